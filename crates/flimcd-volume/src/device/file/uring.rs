//! The queue on io_uring.
//!
//! One ring per queue, used by one thread. What is in flight lives in `slots`: the kernel has
//! pointers into those buffers, so a slot is only emptied after its completion arrived, and
//! dropping the queue waits for all of them.
//!
//! Unaligned requests on a direct device take other ways: a read goes through a wider buffer of its
//! own, a write waits in
//! `parked` until it is alone (see [`super::gate`]) and is then done here by a plain call into the
//! page cache. Aligned writes that meet one of those wait in `parked` too.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    thread,
};

use io_uring::{IoUring, opcode, squeue, types};

use super::{Shared, gate::Waker, usize_of, zeroes_flags};
use crate::device::{IoBuf, IoDone, IoKind, IoOp, IoQueue, check_range};

/// Bounds on the ring's size.
const DEPTH_MAX: u32 = 1024;
/// The only registered file: the device's `main`.
const MAIN: types::Fixed = types::Fixed(0);
/// A copy into the page cache from this length on is left to a thread of the kernel's.
const COPY_BYTES: u64 = 128 << 10;
/// Completion of the read of the waker's eventfd.
const WAKE_ID: u64 = u64::MAX;

pub(super) struct UringQueue {
    ring: IoUring,
    shared: Arc<Shared>,
    /// Not looked at yet.
    pushed: VecDeque<IoOp>,
    /// Waiting for the gate.
    parked: VecDeque<Parked>,
    /// To be done by plain calls, once nothing is in flight here: such a call may have to wait
    /// for the gate, and then nobody would reap what holds it.
    slow: Vec<IoOp>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    done: Vec<IoDone>,
    waker: Arc<Waker>,
    /// Where the kernel puts what it reads from the waker.
    wake_count: Box<[u8; 8]>,
    wake_armed: bool,
}

/// A request the kernel has.
struct Slot {
    op: IoOp,
    /// What is really read when the request is not aligned, and where the wanted bytes begin in it.
    bounce: Option<(IoBuf, usize)>,
    /// Whether the gate must be told at the end.
    holds_gate: bool,
    /// Bytes the kernel was asked for, 0 for what is no read or write.
    expected: usize,
}

struct Parked {
    op: IoOp,
    /// An unaligned write, standing in line at the gate.
    exclusive: bool,
}

/// Whether a ring can be had at all.
pub(super) fn probe() -> io::Result<()> {
    build(8).map(drop)
}

fn build(entries: u32) -> io::Result<IoUring> {
    // Completions are then processed whenever this thread is in the kernel anyway, or in `poll` on
    // the ring; no interrupt of the running thread. (IORING_SETUP_DEFER_TASKRUN would not wake that
    // `poll`.)
    let modern = IoUring::builder()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(entries);
    match modern {
        // Kernels before 5.19.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().dontfork().build(entries)
        }
        other => other,
    }
}

impl UringQueue {
    pub(super) fn new(shared: Arc<Shared>, depth: u32) -> io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        // One more for the read of the waker.
        let ring = build(depth + 1)?;
        ring.submitter()
            .register_files(&[shared.main.as_raw_fd()])?;
        let depth = depth as usize;
        Ok(Self {
            ring,
            shared,
            pushed: VecDeque::new(),
            parked: VecDeque::new(),
            slow: Vec::new(),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            done: Vec::new(),
            waker: Waker::new()?,
            wake_count: Box::new([0; 8]),
            wake_armed: false,
        })
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts `op`, parks it, or ends it at once. A slot must be free.
    fn start(&mut self, op: IoOp) {
        let fits = op.buf.len() as u64 >= op.length;
        let moves_data = matches!(op.kind, IoKind::Read | IoKind::Write);
        let in_range = check_range(self.shared.size, op.offset, op.length).is_ok();
        if op.kind != IoKind::Sync && (!in_range || op.length == 0) || moves_data && !fits {
            // Nothing to do, or the plain call says what is wrong.
            self.done.push(self.shared.run(op));
            return;
        }
        let aligned = self.shared.is_aligned(op.offset, op.length);
        match op.kind {
            IoKind::Read if !aligned => self.start_bounced_read(op),
            IoKind::Write if self.shared.buffered.is_some() => {
                if !aligned {
                    self.shared.gate.queue_exclusive();
                    self.parked.push_back(Parked {
                        op,
                        exclusive: true,
                    });
                } else if self.shared.gate.try_enter_shared(&self.waker) {
                    self.start_plain(op, true);
                } else {
                    self.parked.push_back(Parked {
                        op,
                        exclusive: false,
                    });
                }
            }
            // Into the page cache: a copy, not worth a thread of the kernel's.
            IoKind::Write if op.length < COPY_BYTES => self.done.push(self.shared.run(op)),
            _ => self.start_plain(op, false),
        }
    }

    fn start_plain(&mut self, mut op: IoOp, holds_gate: bool) {
        let pointer = op.buf.as_mut_raw();
        // Checked in `start`: a buffer of more than 4 GiB cannot come from anywhere.
        let length = u32::try_from(op.length).unwrap_or(u32::MAX);
        let mut expected = length as usize;
        let entry = match op.kind {
            IoKind::Read => opcode::Read::new(MAIN, pointer, length)
                .offset(op.offset)
                .build(),
            IoKind::Write => opcode::Write::new(MAIN, pointer, length)
                .offset(op.offset)
                .build(),
            IoKind::Sync => {
                expected = 0;
                opcode::Fsync::new(MAIN)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build()
            }
            IoKind::WriteZeroes { .. } | IoKind::Discard => {
                expected = 0;
                let punch = !matches!(op.kind, IoKind::WriteZeroes { punch: false });
                #[expect(clippy::cast_possible_wrap, reason = "flags")]
                let mode = zeroes_flags(punch).bits() as i32;
                opcode::Fallocate::new(MAIN, op.length)
                    .offset(op.offset)
                    .mode(mode)
                    .build()
            }
        };
        let slot = Slot {
            op,
            bounce: None,
            holds_gate,
            expected,
        };
        self.start_entry(entry, slot);
    }

    fn start_bounced_read(&mut self, op: IoOp) {
        let length = usize_of(op.length);
        let (start, wide) = self.shared.widened(op.offset, length);
        let mut bounce = IoBuf::zeroed(wide);
        let pointer = bounce.as_mut_raw();
        let wide = u32::try_from(wide).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(MAIN, pointer, wide).offset(start).build();
        let skip = usize_of(op.offset - start);
        let slot = Slot {
            op,
            bounce: Some((bounce, skip)),
            holds_gate: false,
            expected: skip + length,
        };
        self.start_entry(entry, slot);
    }

    #[expect(
        clippy::expect_used,
        reason = "the callers made sure; a lost request would be worse"
    )]
    fn start_entry(&mut self, entry: squeue::Entry, slot: Slot) {
        let index = self.free.pop().expect("a slot is free");
        self.slots[index] = Some(slot);
        let entry = entry.user_data(index as u64);
        // SAFETY: the buffers that `entry` points to are in the slot, which is emptied only after
        // the completion, and `Drop` waits for that.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring has an entry per slot");
    }

    /// Tries what waits for the gate again, in order.
    fn retry_parked(&mut self) {
        for _ in 0..self.parked.len() {
            let Some(Parked { op, exclusive }) = self.parked.pop_front() else {
                return;
            };
            if exclusive {
                let shared = Arc::clone(&self.shared);
                match shared.gate.try_exclusive(&self.waker) {
                    Some(_alone) => self.done.push(shared.run_unaligned_write(op)),
                    None => self.parked.push_back(Parked { op, exclusive }),
                }
            } else if !self.free.is_empty() && self.shared.gate.try_enter_shared(&self.waker) {
                self.start_plain(op, true);
            } else {
                self.parked.push_back(Parked { op, exclusive });
            }
        }
    }

    /// Lets the ring's descriptor become readable when the gate opens.
    fn arm_waker(&mut self) {
        if self.wake_armed || self.parked.is_empty() {
            return;
        }
        let fd = types::Fd(self.waker.fd().as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_count.as_mut_ptr(), 8)
            .build()
            .user_data(WAKE_ID);
        // SAFETY: the eight bytes are on the heap and live until `Drop` has waited for this read.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        self.wake_armed = pushed.is_ok();
    }

    /// Hands entries to the kernel, waits for `wait_for` completions.
    fn enter(&mut self, wait_for: u32) -> io::Result<()> {
        loop {
            let waiting = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
            // IORING_ENTER_GETEVENTS: process completions even when not waiting for any.
            let flags = 1;
            // SAFETY: no signal mask is given, and the entries' memory is kept as `start_entry`
            // says.
            let result = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(waiting, wait_for, flags, None)
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No memory at the moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => thread::yield_now(),
                // The completion queue is full: reaping makes room, and the caller comes back.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                // The kernel stopped in the middle.
                Ok(_) => {}
            }
        }
    }

    fn reap(&mut self) {
        let mut ended = std::mem::take(&mut self.done);
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE_ID {
                self.wake_armed = false;
                continue;
            }
            let index = usize_of(entry.user_data());
            let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.free.push(index);
            match finish(&self.shared, slot, entry.result()) {
                Ended::Done(done) => ended.push(done),
                Ended::Again(op) => self.slow.push(op),
            }
        }
        self.done = ended;
        if !self.slow.is_empty() && self.in_flight() == 0 {
            for op in self.slow.drain(..) {
                self.done.push(self.shared.run(op));
            }
        }
    }

    fn has_events(&mut self) -> bool {
        self.ring.submission().taskrun()
    }
}

enum Ended {
    Done(IoDone),
    /// By a plain call, which has the ways around and the last word. For a write that was cut short
    /// it is the same bytes once more.
    Again(IoOp),
}

/// Turns a completion into the request's end.
fn finish(shared: &Shared, mut slot: Slot, result: i32) -> Ended {
    if slot.holds_gate {
        shared.gate.leave_shared();
    }
    let IoOp { id, .. } = slot.op;
    let result = match usize::try_from(result) {
        Ok(bytes) if bytes >= slot.expected => Ok(()),
        Ok(_) => return Ended::Again(slot.op),
        Err(_) => match -result {
            libc::EINVAL | libc::EOPNOTSUPP | libc::EINTR | libc::EAGAIN => {
                return Ended::Again(slot.op);
            }
            code => Err(io::Error::from_raw_os_error(code)),
        },
    };
    if let (Ok(()), Some((bounce, skip))) = (&result, slot.bounce) {
        let length = usize_of(slot.op.length);
        slot.op.buf[..length].copy_from_slice(&bounce[skip..skip + length]);
    }
    Ended::Done(IoDone {
        id,
        result,
        buf: slot.op.buf,
    })
}

impl IoQueue for UringQueue {
    fn push(&mut self, op: IoOp) {
        self.pushed.push_back(op);
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.parked.is_empty() {
            self.retry_parked();
        }
        // What has to be done by plain calls waits for an empty ring, so nothing new goes in.
        while !self.free.is_empty() && self.slow.is_empty() {
            let Some(op) = self.pushed.pop_front() else {
                break;
            };
            self.start(op);
        }
        if !self.parked.is_empty() {
            // Some that were parked just now may go already.
            self.retry_parked();
            self.arm_waker();
        }
        if self.ring.submission().is_empty() {
            Ok(())
        } else {
            self.enter(0)
        }
    }

    fn submit_inline(&mut self) -> io::Result<()> {
        if self.in_flight() == 0
            && self.parked.is_empty()
            && self.pushed.len() == 1
            && let Some(op) = self.pushed.pop_front()
        {
            self.done.push(self.shared.run(op));
            return Ok(());
        }
        self.submit()
    }

    fn completions(&mut self, out: &mut Vec<IoDone>) {
        // When this fails the completions come at the next `submit`, which reports the error.
        if self.has_events() {
            let _ = self.enter(0);
        }
        self.reap();
        if !(self.pushed.is_empty() && self.parked.is_empty()) {
            // There may be room now.
            let _ = self.submit();
        }
        out.append(&mut self.done);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring keeps its descriptor open for as long as it lives, and the result
        // borrows it.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        for parked in &self.parked {
            if parked.exclusive {
                self.shared.gate.abandon_exclusive();
            }
        }
        if self.wake_armed {
            self.waker.wake();
        }
        while self.in_flight() > 0 || self.wake_armed {
            if self.enter(1).is_err() {
                // The kernel may still write into those buffers: better lost than reused.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(std::mem::take(&mut self.wake_count));
                return;
            }
            self.reap();
        }
    }
}
