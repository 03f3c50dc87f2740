//! The NBD server: a unix socket, a thread that accepts, and a thread per client.

mod connection;
mod socket;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use flimcd_core::limits::MAX_NBD_REQUEST_BYTES;
use flimcd_volume::Volume;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use crate::handshake::{Catalogue, ExportInfo};
pub use socket::BindError;

/// Most clients at a time; more are turned away.
const CLIENTS_MAX: usize = 256;

/// A server on one unix socket. Dropping it does what [`shutdown`](Self::shutdown) does.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
    /// Becomes readable when the server is to end, and stays so.
    stop: Arc<OwnedFd>,
    acceptor: Option<JoinHandle<()>>,
}

/// The volumes that a server exports, by name.
#[derive(Default)]
pub(crate) struct Exports {
    volumes: Mutex<BTreeMap<String, Arc<Volume>>>,
}

#[derive(Default)]
struct Shared {
    exports: Exports,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    open: BTreeMap<u64, Client>,
    stopping: bool,
}

#[derive(Debug)]
struct Client {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// The export, once chosen.
    export: Option<String>,
}

/// What is guarded here is changed in single steps, so a panic in between leaves it usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Listens on a new unix socket at `path`, which only the user of this process may connect to.
    /// A socket that a dead server left there is replaced.
    ///
    /// # Errors
    /// [`BindError`], for instance when another server listens there.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, BindError> {
        let path = path.into();
        let listener = socket::bind(&path)?;
        let system = |source| BindError::System {
            path: path.clone(),
            source,
        };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| system(e.into()))?);
        let shared = Arc::new(Shared::default());
        let acceptor = thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn({
                let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
                move || accept_loop(&listener, &stop, &shared)
            })
            .map_err(system)?;
        Ok(Self {
            shared,
            path,
            stop,
            acceptor: Some(acceptor),
        })
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Offers `volume` as `name`, from the next handshake on. One of the same name is replaced, but
    /// not for clients that have it.
    pub fn export(&self, name: impl Into<String>, volume: Arc<Volume>) {
        lock(&self.shared.exports.volumes).insert(name.into(), volume);
    }

    /// Takes an export away, disconnects its clients and returns when they are gone. False when
    /// there was none.
    #[expect(clippy::must_use_candidate, reason = "most callers only want it gone")]
    pub fn unexport(&self, name: &str) -> bool {
        let removed = lock(&self.shared.exports.volumes).remove(name);
        // Who attaches from here on does not find the volume any more.
        self.shared
            .disconnect(|client| client.export.as_deref() == Some(name));
        removed.is_some()
    }

    /// Clients attached to the export `name`.
    #[must_use]
    pub fn clients(&self, name: &str) -> usize {
        let clients = lock(&self.shared.clients);
        clients
            .open
            .values()
            .filter(|client| client.export.as_deref() == Some(name))
            .count()
    }

    /// Stops listening, disconnects all clients, removes the socket, and returns when all threads
    /// have ended.
    pub fn shutdown(mut self) {
        self.stop();
    }

    #[expect(
        clippy::host_endian_bytes,
        reason = "an eventfd takes a number as it lies in memory"
    )]
    fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        // It only fails when the counter would overflow, and then it is readable already.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        let _ = fs::remove_file(&self.path);
        let _ = acceptor.join();
        lock(&self.shared.clients).stopping = true;
        self.shared.disconnect(|_| true);
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.path.display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// Notes that a client chose an export; `None` when that is not there any more.
    fn attach(&self, id: u64, name: &str) -> Option<Arc<Volume>> {
        // Held across both, so that `unexport` sees either the client or an unsuccessful attach.
        let mut clients = lock(&self.clients);
        let (full_name, volume) = self.exports.find_volume(name)?;
        clients.open.get_mut(&id)?.export = Some(full_name);
        Some(volume)
    }

    fn disconnect(&self, chosen: impl Fn(&Client) -> bool) {
        let threads: Vec<_> = lock(&self.clients)
            .open
            .values_mut()
            .filter(|client| chosen(client))
            .filter_map(|client| {
                // Its thread sees the end of the stream; an error says that it has seen it already.
                let _ = client.socket.shutdown(Shutdown::Both);
                client.thread.take()
            })
            .collect();
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn admit(self: &Arc<Self>, socket: UnixStream) -> io::Result<()> {
        let handle = socket.try_clone()?;
        let id = {
            let mut clients = lock(&self.clients);
            if clients.stopping || clients.open.len() >= CLIENTS_MAX {
                return Err(io::Error::other("too many clients"));
            }
            clients.next += 1;
            let id = clients.next;
            clients.open.insert(
                id,
                Client {
                    socket: handle,
                    thread: None,
                    export: None,
                },
            );
            id
        };
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name(format!("nbd-{id}"))
            .spawn(move || {
                if let Err(error) = connection::serve(&socket, &shared, id) {
                    tracing::warn!(client = id, %error, "connection ended");
                }
                lock(&shared.clients).open.remove(&id);
            });
        let mut clients = lock(&self.clients);
        match spawned {
            // Gone from the list when it has ended already.
            Ok(thread) => {
                if let Some(client) = clients.open.get_mut(&id) {
                    client.thread = Some(thread);
                }
                Ok(())
            }
            Err(error) => {
                clients.open.remove(&id);
                Err(error)
            }
        }
    }
}

fn accept_loop(listener: &UnixListener, stop: &OwnedFd, shared: &Arc<Shared>) {
    loop {
        let socket = listener.as_fd();
        let mut fds = [
            PollFd::new(&socket, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        let polled = rustix::event::poll(&mut fds, None);
        if !fds[1].revents().is_empty() {
            return;
        }
        let result = polled
            .map_err(io::Error::from)
            .and_then(|_| listener.accept())
            .and_then(|(socket, _)| {
                socket.set_nonblocking(false)?;
                shared.admit(socket)
            });
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "a client was turned away");
                // Out of descriptors, most likely: let some be given back.
                thread::yield_now();
            }
        }
    }
}

impl Exports {
    /// The volume and its full name; the empty name is the only export there is.
    fn find_volume(&self, name: &str) -> Option<(String, Arc<Volume>)> {
        let volumes = lock(&self.volumes);
        let found = match volumes.get_key_value(name) {
            None if name.is_empty() && volumes.len() == 1 => volumes.first_key_value(),
            found => found,
        };
        found.map(|(name, volume)| (name.clone(), Arc::clone(volume)))
    }
}

impl Catalogue for Exports {
    fn names(&self) -> Vec<String> {
        lock(&self.volumes).keys().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        let (_, volume) = self.find_volume(name)?;
        let size = volume.size().bytes();
        Some(ExportInfo {
            size,
            read_only: false,
            // Requests of any alignment are served, but sectors are what a disk has.
            block_size_min: if size.is_multiple_of(512) { 512 } else { 1 },
            block_size_preferred: 4096,
            request_bytes_max: MAX_NBD_REQUEST_BYTES,
        })
    }
}
