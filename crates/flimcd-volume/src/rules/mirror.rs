//! Writes whose completion waits: for the target, which gets them as well (*mirroring*), and for their turn, when writers are throttled.
//!
//! ```text
//!   begin ─► I/O ─► finish ──► Completion::Now ─► the guest hears of it
//!                     │ the target has the blocks, or there is no credit
//!                     └──────► Completion::Held ─► acked / refill / end of mirroring ─► poll_released ─► the guest hears of it
//! ```
//! The write is on the disk here like any other, and marked like any other; only the guest does not hear of it yet. So nothing about
//! correctness hangs on this: whoever lets a write go early loses a property of the strategy and no data.
//!
//! **Mirroring** (Mashtizadeh et al., "The Design and Evolution of Live Storage Migration in VMware ESX", ATC 2011, section 3.3;
//! QEMU's `copy-mode=write-blocking`): a write to a block that the target has had waits until the target has its new content. A write
//! to what has not been copied yet does not wait, since its content crosses with the copy. Writes to both wait for the blocks that
//! were copied. An acknowledgement counts for a block only if it is neither marked nor being written: else newer content is still
//! to come, and will be acknowledged in its turn.
//!
//! **Throttling** (Bradford et al., "Live Wide-Area Migration of Virtual Machines Including Local Persistent State", VEE 2007, section 3.4): a
//! bucket of credit that [`Rules::refill_writes`] fills. A write that finds it empty waits for the next refill that covers all writes
//! before it, in order. Only written blocks count, each as a whole, as it crosses a link: zeroing and trims cost nothing on a link.
//!
//! # No guest waits for ever
//! There is no clock here, so it is for the driver to see that the oldest held write ([`Rules::oldest_held`]) gets on, and to switch
//! mirroring off for as long as it does not. Whatever ends serving ends waiting: `freeze`, `thaw`, `release` and the end of tracking let all
//! writes go. A failed write is answered at once.

use std::{collections::VecDeque, time::Duration};

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, Time};

use super::{GuestOp, Mode, Outcome, Rules, Ticket, ops::Op};

/// Credit that an idle guest gathers, in time at the limit: more than the driver's pause between two refills.
const BURST: Duration = Duration::from_millis(100);

/// Whether the guest may hear of a request that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Yes.
    Now,
    /// Not before [`Rules::poll_released`] names its ticket, which is good for [`Rules::forget_held`] until then.
    Held,
}

/// A write that ended here and that its guest has not heard of.
#[derive(Debug)]
struct Held {
    /// Counts held writes.
    number: u64,
    ticket: Ticket,
    /// Blocks whose new content the target has not acknowledged.
    awaited: Vec<BlockRange>,
    /// Bytes written, by all writes that were counted before this one.
    written_before: u64,
}

/// The bucket of credit, as two counters that only rise.
#[derive(Debug)]
struct Limit {
    bytes_per_sec: u64,
    filled_at: Time,
    /// Written bytes that were counted.
    written: u64,
    /// Written bytes that may be let go.
    granted: u64,
}

impl Limit {
    fn burst_bytes(&self) -> u64 {
        bytes_in(self.bytes_per_sec, BURST).max(1)
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.filled_at);
        let bytes = bytes_in(self.bytes_per_sec, passed);
        // Shorter than a byte takes: let the time add up.
        if bytes > 0 {
            self.filled_at = now;
            let most = self.written.saturating_add(self.burst_bytes());
            self.granted = self.granted.saturating_add(bytes).min(most);
        }
    }
}

fn bytes_in(bytes_per_sec: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes_per_sec) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    /// Blocks that the target has never had; `None` while mirroring is off.
    lacking: Option<BlockSet>,
    limit: Option<Limit>,
    held: VecDeque<Held>,
    released: VecDeque<Ticket>,
    last_number: u64,
}

impl Mirror {
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.lacking.is_none() && self.limit.is_none()
    }

    pub(super) fn has_output(&self) -> bool {
        !self.released.is_empty()
    }

    /// The write `op` ended well. `bytes`: what it wrote.
    fn hold(&mut self, ticket: Ticket, op: &Op, bytes: u64) -> Completion {
        let awaited = match &self.lacking {
            Some(lacking) => outside(op.blocks_touched(), lacking),
            None => Vec::new(),
        };
        let mut written_before = 0;
        if let Some(limit) = &mut self.limit {
            written_before = limit.written;
            limit.written = limit.written.saturating_add(bytes);
        }
        if awaited.is_empty() && self.has_credit(written_before) {
            return Completion::Now;
        }
        self.last_number += 1;
        self.held.push_back(Held {
            number: self.last_number,
            ticket,
            awaited,
            written_before,
        });
        Completion::Held
    }

    fn has_credit(&self, written_before: u64) -> bool {
        (self.limit.as_ref()).is_none_or(|limit| written_before < limit.granted)
    }

    /// The target has what stands in `runs` now, in order and without overlaps.
    fn acked(&mut self, runs: &[BlockRange]) {
        for held in &mut self.held {
            if !held.awaited.is_empty() {
                held.awaited = without(&held.awaited, runs);
            }
        }
        self.let_go();
    }

    /// Releases what waits for nothing any more.
    fn let_go(&mut self) {
        let held = std::mem::take(&mut self.held);
        for write in held {
            if write.awaited.is_empty() && self.has_credit(write.written_before) {
                self.released.push_back(write.ticket);
            } else {
                self.held.push_back(write);
            }
        }
    }

    fn release_all(&mut self) {
        let all = self.held.drain(..).map(|write| write.ticket);
        self.released.extend(all);
    }

    pub(super) fn stop(&mut self) {
        self.lacking = None;
        self.limit = None;
        self.release_all();
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let runs: usize = (self.held.iter())
            .map(|write| write.awaited.capacity() * size_of::<BlockRange>())
            .sum();
        self.lacking.as_ref().map_or(0, BlockSet::memory_bytes)
            + self.held.capacity() * size_of::<Held>()
            + self.released.capacity() * size_of::<Ticket>()
            + runs
    }
}

/// The runs of `range` that are not in `set`.
fn outside(range: BlockRange, set: &BlockSet) -> Vec<BlockRange> {
    let inside: Vec<_> = set.runs_in(range).collect();
    without(&[range], &inside)
}

/// What of `runs` is in none of `taken`, which are in order and do not overlap.
fn without(runs: &[BlockRange], taken: &[BlockRange]) -> Vec<BlockRange> {
    let mut left = Vec::new();
    for run in runs {
        let mut at = run.start;
        let first = taken.partition_point(|other| other.end <= run.start);
        for other in taken[first..].iter().take_while(|o| o.start < run.end) {
            if at < other.start {
                left.push(BlockRange::new(at, other.start));
            }
            at = at.max(other.end);
        }
        if at < run.end {
            left.push(BlockRange::new(at, run.end));
        }
    }
    left
}

impl Rules {
    /// Begins mirroring, with the blocks that the target does not have, or ends it with `None`, which lets go what waits for the
    /// target. Only writes that end in [`Mode::Owner`] and while they are marked are held, so nothing is before
    /// [`start_tracking`](Self::start_tracking).
    ///
    /// # Panics
    /// When the set is of a volume of another size.
    pub fn set_mirroring(&mut self, lacking: Option<BlockSet>) {
        if let Some(lacking) = &lacking {
            assert_eq!(lacking.capacity(), self.size.blocks(), "blocks lacking");
        }
        if lacking.is_none() {
            for write in &mut self.mirror.held {
                write.awaited.clear();
            }
        }
        self.mirror.lacking = lacking;
        self.mirror.let_go();
    }

    /// Whether writes to what the target has wait for it.
    #[must_use]
    pub fn is_mirroring(&self) -> bool {
        self.mirror.lacking.is_some()
    }

    /// The target has acknowledged the content of these blocks, and nothing newer is known of them than what is marked here.
    /// Writes that waited for that are let go.
    pub fn acked(&mut self, ranges: &[BlockRange]) {
        let Some(lacking) = &mut self.mirror.lacking else {
            return;
        };
        for range in ranges {
            lacking.remove_range(range.intersect(self.size.all_blocks()));
        }
        if self.mirror.held.is_empty() {
            return;
        }
        let mut clean = Vec::new();
        for range in ranges {
            self.clean_runs(*range, &mut clean);
        }
        clean.sort_unstable();
        self.mirror.acked(&clean);
    }

    /// Lets guests write so many bytes per second on average, or as many as they can. `now` is what
    /// [`refill_writes`](Self::refill_writes) goes on from. A limit of 0 counts as 1.
    pub fn set_write_limit(&mut self, bytes_per_sec: Option<u64>, now: Time) {
        match (&mut self.mirror.limit, bytes_per_sec) {
            (limit, None) => {
                *limit = None;
                self.mirror.let_go();
            }
            (Some(limit), Some(rate)) => {
                limit.refill(now);
                limit.bytes_per_sec = rate.max(1);
            }
            (limit, Some(rate)) => {
                let mut new = Limit {
                    bytes_per_sec: rate.max(1),
                    filled_at: now,
                    written: 0,
                    granted: 0,
                };
                new.granted = new.burst_bytes();
                for write in &mut self.mirror.held {
                    write.written_before = 0;
                }
                *limit = Some(new);
            }
        }
    }

    /// Gives writers the credit of the time since the last call. Call it every few milliseconds while there is a limit: less often than ten
    /// times a second writes less than the limit allows.
    pub fn refill_writes(&mut self, now: Time) {
        if let Some(limit) = &mut self.mirror.limit {
            limit.refill(now);
            self.mirror.let_go();
        }
    }

    /// The number of the write that is held longest; the same number means the same write. `None` when none is held.
    #[must_use]
    pub fn oldest_held(&self) -> Option<u64> {
        self.mirror.held.front().map(|write| write.number)
    }

    /// How many writes are held.
    #[must_use]
    pub fn held_count(&self) -> usize {
        self.mirror.held.len()
    }

    /// A write that was held and that its guest may hear of now.
    pub fn poll_released(&mut self) -> Option<Ticket> {
        self.mirror.released.pop_front()
    }

    /// Forgets a held write, because nobody waits for it any more. Also right for one that
    /// [`poll_released`](Self::poll_released) has not named yet.
    pub fn forget_held(&mut self, ticket: Ticket) {
        self.mirror.held.retain(|write| write.ticket != ticket);
        self.mirror.released.retain(|released| *released != ticket);
    }

    /// What becomes of the guest's request `op` that ended.
    #[inline]
    pub(super) fn completion(&mut self, ticket: Ticket, op: &Op, outcome: Outcome) -> Completion {
        if self.mirror.is_idle() || self.mode != Mode::Owner || self.tracking.is_none() {
            return Completion::Now;
        }
        if op.kind == GuestOp::Read || outcome == Outcome::Failed {
            return Completion::Now;
        }
        let bytes = match op.kind {
            GuestOp::Write => op.blocks_touched().len() * BLOCK_SIZE,
            _ => 0,
        };
        self.mirror.hold(ticket, op, bytes)
    }

    /// Lets go every write that is held.
    pub(super) fn release_held(&mut self) {
        self.mirror.release_all();
    }
}
