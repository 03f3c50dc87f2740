//! The hypervisors' bytes between their unix sockets and the link.
//!
//! ```text
//!  QEMU ──unix──► RamPump (listens) ═══ link ═══ RamPump (connects) ──unix──► QEMU -incoming
//!       ◄────────                                                  ◄────────
//! ```
//! One pump per attempt to transfer a running state, on each side, with a task of its own, so that nothing else that the
//! coordinator does holds the bytes up. Which bytes were sent, arrived and have to go again after a link break is
//! decided by [`flimcd_migrate::stream`]; here they are read, packed, sent, unpacked and written.
//!
//! The source's hypervisor connects to the pump's socket, as often as it wants (QEMU: once, and a second time for the pages
//! that a guest waits for after the switch). For each connection the target's pump makes one to the hypervisor there, in
//! the same order. Each carries bytes both ways and ends in each direction by itself.
//!
//! # Backpressure
//! A hypervisor is read only as far as the link takes it: what stands in queues when the guest is stopped makes it
//! stand longer, and by the speed at which its bytes are taken the hypervisor judges whether it may stop the guest. At
//! most [`READ_BYTES`] and what [`flimcd_migrate::stream`] allows wait here, beside the link's own queue.
//!
//! # How it ends
//! The pump runs until it is dropped; then its connections close. Before that it stops by itself only when
//! the other side breaks the rules, or the hypervisor cannot be connected to ([`PumpEvent::Broken`]). A hypervisor that dies
//! closes its connection, which the other hypervisor sees as it would on a network. When the agent dies both
//! hypervisors see that; who looks after the attempt begins the next one.

mod pump;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flimcd_core::MigrationId;
use flimcd_link::Credit;
use flimcd_wire::{Message, VmMessage};
use tokio::{
    net::UnixListener,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::AbortHandle,
};

use crate::links::{LinkInput, PeerLink};
use pump::{Role, Task};

/// Bytes of a hypervisor that become one part at most.
const READ_BYTES: usize = 128 * 1024;
/// Longest path that a unix socket can have.
const SOCKET_PATH_MAX: usize = 107;

/// What a pump tells its coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PumpEvent {
    /// A stream was opened: by the hypervisor here, or by the one over there and connected to the one here.
    Opened {
        /// Its number.
        stream: u8,
    },
    /// The hypervisor here has closed a stream although there were bytes for it. What still comes is dropped.
    Closed {
        /// Its number.
        stream: u8,
        /// What the system said.
        error: String,
    },
    /// Everything of all streams has arrived on both sides, ends included. The pump goes on, so that the other side
    /// learns of it over a link that breaks now.
    Finished,
    /// The pump has stopped; the attempt is over. The text says why.
    Broken(String),
}

/// Bytes since the pump began, all streams together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PumpStats {
    /// Taken from the hypervisor here.
    pub(crate) bytes_in: u64,
    /// The same, packed.
    pub(crate) bytes_packed: u64,
    /// Of those, given to the hypervisor over there.
    pub(crate) bytes_acked: u64,
    /// Given to the hypervisor here, packed.
    pub(crate) bytes_arrived: u64,
    /// The same, unpacked.
    pub(crate) bytes_out: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RamPump {
    inputs: UnboundedSender<LinkInput>,
    events: UnboundedReceiver<PumpEvent>,
    stats: Arc<Mutex<PumpStats>>,
    task: AbortHandle,
    /// The socket that was made here.
    socket: Option<PathBuf>,
}

/// Where the pump of an attempt listens: short, since paths of sockets are.
pub(crate) fn socket_path(runtime_dir: &Path, session: MigrationId, attempt: u32) -> PathBuf {
    let session = session.0 & 0xffff_ffff;
    runtime_dir.join(format!("ram-{session:08x}-{attempt}"))
}

impl RamPump {
    /// The source's: a hypervisor may connect to `socket` from now on, which only this user can. One that is left
    /// over from another run is replaced. The link counts as down.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn listen(
        link: Arc<PeerLink>,
        session: MigrationId,
        attempt: u32,
        socket: &Path,
    ) -> io::Result<Self> {
        let listener = bind(socket)?;
        let mut pump = Self::start(link, session, attempt, Role::Listen(listener));
        pump.socket = Some(socket.to_owned());
        Ok(pump)
    }

    /// The target's: connects to the hypervisor that listens on `socket`, once per stream that the source opens.
    pub(crate) fn connect(
        link: Arc<PeerLink>,
        session: MigrationId,
        attempt: u32,
        socket: &Path,
    ) -> Self {
        let role = Role::Connect(socket.to_owned());
        Self::start(link, session, attempt, role)
    }

    fn start(link: Arc<PeerLink>, session: MigrationId, attempt: u32, role: Role) -> Self {
        let (inputs, receiver) = unbounded_channel();
        let (sender, events) = unbounded_channel();
        let stats = Arc::new(Mutex::new(PumpStats::default()));
        let mut task = Task::new(link, session, attempt, role, sender.clone(), stats.clone());
        let task = tokio::spawn(async move {
            let text = task.run(receiver).await;
            // Nobody listens when the pump was dropped.
            let _ = sender.send(PumpEvent::Broken(text));
        });
        Self {
            inputs,
            events,
            stats,
            task: task.abort_handle(),
            socket: None,
        }
    }

    /// The link is up.
    pub(crate) fn handle_link_up(&self, generation: u64) {
        self.tell(LinkInput::Up(generation));
    }

    /// The link is down.
    pub(crate) fn handle_link_down(&self) {
        self.tell(LinkInput::Down);
    }

    /// A `Part`, `PartAck` or `End` of this session. What belongs to an earlier attempt is dropped.
    pub(crate) fn handle_message(&self, message: VmMessage, credit: Credit) {
        self.tell(LinkInput::Message(Message::Vm(message), credit));
    }

    fn tell(&self, input: LinkInput) {
        // A pump that is broken does not listen any more.
        let _ = self.inputs.send(input);
    }

    /// What happens next; for ever pending after `Broken`. Cancel-safe.
    pub(crate) async fn next_event(&mut self) -> PumpEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// What has gone through so far.
    pub(crate) fn stats(&self) -> PumpStats {
        *lock(&self.stats)
    }
}

impl Drop for RamPump {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(socket) = &self.socket {
            // It is in nobody's way if it stays.
            let _ = fs::remove_file(socket);
        }
    }
}

fn lock(stats: &Mutex<PumpStats>) -> MutexGuard<'_, PumpStats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the socket, which is nobody else's at any moment since its directory is the agent's alone.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(io::Error::other(format!(
            "{} is too long for the path of a socket: choose a shorter runtime_dir",
            path.display()
        )));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
