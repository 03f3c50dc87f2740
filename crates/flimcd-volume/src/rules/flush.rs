//! The order of a flush's steps, and what presence is on its way to being durable.

use std::sync::Arc;

use flimcd_core::BlockSet;

/// What to do next for a flush.
#[derive(Debug, PartialEq, Eq)]
pub enum FlushStep<'a> {
    /// Make the data durable.
    SyncData,
    /// Record that these blocks are present. Several runs of this step may come, and recording a block twice is fine.
    WritePresence(&'a BlockSet),
    /// Make what was recorded durable.
    SyncPresence,
    /// Acknowledge, after [`end_flush`](super::Rules::end_flush).
    Done,
}

/// A flush under way. Run [`next`](Self::next)'s steps one after the other, each only after the one before
/// succeeded, until [`FlushStep::Done`] or the first failure; then [`end_flush`](super::Rules::end_flush).
#[derive(Debug)]
#[must_use]
pub struct FlushPlan {
    id: u64,
    /// The presence to write: what this flush took, and what others took that still run.
    sets: Vec<Arc<BlockSet>>,
    stage: Stage,
    early_ack: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Data,
    Presence(usize),
    Sync,
    Done,
}

impl FlushPlan {
    /// The next step.
    #[expect(
        clippy::should_implement_trait,
        reason = "the steps borrow the plan, which an iterator cannot say"
    )]
    pub fn next(&mut self) -> FlushStep<'_> {
        match self.stage {
            Stage::Data => {
                self.stage = if self.sets.is_empty() || self.early_ack {
                    Stage::Done
                } else {
                    Stage::Presence(0)
                };
                FlushStep::SyncData
            }
            Stage::Presence(at) => {
                self.stage = if at + 1 == self.sets.len() {
                    Stage::Sync
                } else {
                    Stage::Presence(at + 1)
                };
                FlushStep::WritePresence(&self.sets[at])
            }
            Stage::Sync => {
                self.stage = Stage::Done;
                FlushStep::SyncPresence
            }
            Stage::Done => FlushStep::Done,
        }
    }

    /// Whether nothing but the data has to be made durable.
    #[must_use]
    pub fn is_data_only(&self) -> bool {
        self.sets.is_empty() || self.early_ack
    }
}

/// The flushes that run.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// What each of them took.
    running: Vec<(u64, Arc<BlockSet>)>,
    last_id: u64,
}

impl Flushes {
    pub(super) fn begin(&mut self, taken: Option<BlockSet>, early_ack: bool) -> FlushPlan {
        self.last_id += 1;
        if let Some(taken) = taken {
            self.running.push((self.last_id, Arc::new(taken)));
        }
        FlushPlan {
            id: self.last_id,
            sets: self.running.iter().map(|(_, set)| set.clone()).collect(),
            stage: Stage::Data,
            early_ack,
        }
    }

    /// Ends a flush and returns what is not durable because of that.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "an ended plan is of no more use"
    )]
    pub(super) fn end(&mut self, plan: FlushPlan, ok: bool) -> Option<Arc<BlockSet>> {
        assert!(
            !ok || plan.stage == Stage::Done,
            "a flush ended well before its last step"
        );
        let at = self.running.iter().position(|(id, _)| *id == plan.id)?;
        let (_, taken) = self.running.swap_remove(at);
        (!ok || plan.early_ack).then_some(taken)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.running.iter().map(|(_, set)| set.memory_bytes()).sum()
    }
}
