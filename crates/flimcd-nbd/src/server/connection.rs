//! One client: handshake, then requests and answers until it leaves. One thread each.
//!
//! The thread owns the client's [`GuestPort`] and never waits for a single request: it receives as
//! many as one call gives, hands them to the port together, sends what has ended in one gathering
//! write, in whatever order it ended, and only then sleeps in `poll(2)` until the socket or the
//! port has news.
//!
//! Memory is bounded: requests are taken only while what they hold (payloads, room for content,
//! answers not yet sent) is below [`HELD_BYTES_MAX`]. A client that does not read its answers fills
//! that, is not read from any more, and harms nobody else.
//!
//! When the client is gone, or the server wants the connection to end, the port is dropped: that
//! cancels what is parked and waits for what the disk has. What was not answered was not promised.

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
};

use flimcd_core::{ByteRange, limits::MAX_NBD_REQUEST_BYTES};
use flimcd_volume::{
    GuestError, GuestPort, GuestReply, GuestRequest, RequestKind, Volume,
    device::{BufPool, IoBuf},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno as OsError,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags},
};

use super::{Exports, Shared};
use crate::{
    handshake::{Agreed, HandshakeError, Negotiation},
    proto::{Errno, command},
    receive::{BadMagic, Command, Received, Receiver, Request},
    send::Outbox,
};

/// Most bytes that requests of one connection hold; one request of the largest size must fit.
const HELD_BYTES_MAX: usize = 2 * MAX_NBD_REQUEST_BYTES as usize;
/// What a request without content counts.
const REQUEST_COST: usize = 512;
/// Most bytes of buffers kept for use again.
const POOL_BYTES_MAX: usize = 8 << 20;
/// Most extents in one block status answer.
const EXTENTS_MAX: usize = 1024;
/// After requests overlapped: so many batches go through the queue before waiting in place is tried
/// again.
const OVERLAP_MEMORY: u32 = 64;

/// Why a connection ended otherwise than by the client's leave.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("cannot talk to the client: {0}")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Request(#[from] BadMagic),
    #[error("the volume cannot be used: {0}")]
    Port(#[source] io::Error),
}

/// Serves one client to its end.
pub(super) fn serve(socket: &UnixStream, shared: &Shared, id: u64) -> Result<(), ConnectionError> {
    let Some((agreed, rest)) = negotiate(socket, &shared.exports)? else {
        return Ok(());
    };
    // It may have been taken away since.
    let Some(volume) = shared.attach(id, &agreed.name) else {
        return Ok(());
    };
    let port = volume.guest_port().map_err(ConnectionError::Port)?;
    tracing::debug!(
        export = agreed.name,
        structured = agreed.structured,
        "client attached"
    );
    Connection::new(socket, volume, port, agreed, &rest).run()
}

/// Talks until an export is chosen; then what was agreed on and the bytes that came behind. `None`
/// when the client left.
fn negotiate(
    socket: &UnixStream,
    exports: &Exports,
) -> Result<Option<(Agreed, Vec<u8>)>, ConnectionError> {
    let mut negotiation = Negotiation::new();
    let (mut input, mut output) = (Vec::new(), Vec::new());
    negotiation.greet(&mut output);
    let mut buf = [0; 4096];
    loop {
        send_all(socket, &output).map_err(ConnectionError::Socket)?;
        output.clear();
        let bytes = match rustix::net::recv(socket, &mut buf[..], RecvFlags::empty()) {
            Ok((_, 0)) => return Ok(None),
            Ok((_, bytes)) => bytes,
            Err(OsError::INTR) => continue,
            Err(error) => return Err(ConnectionError::Socket(error.into())),
        };
        input.extend_from_slice(&buf[..bytes]);
        match negotiation.advance(&input, exports, &mut output) {
            Ok((used, agreed)) => {
                input.drain(..used);
                if let Some(agreed) = agreed {
                    send_all(socket, &output).map_err(ConnectionError::Socket)?;
                    return Ok(Some((agreed, input)));
                }
            }
            Err(error) => {
                // The client may be gone already, which changes nothing.
                let _ = send_all(socket, &output);
                if error == HandshakeError::Aborted {
                    return Ok(None);
                }
                return Err(error.into());
            }
        }
    }
}

fn send_all(socket: &UnixStream, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::net::send(socket, data, SendFlags::NOSIGNAL) {
            Ok(bytes) => data = &data[bytes..],
            Err(OsError::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What must be known of a request when it ends.
struct Pending {
    cookie: u64,
    command: Command,
    offset: u64,
    cost: usize,
}

/// Whether the client may still send requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// It said goodbye: answer what is open, then close.
    Leaving,
    /// It is gone.
    Gone,
}

struct Connection<'a> {
    socket: &'a UnixStream,
    volume: Arc<Volume>,
    port: GuestPort,
    receiver: Receiver,
    outbox: Outbox,
    pool: BufPool,
    /// By the id that the port knows a request by.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// What requests in work hold; those answered are counted by the outbox.
    held_bytes: usize,
    submitted: usize,
    replies: Vec<GuestReply>,
    phase: Phase,
    /// Above 0 when requests were seen to overlap lately.
    overlap: u32,
}

impl<'a> Connection<'a> {
    fn new(
        socket: &'a UnixStream,
        volume: Arc<Volume>,
        port: GuestPort,
        agreed: Agreed,
        rest: &[u8],
    ) -> Self {
        Self {
            socket,
            volume,
            port,
            outbox: Outbox::new(agreed.structured),
            receiver: Receiver::new(agreed, rest),
            pool: BufPool::new(POOL_BYTES_MAX),
            pending: Vec::new(),
            free: Vec::new(),
            held_bytes: 0,
            submitted: 0,
            replies: Vec::new(),
            phase: Phase::Serving,
            overlap: 0,
        }
    }

    fn run(mut self) -> Result<(), ConnectionError> {
        loop {
            let mut news = self.receive(RecvFlags::DONTWAIT)? > 0;
            news |= self.take_requests()?;
            let inline = self.kick()?;
            news |= self.collect()?;
            if inline && self.receive(RecvFlags::DONTWAIT)? > 0 {
                // More came while this thread waited for the disk.
                self.overlap = OVERLAP_MEMORY;
            }
            news |= self.send()?;
            match self.phase {
                Phase::Gone => return Ok(()),
                Phase::Leaving if self.is_idle() => return Ok(()),
                _ if news => {}
                // Only the client can have news.
                Phase::Serving if self.is_idle() => {
                    self.receive(RecvFlags::empty())?;
                }
                _ => self.wait()?,
            }
        }
    }

    /// Whether nothing is in work and nothing waits to be sent.
    fn is_idle(&self) -> bool {
        self.in_work() == 0 && self.outbox.is_empty()
    }

    fn in_work(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    fn may_take(&self) -> bool {
        self.phase == Phase::Serving && self.held_bytes + self.outbox.bytes() < HELD_BYTES_MAX
    }

    /// Takes what the socket has.
    fn receive(&mut self, flags: RecvFlags) -> Result<usize, ConnectionError> {
        if !self.may_take() {
            return Ok(0);
        }
        let (payload, inbox) = self.receiver.space();
        if payload.is_empty() && inbox.is_empty() {
            return Ok(0);
        }
        let result = if payload.is_empty() {
            rustix::net::recv(self.socket, inbox, flags).map(|(_, bytes)| bytes)
        } else {
            let mut slices = [io::IoSliceMut::new(payload), io::IoSliceMut::new(inbox)];
            let mut control = rustix::net::RecvAncillaryBuffer::default();
            rustix::net::recvmsg(self.socket, &mut slices, &mut control, flags)
                .map(|message| message.bytes)
        };
        match result {
            Ok(0) => {
                self.phase = Phase::Gone;
                Ok(0)
            }
            Ok(bytes) => {
                self.receiver.filled(bytes);
                Ok(bytes)
            }
            Err(OsError::AGAIN | OsError::INTR) => Ok(0),
            Err(OsError::CONNRESET | OsError::PIPE) => {
                self.phase = Phase::Gone;
                Ok(0)
            }
            Err(error) => Err(ConnectionError::Socket(error.into())),
        }
    }

    /// Hands the requests that are there to the port.
    fn take_requests(&mut self) -> Result<bool, ConnectionError> {
        let mut news = false;
        while self.may_take() {
            match self.receiver.next(&mut self.pool)? {
                None => break,
                Some(Received::Request(request)) => self.take(request),
                Some(Received::Refused {
                    cookie,
                    error,
                    command,
                }) => {
                    self.outbox
                        .failed(cookie, error, is_structured_only(command));
                }
            }
            news = true;
        }
        Ok(news)
    }

    fn take(&mut self, request: Request) {
        let Request {
            cookie,
            command,
            offset,
            length,
            payload,
        } = request;
        let len = length as usize;
        let (kind, fua, buf) = match command {
            Command::Disconnect => {
                self.phase = Phase::Leaving;
                return;
            }
            Command::BlockStatus { one } => return self.block_status(cookie, offset, length, one),
            Command::WriteZeroes { fast: true, .. } if !self.volume.zeroes_fast() => {
                return self.outbox.failed(cookie, Errno::NotSup, false);
            }
            Command::Read { .. } => (RequestKind::Read, false, self.pool.take(len)),
            Command::Write { fua } => (RequestKind::Write, fua, payload),
            Command::Flush => (RequestKind::Flush, false, IoBuf::empty()),
            Command::Trim { fua } => (RequestKind::Trim, fua, IoBuf::empty()),
            Command::Cache => (RequestKind::Cache, false, IoBuf::empty()),
            Command::WriteZeroes { punch, fua, .. } => {
                (RequestKind::WriteZeroes { punch }, fua, IoBuf::empty())
            }
        };
        let cost = buf.len() + REQUEST_COST;
        self.held_bytes += cost;
        let pending = Some(Pending {
            cookie,
            command,
            offset,
            cost,
        });
        let id = match self.free.pop() {
            Some(id) => {
                self.pending[id] = pending;
                id
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        let id = id as u64;
        self.submitted += 1;
        self.port.submit(GuestRequest {
            id,
            kind,
            offset,
            length: length.into(),
            fua,
            buf,
        });
    }

    fn block_status(&mut self, cookie: u64, offset: u64, length: u32, one: bool) {
        let range = ByteRange::at(offset, length.into());
        let max = if one { 1 } else { EXTENTS_MAX };
        match self.volume.data_extents(range, max) {
            Ok(extents) => self.outbox.extents(cookie, &extents),
            Err(error) => self.outbox.failed(cookie, io_errno(&error), true),
        }
    }

    /// Starts what was taken. True when this thread waited for it in place.
    fn kick(&mut self) -> Result<bool, ConnectionError> {
        if self.submitted == 0 {
            return Ok(false);
        }
        let alone = self.submitted == 1 && self.in_work() == 1;
        self.submitted = 0;
        let inline = alone && self.overlap == 0;
        self.overlap = self.overlap.saturating_sub(u32::from(alone));
        let result = if inline {
            self.port.kick_inline()
        } else {
            self.port.kick()
        };
        result.map(|()| inline).map_err(ConnectionError::Port)
    }

    /// Puts what has ended into the outbox.
    fn collect(&mut self) -> Result<bool, ConnectionError> {
        if self.in_work() == 0 {
            return Ok(false);
        }
        let mut replies = std::mem::take(&mut self.replies);
        self.port
            .poll(&mut replies)
            .map_err(ConnectionError::Port)?;
        let news = !replies.is_empty();
        for reply in replies.drain(..) {
            self.answer(reply);
        }
        self.replies = replies;
        Ok(news)
    }

    fn answer(&mut self, reply: GuestReply) {
        let GuestReply { id, result, buf } = reply;
        let Ok(id) = usize::try_from(id) else { return };
        let Some(pending) = self.pending.get_mut(id).and_then(Option::take) else {
            return;
        };
        self.free.push(id);
        self.held_bytes -= pending.cost;
        let Pending {
            cookie,
            command,
            offset,
            ..
        } = pending;
        match (result, command) {
            (Ok(()), Command::Read { in_one_piece }) => {
                self.outbox.content(cookie, offset, buf, in_one_piece);
            }
            (Ok(()), _) => {
                self.outbox.done(cookie);
                self.pool.give(buf);
            }
            (Err(error), command) => {
                let is_read = matches!(command, Command::Read { .. });
                tracing::warn!(?command, offset, ?error, "guest request failed");
                self.outbox.failed(cookie, guest_errno(&error), is_read);
                self.pool.give(buf);
            }
        }
    }

    /// Sends what the socket takes, without waiting.
    fn send(&mut self) -> Result<bool, ConnectionError> {
        let mut news = false;
        while !self.outbox.is_empty() {
            let slices = self.outbox.slices();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let mut control = SendAncillaryBuffer::default();
            let result = rustix::net::sendmsg(self.socket, &slices, &mut control, flags);
            drop(slices);
            match result {
                Ok(bytes) => {
                    self.outbox.sent(bytes, &mut self.pool);
                    news = true;
                }
                Err(OsError::INTR) => {}
                Err(OsError::AGAIN) => break,
                Err(OsError::PIPE | OsError::CONNRESET) => {
                    self.phase = Phase::Gone;
                    break;
                }
                Err(error) => return Err(ConnectionError::Socket(error.into())),
            }
        }
        Ok(news)
    }

    /// Sleeps until the socket or the port has news.
    fn wait(&mut self) -> Result<(), ConnectionError> {
        let mut interest = PollFlags::empty();
        if self.may_take() {
            interest |= PollFlags::IN;
        }
        if !self.outbox.is_empty() {
            interest |= PollFlags::OUT;
        }
        let (queue, wakeup) = self.port.wait_fds();
        let socket = self.socket.as_fd();
        let mut fds = [
            PollFd::new(&socket, interest),
            PollFd::new(&wakeup, PollFlags::IN),
            PollFd::new(queue.as_ref().unwrap_or(&wakeup), PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(OsError::INTR) => return Ok(()),
            Err(error) => return Err(ConnectionError::Socket(error.into())),
        }
        // While nothing is taken from the socket, only this tells that the client is gone.
        let hung_up = fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if hung_up && !self.may_take() {
            self.phase = Phase::Gone;
        }
        Ok(())
    }
}

/// Whether a client with structured replies takes no simple one.
fn is_structured_only(number: u16) -> bool {
    matches!(number, command::READ | command::BLOCK_STATUS)
}

fn guest_errno(error: &GuestError) -> Errno {
    match error {
        GuestError::Moved => Errno::Shutdown,
        GuestError::NotHere => Errno::Perm,
        GuestError::OutOfRange => Errno::Inval,
        GuestError::Io(error) => io_errno(error),
    }
}

fn io_errno(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Errno::NoSpc,
        io::ErrorKind::OutOfMemory => Errno::NoMem,
        io::ErrorKind::InvalidInput => Errno::Inval,
        io::ErrorKind::Unsupported => Errno::NotSup,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Errno::Perm,
        _ => Errno::Io,
    }
}
