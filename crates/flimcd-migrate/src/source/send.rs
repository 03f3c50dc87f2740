//! Choosing, reading and sending content.

use std::collections::VecDeque;

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, Seq, SeqSet, Time, limits};
use flimcd_wire::{Blocks, Class, ErrorCode, Message, Runs, WireError};

use super::{
    Cancel, LinkState, RETRY, SourceAction, SourceMachine, SourcePhase,
    flights::{Stage, merge},
    seeding::Verdict,
};
use crate::{
    DiskError,
    policy::{Policy, View, Writes},
};

/// Blocks that are read ahead of the link: 2 MiB. Enough to keep a disk busy, and little enough for what
/// is sent next to be decided late.
const PREPARED_BLOCKS_MAX: u64 = 512;
/// Content that may be on its way without acknowledgement: 64 MiB. The link does the flow control; this only bounds what
/// a broken one loses and what both sides remember. A 10 Gbit/s link of 50 ms needs as much.
const SENT_BLOCKS_MAX: u64 = 16 * 1024;
/// Weight of a new block in the average cost of a block: the last 64 MiB count. Images have long stretches of zeroes, which
/// say little about what is still to come.
const COST_WEIGHT: f64 = 1.0 / 16_384.0;

impl SourceMachine {
    /// Begins as many reads as are worth it.
    pub(super) fn schedule(&mut self, now: Time) {
        let may_read = self.read_retry.is_none_or(|at| at <= now);
        let waiting_max = self.probing.window(self.estimate);
        while may_read
            && self.link == LinkState::Accepted
            && !self.seeding.holds()
            && self.flights.prepared_blocks() < PREPARED_BLOCKS_MAX
            && self.flights.probing_blocks() < waiting_max
            && self.flights.sent_blocks() < SENT_BLOCKS_MAX
        {
            if self.phase == SourcePhase::PostCopy
                && let Some(range) = self.ask_policy(now, |policy, view| policy.next_prefetch(view))
            {
                self.start_read(range, Class::Prefetch);
                continue;
            }
            let Some(range) = self.choose(now) else { break };
            self.begin_run(now, range);
        }
    }

    /// Begins to read `range`, and what the policy chooses next while that follows without a gap.
    fn begin_run(&mut self, now: Time, mut range: BlockRange) {
        let max = self.seeding.run_chunks() * BLOCKS_PER_CHUNK;
        self.pending.remove_range(range);
        while range.len() < max
            && !self.probing.is_alone(range)
            && self.phase != SourcePhase::PostCopy
        {
            let Some(next) = self.choose(now) else { break };
            self.pending.remove_range(next);
            let follows = next.start == range.end
                && !self.probing.is_alone(next)
                && !self.places.iter().any(|place| place.start == next.start);
            if follows && range.len() + next.len() <= max {
                range.end = next.end;
            } else {
                self.start_read(range, Class::Bulk);
                range = next;
            }
        }
        self.start_read(range, Class::Bulk);
    }

    fn choose(&mut self, now: Time) -> Option<BlockRange> {
        if (self.sealing.as_ref()).is_some_and(super::sealing::Sealing::is_closing) {
            return None;
        }
        let phase = self.phase;
        self.ask_policy(now, |policy, view| match phase {
            SourcePhase::PreCopy | SourcePhase::Draining => policy.next_precopy(view),
            SourcePhase::PostCopy => policy.next_push(view),
            _ => None,
        })
    }

    fn ask_policy(
        &mut self,
        now: Time,
        ask: impl FnOnce(&mut dyn Policy, &View<'_>) -> Option<BlockRange>,
    ) -> Option<BlockRange> {
        let range = self.with_policy(now, ask)?;
        assert!(
            self.pending.contains_all(range),
            "a policy may only choose pending blocks"
        );
        Some(range)
    }

    fn start_read(&mut self, range: BlockRange, class: Class) {
        self.pending.remove_range(range);
        let seq = self.flights.start(range, class);
        self.actions.push_back(SourceAction::Read {
            seq,
            range,
            compress: self.policy.compress(),
            same: self.seeding.same_in(range),
            probe: class == Class::Bulk && self.policy.uses_library() && self.probing.wants(range),
        });
    }

    /// Content was read.
    pub(super) fn queue(&mut self, blocks: Blocks) {
        if self.phase == SourcePhase::Returning || self.phase.is_final() {
            return;
        }
        let Some(flight) = self.flights.get_mut(blocks.seq) else {
            return;
        };
        let class = flight.class;
        self.flights.set_stage(blocks.seq, Stage::Queued);
        self.seeding.was_read(&blocks.entries);
        self.content_queue(class).push_back(blocks);
    }

    fn content_queue(&mut self, class: Class) -> &mut VecDeque<Blocks> {
        match class {
            Class::Fault => &mut self.urgent,
            Class::Prefetch => &mut self.prefetched,
            Class::Control | Class::Ram | Class::Bulk => &mut self.bulk,
        }
    }

    pub(super) fn handle_read_error(&mut self, now: Time, seq: Seq, error: &DiskError) {
        self.flights.abandon(seq, &mut self.pending);
        if self.phase == SourcePhase::PostCopy || self.phase == SourcePhase::Switching {
            // Nobody else has this content: whoever asked waits, and it is tried again.
            self.note(format!("cannot read the image, trying again: {error}"));
            self.read_retry = Some(now + RETRY);
        } else {
            let text = format!("cannot read the image at the source: {error}");
            self.end_early(Cancel::Error(WireError::new(ErrorCode::DISK, text)));
        }
    }

    /// The next message with content for the link.
    pub(super) fn next_content(&mut self, class: Class) -> Option<Blocks> {
        if self.phase.is_final() {
            return None;
        }
        loop {
            let blocks = self.content_queue(class).pop_front()?;
            if !self.flights.take_off(blocks.seq) {
                self.flights.abandon(blocks.seq, &mut self.pending);
                continue;
            }
            let count: u64 = blocks.ranges().map(BlockRange::len).sum();
            let bytes = (blocks.payload.len() + 24 + 8 * blocks.entries.len()) as u64;
            self.progress.blocks_sent += count;
            for entry in &blocks.entries {
                self.progress.content.count(*entry);
            }
            self.progress.content_bytes_sent += bytes;
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let weight = (count as f64 * COST_WEIGHT).min(1.0);
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let cost = bytes as f64 / count as f64;
            self.progress.bytes_per_block += weight * (cost - self.progress.bytes_per_block);
            return Some(blocks);
        }
    }

    pub(super) fn handle_durable(&mut self, seqs: &SeqSet) {
        let clean = self.flights.durable(seqs, &self.pending);
        if !clean.is_empty() {
            self.actions.push_back(SourceAction::MarkClean(clean));
        }
    }

    /// A guest at the target waits for these blocks.
    pub(super) fn handle_demand(&mut self, now: Time, runs: impl Iterator<Item = BlockRange>) {
        if !matches!(self.phase, SourcePhase::Switching | SourcePhase::PostCopy) {
            return self.protocol_error("a demand before the switch");
        }
        let mut blocks_left = limits::MAX_BLOCKS_PER_MESSAGE * 4;
        for run in runs {
            if run.end > self.config.size.blocks() || run.len() > blocks_left {
                return self.protocol_error("a demand for too much, or beyond the volume");
            }
            blocks_left -= run.len();
            self.policy.on_demand(now, run);
            let (waiting, rest) = self.flights.split_demand(run);
            for seq in waiting {
                self.hurry(seq);
            }
            for range in rest {
                for piece in by_chunk(range) {
                    let piece = self.widen(piece);
                    self.start_read(piece, Class::Fault);
                }
            }
        }
    }

    /// The target does not hold what a message says: its blocks have to be sent in full.
    pub(super) fn handle_lacking(&mut self, seq: Seq, is_waited_for: bool) {
        let sent = self
            .flights
            .get_mut(seq)
            .filter(|flight| flight.stage == Stage::Sent)
            .map(|flight| flight.range);
        let Some(range) = sent else { return };
        let is_one = self.probing.lacked(range);
        match self.seeding.lacks(range, is_one) {
            Verdict::First => self.note(
                "the image in the target's library does not hold what its table says; what differs is sent",
            ),
            Verdict::Again => {}
            Verdict::TooMany => {
                self.note("the image in the target's library is another one now; everything is sent");
            }
        }
        self.flights.abandon(seq, &mut self.pending);
        // A demand for these blocks may have come while they seemed to be on their way.
        let is_urgent = match self.phase {
            SourcePhase::PostCopy => is_waited_for || !self.seeding.is_in_doubt(),
            SourcePhase::Switching => is_waited_for,
            _ => false,
        };
        if is_urgent {
            self.seeding.clear(range);
            for piece in by_chunk(range) {
                self.start_read(piece, Class::Fault);
            }
        }
    }

    /// Moves a flight that the link has not taken to the front.
    fn hurry(&mut self, seq: Seq) {
        if let Some(flight) = self.flights.get_mut(seq) {
            flight.class = Class::Fault;
            if matches!(flight.stage, Stage::Probing(_)) {
                self.pack(seq, Runs::default());
            }
        }
        for queue in [&mut self.prefetched, &mut self.bulk] {
            if let Some(at) = queue.iter().position(|blocks| blocks.seq == seq)
                && let Some(blocks) = queue.remove(at)
            {
                self.urgent.push_back(blocks);
            }
        }
    }

    /// What the guest at the target has read.
    pub(super) fn handle_touched(&mut self, now: Time, reads: &[BlockRange]) {
        if self.phase != SourcePhase::PostCopy {
            return;
        }
        let size = self.config.size.all_blocks();
        for run in reads.iter().map(|run| run.intersect(size)) {
            self.heat.read(run, now);
            self.policy.on_read(now, run);
        }
    }

    /// The target has the content of these messages.
    pub(super) fn handle_ack(&mut self, seqs: &SeqSet) {
        let mut arrived = Vec::new();
        self.flights
            .acknowledged(seqs, &mut self.pending, |range| arrived.push(range));
        // What was written on its way has to go again.
        for run in arrived
            .iter()
            .flat_map(|range| self.pending.runs_in(*range))
        {
            self.policy.on_outdated(run);
        }
        if self.phase == SourcePhase::PreCopy && self.policy.writes() == Writes::Mirrored {
            // What was written again while it was on its way is still to come.
            let newest = (arrived.into_iter().flat_map(BlockRange::iter))
                .filter(|&block| !self.pending.contains(block))
                .map(BlockRange::single);
            let newest = merge(newest.collect());
            self.actions.push_back(SourceAction::Acked(newest));
        }
    }

    /// Tells the driver what becomes of the guest's writes, when that has changed.
    pub(super) fn consider_writes(&mut self, now: Time) {
        if self.phase != SourcePhase::PreCopy || self.policy.writes() != Writes::Limited {
            return;
        }
        let limit = self.with_policy(now, |policy, view| policy.write_limit(view));
        if limit != self.write_limit {
            self.write_limit = limit;
            self.actions.push_back(SourceAction::LimitWrites(limit));
        }
    }

    /// The guest's writes do not wait for the migration any more.
    pub(super) fn free_writes(&mut self) {
        match self.policy.writes() {
            Writes::Free => {}
            Writes::Mirrored => self.actions.push_back(SourceAction::Mirror(false)),
            Writes::Limited => self.actions.push_back(SourceAction::LimitWrites(None)),
        }
    }

    /// The guest at the target has overwritten these.
    pub(super) fn handle_unneeded(&mut self, runs: impl Iterator<Item = BlockRange>) {
        if self.phase != SourcePhase::PostCopy {
            return;
        }
        let size = self.config.size.all_blocks();
        let runs: Vec<_> = runs
            .map(|run| run.intersect(size))
            .filter(|r| !r.is_empty())
            .collect();
        for &run in &runs {
            self.pending.remove_range(run);
        }
        if !runs.is_empty() {
            self.actions.push_back(SourceAction::MarkClean(runs));
        }
    }

    /// Queues a message; without a link it is made again from the phase once there is one.
    pub(super) fn control_message(&mut self, message: Message) {
        if self.link == LinkState::Accepted {
            self.control.push_back(message);
        }
    }
}

/// Cuts a run where chunks begin.
fn by_chunk(run: BlockRange) -> impl Iterator<Item = BlockRange> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        let piece = BlockRange::new(at, run.end.min(BlockIndex(at).chunk().blocks().end));
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}
