//! A trace as a source of requests.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use flimcd_core::BLOCK_SIZE;
use serde::{Deserialize, Serialize};

use super::{Fold, Trace, TraceRecord};
use crate::load::{DiskOp, PlannedOp, RequestSource};

/// How to replay a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplayOptions {
    /// How many times faster than recorded; 1.0 is as recorded.
    pub speed: f64,
    /// Start again at the end.
    pub is_repeating: bool,
    /// A flush after so many writes, because traces record none; 0 for none.
    pub flush_every_writes: u32,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self {
            speed: 1.0,
            is_repeating: true,
            flush_every_writes: 256,
        }
    }
}

/// Replays a trace on a disk of any size.
///
/// Requests keep their recorded order and their times divided by the speed. A disk that is too
/// slow makes them late, it never makes them fewer. Sectors are the unit, so the load's baseline
/// must have a granule of [`super::SECTOR_BYTES`].
#[derive(Clone, Debug)]
pub struct Replay {
    records: Arc<Vec<TraceRecord>>,
    options: ReplayOptions,
    fold: Fold,
    next: usize,
    /// Recorded time of all rounds before this one.
    earlier: Duration,
    /// Parts of a request that had to be cut, and flushes.
    queued: VecDeque<PlannedOp>,
    writes_since_flush: u32,
}

impl Replay {
    /// Replays `trace` on a disk of `size` bytes.
    #[must_use]
    pub fn new(trace: Trace, size: u64, options: ReplayOptions) -> Self {
        let fold = Fold::new(&trace.records, size);
        Self {
            records: Arc::new(trace.records),
            options,
            fold,
            next: 0,
            earlier: Duration::ZERO,
            queued: VecDeque::new(),
            writes_since_flush: 0,
        }
    }

    /// How addresses are fitted to the disk.
    #[must_use]
    pub const fn fold(&self) -> &Fold {
        &self.fold
    }

    /// Time until the last request is due, once.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.records
            .last()
            .map_or(Duration::ZERO, |record| self.scaled(record.at))
    }

    fn scaled(&self, recorded: Duration) -> Duration {
        let seconds = recorded.as_secs_f64() / self.options.speed.max(1e-6);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn next_record(&mut self) -> Option<TraceRecord> {
        if self.next == self.records.len() {
            let last = self.records.last().filter(|_| self.options.is_repeating)?;
            // As long after the last as requests are apart on average, at least a microsecond.
            let count = u32::try_from(self.records.len()).unwrap_or(u32::MAX);
            self.earlier += last.at + (last.at / count).max(Duration::from_micros(1));
            self.next = 0;
        }
        let record = self.records.get(self.next)?.clone();
        self.next += 1;
        Some(TraceRecord {
            at: self.earlier + record.at,
            ..record
        })
    }
}

impl RequestSource for Replay {
    fn next_op(&mut self) -> Option<PlannedOp> {
        if let Some(op) = self.queued.pop_front() {
            return Some(op);
        }
        let record = self.next_record()?;
        let due = Some(self.scaled(record.at));
        let op = if record.is_write {
            DiskOp::Write
        } else {
            DiskOp::Read
        };
        // Bytes of the record that lie before this part.
        let mut before = 0;
        for (offset, length) in self.fold.map(&record) {
            let content = part_of(record.content.as_ref(), before, length);
            before += length;
            self.queued.push_back(PlannedOp {
                op,
                offset,
                length,
                due,
                content,
            });
        }
        let every = self.options.flush_every_writes;
        if record.is_write && every > 0 {
            self.writes_since_flush += 1;
            if self.writes_since_flush >= every {
                self.writes_since_flush = 0;
                self.queued.push_back(PlannedOp {
                    due,
                    ..PlannedOp::FLUSH
                });
            }
        }
        self.queued.pop_front()
    }
}

/// The contents of a part of a request; none where the part is not of whole blocks.
fn part_of(content: Option<&Arc<[u32]>>, before: u32, length: u32) -> Option<Arc<[u32]>> {
    let content = content?;
    let whole = content.len() as u64 * BLOCK_SIZE;
    if before == 0 && u64::from(length) == whole {
        return Some(Arc::clone(content));
    }
    let (start, length) = (u64::from(before), u64::from(length));
    if !start.is_multiple_of(BLOCK_SIZE) || !length.is_multiple_of(BLOCK_SIZE) {
        return None;
    }
    let index = |bytes: u64| usize::try_from(bytes / BLOCK_SIZE).ok();
    let part = content.get(index(start)?..index(start + length)?)?;
    Some(part.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::vscsi::{parse, tests::raw};

    fn trace() -> Trace {
        parse(&[raw(0x2a, 512, 8, 0), raw(0x28, 4096, 1 << 25, 1_000_000)].concat())
    }

    #[test]
    fn requests_come_at_scaled_times_and_again() {
        let options = ReplayOptions {
            speed: 10.0,
            flush_every_writes: 1,
            ..ReplayOptions::default()
        };
        let mut replay = Replay::new(trace(), 8 << 20, options);
        assert_eq!(replay.duration(), Duration::from_millis(100));
        let ops: Vec<PlannedOp> = (0..6).filter_map(|_| replay.next_op()).collect();
        let kinds: Vec<DiskOp> = ops.iter().map(|op| op.op).collect();
        use DiskOp::{Flush, Read, Write};
        assert_eq!(kinds, [Write, Flush, Read, Write, Flush, Read]);
        let due: Vec<u128> = ops.iter().map(|op| op.due.unwrap().as_millis()).collect();
        assert_eq!(due, [0, 0, 100, 150, 150, 250]);
        assert_eq!((ops[2].offset, ops[2].length), (1 << 20, 4096));
    }

    #[test]
    fn without_repeating_it_ends() {
        let options = ReplayOptions {
            is_repeating: false,
            flush_every_writes: 0,
            ..ReplayOptions::default()
        };
        let mut replay = Replay::new(trace(), 8 << 20, options);
        assert_eq!(std::iter::from_fn(|| replay.next_op()).count(), 2);
        let mut none = Replay::new(trace(), 511, ReplayOptions::default());
        assert!(none.next_op().is_none());
        let empty = Trace {
            records: Vec::new(),
            summary: super::super::TraceSummary::default(),
        };
        assert!(
            Replay::new(empty, 512, ReplayOptions::default())
                .next_op()
                .is_none()
        );
    }
}
