//! The relay's thread: poll, accept, read into the link, write out what is due.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::TcpListener,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use flimcd_core::Time;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
};
use socket2::SockRef;

use super::{
    Cut, RelayCounters, RelayOptions, Route,
    conn::{Conn, Received, Segment},
    new_socket, tune,
};
use crate::wan::{Link, LinkModel, Side, Verdict};

/// Shortest sleep between two looks: a busy link is served in portions this long, which costs
/// little CPU and stays well below a millisecond.
const TICK: Duration = Duration::from_micros(200);
/// Longest sleep: only commands and new connections wake an idle relay earlier.
const IDLE: Duration = Duration::from_secs(5);
/// What the link holds ahead at least while there is something to send, so that it never idles
/// between two looks.
const LEAD: Duration = Duration::from_millis(1);
/// Bytes are taken this much faster than the link carries them, in per cent, and so the queue fills.
const FILL_PERCENT: u64 = 1;
/// How much of its turn a late look may make up for.
const CREDIT: Duration = Duration::from_millis(5);
/// Vectors kept for reuse.
const SPARE_BUFFERS_MAX: usize = 256;
/// On its way at most, per direction, whatever the rate and delay say.
const IN_FLIGHT_BYTES_MAX: u64 = 256 << 20;

/// What the [`super::Relay`] asks for.
pub(super) enum Command {
    Cut(Option<Cut>, mpsc::Sender<()>),
    Model(LinkModel, mpsc::Sender<()>),
    Stop,
}

/// One direction: the link and what is on it.
struct Direction {
    link: Link,
    on_the_way: VecDeque<(Time, u64, Segment)>,
    on_the_way_bytes: u64,
    /// Connection that was served last: the next one has its turn first.
    last_served: u64,
    /// When the next bytes may be taken, beyond what keeps the link busy.
    take_at: Time,
}

impl Direction {
    /// Bytes read at once: about a tick's worth.
    fn portion(&self) -> u64 {
        (self.link.model().rate_bytes_per_sec() / 4000).clamp(1448, 64 << 10)
    }

    /// From when on a portion may be read.
    fn room_at(&self) -> Time {
        let portion = self.portion();
        let model = self.link.model();
        let lead = model.rate_bytes_per_sec() / 1000 * u64::from(LEAD.subsec_millis());
        let limit = model.queue_limit_bytes().saturating_sub(portion);
        let keeps_busy = self.link.drained_at(lead.min(limit));
        keeps_busy.min(self.take_at.max(self.link.room_at(portion)))
    }

    /// `len` bytes were taken at `now`.
    fn took(&mut self, now: Time, len: u64) {
        let turn = self
            .link
            .model()
            .transmission(len * 100 / (100 + FILL_PERCENT));
        let earliest = Time(now.0.saturating_sub(u64::from(CREDIT.subsec_nanos())));
        self.take_at = self.take_at.max(earliest) + turn;
    }
}

pub(super) struct Engine {
    start: Instant,
    routes: Vec<Route>,
    listeners: Vec<TcpListener>,
    inbox: mpsc::Receiver<Command>,
    wake: Arc<OwnedFd>,
    shared: Arc<Mutex<RelayCounters>>,
    counters: RelayCounters,
    /// By number of the connection, so that turns have an order.
    conns: BTreeMap<u64, Conn>,
    next_conn: u64,
    /// Indexed by the side that sends.
    directions: [Direction; 2],
    cut: Option<Cut>,
    spare: Vec<Vec<u8>>,
    is_stopping: bool,
}

/// What a poll entry stands for.
enum Polled {
    Wake,
    Listener(usize),
    Conn(u64, Side),
}

impl Engine {
    pub(super) fn new(
        options: &RelayOptions,
        listeners: Vec<TcpListener>,
        inbox: mpsc::Receiver<Command>,
        wake: Arc<OwnedFd>,
        shared: Arc<Mutex<RelayCounters>>,
    ) -> Self {
        let model = relayable(options.model);
        let direction = |salt| Direction {
            link: Link::new(model, options.seed ^ salt),
            on_the_way: VecDeque::new(),
            on_the_way_bytes: 0,
            last_served: 0,
            take_at: Time::ZERO,
        };
        Self {
            start: Instant::now(),
            routes: options.routes.clone(),
            listeners,
            inbox,
            wake,
            shared,
            counters: RelayCounters::default(),
            conns: BTreeMap::new(),
            next_conn: 1,
            directions: [direction(0), direction(1 << 63)],
            cut: None,
            spare: Vec::new(),
            is_stopping: false,
        }
    }

    pub(super) fn run(mut self) {
        crate::wan::prefer_this_thread();
        while !self.is_stopping {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "the WAN relay cannot poll; it stops");
                break;
            }
            self.obey();
            if self.cut != Some(Cut::BlackHole) {
                // One time for both: a byte that is due must find its target connected.
                let now = self.now();
                self.open_due(now);
                self.deliver_due(Side::A, now);
                self.deliver_due(Side::B, now);
                self.receive(Side::A);
                self.receive(Side::B);
                self.conns.retain(|_, conn| !conn.is_over());
            }
            self.spare.truncate(SPARE_BUFFERS_MAX);
            self.publish();
        }
        self.reset_all();
    }

    fn now(&self) -> Time {
        Time::ZERO + self.start.elapsed()
    }

    /// Sleeps until a socket, a command or a time needs attention, and notes what it was.
    fn wait(&mut self) -> io::Result<()> {
        let now = self.now();
        let mut polled = vec![Polled::Wake];
        let mut ready = Vec::new();
        {
            let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
            if self.cut != Some(Cut::BlackHole) {
                for (index, listener) in self.listeners.iter().enumerate() {
                    polled.push(Polled::Listener(index));
                    fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
                }
                for (&number, conn) in &self.conns {
                    for side in [Side::A, Side::B] {
                        let mut flags = PollFlags::empty();
                        flags.set(PollFlags::IN, conn.wants_poll_read(side, now));
                        flags.set(PollFlags::OUT, conn.wants_write(side));
                        if let Some(socket) = conn.socket(side).filter(|_| !flags.is_empty()) {
                            polled.push(Polled::Conn(number, side));
                            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), flags));
                        }
                    }
                }
            }
            let timeout = self.sleep_at_most(now);
            let timeout = Timespec {
                tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(timeout.subsec_nanos()),
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) => ready.extend(fds.iter().map(PollFd::revents)),
                Err(rustix::io::Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        for (what, events) in polled.iter().zip(ready).filter(|(_, e)| !e.is_empty()) {
            self.note(what, events);
        }
        Ok(())
    }

    fn note(&mut self, what: &Polled, events: PollFlags) {
        match *what {
            Polled::Wake => {
                let mut count = [0u8; 8];
                let _ = rustix::io::read(&*self.wake, &mut count);
            }
            Polled::Listener(index) => self.accept(index),
            Polled::Conn(number, side) => {
                let Some(conn) = self.conns.get_mut(&number) else {
                    return;
                };
                if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                    conn.set_readable(side);
                }
                if events.contains(PollFlags::OUT)
                    && let Some(reset) = conn.flush(side, &mut self.spare)
                {
                    self.send(side, number, reset);
                }
            }
        }
    }

    /// Time until something is due, but not less than a tick when a timer asks for it.
    fn sleep_at_most(&self, now: Time) -> Duration {
        if self.cut == Some(Cut::BlackHole) {
            return IDLE;
        }
        let mut next = now + IDLE;
        for side in [Side::A, Side::B] {
            let direction = &self.directions[side.index()];
            if let Some((at, ..)) = direction.on_the_way.front() {
                next = next.min(*at);
            }
            if self.conns.values().any(|conn| conn.wants_read(side, now)) {
                next = next.min(direction.room_at());
            }
        }
        for conn in self.conns.values() {
            next = conn.connect_at.map_or(next, |at| next.min(at));
            if now < conn.read_from {
                next = next.min(conn.read_from);
            }
        }
        next.since(now).max(TICK)
    }

    fn obey(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Stop => self.is_stopping = true,
                Command::Model(model, done) => {
                    let model = relayable(model);
                    for direction in &mut self.directions {
                        direction.link.set_model(model);
                    }
                    let _ = done.send(());
                }
                Command::Cut(cut, done) => {
                    self.set_cut(cut);
                    let _ = done.send(());
                }
            }
        }
    }

    fn set_cut(&mut self, cut: Option<Cut>) {
        self.cut = cut;
        if cut == Some(Cut::Reset) {
            self.reset_all();
        }
    }

    fn reset_all(&mut self) {
        for conn in self.conns.values_mut() {
            conn.abort(Side::A);
            conn.abort(Side::B);
        }
        self.conns.clear();
        for direction in &mut self.directions {
            direction.on_the_way.clear();
            direction.on_the_way_bytes = 0;
        }
    }

    fn accept(&mut self, index: usize) {
        while let Ok((client, _)) = self.listeners[index].accept() {
            let socket = SockRef::from(&client);
            if self.cut == Some(Cut::Reset) || client.set_nonblocking(true).is_err() {
                let _ = socket.set_linger(Some(Duration::ZERO));
                continue;
            }
            tune(&socket);
            let from = self.routes[index].from;
            let delay = self.directions[from.index()].link.model().delay;
            let now = self.now();
            self.counters.connections += 1;
            let conn = Conn::new(client, from, index, now + delay * 2, now + delay * 3);
            self.conns.insert(self.next_conn, conn);
            self.next_conn += 1;
        }
    }

    /// Connects to the targets of connections whose handshake has come that far.
    fn open_due(&mut self, now: Time) {
        for conn in self.conns.values_mut() {
            if conn.connect_at.is_none_or(|at| at > now) {
                continue;
            }
            let target = self.routes[conn.route].target;
            let model = self.directions[0].link.model();
            let opened =
                new_socket(target, model).and_then(|socket| match socket.connect(&target.into()) {
                    Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
                    _ => Ok(socket),
                });
            match opened {
                Ok(socket) => conn.set_connected(socket.into()),
                Err(error) => {
                    tracing::warn!(%error, %target, "the relay's target cannot be reached");
                    self.counters.connections_failed += 1;
                    conn.connect_at = None;
                    conn.abort(Side::A);
                    conn.abort(Side::B);
                }
            }
        }
    }

    /// Hands over everything that `from` sent and that has arrived by now.
    fn deliver_due(&mut self, from: Side, now: Time) {
        loop {
            let direction = &mut self.directions[from.index()];
            if direction
                .on_the_way
                .front()
                .is_none_or(|(at, ..)| *at > now)
            {
                return;
            }
            let Some((_, number, segment)) = direction.on_the_way.pop_front() else {
                return;
            };
            direction.on_the_way_bytes -= segment.len();
            let Some(conn) = self.conns.get_mut(&number) else {
                continue;
            };
            if let Some(reset) = conn.deliver(from.other(), segment, &mut self.spare) {
                self.send(from.other(), number, reset);
            }
        }
    }

    /// Reads from the connections of `from` in turns while the link has room.
    fn receive(&mut self, from: Side) {
        loop {
            let now = self.now();
            let direction = &self.directions[from.index()];
            let portion = direction.portion();
            let is_full =
                direction.room_at() > now || direction.on_the_way_bytes >= IN_FLIGHT_BYTES_MAX;
            if is_full {
                return;
            }
            let after = direction.last_served;
            let ready = |(_, conn): &(&u64, &Conn)| conn.wants_read(from, now);
            let turn = self
                .conns
                .range(after + 1..)
                .find(ready)
                .or_else(|| self.conns.range(..=after).find(ready))
                .map(|(&number, _)| number);
            let Some(number) = turn else { return };
            self.directions[from.index()].last_served = number;
            let Some(conn) = self.conns.get_mut(&number) else {
                return;
            };
            let max = usize::try_from(portion).unwrap_or(usize::MAX);
            if let Received::Segment(segment) = conn.read(from, max, &mut self.spare) {
                self.send(from, number, segment);
            }
        }
    }

    /// Puts a segment of connection `number` on the link.
    fn send(&mut self, from: Side, number: u64, segment: Segment) {
        let now = self.now();
        let direction = &mut self.directions[from.index()];
        direction.took(now, segment.len());
        // A relayable link drops nothing but what finds no room. Data is only read when there is
        // room for a whole portion, and an end of data must get through, so it has no length.
        let at = match direction.link.offer(now, segment.len()) {
            Verdict::Deliver(at) => at,
            Verdict::Drop(_) => now + direction.link.model().delay,
        };
        let at = direction
            .on_the_way
            .back()
            .map_or(at, |(last, ..)| at.max(*last));
        direction.on_the_way_bytes += segment.len();
        direction.on_the_way.push_back((at, number, segment));
    }

    fn publish(&mut self) {
        self.counters.a_to_b = self.directions[0].link.counters();
        self.counters.b_to_a = self.directions[1].link.counters();
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = self.counters;
    }
}

impl Segment {
    fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Fin | Self::Reset => 0,
        }
    }
}

/// The model without what a relay cannot do.
fn relayable(model: LinkModel) -> LinkModel {
    LinkModel {
        loss: 0.0,
        reorder: 0.0,
        ..model
    }
}
