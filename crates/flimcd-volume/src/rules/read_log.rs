//! What the guest reads, for whoever orders a migration by it.

use flimcd_core::BlockRange;

use super::{GuestOp, Rules, ops::Op};

/// Reads that are kept between two looks. A driver looks every few milliseconds, so that more come only with more than
/// a hundred thousand a second; of those the first say as much.
pub const READS_KEPT_MAX: usize = 1024;

/// The reads since the last look, in order of time.
#[derive(Debug, Default)]
pub(super) struct ReadLog {
    is_on: bool,
    reads: Vec<BlockRange>,
    dropped: u64,
    /// The log was empty and is not any more, and nobody was told.
    news: bool,
}

impl ReadLog {
    /// Takes note of a request if it is a read and anybody wants to know.
    #[inline]
    pub(super) fn note(&mut self, op: &Op) {
        if self.is_on && op.kind == GuestOp::Read {
            self.push(op.blocks_touched());
        }
    }

    fn push(&mut self, blocks: BlockRange) {
        if blocks.is_empty() {
            return;
        }
        if self.reads.len() >= READS_KEPT_MAX {
            self.dropped += 1;
            return;
        }
        self.news |= self.reads.is_empty();
        self.reads.push(blocks);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.reads.capacity() * size_of::<BlockRange>()
    }
}

impl Rules {
    /// Whether guest reads are kept for [`take_reads`](Self::take_reads). Off at first; switched off, it forgets what it has.
    pub fn set_read_log(&mut self, is_on: bool) {
        if self.reads.is_on != is_on {
            self.reads = ReadLog {
                is_on,
                dropped: self.reads.dropped,
                ..ReadLog::default()
            };
        }
    }

    /// Appends the blocks of the guest's reads since the last call, in order of time: each once, when it is admitted or has to
    /// wait for blocks, in `Owner` and in `PostCopy`. A read that was parked because the volume was frozen, or had not arrived,
    /// counts from the moment the guest runs; one that was put to the source before the switch does not count. At most
    /// [`READS_KEPT_MAX`]; what comes beyond is counted in [`reads_dropped`](Self::reads_dropped).
    pub fn take_reads(&mut self, out: &mut Vec<BlockRange>) {
        out.append(&mut self.reads.reads);
        self.reads.news = false;
    }

    /// Reads that found the log full, since the rules were made.
    #[must_use]
    pub fn reads_dropped(&self) -> u64 {
        self.reads.dropped
    }

    /// Whether the log was empty and is not any more: true once, until [`take_reads`](Self::take_reads).
    pub fn poll_read_news(&mut self) -> bool {
        std::mem::take(&mut self.reads.news)
    }

    /// The guest runs: takes note of the reads that were parked for it, in order of arrival.
    pub(super) fn note_parked_reads(&mut self) {
        for ticket in &self.parked {
            let op = self.ops.op(*ticket);
            if !op.missed {
                self.reads.note(op);
            }
        }
    }
}
