//! The router: one thread per direction reads packets from one device, asks the link, and writes
//! them to the other device when they are due.
//!
//! While packets flow the thread looks every tick and handles what came since, because waking up
//! for each packet would cost more than the packet. An idle link wakes it up at once, so that a
//! lone packet is not late.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use flimcd_core::Time;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{NamespaceOptions, RouterCounters, TunDevice};
use crate::wan::{Link, LinkModel, Side, Verdict};

/// Time between two looks while packets flow.
const TICK: Duration = Duration::from_micros(200);
/// Longest sleep of an idle router.
const IDLE: Duration = Duration::from_secs(5);
/// So many packets on the way are delivered each at its time; more of them tick by tick.
const FEW_PACKETS: usize = 8;
/// Packets read before due ones are written again.
const BATCH: usize = 64;
/// A packet this much behind its time counts as late.
const LATE: Duration = Duration::from_millis(1);

/// What the owner of the router and its threads share.
#[derive(Debug)]
pub(super) struct Control {
    /// Indexed by the side that sends.
    directions: [Mutex<Shared>; 2],
}

#[derive(Debug)]
struct Shared {
    link: Link,
    /// Counts cuts: packets on the way at one are lost.
    cuts: u64,
    is_stopping: bool,
    late: u64,
    refused: u64,
}

impl Control {
    pub(super) fn new(options: &NamespaceOptions) -> Self {
        let shared = |salt| {
            let link = Link::new(options.model, options.seed ^ salt);
            Mutex::new(Shared {
                link,
                cuts: 0,
                is_stopping: false,
                late: 0,
                refused: 0,
            })
        };
        Self {
            directions: [shared(0), shared(1 << 63)],
        }
    }

    fn lock(&self, from: Side) -> MutexGuard<'_, Shared> {
        self.directions[from.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counters(&self) -> RouterCounters {
        let (a, b) = (self.lock(Side::A), self.lock(Side::B));
        RouterCounters {
            a_to_b: a.link.counters(),
            b_to_a: b.link.counters(),
            late: a.late + b.late,
            refused: a.refused + b.refused,
        }
    }

    pub(super) fn set_cut(&self, is_cut: bool) {
        for side in [Side::A, Side::B] {
            let mut shared = self.lock(side);
            shared.link.set_cut(is_cut);
            shared.cuts += u64::from(is_cut);
        }
    }

    pub(super) fn set_model(&self, model: LinkModel) {
        for side in [Side::A, Side::B] {
            self.lock(side).link.set_model(model);
        }
    }
}

/// A thread that forwards one direction; stops when dropped.
#[derive(Debug)]
pub(super) struct Router {
    from: Side,
    control: Arc<Control>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    pub(super) fn start(
        from: Side,
        input: Arc<TunDevice>,
        output: Arc<TunDevice>,
        options: &NamespaceOptions,
        control: Arc<Control>,
    ) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let direction = Direction {
            from,
            input,
            output,
            control: Arc::clone(&control),
            wake: Arc::clone(&wake),
            start: Instant::now(),
            buffer: vec![0; usize::from(options.mtu)],
            on_the_way: VecDeque::new(),
            held_back: BinaryHeap::new(),
            spare: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("wan-{from:?}"))
            .spawn(move || direction.run())?;
        Ok(Self {
            from,
            control,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.control.lock(self.from).is_stopping = true;
        let _ = rustix::io::write(&*self.wake, &[1; 8]);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the WAN router panicked");
        }
    }
}

/// A packet and when it is due.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    at: Time,
    /// Cuts so far when it came onto the link.
    cuts: u64,
    bytes: Vec<u8>,
}

struct Direction {
    from: Side,
    input: Arc<TunDevice>,
    output: Arc<TunDevice>,
    control: Arc<Control>,
    wake: Arc<OwnedFd>,
    start: Instant,
    buffer: Vec<u8>,
    /// In order of their times.
    on_the_way: VecDeque<Packet>,
    /// Those that others overtake.
    held_back: BinaryHeap<Reverse<Packet>>,
    spare: Vec<Vec<u8>>,
}

impl Direction {
    fn run(mut self) {
        crate::wan::prefer_this_thread();
        loop {
            let read = match self.receive() {
                Ok(read) => read,
                Err(error) => {
                    tracing::error!(%error, from = ?self.from, "the WAN router cannot read; it stops");
                    return;
                }
            };
            self.deliver_due();
            if read == BATCH {
                continue;
            }
            if self.control.lock(self.from).is_stopping {
                return;
            }
            self.wait(read > 0);
        }
    }

    fn now(&self) -> Time {
        Time::ZERO + self.start.elapsed()
    }

    /// Takes a batch of packets from the device onto the link; says how many.
    fn receive(&mut self) -> io::Result<usize> {
        let control = Arc::clone(&self.control);
        let mut shared = None;
        for read in 0..BATCH {
            let Some(length) = self.input.read(&mut self.buffer)? else {
                return Ok(read);
            };
            let now = self.now();
            let shared = shared.get_or_insert_with(|| control.lock(self.from));
            let Verdict::Deliver(at) = shared.link.offer(now, length as u64) else {
                continue;
            };
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            bytes.extend_from_slice(&self.buffer[..length]);
            let packet = Packet {
                at,
                cuts: shared.cuts,
                bytes,
            };
            if self.on_the_way.back().is_none_or(|last| last.at <= at) {
                self.on_the_way.push_back(packet);
            } else {
                self.held_back.push(Reverse(packet));
            }
        }
        Ok(BATCH)
    }

    /// Writes everything that is due. Packets that were on the way at a cut are lost.
    fn deliver_due(&mut self) {
        let now = self.now();
        if self.next_due().is_none_or(|at| at > now) {
            return;
        }
        let cuts = self.control.lock(self.from).cuts;
        let (mut late, mut refused) = (0, 0);
        while let Some(packet) = self.pop_due(now) {
            late += u64::from(now.since(packet.at) > LATE);
            if packet.cuts == cuts
                && let Err(error) = self.output.write(&packet.bytes)
            {
                tracing::trace!(%error, "a packet was refused");
                refused += 1;
            }
            self.spare.push(packet.bytes);
        }
        if late + refused > 0 {
            let mut shared = self.control.lock(self.from);
            shared.late += late;
            shared.refused += refused;
        }
    }

    fn next_due(&self) -> Option<Time> {
        let in_order = self.on_the_way.front().map(|packet| packet.at);
        let held_back = self.held_back.peek().map(|packet| packet.0.at);
        in_order.into_iter().chain(held_back).min()
    }

    fn pop_due(&mut self, now: Time) -> Option<Packet> {
        let next = self.next_due().filter(|at| *at <= now)?;
        if self
            .on_the_way
            .front()
            .is_some_and(|packet| packet.at == next)
        {
            self.on_the_way.pop_front()
        } else {
            self.held_back.pop().map(|packet| packet.0)
        }
    }

    /// Sleeps until something is due or comes in; while packets flow, not less than a tick.
    fn wait(&self, is_flowing: bool) {
        if is_flowing {
            std::thread::sleep(TICK);
            return;
        }
        let mut wait = self.next_due().map_or(IDLE, |at| at.since(self.now()));
        if self.on_the_way.len() > FEW_PACKETS {
            wait = wait.max(TICK);
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.input.fd(), PollFlags::IN),
            PollFd::new(&*self.wake, PollFlags::IN),
        ];
        // Whatever woke it up, it looks at everything.
        let _ = poll(&mut fds, Some(&timeout));
    }
}
