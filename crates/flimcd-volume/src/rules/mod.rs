//! The rules that every guest request and every transfer of a volume obeys, as a state machine without I/O, clock
//! or threads. The agent runs them behind a mutex over real files ([`Volume`](crate::Volume)), the simulator over
//! simulated ones, the concurrency check under every schedule it can find: all three the same code.
//!
//! # Modes
//! ```text
//!   source:  Owner ──freeze──► Frozen ──release──► Released ──enter_incoming──► Incoming
//!              ▲───────thaw──────┘                    ▲───────leave_incoming──────┘
//!   target:  Incoming ──start_postcopy──► PostCopy ──finish_postcopy──► Owner
//! ```
//! | mode | guest requests | fetched content |
//! | --- | --- | --- |
//! | `Owner` | run | dropped |
//! | `Frozen` | what was admitted drains, the rest is parked | dropped |
//! | `Released` | refused: the volume has moved | dropped |
//! | `Incoming` | parked until the switch, or *peeking* | written, in order of arrival per block |
//! | `PostCopy` | run where the blocks are present, else wait for them | written where missing, else dropped |
//!
//! A parked request was never acknowledged, so it may run later, be refused, or be forgotten with its connection.
//!
//! # Reads before the switch
//! A hypervisor that waits for a machine's running state opens its disks, and reads from them before they are its own:
//! where a partition table or a header of an image format stands. Parked until the switch such a read would hold up what the switch
//! waits for. So with [`Rules::set_peeking`] a read in `Incoming` becomes *questions* to the source, in pieces, and ends as
//! [`Admission::Answered`] with what stood there at some moment between question and answer; each piece for itself, since nobody
//! may run on what he read there. That is why it is off by default: a guest that is started early and means to
//! *use* what it reads has to wait for the switch. Writes, zeroing and trims are refused, as on a disk that is not ours yet. A flush
//! has nothing to do and succeeds. Peeks are counted for themselves and never as reads or misses, and what they bring is not written anywhere.
//! At the switch open questions are forgotten, and their reads are decided like any other.
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
//! Marks are set at a target as well, from the switch on: what its guest writes is what the copy that the source kept
//! lacks, should the volume go back there.
//!
//! # Writes that their guest hears of later
//! With [`Rules::set_mirroring`] or [`Rules::set_write_limit`] a write that has ended can be held: see `mirror`. It is no
//! request in flight any more, so it delays no switch, and whatever ends serving lets it go.
//!
//! # Flush
//! In post-copy a flush may be acknowledged only when both the data and the *presence* of what was written before it are
//! durable, in this order: presence without data would turn a crash into wrong content, data without presence
//! would have the source's old content fetched over it. [`Rules::begin_flush`] takes the presence that is not durable
//! yet, *before* the data sync starts; [`FlushPlan`] then gives the steps. Blocks that become present during the data sync
//! are left to the next flush. A flush that begins while another one runs also writes what that one took, since its guest may
//! have seen those blocks written. On failure the taken presence is put back.
//!
//! A flush is never parked, in no mode. On a frozen volume it makes durable what was acknowledged, while reads and writes stay parked:
//! a hypervisor flushes when it hands its disks over, and the switch waits for that. On a released volume it does the same
//! and succeeds. That is right: everything that this guest's acknowledged writes left here is in the image and is synced by this very
//! flush, so that what the new owner still fetches cannot be lost with the power, and what was changed since belongs to another
//! guest, which flushes there.
//!
//! # Who owns what, and how it fails
//! The caller owns the I/O and its order: admitted (`Go`) → submitted → finished, each ticket finished exactly
//! once. After every call it polls [`Rules::poll_woken`], [`Rules::poll_fault`], [`Rules::poll_peek`] and
//! [`Rules::poll_apply_ready`] until they are empty. Calls out of order (a ticket finished twice, a switch from the wrong mode) are bugs and panic: going on
//! would risk the guest's data. Nothing that a peer or a guest sends can cause a panic, provided that ranges are inside the volume.
//!
//! # Cost
//! In `Owner` without tracking a request costs a slot in a table and allocates nothing. Sets are paged bitmaps
//! ([`BlockSet`](flimcd_core::BlockSet)): a set that is mixed everywhere takes 32 MiB per TiB.

mod flush;
mod guest;
mod mirror;
mod mutation;
mod ops;
mod peek;
mod presence;
mod read_log;
mod source;
mod target;
#[cfg(test)]
mod tests;
mod tracking;
mod types;

use std::collections::VecDeque;

use flimcd_core::VolumeSize;

pub use flush::{FlushPlan, FlushStep};
pub use mirror::Completion;
#[cfg(any(test, feature = "mutations"))]
pub use mutation::Mutation;
#[cfg(not(any(test, feature = "mutations")))]
use mutation::Mutation;
pub use ops::Ticket;
pub use peek::{Answered, Peek};
pub use presence::{ApplyPlan, ApplyToken};
pub use read_log::READS_KEPT_MAX;
pub use types::{Admission, GuestOp, GuestStats, Mode, Outcome, Refusal};

use flush::Flushes;
use mirror::Mirror;
use mutation::Broken;
use ops::OpTable;
use peek::Peeks;
use presence::Presence;
use read_log::ReadLog;
use tracking::Tracking;

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
    peeks: Peeks,
    flushes: Flushes,
    reads: ReadLog,
    mirror: Mirror,
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
            peeks: Peeks::default(),
            flushes: Flushes::default(),
            reads: ReadLog::default(),
            mirror: Mirror::default(),
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
            + self.mirror.memory_bytes()
            + self.presence.memory_bytes()
            + self.peeks.memory_bytes()
            + self.flushes.memory_bytes()
            + self.reads.memory_bytes()
    }

    /// Breaks a rule on purpose, for tests that show that it is needed.
    #[cfg(any(test, feature = "mutations"))]
    pub fn set_mutation(&mut self, mutation: Option<Mutation>) {
        self.broken = Broken::new(mutation);
    }

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
