//! Messages with content that are on their way, and what is known of those that arrived.
//!
//! ```text
//!  start ─► Reading ─► Queued ─► Sent ─► acknowledged: undurable ─► durable
//!            ▲  │          │        └──── lost with the link ──┐
//!       Probing └──────────┴── abandoned (outdated) ───────────┴─► back to the caller as pending
//! ```
//! No block is in two flights at once, so content of a block can never be overtaken by an older one.

use std::collections::BTreeMap;

use flimcd_core::{BlockRange, BlockSet, Seq, SeqSet};
use flimcd_wire::Class;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The driver reads or packs it.
    Reading,
    /// The target is asked which of so many of its blocks it has.
    Probing(u64),
    /// In one of the machine's queues.
    Queued,
    /// Taken by the link.
    Sent,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) range: BlockRange,
    pub(super) stage: Stage,
    /// How urgent it is. [`Class::Fault`]: a guest at the target waits for it.
    pub(super) class: Class,
}

#[derive(Debug)]
pub(super) struct Flights {
    flights: BTreeMap<Seq, Flight>,
    next_seq: u64,
    /// All blocks in flight.
    blocks: BlockSet,
    /// Blocks in flight that were written after they were read, or may have been.
    redirtied: BlockSet,
    /// Blocks of flights that are being read or wait for the link.
    prepared_blocks: u64,
    /// Blocks of flights that wait for the target's answer.
    probing_blocks: u64,
    /// Flights that ended while they waited for it.
    forgotten: Vec<Seq>,
    /// Runs of ended flights that have to go (again).
    returned: Vec<BlockRange>,
    /// Acknowledged, not yet durable at the target.
    undurable: BTreeMap<Seq, BlockRange>,
    /// For every undurable block the flight that brought its newest content.
    newest: BTreeMap<u64, Seq>,
}

impl Flights {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            flights: BTreeMap::new(),
            next_seq: 1,
            blocks: BlockSet::new(blocks),
            redirtied: BlockSet::new(blocks),
            prepared_blocks: 0,
            probing_blocks: 0,
            forgotten: Vec::new(),
            returned: Vec::new(),
            undurable: BTreeMap::new(),
            newest: BTreeMap::new(),
        }
    }

    /// Every block in flight.
    pub(super) fn blocks(&self) -> &BlockSet {
        &self.blocks
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Nothing is in flight, and what arrived is durable.
    pub(super) fn is_settled(&self) -> bool {
        self.flights.is_empty() && self.undurable.is_empty()
    }

    /// Blocks being read or waiting in a queue.
    pub(super) fn prepared_blocks(&self) -> u64 {
        self.prepared_blocks
    }

    /// Blocks that the link has and the target has not acknowledged.
    pub(super) fn sent_blocks(&self) -> u64 {
        self.blocks.count() - self.prepared_blocks - self.probing_blocks
    }

    /// Blocks that wait for the target's answer.
    pub(super) fn probing_blocks(&self) -> u64 {
        self.probing_blocks
    }

    /// Flights that wait for the target's answer.
    pub(super) fn probing(&self) -> Vec<Seq> {
        let waits = |(&seq, flight): (&Seq, &Flight)| {
            matches!(flight.stage, Stage::Probing(_)).then_some(seq)
        };
        self.flights.iter().filter_map(waits).collect()
    }

    /// Flights that ended while they waited for the target's answer, each once.
    pub(super) fn take_forgotten(&mut self) -> Vec<Seq> {
        std::mem::take(&mut self.forgotten)
    }

    /// Runs that were on their way and have to go (again), each once.
    pub(super) fn take_returned(&mut self) -> Vec<BlockRange> {
        std::mem::take(&mut self.returned)
    }

    /// Moves a flight on.
    pub(super) fn set_stage(&mut self, seq: Seq, stage: Stage) {
        let Some(flight) = self.flights.get_mut(&seq) else {
            return;
        };
        let old = std::mem::replace(&mut flight.stage, stage);
        let blocks = flight.range.len();
        if let Some(counter) = self.counter(old) {
            *counter -= blocks;
        }
        if let Some(counter) = self.counter(stage) {
            *counter += blocks;
        }
    }

    fn counter(&mut self, stage: Stage) -> Option<&mut u64> {
        match stage {
            Stage::Reading | Stage::Queued => Some(&mut self.prepared_blocks),
            Stage::Probing(_) => Some(&mut self.probing_blocks),
            Stage::Sent => None,
        }
    }

    pub(super) fn oldest_unacked(&self) -> Seq {
        self.flights
            .keys()
            .next()
            .copied()
            .unwrap_or(Seq(self.next_seq))
    }

    pub(super) fn get_mut(&mut self, seq: Seq) -> Option<&mut Flight> {
        self.flights.get_mut(&seq)
    }

    /// Begins to read `range`, of which nothing may be in flight.
    pub(super) fn start(&mut self, range: BlockRange, class: Class) -> Seq {
        assert!(
            !self.blocks.intersects(range),
            "{range:?} is on its way already"
        );
        let seq = Seq(self.next_seq);
        self.next_seq += 1;
        self.flights.insert(
            seq,
            Flight {
                range,
                stage: Stage::Reading,
                class,
            },
        );
        self.blocks.insert_range(range);
        self.prepared_blocks += range.len();
        seq
    }

    /// The link takes it. False when every block has been written since: not worth sending.
    pub(super) fn take_off(&mut self, seq: Seq) -> bool {
        let Some(flight) = self.flights.get_mut(&seq) else {
            return false;
        };
        if flight.class != Class::Fault && self.redirtied.contains_all(flight.range) {
            return false;
        }
        self.set_stage(seq, Stage::Sent);
        true
    }

    /// Ends a flight; what of it has to be sent (again) goes to `pending`.
    fn end(&mut self, seq: Seq, arrived: bool, pending: &mut BlockSet) -> Option<Flight> {
        let flight = self.flights.remove(&seq)?;
        if let Some(counter) = self.counter(flight.stage) {
            *counter -= flight.range.len();
        }
        if matches!(flight.stage, Stage::Probing(_)) {
            self.forgotten.push(seq);
        }
        self.blocks.remove_range(flight.range);
        if arrived {
            let again: Vec<_> = self.redirtied.runs_in(flight.range).collect();
            for run in again {
                pending.insert_range(run);
                self.returned.push(run);
            }
        } else {
            pending.insert_range(flight.range);
            self.returned.push(flight.range);
        }
        self.redirtied.remove_range(flight.range);
        Some(flight)
    }

    /// Gives a flight up before it was sent.
    pub(super) fn abandon(&mut self, seq: Seq, pending: &mut BlockSet) {
        self.end(seq, false, pending);
    }

    /// Blocks got dirty: those in flight are remembered here, the others go to `pending`.
    pub(super) fn dirtied(&mut self, dirty: &BlockSet, pending: &mut BlockSet) {
        for run in dirty.runs() {
            pending.insert_range(run);
        }
        if self.blocks.is_empty() {
            return;
        }
        for run in dirty.runs() {
            let in_flight: Vec<_> = self.blocks.runs_in(run).collect();
            for part in in_flight {
                pending.remove_range(part);
                self.redirtied.insert_range(part);
            }
        }
    }

    fn known(&self, seqs: &SeqSet) -> Vec<Seq> {
        let in_run = |(start, end)| {
            self.flights
                .range(Seq(start)..Seq(end))
                .map(|(&seq, _)| seq)
        };
        seqs.runs().flat_map(in_run).collect()
    }

    /// The target has these, of which it says the blocks. Numbers that are not in flight are ignored.
    pub(super) fn acknowledged(
        &mut self,
        seqs: &SeqSet,
        pending: &mut BlockSet,
        mut arrived: impl FnMut(BlockRange),
    ) {
        for seq in self.known(seqs) {
            // What was never sent cannot have arrived, whatever the peer says.
            if self.flights[&seq].stage != Stage::Sent {
                continue;
            }
            let Some(flight) = self.end(seq, true, pending) else {
                continue;
            };
            arrived(flight.range);
            self.undurable.insert(seq, flight.range);
            for block in flight.range.iter() {
                self.newest.insert(block.0, seq);
            }
        }
    }

    /// The target has these on its disk. Says which blocks need nothing more: their newest content is
    /// among these, none is on its way, and they are not in `pending`.
    pub(super) fn durable(&mut self, seqs: &SeqSet, pending: &BlockSet) -> Vec<BlockRange> {
        let mut clean = Vec::new();
        for (start, end) in seqs.runs() {
            let done: Vec<_> = self
                .undurable
                .range(Seq(start)..Seq(end))
                .map(|(&s, &r)| (s, r))
                .collect();
            for (seq, range) in done {
                self.undurable.remove(&seq);
                for block in range.iter() {
                    if self.newest.get(&block.0) == Some(&seq) {
                        self.newest.remove(&block.0);
                        if !self.blocks.contains(block) && !pending.contains(block) {
                            clean.push(BlockRange::single(block));
                        }
                    }
                }
            }
        }
        merge(clean)
    }

    /// The link broke, and the target says what it has: all else that was sent is lost.
    pub(super) fn lost_except(&mut self, received: &SeqSet, pending: &mut BlockSet) {
        let lost: Vec<_> = self
            .flights
            .iter()
            .filter(|(seq, flight)| flight.stage == Stage::Sent && !received.contains(**seq))
            .map(|(&seq, _)| seq)
            .collect();
        for seq in lost {
            self.end(seq, false, pending);
        }
    }

    /// The target has been restarted: what it did not have on its disk may be gone.
    pub(super) fn lost_undurable(&mut self, pending: &mut BlockSet) {
        self.lost_except(&SeqSet::new(), pending);
        for range in std::mem::take(&mut self.undurable).into_values() {
            for block in range.iter().filter(|&block| !self.blocks.contains(block)) {
                pending.insert(block);
            }
        }
        self.newest.clear();
    }

    /// The guest has stopped: flights with outdated content end here. Returns the numbers of those
    /// that the link has, for the target to drop.
    pub(super) fn retire_outdated(&mut self, pending: &mut BlockSet) -> SeqSet {
        let outdated: Vec<_> = self
            .flights
            .iter()
            .filter(|(_, flight)| self.redirtied.intersects(flight.range))
            .map(|(&seq, flight)| (seq, flight.stage))
            .collect();
        let mut stale = SeqSet::new();
        for (seq, stage) in outdated {
            self.end(seq, false, pending);
            if stage == Stage::Sent {
                stale.insert(seq);
            }
        }
        assert!(self.redirtied.is_empty(), "only blocks in flight are in it");
        stale
    }

    /// All numbers in flight.
    pub(super) fn numbers(&self) -> SeqSet {
        self.flights.keys().map(|seq| (seq.0, seq.0 + 1)).collect()
    }

    /// Flights of `range`'s blocks that can still be made urgent, and the blocks in no flight.
    pub(super) fn split_demand(&self, range: BlockRange) -> (Vec<Seq>, Vec<BlockRange>) {
        let mut rest = BlockSet::new(self.blocks.capacity());
        rest.insert_range(range);
        if self.blocks.intersects(range) {
            rest.subtract(&self.blocks);
        }
        let waiting = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.range.overlaps(range) && flight.stage != Stage::Sent)
            .map(|(&seq, _)| seq)
            .collect();
        (waiting, rest.runs().collect())
    }
}

/// Joins neighbouring runs.
pub(super) fn merge(mut runs: Vec<BlockRange>) -> Vec<BlockRange> {
    runs.sort_unstable();
    runs.dedup_by(|next, run| {
        let touches = next.start <= run.end;
        if touches {
            run.end = run.end.max(next.end);
        }
        touches
    });
    runs
}

#[cfg(test)]
mod tests;
