//! One connection of a bundle: a socket and its TLS session, read by one task and written by another.
//!
//! A frame is encrypted only when the socket can take more, and only one at a time: whatever waits,
//! waits in the [`crate::outbox`], where something more urgent can still go first. Small frames of a bulk
//! lane are the exception: as many as fit into one TLS record go together, because each by itself would
//! cost a record of its own and leave a packet half empty. That is less than one usual frame, so no more
//! is decided early than without. Memory per lane: at most one frame or one record encrypted, one record
//! decrypted, and one frame in the decoder.

use std::{
    io::{self, BufRead as _, IoSlice, Read, Write},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::BytesMut;
use flimcd_wire::{Class, Encoded};
use rustls::Connection;
use tokio::{io::Interest, net::TcpStream};

use crate::{LinkError, identity, socket};

/// Lane 0: what moves migrations on, and the link's own messages. Faults as well, when that is faster:
/// BBR lets a connection have four packets under way for 200 ms every ten seconds, to measure its round
/// trip, and a lost packet holds up what follows it.
pub(crate) const CONTROL: u8 = 0;
/// Lane 1: demands and their answers.
pub(crate) const FAULTS: u8 = 1;
/// Lanes from here on: the machine's state (first of them only) and everything else.
pub(crate) const BULK: u8 = 2;

/// Encrypted bytes that may wait for the socket: more than one usual frame, so that one write call
/// hands all of it over.
const TLS_BUFFER_BYTES: usize = 128 * 1024;
/// Content of the longest TLS record: what small frames are gathered to.
pub(crate) const RECORD_BYTES: usize = 16 * 1024;
/// Small frames that are gathered at most.
pub(crate) const GATHERED_MAX: usize = 64;
/// Bytes read from the socket at once.
pub(crate) const READ_BYTES: usize = 128 * 1024;

/// The classes that lane `lane` carries, most urgent first.
pub(crate) const fn classes(lane: u8) -> &'static [Class] {
    match lane {
        CONTROL => &[Class::Control, Class::Fault],
        FAULTS => &[Class::Fault],
        BULK => &[Class::Ram, Class::Prefetch, Class::Bulk],
        _ => &[Class::Prefetch, Class::Bulk],
    }
}

/// Bytes on the sockets of a link, all its bundles together, including TLS and greetings.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

/// See the module.
pub(crate) struct Lane {
    pub(crate) index: u8,
    pub(crate) tcp: TcpStream,
    tls: Mutex<Connection>,
    /// The kernel may keep the last packet back until it is full, as it was told that more follows.
    is_held: AtomicBool,
}

impl Lane {
    /// A lane over a connection whose greeting is done.
    pub(crate) fn new(index: u8, tcp: TcpStream, mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Self {
            index,
            tcp,
            tls: Mutex::new(tls),
            is_held: AtomicBool::new(false),
        }
    }

    fn tls(&self) -> MutexGuard<'_, Connection> {
        // Nothing panics while it holds the lock; if something did, the session's own checks find it.
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel holds so little unsent data that it takes more. If not, the next
    /// [`Lane::writable`] waits until it does.
    pub(crate) fn is_writable(&self) -> bool {
        // tokio remembers that the socket was writable once; the kernel knows whether it is now. Asking
        // it in here makes tokio wait for the next change if the answer is no.
        let ask = || {
            if socket::takes_more(&self.tcp) {
                Ok(())
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            }
        };
        self.tcp.try_io(Interest::WRITABLE, ask).is_ok()
    }

    /// Waits until the kernel takes more.
    pub(crate) async fn writable(&self) -> Result<(), LinkError> {
        loop {
            self.tcp.writable().await.map_err(LinkError::io)?;
            if self.is_writable() {
                return Ok(());
            }
        }
    }

    /// Writes frames, one after the other; ends when the kernel has all of them. With `more_follows` the kernel
    /// waits with a packet that is not full for what is written next, or for [`push`](Self::push).
    pub(crate) async fn write(
        &self,
        frames: &[Encoded],
        more_follows: bool,
        traffic: &Traffic,
    ) -> Result<(), LinkError> {
        let len: usize = frames.iter().map(Encoded::len).sum();
        let mut done = 0;
        self.is_held.store(more_follows, Ordering::Relaxed);
        loop {
            let is_blocked = {
                let mut tls = self.tls();
                done += push_plaintext(&mut tls, frames, done).map_err(LinkError::io)?;
                self.push_records(&mut tls, more_follows, traffic)?
            };
            if done == len && !is_blocked {
                return Ok(());
            }
            if is_blocked {
                self.tcp.writable().await.map_err(LinkError::io)?;
            }
        }
    }

    /// Nothing follows for now after all: what the kernel keeps back leaves.
    pub(crate) fn push(&self) {
        if self.is_held.swap(false, Ordering::Relaxed) {
            socket::push(&self.tcp);
        }
    }

    /// Hands encrypted records to the kernel; true when it takes no more now.
    fn push_records(
        &self,
        tls: &mut Connection,
        more_follows: bool,
        traffic: &Traffic,
    ) -> Result<bool, LinkError> {
        let mut socket = Socket {
            tcp: &self.tcp,
            more_follows,
        };
        while tls.wants_write() {
            match tls.write_tls(&mut socket) {
                Ok(bytes) => {
                    traffic.sent.fetch_add(bytes as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(LinkError::io(error)),
            }
        }
        Ok(false)
    }

    /// Waits for bytes, decrypts what arrived and appends it to `plain`.
    pub(crate) async fn read(
        &self,
        scratch: &mut [u8],
        plain: &mut BytesMut,
        traffic: &Traffic,
    ) -> Result<(), LinkError> {
        loop {
            self.tcp.readable().await.map_err(LinkError::io)?;
            match self.tcp.try_read(scratch) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(bytes) => {
                    traffic.received.fetch_add(bytes as u64, Ordering::Relaxed);
                    return self.decrypt(&scratch[..bytes], plain);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(LinkError::io(error)),
            }
        }
    }

    /// Appends to `plain` what came with the greeting already.
    pub(crate) fn take_early(&self, plain: &mut BytesMut) -> Result<(), LinkError> {
        drain(&mut self.tls(), plain)
    }

    fn decrypt(&self, mut received: &[u8], plain: &mut BytesMut) -> Result<(), LinkError> {
        let mut tls = self.tls();
        while !received.is_empty() {
            tls.read_tls(&mut received).map_err(LinkError::io)?;
            tls.process_new_packets().map_err(identity::explain)?;
            drain(&mut tls, plain)?;
        }
        Ok(())
    }

    /// Forgets unsent data as soon as the lane is dropped.
    pub(crate) fn discard_on_close(&self) {
        socket::discard_on_close(&self.tcp);
    }
}

/// Encrypts as much of `frames` from byte `done` on as the session takes, in records as long as can be.
fn push_plaintext(tls: &mut Connection, frames: &[Encoded], done: usize) -> io::Result<usize> {
    let mut skip = done;
    let mut parts = Vec::with_capacity(2 * frames.len());
    for part in frames
        .iter()
        .flat_map(|frame| [&frame.head, &frame.payload])
    {
        let rest = part.get(skip..).unwrap_or_default();
        skip = skip.saturating_sub(part.len());
        if !rest.is_empty() {
            parts.push(IoSlice::new(rest));
        }
    }
    if parts.is_empty() {
        return Ok(0);
    }
    tls.writer().write_vectored(&parts)
}

fn drain(tls: &mut Connection, plain: &mut BytesMut) -> Result<(), LinkError> {
    let mut reader = tls.reader();
    loop {
        match reader.fill_buf() {
            Ok([]) => return Err(LinkError::Closed),
            Ok(chunk) => {
                let len = chunk.len();
                plain.extend_from_slice(chunk);
                reader.consume(len);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(LinkError::io(error)),
        }
    }
}

/// A non-blocking socket as `std::io` sees it.
struct Socket<'a> {
    tcp: &'a TcpStream,
    more_follows: bool,
}

impl Read for Socket<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.tcp.try_read(buf)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let send = || socket::send(self.tcp, bufs, self.more_follows);
        self.tcp.try_io(Interest::WRITABLE, send)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
