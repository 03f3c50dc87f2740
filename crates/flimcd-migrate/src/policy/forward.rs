//! `mirror` and `forward-writes`: one pass over the disk, while every write to what has gone over already goes there, too.
//!
//! `mirror`: Mashtizadeh et al., "The design and evolution of live storage migration in VMware ESX", ATC 2011 (ESX 5), and what
//! QEMU's mirror job does with `copy-mode=write-blocking`: such a write is answered when both sides have it.
//! `forward-writes`: Bradford et al., "Live wide-area migration of virtual machines including local persistent state", VEE 2007:
//! it is answered at once and follows as a delta; writers are slowed down while deltas stand in line for more than
//! [`BACKLOG_MAX`], and at the end until what is left fits the downtime.

use std::{collections::VecDeque, time::Duration};

use flimcd_core::{BLOCK_SIZE, BlockIndex, BlockRange};

use super::{Policy, View, Writes, cursor::Cursor, fits_downtime};

/// Deltas that stand in line for so long slow writers down...
const BACKLOG_MAX: Duration = Duration::from_millis(1000);
/// ...until it is no more than this.
const BACKLOG_LOW: Duration = Duration::from_millis(250);
/// Part of the link's rate at which they may write then.
const SLOW_SHARE: f64 = 0.5;
/// Runs in line; beyond that they are found by looking.
const QUEUE_MAX: usize = 1 << 16;

pub(super) struct Forward {
    writes: Writes,
    /// The pass over the disk.
    bulk: Cursor,
    /// Writes to what has gone over, oldest first.
    queue: VecDeque<BlockRange>,
    queued_blocks: u64,
    /// Looks for those that had no room in the queue.
    late: Cursor,
    has_late: bool,
    is_slow: bool,
}

impl Forward {
    pub(super) fn mirroring() -> Self {
        Self::new(Writes::Mirrored)
    }

    pub(super) fn limiting() -> Self {
        Self::new(Writes::Limited)
    }

    fn new(writes: Writes) -> Self {
        Self {
            writes,
            bulk: Cursor::default(),
            queue: VecDeque::new(),
            queued_blocks: 0,
            late: Cursor::default(),
            has_late: false,
            is_slow: false,
        }
    }

    fn next_queued(&mut self, view: &View<'_>) -> Option<BlockRange> {
        while let Some(run) = self.queue.pop_front() {
            self.queued_blocks -= run.len();
            let Some(found) = view.pending.next_run(run.start, run.end) else {
                continue;
            };
            let found = found.intersect(BlockIndex(found.start).chunk().blocks());
            let rest = BlockRange::new(found.end, run.end.max(found.end));
            if !rest.is_empty() {
                self.queued_blocks += rest.len();
                self.queue.push_front(rest);
            }
            return Some(found);
        }
        None
    }
}

impl Policy for Forward {
    fn name(&self) -> &'static str {
        match self.writes {
            Writes::Mirrored => "mirror",
            Writes::Free | Writes::Limited => "forward-writes",
        }
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn allows_postcopy(&self) -> bool {
        false
    }

    fn writes(&self) -> Writes {
        self.writes
    }

    fn write_limit(&mut self, view: &View<'_>) -> Option<u64> {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let bytes = self.queued_blocks as f64 * view.bytes_per_block.min(BLOCK_SIZE as f64);
        let backlog_s = bytes / view.link.rate_or_default();
        let limit = if self.is_slow {
            BACKLOG_LOW
        } else {
            BACKLOG_MAX
        };
        // After the pass over the disk only the deltas stand between the guest and the switch.
        let is_last = self.bulk.rounds() > 0 && !fits_downtime(view);
        self.is_slow = is_last || backlog_s > limit.as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive rate"
        )]
        self.is_slow
            .then(|| (view.link.rate_or_default() * SLOW_SHARE) as u64)
    }

    fn on_outdated(&mut self, run: BlockRange) {
        if self.queue.len() < QUEUE_MAX {
            self.queued_blocks += run.len();
            self.queue.push_back(run);
        } else {
            self.has_late = true;
        }
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if let Some(run) = self.next_queued(view) {
            return Some(run);
        }
        if self.bulk.rounds() == 0
            && let Some(run) = self.bulk.next(view.pending, |_| true)
            && self.bulk.rounds() == 0
        {
            return Some(run);
        }
        if self.has_late || self.bulk.rounds() > 0 {
            let next = self.late.next(view.pending, |_| true);
            self.has_late = next.is_some();
            return next;
        }
        None
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.bulk.rounds() > 0 && fits_downtime(view)
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.late.next(view.pending, |_| true)
    }
}
