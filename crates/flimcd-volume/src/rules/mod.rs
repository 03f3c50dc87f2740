//! The rules that every guest request and every transfer of a volume obeys, as a state machine without I/O, clock
//! or threads. The agent runs them behind a mutex over real files ([`Volume`](crate::Volume)), the simulator over
//! simulated ones, the concurrency check under every schedule it can find: all three the same code.
//!
//! # Modes
//! ```text
//!   source:  Owner ──freeze──► Frozen ──release──► Released ──enter_incoming──► Incoming
//!              ▲───────thaw──────┘
//!   target:  Incoming ──start_postcopy──► PostCopy ──finish_postcopy──► Owner
//! ```
//! | mode | guest requests | fetched content |
//! | --- | --- | --- |
//! | `Owner` | run | dropped |
//! | `Frozen` | what was admitted drains, the rest is parked | dropped |
//! | `Released` | refused: the volume has moved | dropped |
//! | `Incoming` | parked until the switch | written, in order of arrival per block |
//! | `PostCopy` | run where the blocks are present, else wait for them | written where missing, else dropped |
//!
//! A parked request was never acknowledged, so it may run later, be refused, or be forgotten with its connection.
//!
//! # A block in post-copy
//! ```text
//!              begin_apply           end_apply(Done)
//!            ┌────────────► applying ───────────────┐
//!   missing ─┤                 │ Failed             ├──► present (for good)
//!      ▲  ▲  │                 │                    │
//!      │  └──┼─────────────────┘                    │
//!      │     └────────────► guest-writing ──────────┘
//!      │  covering write       │ Failed   finish(Done)
//!      └───────────────────────┘
//! ```
//! - A guest write, zeroing or trim that covers a whole missing block claims it at admission (*guest-writing*). What is
//!   fetched for the block meanwhile is dropped; every other request to it waits. If the write fails the block is missing
//!   again, and is asked for again, because content for it may just have been dropped.
//! - A read of a missing block, and a write to a part of one, waits until it is present, and reports the fault.
//! - Whatever touches a block that is being applied waits for the apply. So fetched content and guest I/O never meet
//!   on the device.
//! - Fetched content never overwrites a guest write: a block that is present or guest-writing takes none.
//! - One block has at most one apply at a time, in `Incoming` too. Later ones wait in order of arrival.
//! - An apply that began in `Incoming` never makes a block present: its content may be older than the switch.
//! - Trims shrink inwards to whole blocks. The caller runs a trim as zeroing while in post-copy, since a device
//!   may ignore a trim, and what lies under a missing block is nobody's content.
//!
//! # Dirty blocks at the source
//! Blocks are marked when a write is admitted, so before it can be submitted. [`Rules::take_dirty`] and
//! [`Rules::begin_send`] clear marks *before* the content is read, and never that of a block with a write in flight:
//! the reader may see the old content, so the block has to be sent again after the write. A failed write leaves its
//! marks. Who took marks and fails to deliver keeps them: see the machines.
//!
//! # Flush
//! In post-copy a flush may be acknowledged only when both the data and the *presence* of what was written before it are
//! durable, in this order: presence without data would turn a crash into wrong content, data without presence
//! would have the source's old content fetched over it. [`Rules::begin_flush`] takes the presence that is not durable
//! yet, *before* the data sync starts; [`FlushPlan`] then gives the steps. Blocks that become present during the data sync
//! are left to the next flush. A flush that begins while another one runs also writes what that one took, since its guest may
//! have seen those blocks written. On failure the taken presence is put back.
//!
//! # Who owns what, and how it fails
//! The caller owns the I/O and its order: admitted (`Go`) → submitted → finished, each ticket finished exactly
//! once. After every call it polls [`Rules::poll_woken`], [`Rules::poll_fault`] and [`Rules::poll_apply_ready`] until they
//! are empty. Calls out of order (a ticket finished twice, a switch from the wrong mode) are bugs and panic: going on
//! would risk the guest's data. Nothing that a peer or a guest sends can cause a panic, provided that ranges are inside the volume.
//!
//! # Cost
//! In `Owner` without tracking a request costs a slot in a table and allocates nothing. Sets are paged bitmaps
//! ([`BlockSet`]): a set that is mixed everywhere takes 32 MiB per TiB.

mod flush;
mod mutation;
mod ops;
mod presence;
#[cfg(test)]
mod tests;
mod tracking;

use std::collections::VecDeque;

use flimcd_core::{BlockRange, BlockSet, ByteRange, VolumeSize};

pub use flush::{FlushPlan, FlushStep};
#[cfg(any(test, feature = "mutations"))]
pub use mutation::Mutation;
#[cfg(not(any(test, feature = "mutations")))]
use mutation::Mutation;
pub use ops::Ticket;
pub use presence::{ApplyPlan, ApplyToken};

use flush::Flushes;
use mutation::Broken;
use ops::{Op, OpTable, State};
use presence::{Decision, Presence};
use tracking::Tracking;

/// What the volume does with guest requests; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The guest is served: no migration, or the source of one.
    Owner,
    /// The switch is prepared: admitted requests drain, new ones are parked.
    Frozen,
    /// The volume has moved away.
    Released,
    /// The target before the switch.
    Incoming,
    /// The target after the switch, while blocks are missing.
    PostCopy,
}

/// A guest request on a range of bytes. Flush has its own calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestOp {
    /// Reads bytes.
    Read,
    /// Replaces bytes.
    Write,
    /// Makes bytes zero.
    WriteZeroes,
    /// Says that the content is not needed any more.
    Trim,
}

/// Answer to a guest request.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The I/O may be submitted now; [`Rules::finish`] must follow.
    Go {
        /// Name of the request from here on.
        ticket: Ticket,
        /// Whether the request marked a block dirty that was not.
        newly_dirty: bool,
    },
    /// The request waits; [`Rules::poll_woken`] will name the ticket, unless it is cancelled.
    Parked {
        /// Name of the request from here on.
        ticket: Ticket,
    },
    /// The request fails, and there is no ticket to finish.
    Refused(Refusal),
}

/// Why a guest request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The volume has another owner now.
    #[error("the volume has moved to another site")]
    Moved,
}

/// How I/O ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Completed.
    Done,
    /// Failed, or was never submitted: the content of the range is unknown.
    Failed,
}

/// Counts since the rules were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Guest reads begun.
    pub guest_reads: u64,
    /// Of those, the ones that touched a block that was not there yet.
    pub guest_reads_missed: u64,
    /// Blocks that missed reads waited for.
    pub blocks_missed: u64,
    /// Guest writes begun.
    pub guest_writes: u64,
    /// Guest zeroings begun.
    pub guest_zeroes: u64,
    /// Guest trims begun.
    pub guest_trims: u64,
    /// Flushes begun.
    pub flushes: u64,
    /// Bytes of guest reads begun.
    pub read_bytes: u64,
    /// Bytes of guest writes begun.
    pub written_bytes: u64,
    /// Fetched blocks that were written.
    pub blocks_applied: u64,
    /// Fetched blocks that were dropped because the guest's content is newer, or the block was there.
    pub blocks_dropped: u64,
}

/// The state of one volume. See the module for the rules and the caller's contract.
#[derive(Debug)]
pub struct Rules {
    size: VolumeSize,
    mode: Mode,
    ops: OpTable,
    /// Tickets in state [`State::Parked`], in order of arrival.
    parked: Vec<Ticket>,
    woken: VecDeque<(Ticket, Admission)>,
    tracking: Option<Tracking>,
    presence: Presence,
    flushes: Flushes,
    stats: GuestStats,
    broken: Broken,
}

impl Rules {
    /// The rules of a volume of `size` that begins in `mode`.
    ///
    /// # Panics
    /// For [`Mode::PostCopy`]: begin as [`Mode::Incoming`] and call [`Rules::start_postcopy`].
    #[must_use]
    pub fn new(size: VolumeSize, mode: Mode) -> Self {
        assert!(
            mode != Mode::PostCopy,
            "post-copy needs the missing set: start_postcopy"
        );
        Self {
            size,
            mode,
            ops: OpTable::default(),
            parked: Vec::new(),
            woken: VecDeque::new(),
            tracking: None,
            presence: Presence::new(size),
            flushes: Flushes::default(),
            stats: GuestStats::default(),
            broken: Broken::default(),
        }
    }

    /// The mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The volume's size.
    #[must_use]
    pub fn size(&self) -> VolumeSize {
        self.size
    }

    /// Counts so far.
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        self.stats
    }

    /// Bytes of memory that the sets and tables hold.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.ops.memory_bytes()
            + self.parked.capacity() * size_of::<Ticket>()
            + self.tracking.as_ref().map_or(0, Tracking::memory_bytes)
            + self.presence.memory_bytes()
            + self.flushes.memory_bytes()
    }

    /// Breaks a rule on purpose, for tests that show that it is needed.
    #[cfg(any(test, feature = "mutations"))]
    pub fn set_mutation(&mut self, mutation: Option<Mutation>) {
        self.broken = Broken::new(mutation);
    }

    // ---- guest requests

    /// A guest asks for `op` on `range`. On `Go` the dirty mark is already set and the I/O may be submitted.
    ///
    /// # Panics
    /// When the range reaches beyond the volume.
    #[inline]
    pub fn begin(&mut self, op: GuestOp, range: ByteRange) -> Admission {
        assert!(
            range.end <= self.size.bytes() && range.start <= range.end,
            "{range:?} is not in the volume"
        );
        self.count(op, range);
        let op = Op::new(op, range, self.size);
        match self.mode {
            Mode::Owner => {
                let newly_dirty = self.mark_dirty(&op);
                let ticket = self.ops.insert(op, State::Active);
                Admission::Go {
                    ticket,
                    newly_dirty,
                }
            }
            Mode::Released => Admission::Refused(Refusal::Moved),
            Mode::Frozen | Mode::Incoming => self.park(op),
            Mode::PostCopy => self.begin_postcopy(op),
        }
    }

    fn begin_postcopy(&mut self, mut op: Op) -> Admission {
        self.count_miss(&mut op);
        match self.presence.decide(&mut op) {
            Decision::Go => Admission::Go {
                ticket: self.ops.insert(op, State::Active),
                newly_dirty: false,
            },
            Decision::Wait => {
                self.presence.report_faults(&op);
                self.park(op)
            }
        }
    }

    fn park(&mut self, op: Op) -> Admission {
        let ticket = self.ops.insert(op, State::Parked);
        self.parked.push(ticket);
        Admission::Parked { ticket }
    }

    #[inline]
    fn count(&mut self, op: GuestOp, range: ByteRange) {
        match op {
            GuestOp::Read => {
                self.stats.guest_reads += 1;
                self.stats.read_bytes += range.len();
            }
            GuestOp::Write => {
                self.stats.guest_writes += 1;
                self.stats.written_bytes += range.len();
            }
            GuestOp::WriteZeroes => self.stats.guest_zeroes += 1,
            GuestOp::Trim => self.stats.guest_trims += 1,
        }
    }

    /// Counts a read that meets missing blocks, once per request however often it is decided again.
    fn count_miss(&mut self, op: &mut Op) {
        if op.kind == GuestOp::Read && !op.missed {
            let missing = self.presence.count_awaited(op.blocks_touched());
            if missing > 0 {
                op.missed = true;
                self.stats.guest_reads_missed += 1;
                self.stats.blocks_missed += missing;
            }
        }
    }

    #[inline]
    fn mark_dirty(&mut self, op: &Op) -> bool {
        match &mut self.tracking {
            Some(tracking) if op.kind != GuestOp::Read => {
                !self.broken.is(Mutation::MarkDirtyAfterWrite) && tracking.mark(op.blocks_touched())
            }
            _ => false,
        }
    }

    /// The I/O of an admitted request ended.
    ///
    /// # Panics
    /// When `ticket` is not of a request that was admitted and has not been finished.
    #[inline]
    pub fn finish(&mut self, ticket: Ticket, outcome: Outcome) {
        let op = self.ops.remove(ticket, State::Active);
        if self.broken.is(Mutation::MarkDirtyAfterWrite)
            && op.kind != GuestOp::Read
            && let Some(tracking) = &mut self.tracking
        {
            tracking.mark(op.blocks_touched());
        }
        if op.claims {
            self.finish_claim(&op, outcome);
        }
    }

    fn finish_claim(&mut self, op: &Op, outcome: Outcome) {
        self.presence.end_claim(op.blocks_covered(), outcome);
        self.wake(op.blocks_covered());
    }

    /// Forgets a request that was parked, because nobody waits for it any more. Also right for one that has been
    /// decided, as long as [`poll_woken`](Self::poll_woken) has not named it: it counts as failed.
    pub fn cancel_parked(&mut self, ticket: Ticket) {
        self.woken.retain(|(woken, _)| *woken != ticket);
        match self.ops.state(ticket) {
            Some(State::Parked) => {
                self.ops.remove(ticket, State::Parked);
                self.parked.retain(|parked| *parked != ticket);
            }
            Some(State::Woken) => {
                let op = self.ops.remove(ticket, State::Woken);
                if op.claims {
                    self.finish_claim(&op, Outcome::Failed);
                }
            }
            Some(State::Active) => panic!("{ticket:?} is running: finish it"),
            None => {}
        }
    }

    /// A parked request that has been decided since: `Go` with the same ticket, or `Refused`.
    pub fn poll_woken(&mut self) -> Option<(Ticket, Admission)> {
        let (ticket, admission) = self.woken.pop_front()?;
        if matches!(admission, Admission::Go { .. }) {
            self.ops.set_state(ticket, State::Active);
        }
        Some((ticket, admission))
    }

    /// Whether one of the `poll_*` calls has something.
    #[inline]
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.woken.is_empty() || self.presence.has_output()
    }

    /// Whether [`poll_fault`](Self::poll_fault) may have something.
    #[must_use]
    pub fn has_faults(&self) -> bool {
        self.presence.has_faults()
    }

    /// Number of requests that are parked.
    #[must_use]
    pub fn parked_count(&self) -> usize {
        self.parked.len()
    }

    /// Decides the parked requests that touch `blocks` again.
    fn wake(&mut self, blocks: BlockRange) {
        if self.parked.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut self.parked);
        for ticket in parked {
            if !self.ops.op(ticket).is_near(blocks) || !self.try_wake(ticket) {
                self.parked.push(ticket);
            }
        }
    }

    fn try_wake(&mut self, ticket: Ticket) -> bool {
        let mut op = *self.ops.op(ticket);
        let newly_dirty = match self.mode {
            Mode::Frozen | Mode::Incoming => return false,
            Mode::Released => {
                self.ops.remove(ticket, State::Parked);
                self.woken
                    .push_back((ticket, Admission::Refused(Refusal::Moved)));
                return true;
            }
            Mode::Owner => self.mark_dirty(&op),
            Mode::PostCopy => {
                self.count_miss(&mut op);
                let decision = self.presence.decide(&mut op);
                *self.ops.op_mut(ticket) = op;
                if decision == Decision::Wait {
                    self.presence.report_faults(&op);
                    return false;
                }
                false
            }
        };
        self.ops.set_state(ticket, State::Woken);
        let admission = Admission::Go {
            ticket,
            newly_dirty,
        };
        self.woken.push_back((ticket, admission));
        true
    }

    /// Blocks that a parked request needs and that nothing here brings. Each is reported once, until it was present or
    /// [`requeue_faults`](Self::requeue_faults) was called.
    pub fn poll_fault(&mut self) -> Option<BlockRange> {
        self.presence.poll_fault()
    }

    /// Reports every block that is still needed again, because the earlier reports may be lost with a link.
    pub fn requeue_faults(&mut self) {
        self.presence.forget_reports();
        for ticket in &self.parked {
            let op = *self.ops.op(*ticket);
            self.presence.report_faults(&op);
        }
    }

    // ---- source

    /// Starts to mark what the guest writes, with the writes in flight as the first marks. Keeps the marks there are.
    pub fn start_tracking(&mut self) {
        if self.tracking.is_none() {
            let mut tracking = Tracking::new(self.size);
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks);
            }
            self.tracking = Some(tracking);
        }
    }

    /// Stops marking and drops the marks.
    pub fn stop_tracking(&mut self) {
        self.tracking = None;
    }

    /// Whether writes are marked.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.tracking.is_some()
    }

    /// Hands the marks over and clears them, except those of blocks with a write in flight, which are handed over *and*
    /// kept: the block has to be sent after the write as well.
    pub fn take_dirty(&mut self) -> BlockSet {
        let Some(tracking) = &mut self.tracking else {
            return BlockSet::new(self.size.blocks());
        };
        let taken = tracking.take();
        // Whatever is in flight was marked when it was admitted, so this puts back and adds nothing.
        if !self.broken.is(Mutation::IgnoreWriteInFlight) {
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks);
            }
        }
        taken
    }

    /// To be called before `range` is read to be sent: clears the marks of blocks without a write in flight, so that
    /// every write from here on, and every one in flight, leaves the block marked after the read.
    pub fn begin_send(&mut self, range: BlockRange) {
        if !self.broken.is(Mutation::ClearAfterRead) {
            self.clear_marks(range);
        }
    }

    /// To be called after the read that [`begin_send`](Self::begin_send) announced. Nothing follows from it: clearing
    /// after the read is the mistake that [`Mutation::ClearAfterRead`](Mutation) makes here.
    pub fn end_send(&mut self, range: BlockRange) {
        if self.broken.is(Mutation::ClearAfterRead) {
            self.clear_marks(range);
        }
    }

    fn clear_marks(&mut self, range: BlockRange) {
        let Some(tracking) = &mut self.tracking else {
            return;
        };
        tracking.clear(range);
        if !self.broken.is(Mutation::IgnoreWriteInFlight) {
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks.intersect(range));
            }
        }
    }

    /// Whether a block of `range` is marked.
    #[must_use]
    pub fn is_dirty(&self, range: BlockRange) -> bool {
        self.tracking.as_ref().is_some_and(|t| t.is_dirty(range))
    }

    /// A copy of the marks.
    #[must_use]
    pub fn dirty(&self) -> BlockSet {
        match &self.tracking {
            Some(tracking) => tracking.dirty().clone(),
            None => BlockSet::new(self.size.blocks()),
        }
    }

    /// Appends the runs of `range` that are neither marked nor have a write in flight.
    pub fn clean_runs(&self, range: BlockRange, out: &mut Vec<BlockRange>) {
        let range = range.intersect(self.size.all_blocks());
        let mut busy: Vec<BlockRange> = self.ops.writes_in_flight().collect();
        if let Some(tracking) = &self.tracking {
            busy.extend(tracking.dirty().runs_in(range));
        }
        busy.retain(|run| run.overlaps(range));
        busy.sort_unstable();
        let mut at = range.start;
        for run in busy {
            if at < run.start {
                out.push(BlockRange::new(at, run.start));
            }
            at = at.max(run.end);
        }
        if at < range.end {
            out.push(BlockRange::new(at, range.end));
        }
    }

    /// Whether a write to a block of `range` is in flight.
    #[must_use]
    pub fn is_writing(&self, range: BlockRange) -> bool {
        self.ops.writes_in_flight().any(|b| b.overlaps(range))
    }

    /// Parks every request from here on. Those admitted go on: see [`is_drained`](Self::is_drained).
    ///
    /// # Panics
    /// Unless in `Owner` or `Frozen`.
    pub fn freeze(&mut self) {
        self.expect_mode(&[Mode::Owner, Mode::Frozen], "freeze");
        self.mode = Mode::Frozen;
    }

    /// Whether no admitted request is in flight.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.ops.admitted() == 0
    }

    /// Back from `Frozen` to `Owner`: parked requests run.
    ///
    /// # Panics
    /// Unless in `Owner` or `Frozen`.
    pub fn thaw(&mut self) {
        self.expect_mode(&[Mode::Owner, Mode::Frozen], "thaw");
        self.mode = Mode::Owner;
        self.wake(self.size.all_blocks());
    }

    /// The volume has moved: parked requests are refused, and so are all from here on.
    ///
    /// # Panics
    /// Unless in `Frozen` and drained, or `Released`: a request in flight could write what the new owner never sees.
    pub fn release(&mut self) {
        self.expect_mode(&[Mode::Frozen, Mode::Released], "release");
        assert!(self.is_drained(), "released with guest requests in flight");
        self.mode = Mode::Released;
        self.tracking = None;
        self.wake(self.size.all_blocks());
    }

    /// A volume that moved away comes back: requests are parked until the switch.
    ///
    /// # Panics
    /// Unless in `Released` or `Incoming`.
    pub fn enter_incoming(&mut self) {
        self.expect_mode(&[Mode::Released, Mode::Incoming], "enter_incoming");
        self.mode = Mode::Incoming;
    }

    // ---- target

    /// The switch: the guest runs here from now on, without the content of `missing`. Parked requests are decided
    /// again. Applies that wait are dropped, since their content may be older than the switch.
    ///
    /// # Panics
    /// Unless in `Incoming`, or when the set is of a volume of another size.
    pub fn start_postcopy(&mut self, missing: BlockSet) {
        self.expect_mode(&[Mode::Incoming], "start_postcopy");
        self.presence.start(missing);
        self.mode = Mode::PostCopy;
        self.wake(self.size.all_blocks());
    }

    /// Content for `range` arrived: says which blocks of it to write. [`end_apply`](Self::end_apply) must follow, also when
    /// there is nothing to write. With [`ApplyPlan::wait`] set, nothing may be done before
    /// [`poll_apply_ready`](Self::poll_apply_ready) gives the plan with the same token again, decided.
    ///
    /// # Panics
    /// When the range reaches beyond the volume.
    pub fn begin_apply(&mut self, range: BlockRange) -> ApplyPlan {
        assert!(
            range.end <= self.size.blocks(),
            "{range:?} is not in the volume"
        );
        let broken = self.broken.is(Mutation::FetchedOverwritesGuestWrite);
        let plan = self.presence.begin_apply(range, self.mode, broken);
        self.count_apply(&plan);
        plan
    }

    /// An apply that had to wait and may run now.
    pub fn poll_apply_ready(&mut self) -> Option<ApplyPlan> {
        let broken = self.broken.is(Mutation::FetchedOverwritesGuestWrite);
        let plan = self.presence.poll_apply_ready(self.mode, broken)?;
        self.count_apply(&plan);
        Some(plan)
    }

    fn count_apply(&mut self, plan: &ApplyPlan) {
        if !plan.wait {
            self.stats.blocks_applied += plan.blocks_to_write();
            self.stats.blocks_dropped += plan.range.len() - plan.blocks_to_write();
        }
    }

    /// The writes of an apply ended. `Done`: in post-copy the blocks are present. `Failed`: they are missing as before.
    ///
    /// # Panics
    /// When `token` is not of an apply that runs.
    pub fn end_apply(&mut self, token: ApplyToken, outcome: Outcome) {
        let touched = self.presence.end_apply(token, outcome);
        if self.mode == Mode::PostCopy {
            self.wake(touched);
        }
        self.finish_if_idle();
    }

    /// Number of blocks whose content is not here.
    #[must_use]
    pub fn missing_count(&self) -> u64 {
        self.presence.missing().count()
    }

    /// The blocks whose content is not here; blocks being written stay in it until the write is done.
    #[must_use]
    pub fn missing(&self) -> &BlockSet {
        self.presence.missing()
    }

    /// The blocks that guest writes made present since the last call: the source need not send them.
    pub fn take_overwritten(&mut self) -> BlockSet {
        self.presence.take_overwritten()
    }

    /// Nothing is missing any more and the caller has made that durable: the volume is an ordinary one. An apply that
    /// still runs delays the change of mode to its end.
    ///
    /// # Panics
    /// Unless in `PostCopy` (or `Owner` already), or when blocks are missing.
    pub fn finish_postcopy(&mut self) {
        self.expect_mode(&[Mode::PostCopy, Mode::Owner], "finish_postcopy");
        assert_eq!(
            self.missing_count(),
            0,
            "post-copy ends with blocks missing"
        );
        self.presence.set_finishing();
        self.finish_if_idle();
    }

    fn finish_if_idle(&mut self) {
        if self.mode == Mode::PostCopy && self.presence.may_finish() {
            self.mode = Mode::Owner;
            self.presence = Presence::new(self.size);
        }
    }

    // ---- flush

    /// Begins a flush: takes the presence that is not durable yet. Call it before the data sync is started, run the plan's
    /// steps, then [`end_flush`](Self::end_flush), then acknowledge.
    pub fn begin_flush(&mut self) -> FlushPlan {
        self.stats.flushes += 1;
        let early_ack = self.broken.is(Mutation::FlushBeforePresence);
        self.flushes
            .begin(self.presence.take_undurable(), early_ack)
    }

    /// Ends a flush. Unless `ok`, the presence that it took is put back and the flush must be answered with an error.
    ///
    /// # Panics
    /// When `ok` is said before the plan's last step.
    pub fn end_flush(&mut self, plan: FlushPlan, ok: bool) {
        if let Some(put_back) = self.flushes.end(plan, ok) {
            self.presence.put_back_undurable(&put_back);
        }
    }

    fn expect_mode(&self, modes: &[Mode], what: &str) {
        assert!(modes.contains(&self.mode), "{what} in mode {:?}", self.mode);
    }
}
