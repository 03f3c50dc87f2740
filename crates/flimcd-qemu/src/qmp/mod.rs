//! A client for QEMU's monitor protocol.
//!
//! ```text
//!   Qmp (clones) ── command + id ──► task ── line ──► QEMU
//!       ▲  ▲                          │ owns the socket
//!       │  └──── answer, by id ───────┤◄──── line ─────
//!       └─────── events (broadcast) ──┘
//! ```
//! One task owns the socket. It ends when QEMU closes the monitor, when a line is no QMP, or when the
//! last [`Qmp`] is dropped; then every waiting and every later command fails with [`QmpError::Closed`].
//! To reconnect is to call [`Qmp::connect`] again: nothing here outlives a connection.
//!
//! A command that is not answered in time fails with [`QmpError::Timeout`] and may still happen, since
//! QEMU cannot take a command back. A monitor serves one client at a time and simply does not greet
//! the second.

mod decode;
mod error;
mod event;
mod task;

use std::{path::Path, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot, watch},
    time::timeout,
};

pub use decode::{DecodeError, Incoming, MAX_LINE_BYTES, decode_line};
pub use error::QmpError;
pub use event::{Event, EventKind, Events};
use task::{Request, Task};

/// How long a monitor may take to greet. A free one greets at once.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Commands waiting for the task.
const REQUESTS_MAX: usize = 64;

/// A version of QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
    /// What the distribution calls it; may be empty.
    pub package: String,
}

impl Version {
    /// Whether it is `major.minor` or newer.
    #[must_use]
    pub const fn is_at_least(&self, major: u32, minor: u32) -> bool {
        self.major > major || (self.major == major && self.minor >= minor)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A command of the monitor: its arguments are what it serializes to.
pub trait Command: Serialize {
    /// Its name.
    const NAME: &'static str;
    /// How long QEMU may take to answer.
    const TIMEOUT: Duration = Duration::from_secs(30);
    /// What it returns.
    type Reply: DeserializeOwned;
}

/// A connection to a monitor. Clones share it.
#[derive(Clone, Debug)]
pub struct Qmp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    version: Version,
    /// Process at the other end, if the kernel knows it.
    pid: Option<u32>,
    requests: mpsc::Sender<Request>,
    /// Never read, only to subscribe: a sender here would keep listeners waiting after the end.
    events: broadcast::Receiver<Event>,
    closed: watch::Receiver<bool>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// [`QmpError::Connect`] when nobody listens, [`QmpError::Busy`] when the monitor does not greet
    /// within 5 s because somebody else holds it, [`QmpError::NotQmp`] when it is none.
    pub async fn connect(socket: &Path) -> Result<Self, QmpError> {
        let path = socket.to_owned();
        let connected = timeout(GREETING_TIMEOUT, UnixStream::connect(socket)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => return Err(QmpError::Connect { path, source }),
            // Its queue of connections is full.
            Err(_) => return Err(QmpError::Busy { path }),
        };
        let pid = stream.peer_cred().ok().and_then(|c| c.pid());
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut line = Vec::new();
        match timeout(GREETING_TIMEOUT, read.read_until(b'\n', &mut line)).await {
            Err(_) => return Err(QmpError::Busy { path }),
            Ok(Err(source)) => return Err(QmpError::Connect { path, source }),
            Ok(Ok(_)) => {}
        }
        let version = match decode_line(&line) {
            Ok(Incoming::Greeting(version)) => version,
            Ok(_) => {
                let reason = "it answers without having greeted".to_owned();
                return Err(QmpError::NotQmp { path, reason });
            }
            Err(error) => {
                let reason = error.to_string();
                return Err(QmpError::NotQmp { path, reason });
            }
        };
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        let (event_sender, events) = broadcast::channel(event::EVENTS_MAX);
        let (closing, closed) = watch::channel(false);
        let task = Task::new(inbox, event_sender, closing);
        tokio::spawn(task.run(read, write));
        let qmp = Self {
            inner: Arc::new(Inner {
                version,
                pid: pid.and_then(|p| u32::try_from(p).ok()),
                requests,
                events,
                closed,
            }),
        };
        qmp.execute(crate::commands::QmpCapabilities {}).await?;
        Ok(qmp)
    }

    /// The version of QEMU.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.inner.version
    }

    /// QEMU's process id. `None` when the kernel does not say, and that of another process when
    /// somebody else made the socket (libvirt does).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.inner.pid
    }

    /// Executes a command and returns its answer. When the returned future is dropped, the command
    /// is not taken back.
    ///
    /// # Errors
    /// [`QmpError::Command`] when QEMU refuses; the others when the conversation fails.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Reply, QmpError> {
        let reply_error = |source| QmpError::Reply {
            command: C::NAME,
            source,
        };
        let arguments = serde_json::to_value(command).map_err(reply_error)?;
        let value = self.ask(C::NAME, arguments, C::TIMEOUT).await?;
        serde_json::from_value(value).map_err(reply_error)
    }

    async fn ask(
        &self,
        command: &'static str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            command,
            arguments,
            answer,
        };
        let exchange = async {
            let closed = || QmpError::Closed { command };
            let sent = self.inner.requests.send(request).await;
            sent.map_err(|_| closed())?;
            answered.await.map_err(|_| closed())?
        };
        match timeout(patience, exchange).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::Timeout {
                command,
                seconds: patience.as_secs(),
            }),
        }
    }

    /// Every event from this call on.
    #[must_use]
    pub fn events(&self) -> Events {
        Events {
            receiver: self.inner.events.resubscribe(),
        }
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.inner.closed.borrow()
    }

    /// Returns when the connection has ended. Cancel safe.
    pub async fn closed(&self) {
        let mut closed = self.inner.closed.clone();
        // An error says that the task is gone, which is the same.
        let _ = closed.wait_for(|closed| *closed).await;
    }
}
