//! Messages with content that have arrived: which are being written, acknowledged, made durable.

use std::collections::BTreeMap;

use flimcd_core::{BLOCK_SIZE, BlockRange, Seq, SeqSet, Time};
use flimcd_wire::Blocks;

use super::{ApplyId, SYNC_BYTES, SYNC_INTERVAL, SyncId};

/// Messages whose blocks are remembered: as many as a source has on its way at the most, if each had one block.
const LATEST_MAX: usize = 32 * 1024;

#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Run of the source machine that the numbers belong to.
    incarnation: Option<u64>,
    /// Numbers that have arrived, from the oldest one on that the source may ask about.
    received: SeqSet,
    /// The blocks of the latest of them, for the switch.
    latest: BTreeMap<Seq, Vec<BlockRange>>,
    /// Numbers that must be dropped if they come.
    stale: SeqSet,
    /// Being written. Kept whole so that writing can be tried again.
    applying: BTreeMap<ApplyId, Blocks>,
    next_apply: u64,
    /// Could not be written; tried again at the next tick.
    retries: Vec<Blocks>,
    /// Written, the source has not been told.
    to_ack: SeqSet,
    /// Written, not durable.
    unsynced: SeqSet,
    unsynced_bytes: u64,
    unsynced_since: Option<Time>,
    syncing: Option<(SyncId, SeqSet)>,
    next_sync: u64,
    /// Durable, all of this incarnation.
    durable: SeqSet,
}

impl Arrivals {
    /// Whether content of an earlier run of the source is still being written. What the new run sends
    /// could be overtaken by it, so nothing may be accepted before. Gives up what waits for another
    /// try: the source will send it again.
    pub(super) fn must_wait_for(&mut self, incarnation: u64) -> bool {
        if self.incarnation == Some(incarnation) {
            return false;
        }
        self.retries.clear();
        !self.applying.is_empty()
    }

    /// The source has said who it is, and below which number everything is settled. True when it is
    /// another run than before.
    pub(super) fn open(&mut self, incarnation: u64, oldest_unacked: Seq) -> bool {
        if self.incarnation != Some(incarnation) {
            let (next_apply, next_sync) = (self.next_apply, self.next_sync);
            let incarnation = Some(incarnation);
            *self = Self {
                incarnation,
                next_apply,
                next_sync,
                ..Self::default()
            };
            return true;
        }
        self.received.remove_below(oldest_unacked);
        // Acknowledgements may have been lost with the link. All that is settled is said again.
        self.to_ack = self.received.clone();
        let open: Vec<_> = self
            .applying
            .values()
            .chain(&self.retries)
            .map(|b| b.seq)
            .collect();
        for seq in open {
            self.not_yet(seq);
        }
        false
    }

    /// This has arrived and is not written: not to be acknowledged.
    pub(super) fn not_yet(&mut self, seq: Seq) {
        let runs = self.to_ack.runs();
        let around =
            |(start, end): (u64, u64)| [(start, end.min(seq.0)), (start.max(seq.0 + 1), end)];
        self.to_ack = runs.flat_map(around).collect();
    }

    pub(super) fn received(&self) -> &SeqSet {
        &self.received
    }

    /// What the source may count on, to be said again after a link-up.
    pub(super) fn durable(&self) -> &SeqSet {
        &self.durable
    }

    pub(super) fn drop_stale(&mut self, seqs: &SeqSet) {
        self.stale.union_with(seqs);
    }

    /// A message has come. False when it must be dropped.
    pub(super) fn receive(&mut self, blocks: &Blocks) -> bool {
        let seq = blocks.seq;
        if self.stale.contains(seq) || !self.received.insert(seq) {
            return false;
        }
        let mut runs: Vec<BlockRange> = Vec::with_capacity(1);
        for range in blocks.ranges() {
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        self.latest.insert(seq, runs);
        if self.latest.len() > LATEST_MAX {
            self.latest.pop_first();
        }
        true
    }

    /// Calls back with the blocks of those of `seqs` that have arrived. Very old ones may be left out.
    pub(super) fn arrived_of(&self, seqs: &SeqSet, mut arrived: impl FnMut(BlockRange)) {
        for (start, end) in seqs.runs() {
            for run in self
                .latest
                .range(Seq(start)..Seq(end))
                .flat_map(|(_, runs)| runs)
            {
                arrived(*run);
            }
        }
    }

    /// Begins to write.
    pub(super) fn begin(&mut self, blocks: Blocks) -> ApplyId {
        let id = ApplyId(self.next_apply);
        self.next_apply += 1;
        self.applying.insert(id, blocks);
        id
    }

    /// Nothing is being written, nor waits for another try.
    pub(super) fn is_idle(&self) -> bool {
        self.applying.is_empty() && self.retries.is_empty()
    }

    /// Written. Returns the blocks.
    pub(super) fn applied(&mut self, now: Time, id: ApplyId) -> Vec<BlockRange> {
        let Some(blocks) = self.applying.remove(&id) else {
            return Vec::new();
        };
        self.unsynced_bytes += blocks.ranges().map(BlockRange::len).sum::<u64>() * BLOCK_SIZE;
        self.unsynced_since.get_or_insert(now);
        self.to_ack.insert(blocks.seq);
        self.unsynced.insert(blocks.seq);
        blocks.ranges().collect()
    }

    pub(super) fn forget(&mut self, id: ApplyId) {
        self.applying.remove(&id);
    }

    /// What a message says cannot be made here: it counts as not arrived. Returns its number and its blocks.
    pub(super) fn lacking(&mut self, id: ApplyId) -> Option<(Seq, Vec<BlockRange>)> {
        let blocks = self.applying.remove(&id)?;
        // Neither an Accept nor the switch may count on it any more.
        self.received.remove(blocks.seq);
        self.latest.remove(&blocks.seq);
        Some((blocks.seq, blocks.ranges().collect()))
    }

    pub(super) fn retry_later(&mut self, id: ApplyId) {
        self.retries.extend(self.applying.remove(&id));
    }

    /// What could not be written, for another try.
    pub(super) fn take_retries(&mut self) -> Vec<Blocks> {
        std::mem::take(&mut self.retries)
    }

    /// Numbers to acknowledge now.
    pub(super) fn take_acks(&mut self) -> Option<SeqSet> {
        (!self.to_ack.is_empty()).then(|| std::mem::take(&mut self.to_ack))
    }

    /// When the next sync is due, unless one is under way.
    pub(super) fn sync_due(&self) -> Option<Time> {
        let since = self.unsynced_since?;
        self.syncing.is_none().then(|| since + SYNC_INTERVAL)
    }

    /// Begins a sync if one is due.
    pub(super) fn begin_sync(&mut self, now: Time) -> Option<SyncId> {
        let due = self.sync_due()?;
        if now < due && self.unsynced_bytes < SYNC_BYTES {
            return None;
        }
        let id = SyncId(self.next_sync);
        self.next_sync += 1;
        self.unsynced_since = None;
        self.unsynced_bytes = 0;
        self.syncing = Some((id, std::mem::take(&mut self.unsynced)));
        Some(id)
    }

    /// A sync ended. Returns what is durable now.
    pub(super) fn synced(&mut self, now: Time, id: SyncId, done: bool) -> Option<SeqSet> {
        let (_, seqs) = self.syncing.take_if(|(syncing, _)| *syncing == id)?;
        if done {
            self.durable.union_with(&seqs);
            return Some(seqs);
        }
        self.unsynced.union_with(&seqs);
        self.unsynced_since.get_or_insert(now);
        None
    }
}
