//! What the target lacks at the beginning, by what stands there already.
//!
//! | at the target | it lacks |
//! | --- | --- |
//! | zeroes | what is not a hole here |
//! | the copy that the migration named in the offer left | what changed since |
//! | a copy of some time | anything: even a hole has to be sent, as zeroes |
//!
//! The durable record of what is unacknowledged starts out full, so that a restart before the target has said what it has
//! loses nothing; then what is not lacking is taken out of it.

use flimcd_core::{BlockRange, BlockSet, VolumeLayout};
use flimcd_wire::Base;

use super::{SourceAction, SourceConfig, SourceMachine};

/// Where each volume lies.
pub(super) fn places(config: &SourceConfig) -> Vec<BlockRange> {
    let sizes = config.volumes.iter().map(|volume| volume.size);
    match VolumeLayout::new(sizes) {
        Ok(layout) => layout.all_blocks().collect(),
        // The target refuses it.
        Err(_) => vec![config.size.all_blocks()],
    }
}

/// What would be lacking on each kind of base.
#[derive(Debug)]
pub(super) struct Lacking {
    pub(super) data: BlockSet,
    pub(super) changed: Option<BlockSet>,
}

impl Lacking {
    /// The guest writes while the target is being asked.
    pub(super) fn dirtied(&mut self, dirty: &BlockSet) {
        self.data.union_with(dirty);
        if let Some(changed) = &mut self.changed {
            changed.union_with(dirty);
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.data.memory_bytes() + self.changed.as_ref().map_or(0, BlockSet::memory_bytes)
    }
}

impl SourceMachine {
    /// The target has said what stands there. Anything that makes no sense counts as a copy of some time.
    pub(super) fn begin_on(&mut self, lacking: &Lacking, bases: &[Base]) {
        let mut pending = BlockSet::new(self.config.size.blocks());
        for (at, &range) in self.places.iter().enumerate() {
            let set = match (bases.get(at), &lacking.changed) {
                (Some(Base::Zeroes), _) => &lacking.data,
                (Some(Base::Known), Some(changed)) => changed,
                _ => {
                    pending.insert_range(range);
                    continue;
                }
            };
            for run in set.runs_in(range) {
                pending.insert_range(run);
            }
        }
        let mut clean = BlockSet::full(pending.capacity());
        clean.subtract(&pending);
        if !clean.is_empty() {
            self.actions
                .push_back(SourceAction::MarkClean(clean.runs().collect()));
        }
        self.progress.blocks_total = pending.count();
        self.pending = pending;
    }
}
