//! Asking the target, before content is sent, which blocks it has anywhere.
//!
//! ```text
//!  Reading ──► zero, or the same as the seed: Queued at once
//!     │
//!     └─ the rest's fingerprints ─► Probing ── Probed ─► Pack ─► Queued: what the target has goes as `Copy`
//!                                      └── a guest waits for it, or the link breaks: without an answer
//! ```
//! A probe costs 8 bytes a block and a round trip in which nothing waits: as much is being probed as the link will need by the
//! time the answers come, more where most blocks turn out to be there. Where hardly anything does, only one read in
//! [`SAMPLED`] asks, to notice when that changes.

use std::collections::BTreeSet;

use flimcd_core::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockIndex, BlockRange, Seq};
use flimcd_wire::{Class, Message, Probe, Probed, Runs};

use super::{LinkState, SourceAction, SourceMachine, SourcePhase, flights::Stage};
use crate::LinkEstimate;

/// Blocks that may wait for an answer whatever the link is like: 2 MiB.
const WAITING_BLOCKS_MIN: u64 = 512;
/// And at most: 32 MiB of content that the driver keeps meanwhile.
const WAITING_BLOCKS_MAX: u64 = 8192;
/// Answers that are remembered, in blocks; the older half counts less.
const MEMORY_BLOCKS: u64 = 16 * 1024;
/// Answers before anything is concluded from them.
const ENOUGH_BLOCKS: u64 = 2048;
/// One block in so many has to be there for asking to pay.
const WORTH: u64 = 64;
/// One read in so many asks while it does not pay.
const SAMPLED: u64 = 16;
/// Chunks that are remembered because the target did not have what it said.
const DOUBTED_MAX: usize = 4096;

/// What answers have been like.
#[derive(Debug, Default)]
pub(super) struct Probing {
    asked: u64,
    had: u64,
    /// Reads since the last one that asked although it does not pay.
    skipped: u64,
    /// Chunks of messages of which the target did not have something: sent one by one, so that what it does have counts.
    alone: BTreeSet<u64>,
    /// Chunks of which it did not have something even so: not asked about again.
    doubted: BTreeSet<u64>,
}

impl Probing {
    /// Whether a read of `range` should ask.
    pub(super) fn wants(&mut self, range: BlockRange) -> bool {
        let chunk = range.start / BLOCKS_PER_CHUNK;
        let end = range.end.div_ceil(BLOCKS_PER_CHUNK);
        if self.doubted.range(chunk..end).next().is_some() {
            return false;
        }
        if self.asked < ENOUGH_BLOCKS || self.had * WORTH >= self.asked {
            return true;
        }
        self.skipped += 1;
        self.skipped.is_multiple_of(SAMPLED)
    }

    /// Blocks that may wait for an answer at once.
    pub(super) fn window(&self, link: LinkEstimate) -> u64 {
        let rtt = link.rtt.unwrap_or_default().as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an estimate, bounded below"
        )]
        let on_the_way = (2.0 * rtt * link.rate_or_default() / BLOCK_SIZE as f64) as u64;
        // What is there takes hardly any of the link.
        let lacking = (self.asked - self.had).max(self.asked / 16).max(1);
        let window = (WAITING_BLOCKS_MIN + on_the_way).saturating_mul(self.asked.max(1)) / lacking;
        window.clamp(WAITING_BLOCKS_MIN, WAITING_BLOCKS_MAX)
    }

    fn answered(&mut self, asked: u64, had: u64) {
        self.asked += asked;
        self.had += had.min(asked);
        if self.asked > MEMORY_BLOCKS {
            self.asked /= 2;
            self.had /= 2;
        }
    }

    /// The target did not have all of a message that covered this. True when it was of one chunk, which is to be sent in full.
    pub(super) fn lacked(&mut self, range: BlockRange) -> bool {
        let chunks = range.start / BLOCKS_PER_CHUNK..range.end.div_ceil(BLOCKS_PER_CHUNK);
        let is_one = chunks.end - chunks.start <= 1;
        let set = if is_one {
            &mut self.doubted
        } else {
            &mut self.alone
        };
        set.extend(chunks);
        while set.len() > DOUBTED_MAX {
            set.pop_first();
        }
        is_one
    }

    /// Whether the chunk has to go in a message of its own.
    pub(super) fn is_alone(&self, range: BlockRange) -> bool {
        self.alone.contains(&(range.start / BLOCKS_PER_CHUNK))
    }
}

impl SourceMachine {
    /// Content was read, and some of it could be at the target.
    pub(super) fn handle_probe(&mut self, probe: Probe) {
        let seq = probe.seq;
        let Some(flight) = self.flights.get_mut(seq) else {
            return self.actions.push_back(SourceAction::Forget(seq));
        };
        let is_urgent = flight.class == Class::Fault;
        self.flights
            .set_stage(seq, Stage::Probing(probe.blocks.blocks()));
        if is_urgent {
            self.pack(seq, Runs::default());
        } else if self.link == LinkState::Accepted && self.phase != SourcePhase::Returning {
            self.control.push_back(Message::Probe(probe));
        } else {
            self.flights.abandon(seq, &mut self.pending);
        }
    }

    /// What the target has of it.
    pub(super) fn handle_probed(&mut self, probed: Probed) {
        let Some(flight) = self.flights.get_mut(probed.seq) else {
            return;
        };
        let Stage::Probing(asked) = flight.stage else {
            return;
        };
        let had = probed.had.blocks();
        if had > asked {
            return self.protocol_error("it has more than it was asked about");
        }
        self.probing.answered(asked, had);
        self.progress.content.count_probed(&probed);
        self.pack(probed.seq, probed.had);
    }

    pub(super) fn pack(&mut self, seq: Seq, had: Runs) {
        self.flights.set_stage(seq, Stage::Reading);
        self.actions.push_back(SourceAction::Pack { seq, had });
    }

    /// The link broke: what waits for an answer is read again once there is a new one.
    pub(super) fn give_probes_up(&mut self) {
        for seq in self.flights.probing() {
            self.flights.abandon(seq, &mut self.pending);
        }
    }

    /// The driver need not keep the content of flights that ended while they waited.
    pub(super) fn forget_ended(&mut self) {
        let ended = self.flights.take_forgotten();
        self.actions
            .extend(ended.into_iter().map(SourceAction::Forget));
    }

    /// As much of the chunk as may go with `range`, because the target probably has all of it.
    pub(super) fn widen(&self, range: BlockRange) -> BlockRange {
        let chunk = BlockIndex(range.start).chunk().blocks();
        let is_known = self.seeding.same(chunk).is_some() && !self.seeding.is_in_doubt();
        if is_known && chunk.end <= self.config.size.blocks() && self.pending.contains_all(chunk) {
            chunk
        } else {
            range
        }
    }
}
