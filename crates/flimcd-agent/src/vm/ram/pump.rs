//! The task of a pump: one loop over the link's messages and the hypervisor's connections.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use flimcd_content::{Effort, StreamPacker, StreamUnpacker};
use flimcd_core::{MigrationId, Time};
use flimcd_migrate::stream::{Delivery, StreamError, Streams};
use flimcd_wire::{Class, Message, VmMessage};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc::{UnboundedReceiver, UnboundedSender},
};

use super::{PumpEvent, PumpStats, READ_BYTES, lock};
use crate::{
    links::{LinkInput, PeerLink},
    migration::port::LinkPort,
};

/// Parts that one connection is given before the others have their turn.
const DELIVERIES_AT_ONCE: usize = 8;
/// Messages that are worked off before the connections have their turn.
const MESSAGES_AT_ONCE: usize = 32;

/// How connections to the hypervisor come about.
pub(super) enum Role {
    /// It connects here.
    Listen(UnixListener),
    /// It listens there.
    Connect(PathBuf),
}

/// See the module.
pub(super) struct Task {
    port: LinkPort,
    streams: Streams,
    role: Role,
    /// The connections, in the order of their streams.
    pipes: Vec<Pipe>,
    events: UnboundedSender<PumpEvent>,
    stats: Arc<Mutex<PumpStats>>,
    began: Instant,
    has_finished: bool,
    scratch: Vec<u8>,
}

impl Task {
    pub(super) fn new(
        link: Arc<PeerLink>,
        session: MigrationId,
        attempt: u32,
        role: Role,
        events: UnboundedSender<PumpEvent>,
        stats: Arc<Mutex<PumpStats>>,
    ) -> Self {
        let streams = match role {
            Role::Listen(_) => Streams::opening(attempt),
            Role::Connect(_) => Streams::following(attempt),
        };
        Self {
            port: LinkPort::new(link, session),
            streams,
            role,
            pipes: Vec::new(),
            events,
            stats,
            began: Instant::now(),
            has_finished: false,
            scratch: vec![0; READ_BYTES],
        }
    }

    /// Runs until something breaks, and says what.
    pub(super) async fn run(&mut self, mut inputs: UnboundedReceiver<LinkInput>) -> String {
        loop {
            match self.turn(&mut inputs).await {
                Ok(true) => {}
                Ok(false) => return "nobody looks after it any more".to_owned(),
                Err(text) => return text,
            }
        }
    }

    /// Waits for something to do, and does it; false when the pump's owner is gone.
    async fn turn(&mut self, inputs: &mut UnboundedReceiver<LinkInput>) -> Result<bool, String> {
        let due = self.streams.poll_timeout();
        let timer = async {
            match due {
                Some(due) => {
                    let at = self.began + Duration::from_nanos(due.0);
                    tokio::time::sleep_until(at.into()).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            input = inputs.recv() => {
                let Some(input) = input else { return Ok(false) };
                self.handle(input)?;
                for _ in 0..MESSAGES_AT_ONCE {
                    let Ok(input) = inputs.try_recv() else { break };
                    self.handle(input)?;
                }
            }
            accepted = accept(&self.role) => self.handle_accepted(accepted)?,
            () = ready(&self.pipes) => {}
            () = self.port.room() => {}
            () = timer => {}
        }
        self.connect_opened().await?;
        self.work()?;
        Ok(true)
    }

    fn now(&self) -> Time {
        Time::ZERO + self.began.elapsed()
    }

    fn handle(&mut self, input: LinkInput) -> Result<(), String> {
        match input {
            LinkInput::Up(generation) => {
                self.port.set_up(generation);
                self.streams.handle_link_up();
            }
            LinkInput::Down => {
                self.port.set_down();
                self.streams.handle_link_down();
            }
            LinkInput::Message(Message::Vm(message), _credit) => {
                // The window bounds what is held here, so that the link is never held up.
                match self.streams.handle_message(message) {
                    Err(StreamError::Attempt { got, expected }) if got < expected => {}
                    result => result.map_err(|error| {
                        format!("the peer's stream of running state makes no sense: {error}")
                    })?,
                }
            }
            LinkInput::Message(..) => {}
        }
        Ok(())
    }

    fn handle_accepted(&mut self, accepted: io::Result<UnixStream>) -> Result<(), String> {
        let socket = accepted
            .map_err(|error| format!("waiting for the hypervisor's connection failed: {error}"))?;
        let Some(stream) = self.streams.open() else {
            tracing::warn!("the hypervisor opens more connections than can be carried");
            return Ok(());
        };
        self.add(stream, socket)
    }

    async fn connect_opened(&mut self) -> Result<(), String> {
        while let Some(stream) = self.streams.poll_opened() {
            let Role::Connect(path) = &self.role else {
                unreachable!("only a following side is told of streams");
            };
            let connected = UnixStream::connect(path).await;
            let socket = connected.map_err(|error| {
                let path = path.display();
                format!("connecting to the hypervisor at {path} failed: {error}")
            })?;
            self.add(stream, socket)?;
        }
        Ok(())
    }

    fn add(&mut self, stream: u8, socket: UnixStream) -> Result<(), String> {
        // The source's first stream has the memory. The others, and what the target says, are small and urgent.
        let effort = match self.role {
            Role::Listen(_) if stream == 0 => {
                let handle = self.port.link().handle();
                Effort::for_rate(handle.estimate().rate_bytes_per_sec)
            }
            _ => Effort::Small,
        };
        let pipe = Pipe::new(socket, effort)
            .map_err(|error| format!("preparing to pack the running state failed: {error}"))?;
        self.pipes.push(pipe);
        let _ = self.events.send(PumpEvent::Opened { stream });
        Ok(())
    }

    /// Reads, sends and writes as much as is there and fits, a bounded amount.
    fn work(&mut self) -> Result<(), String> {
        for (number, pipe) in (0..).zip(&mut self.pipes) {
            let stream = self.streams.stream(number);
            pipe.wants_read = pipe.may_read && stream.wants_more();
            if pipe.wants_read {
                match pipe.read(&mut self.scratch) {
                    Taken::Part { bytes, packed } => {
                        let mut stats = lock(&self.stats);
                        stats.bytes_in += bytes as u64;
                        stats.bytes_packed += packed.len() as u64;
                        drop(stats);
                        stream.push(packed.into());
                        pipe.wants_read = stream.wants_more();
                    }
                    Taken::Nothing => {}
                    Taken::End => stream.push_end(),
                    Taken::Failed(text) => return Err(text),
                }
            }
        }
        self.transmit();
        self.deliver()?;
        // Acknowledgements of what was delivered, and what now fits.
        self.transmit();
        let sums = self.streams.stats();
        let mut stats = lock(&self.stats);
        stats.bytes_acked = sums.acked_bytes;
        stats.bytes_arrived = sums.delivered_bytes;
        drop(stats);
        if !self.has_finished && self.streams.is_finished() {
            self.has_finished = true;
            let _ = self.events.send(PumpEvent::Finished);
        }
        Ok(())
    }

    fn transmit(&mut self) {
        let (now, streams) = (self.now(), &mut self.streams);
        self.port.transmit(|has_room: &dyn Fn(Class) -> bool| {
            let (class, message): (Class, VmMessage) = streams.poll_transmit(now, has_room)?;
            Some((class, Message::Vm(message)))
        });
        for (number, pipe) in (0..).zip(&mut self.pipes) {
            pipe.wants_read = pipe.may_read && self.streams.stream(number).wants_more();
        }
    }

    fn deliver(&mut self) -> Result<(), String> {
        let now = self.now();
        for (number, pipe) in (0..).zip(&mut self.pipes) {
            let stream = self.streams.stream(number);
            for _ in 0..DELIVERIES_AT_ONCE {
                if !pipe.is_writing() {
                    match stream.poll_delivery() {
                        Some(Delivery::Part(part)) => pipe.unpack(&part)?,
                        Some(Delivery::End) => pipe.end(),
                        None => break,
                    }
                }
                match pipe.write() {
                    Ok(bytes) => lock(&self.stats).bytes_out += bytes as u64,
                    Err(error) => {
                        pipe.is_closed = true;
                        let _ = self.events.send(PumpEvent::Closed {
                            stream: number,
                            error: error.to_string(),
                        });
                    }
                }
                if pipe.is_writing() && !pipe.is_closed {
                    break;
                }
                pipe.out.clear();
                pipe.written = 0;
                pipe.has_output = false;
                stream.handle_delivered(now);
            }
            // More than one turn allows is there.
            pipe.has_more = !pipe.is_writing() && stream.has_delivery();
        }
        Ok(())
    }
}

/// What came of reading.
enum Taken {
    Part { bytes: usize, packed: Vec<u8> },
    Nothing,
    End,
    Failed(String),
}

/// A connection with the hypervisor.
struct Pipe {
    socket: UnixStream,
    packer: StreamPacker,
    unpacker: StreamUnpacker,
    /// The hypervisor has not ended its direction.
    may_read: bool,
    /// What it says can be taken.
    wants_read: bool,
    /// A part, unpacked, of which `written` bytes are with the hypervisor.
    out: Vec<u8>,
    written: usize,
    has_output: bool,
    /// There is more to write than was done in the last turn.
    has_more: bool,
    /// The hypervisor takes nothing more.
    is_closed: bool,
}

impl Pipe {
    fn new(socket: UnixStream, effort: Effort) -> io::Result<Self> {
        Ok(Self {
            socket,
            packer: StreamPacker::new(effort)?,
            unpacker: StreamUnpacker::new()?,
            may_read: true,
            wants_read: true,
            out: Vec::new(),
            written: 0,
            has_output: false,
            has_more: false,
            is_closed: false,
        })
    }

    /// Takes what the hypervisor says.
    fn read(&mut self, scratch: &mut [u8]) -> Taken {
        match self.socket.try_read(scratch) {
            Ok(bytes @ 1..) => match self.packer.pack(&scratch[..bytes]) {
                Ok(packed) => Taken::Part { bytes, packed },
                Err(error) => Taken::Failed(format!("packing the running state failed: {error}")),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Taken::Nothing,
            end => {
                // A hypervisor that dies with bytes unread resets the connection; that is an end as well.
                tracing::debug!(?end, "the hypervisor ended its direction");
                self.may_read = false;
                self.wants_read = false;
                Taken::End
            }
        }
    }

    fn unpack(&mut self, part: &[u8]) -> Result<(), String> {
        self.written = 0;
        self.has_output = true;
        self.unpacker
            .unpack(part, &mut self.out, READ_BYTES)
            .map_err(|error| format!("the peer's stream of running state is wrong: {error}"))
    }

    fn end(&mut self) {
        // It may have closed its end already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
    }

    const fn is_writing(&self) -> bool {
        self.has_output && self.written < self.out.len()
    }

    /// Writes what the hypervisor takes; how many bytes.
    fn write(&mut self) -> io::Result<usize> {
        let before = self.written;
        while self.is_writing() && !self.is_closed {
            match self.socket.try_write(&self.out[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.written - before)
    }

    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.has_more
            || self.wants_read && self.socket.poll_read_ready(cx).is_ready()
            || self.is_writing() && !self.is_closed && self.socket.poll_write_ready(cx).is_ready()
        {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

/// Waits until a connection can be read or written that has to be.
async fn ready(pipes: &[Pipe]) {
    std::future::poll_fn(|cx| {
        // All of them, so that each knows whom to wake.
        let mut is_ready = false;
        for pipe in pipes {
            is_ready |= pipe.poll_ready(cx).is_ready();
        }
        if is_ready {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

async fn accept(role: &Role) -> io::Result<UnixStream> {
    match role {
        Role::Listen(listener) => Ok(listener.accept().await?.0),
        Role::Connect(_) => std::future::pending().await,
    }
}
