//! TCP relay in user space: an emulated WAN for a user without any rights.
//!
//! ```text
//!  client ──► listen address │ A→B link: rate, delay, queue │ ──► target address
//!         ◄──                │ B→A link                     │ ◄──
//! ```
//! All connections of a relay share **one** link per direction. Bytes are read from a connection
//! only while the link's queue has room, so a full queue holds the sender back instead of dropping;
//! socket buffers are kept small, so that the queue that counts is the modelled one. Connections
//! that want to send take turns in small portions, as packets of several senders would mix in a
//! router, and what is in the queue leaves first in, first out.
//!
//! The kernel acknowledges bytes to their sender when the relay takes them, and not, as over a real
//! link, when they arrive. To a sender that measures what is delivered, a queue that fills at once
//! would look like a faster link. So bytes are taken hardly faster than the link carries them: the
//! queue of a saturated link fills by one per cent of the rate, and delivery looks as it should.
//!
//! **What it cannot model.** Loss and reordering: TCP has repaired both before the relay sees a
//! byte; [`Relay::start`] ignores them and [`Relay::cannot_model`] says so. Headers do not count:
//! the rate is one of payload. The kernel's `TCP_INFO` at either end describes the loopback, not
//! the emulated path, except for the rate of a saturated link. A `connect` succeeds at once; the
//! handshake's round trip is charged to the first bytes instead.
//!
//! One thread owns every socket and both links; the [`Relay`] sends it commands and stops it when
//! dropped, which resets what is open.

mod conn;
mod engine;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use super::{LinkCounters, LinkModel, Side};
use engine::{Command, Engine};

/// Where a relay listens and where it connects to.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Loopback address to listen on; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Address that connections are forwarded to.
    pub target: SocketAddr,
    /// The site that the connecting side stands for.
    pub from: Side,
}

/// What a relay is made of.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// The link, the same in both directions.
    pub model: LinkModel,
    /// Addresses to forward.
    pub routes: Vec<Route>,
    /// Decides the jitter.
    pub seed: u64,
}

/// How a link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Connections are reset, and new ones too until the link is restored.
    Reset,
    /// Nothing moves and nobody is told. What was on its way arrives after the restoration, as
    /// TCP would have sent it again.
    BlackHole,
}

/// What both directions of a relay did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelayCounters {
    /// From side A to side B.
    pub a_to_b: LinkCounters,
    /// From side B to side A.
    pub b_to_a: LinkCounters,
    /// Connections accepted.
    pub connections: u64,
    /// Connections whose target could not be reached.
    pub connections_failed: u64,
}

impl RelayCounters {
    /// Payload bytes that went onto the link, both directions.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.a_to_b.bytes + self.b_to_a.bytes
    }
}

/// Why a relay did not start.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A relay without any authentication must not be reachable from elsewhere.
    #[error("the relay would listen on {0}, which is not a loopback address; use 127.0.0.1 or ::1")]
    NotLoopback(SocketAddr),
    /// The address cannot be listened on.
    #[error(
        "the relay cannot listen on {address}: {source}; choose another port, or 0 for a free one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Thread or descriptor could not be had.
    #[error("the relay cannot start: {0}")]
    System(#[from] io::Error),
}

/// A running relay. Dropping it stops it and resets its connections.
#[derive(Debug)]
pub struct Relay {
    addresses: Vec<SocketAddr>,
    cannot_model: Option<String>,
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    counters: Arc<Mutex<RelayCounters>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens on all routes and starts forwarding.
    ///
    /// # Errors
    /// [`RelayError`] when an address is not loopback or cannot be listened on.
    pub fn start(options: &RelayOptions) -> Result<Self, RelayError> {
        let mut listeners = Vec::with_capacity(options.routes.len());
        for route in &options.routes {
            listeners.push(listen(route.listen, &options.model)?);
        }
        let addresses = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<io::Result<Vec<_>>>()?;
        let wake = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?,
        );
        let counters = Arc::new(Mutex::new(RelayCounters::default()));
        let (commands, inbox) = mpsc::channel();
        let cannot_model = what_is_missing(&options.model);
        let engine = Engine::new(
            options,
            listeners,
            inbox,
            Arc::clone(&wake),
            Arc::clone(&counters),
        );
        let thread = std::thread::Builder::new()
            .name("wan-relay".into())
            .spawn(move || engine.run())?;
        Ok(Self {
            addresses,
            cannot_model,
            commands,
            wake,
            counters,
            thread: Some(thread),
        })
    }

    /// Addresses listened on, in the order of the routes.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What the model asks for and a relay cannot do, as a sentence for people.
    #[must_use]
    pub fn cannot_model(&self) -> Option<&str> {
        self.cannot_model.as_deref()
    }

    /// What went over the link so far.
    #[must_use]
    pub fn counters(&self) -> RelayCounters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the link; in force when this returns.
    pub fn cut(&self, cut: Cut) {
        self.command(|done| Command::Cut(Some(cut), done));
    }

    /// Joins the link again; in force when this returns.
    pub fn restore(&self) {
        self.command(|done| Command::Cut(None, done));
    }

    /// Changes the link from now on; what is on its way keeps its time.
    pub fn set_model(&self, model: LinkModel) {
        self.command(|done| Command::Model(model, done));
    }

    fn command(&self, make: impl FnOnce(mpsc::Sender<()>) -> Command) {
        let (done, finished) = mpsc::channel();
        if self.commands.send(make(done)).is_ok() {
            self.wake();
            // An error means that the thread ended; then nothing is forwarded anyhow.
            let _ = finished.recv();
        }
    }

    fn wake(&self) {
        // Any number but 0 wakes it. Full is fine: the thread is going to wake up then.
        let _ = rustix::io::write(&*self.wake, &[1; 8]);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the WAN relay's thread panicked");
        }
    }
}

fn what_is_missing(model: &LinkModel) -> Option<String> {
    let what = match (model.loss > 0.0, model.reorder > 0.0) {
        (false, false) => return None,
        (true, false) => "loss",
        (false, true) => "reordering",
        (true, true) => "loss and reordering",
    };
    Some(format!(
        "the TCP relay cannot model {what}: TCP repairs it before the relay sees a byte. \
         Use the TUN router (root or a user namespace) for that"
    ))
}

fn listen(address: SocketAddr, model: &LinkModel) -> Result<TcpListener, RelayError> {
    if !address.ip().is_loopback() {
        return Err(RelayError::NotLoopback(address));
    }
    let open = || -> io::Result<TcpListener> {
        let socket = new_socket(address, model)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        Ok(socket.into())
    };
    open().map_err(|source| RelayError::Listen { address, source })
}

/// A non-blocking socket whose buffers hold no more than the relay needs between two looks, so
/// that bytes queue in the model and not in the kernel.
fn new_socket(address: SocketAddr, model: &LinkModel) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(receive_buffer_bytes(model))?;
    // On loopback a segment is as large as such a buffer, and a sender that sees no window for a
    // whole segment waits for its persist timer. Segments of Ethernet size avoid that.
    socket.set_tcp_mss(1448)?;
    tune(&socket);
    Ok(socket)
}

/// Settings that only make it better, so that a refusal is no reason to stop.
fn tune(socket: &Socket) {
    let _ = socket.set_tcp_nodelay(true);
    // The relay's own sockets must not probe or pace: the model decides when bytes move.
    let _ = socket.set_tcp_congestion(b"cubic");
}

/// About a millisecond of the link, within what the kernel handles well.
fn receive_buffer_bytes(model: &LinkModel) -> usize {
    let bytes = (model.rate_bytes_per_sec() / 1000).clamp(32 << 10, 256 << 10);
    usize::try_from(bytes).unwrap_or(32 << 10)
}
