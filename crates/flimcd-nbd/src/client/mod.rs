//! A blocking client on a unix socket, with many requests in flight where the caller wants that.
//!
//! Two ways to use it, not at the same time: the calls of one request each ([`Client::read`],
//! [`Client::write`], …), or [`Client::submit`] and [`Client::recv`], which answer in whatever
//! order the server does.

mod negotiate;

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use flimcd_core::ByteRange;

use crate::proto::{
    CHUNK_BYTES, CHUNK_MAGIC, Errno, REQUEST_MAGIC, Reader, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    chunk, command, flag,
};

/// Bytes received by one call.
const INBOX_BYTES: usize = 256 << 10;
/// Largest chunk that is believed: the largest read and its header, with room to spare.
const CHUNK_PAYLOAD_MAX: usize = 65 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection is broken; nothing is known of requests in flight.
    #[error("the connection to the server is broken: {0}")]
    Io(#[from] io::Error),
    /// The server does not speak NBD as we know it.
    #[error("the server breaks the protocol: {0}")]
    Protocol(&'static str),
    /// The server has no such export.
    #[error("the server has no export called {0:?}")]
    NoSuchExport(String),
    /// The server refused a request.
    #[error("the server answered: {0}")]
    Refused(#[from] Errno),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// `length` bytes from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// `data` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: &'a [u8],
        /// Durable before the answer.
        fua: bool,
    },
    /// Make durable what was answered before.
    Flush,
    /// Give the space back.
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// Make it read as zero.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
        /// Space may be given back.
        punch: bool,
        /// Fail rather than be slow.
        fast: bool,
    },
    /// It will be read soon.
    Cache {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// What is allocated.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
}

/// The answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// What [`Client::submit`] returned.
    pub cookie: u64,
    /// How it went.
    pub result: Result<(), Errno>,
    /// Of a read: the content.
    pub data: Vec<u8>,
    /// Of a block status: the extents and their `base:allocation` flags.
    pub extents: Vec<(ByteRange, u32)>,
}

/// A request without an answer.
#[derive(Debug)]
struct Pending {
    offset: u64,
    /// Of a read: where the content is put.
    data: Vec<u8>,
    extents: Vec<(ByteRange, u32)>,
    error: Option<Errno>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    size: u64,
    flags: u16,
    allocation: bool,
    next_cookie: u64,
    pending: HashMap<u64, Pending>,
    outbox: Vec<u8>,
    inbox: Box<[u8]>,
    start: usize,
    end: usize,
    spare: Vec<Vec<u8>>,
}

impl Client {
    /// Connects to the server at `path` and chooses `export`.
    ///
    /// # Errors
    /// When there is no server, no such export, or something else speaks there.
    pub fn connect_unix(path: impl AsRef<Path>, export: &str) -> Result<Self, ClientError> {
        let mut socket = UnixStream::connect(path)?;
        let agreed = negotiate::negotiate(&mut socket, export)?;
        Ok(Self {
            socket,
            size: agreed.size,
            flags: agreed.flags,
            allocation: agreed.allocation,
            next_cookie: 1,
            pending: HashMap::new(),
            outbox: Vec::new(),
            inbox: vec![0; INBOX_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            spare: Vec::new(),
        })
    }

    /// Names of the exports of the server at `path`.
    ///
    /// # Errors
    /// As [`connect_unix`](Self::connect_unix).
    pub fn list_unix(path: impl AsRef<Path>) -> Result<Vec<String>, ClientError> {
        negotiate::list(&mut UnixStream::connect(path)?)
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The export's transmission flags, see [`crate::proto::export`].
    #[must_use]
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Whether [`Op::BlockStatus`] may be asked for.
    #[must_use]
    pub fn has_block_status(&self) -> bool {
        self.allocation
    }

    /// Requests without an answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The socket, for waiting on several clients at once or for shutting it down from another
    /// thread.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// A call that waits longer than this for the server fails; `None` waits for ever.
    ///
    /// # Errors
    /// When the system refuses, for instance a timeout of zero.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.socket.set_read_timeout(timeout)?;
        Ok(self.socket.set_write_timeout(timeout)?)
    }

    /// Queues a request and returns its cookie. It is sent by the next
    /// [`flush_requests`](Self::flush_requests) or [`recv`](Self::recv), or at once when it carries
    /// data.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn submit(&mut self, op: Op<'_>) -> Result<u64, ClientError> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let (number, flags, offset, length) = encode(op);
        for part in [
            &REQUEST_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &number.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ] {
            self.outbox.extend_from_slice(part);
        }
        let mut data = Vec::new();
        match op {
            Op::Read { length, .. } => {
                data = self.spare.pop().unwrap_or_default();
                data.resize(length as usize, 0);
            }
            Op::Write { data, .. } => self.outbox.extend_from_slice(data),
            _ => {}
        }
        self.pending.insert(
            cookie,
            Pending {
                offset,
                data,
                extents: Vec::new(),
                error: None,
            },
        );
        if self.outbox.len() >= INBOX_BYTES {
            self.flush_requests()?;
        }
        Ok(cookie)
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn flush_requests(&mut self) -> Result<(), ClientError> {
        if !self.outbox.is_empty() {
            self.socket.write_all(&self.outbox)?;
            self.outbox.clear();
        }
        Ok(())
    }

    /// Sends what is queued, then waits for the next answer.
    ///
    /// # Errors
    /// When the connection is broken or nothing is in flight. A refusal by the server is no error
    /// here.
    pub fn recv(&mut self) -> Result<Reply, ClientError> {
        self.flush_requests()?;
        if self.pending.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "nothing is in flight").into());
        }
        loop {
            if let Some(reply) = self.next_chunk()? {
                return Ok(reply);
            }
        }
    }

    /// As [`recv`](Self::recv), but only of what has been received already; `None` when that is not
    /// enough for an answer.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn recv_buffered(&mut self) -> Result<Option<Reply>, ClientError> {
        while self.has_whole_chunk() {
            if let Some(reply) = self.next_chunk()? {
                return Ok(Some(reply));
            }
        }
        Ok(None)
    }

    /// Takes the memory of a read's content back, for the next read.
    pub fn recycle(&mut self, data: Vec<u8>) {
        if data.capacity() > 0 && self.spare.len() < 256 {
            self.spare.push(data);
        }
    }

    /// Whether the inbox has a chunk that needs no more bytes from the socket.
    fn has_whole_chunk(&self) -> bool {
        let there = &self.inbox[self.start..self.end];
        let Some(magic) = Reader(there).u32() else {
            return false;
        };
        if magic == SIMPLE_REPLY_MAGIC {
            let mut reader = Reader(there);
            let (_, error, cookie) = (reader.u32(), reader.u32(), reader.u64());
            let content = match (error, cookie.and_then(|c| self.pending.get(&c))) {
                (Some(0), Some(pending)) => pending.data.len(),
                _ => 0,
            };
            return there.len() >= SIMPLE_REPLY_BYTES + content;
        }
        let Some(length) = there.get(CHUNK_BYTES - 4..CHUNK_BYTES) else {
            return false;
        };
        let length = Reader(length).u32().unwrap_or(0) as usize;
        there.len() - CHUNK_BYTES >= length
    }

    /// Reads one simple reply or chunk; the answer, when that ended it.
    fn next_chunk(&mut self) -> Result<Option<Reply>, ClientError> {
        self.fill(SIMPLE_REPLY_BYTES)?;
        let magic = Reader(&self.inbox[self.start..self.end]).u32();
        match magic {
            Some(SIMPLE_REPLY_MAGIC) => self.simple_reply().map(Some),
            Some(CHUNK_MAGIC) => self.structured_chunk(),
            _ => Err(ClientError::Protocol(
                "a reply begins with a wrong magic number",
            )),
        }
    }

    fn simple_reply(&mut self) -> Result<Reply, ClientError> {
        let mut reader = Reader(&self.inbox[self.start + 4..self.end]);
        let (error, cookie) = (reader.u32().unwrap_or(0), reader.u64().unwrap_or(0));
        self.start += SIMPLE_REPLY_BYTES;
        let mut pending = self.take(cookie)?;
        if error != 0 {
            pending.error = Some(Errno::from_code(error));
        } else if !pending.data.is_empty() {
            self.read_exact(&mut pending.data)?;
        }
        Ok(pending.into_reply(cookie))
    }

    fn structured_chunk(&mut self) -> Result<Option<Reply>, ClientError> {
        self.fill(CHUNK_BYTES)?;
        let mut reader = Reader(&self.inbox[self.start + 4..self.end]);
        let (flags, kind) = (reader.u16().unwrap_or(0), reader.u16().unwrap_or(0));
        let (cookie, length) = (
            reader.u64().unwrap_or(0),
            reader.u32().unwrap_or(0) as usize,
        );
        self.start += CHUNK_BYTES;
        if length > CHUNK_PAYLOAD_MAX {
            return Err(ClientError::Protocol("a chunk is too long"));
        }
        let mut pending = self.take(cookie)?;
        self.chunk_payload(&mut pending, kind, length)?;
        if flags & chunk::FLAG_DONE != 0 {
            return Ok(Some(pending.into_reply(cookie)));
        }
        self.pending.insert(cookie, pending);
        Ok(None)
    }

    fn chunk_payload(
        &mut self,
        pending: &mut Pending,
        kind: u16,
        length: usize,
    ) -> Result<(), ClientError> {
        const WRONG: ClientError = ClientError::Protocol("a chunk does not fit its request");
        if kind == chunk::OFFSET_DATA {
            let mut head = [0; 8];
            let content = length.checked_sub(head.len()).ok_or(WRONG)?;
            self.read_exact(&mut head)?;
            let part = pending
                .part(u64::from_be_bytes(head), content)
                .ok_or(WRONG)?;
            return self.read_exact(part);
        }
        let mut payload = vec![0; length];
        self.read_exact(&mut payload)?;
        let mut reader = Reader(&payload);
        match kind {
            chunk::NONE => {}
            chunk::OFFSET_HOLE => {
                let (Some(at), Some(len)) = (reader.u64(), reader.u32()) else {
                    return Err(WRONG);
                };
                pending.part(at, len as usize).ok_or(WRONG)?.fill(0);
            }
            chunk::BLOCK_STATUS => {
                reader.u32().ok_or(WRONG)?;
                let mut at = pending.offset;
                while let (Some(len), Some(state)) = (reader.u32(), reader.u32()) {
                    pending.extents.push((ByteRange::at(at, len.into()), state));
                    at += u64::from(len);
                }
            }
            kind if kind & (1 << 15) != 0 => {
                pending.error = Some(Errno::from_code(reader.u32().ok_or(WRONG)?));
            }
            _ => return Err(ClientError::Protocol("a chunk of unknown type")),
        }
        Ok(())
    }

    fn take(&mut self, cookie: u64) -> Result<Pending, ClientError> {
        let unknown = ClientError::Protocol("a reply to a request that was never sent");
        self.pending.remove(&cookie).ok_or(unknown)
    }

    /// Makes at least `bytes` bytes be in the inbox.
    fn fill(&mut self, bytes: usize) -> Result<(), ClientError> {
        while self.end - self.start < bytes {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.inbox.len() - self.end < bytes {
                self.inbox.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match self.socket.read(&mut self.inbox[self.end..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.end += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), ClientError> {
        let there = buf.len().min(self.end - self.start);
        buf[..there].copy_from_slice(&self.inbox[self.start..self.start + there]);
        self.start += there;
        Ok(self.socket.read_exact(&mut buf[there..])?)
    }

    // --- one request at a time

    fn call(&mut self, op: Op<'_>) -> Result<Reply, ClientError> {
        let cookie = self.submit(op)?;
        let reply = self.recv()?;
        if reply.cookie != cookie {
            return Err(ClientError::Protocol(
                "the answer belongs to another request",
            ));
        }
        reply.result?;
        Ok(reply)
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// When the server refuses or the connection breaks.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), ClientError> {
        let length = length_of(buf)?;
        let reply = self.call(Op::Read { offset, length })?;
        buf.copy_from_slice(&reply.data);
        self.recycle(reply.data);
        Ok(())
    }

    /// Writes `data` at `offset`; with `fua` it is durable on return.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        length_of(data)?;
        self.call(Op::Write { offset, data, fua }).map(drop)
    }

    /// Makes durable what was answered before.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.call(Op::Flush).map(drop)
    }

    /// Gives space back.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.call(Op::Trim { offset, length }).map(drop)
    }

    /// Makes a range read as zero; with `punch` the space may be given back.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write_zeroes(
        &mut self,
        offset: u64,
        length: u32,
        punch: bool,
    ) -> Result<(), ClientError> {
        self.call(Op::WriteZeroes {
            offset,
            length,
            punch,
            fast: false,
        })
        .map(drop)
    }

    /// Extents from `offset` with their `base:allocation` flags; they may cover less or more than
    /// `length`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn block_status(
        &mut self,
        offset: u64,
        length: u32,
    ) -> Result<Vec<(ByteRange, u32)>, ClientError> {
        self.call(Op::BlockStatus { offset, length })
            .map(|reply| reply.extents)
    }

    /// Says goodbye and closes.
    ///
    /// # Errors
    /// When the connection is broken already.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        let mut goodbye = REQUEST_MAGIC.to_be_bytes().to_vec();
        goodbye.extend([0; 2]);
        goodbye.extend(command::DISCONNECT.to_be_bytes());
        goodbye.extend([0; 20]);
        self.outbox.extend_from_slice(&goodbye);
        self.flush_requests()?;
        // The server closes once everything is answered.
        io::copy(&mut self.socket, &mut io::sink())?;
        Ok(())
    }
}

impl Pending {
    /// The part of the content that `length` bytes at `offset` of the export are.
    fn part(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        let from = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        self.data.get_mut(from..from.checked_add(length)?)
    }

    fn into_reply(self, cookie: u64) -> Reply {
        let result = self.error.map_or(Ok(()), Err);
        Reply {
            cookie,
            result,
            data: self.data,
            extents: self.extents,
        }
    }
}

fn length_of(data: &[u8]) -> Result<u32, ClientError> {
    u32::try_from(data.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "more than 4 GiB at once").into())
}

/// Command, flags, offset and length of a request.
fn encode(op: Op<'_>) -> (u16, u16, u64, u32) {
    match op {
        Op::Read { offset, length } => (command::READ, 0, offset, length),
        Op::Write { offset, data, fua } => {
            let flags = if fua { flag::FUA } else { 0 };
            (
                command::WRITE,
                flags,
                offset,
                u32::try_from(data.len()).unwrap_or(u32::MAX),
            )
        }
        Op::Flush => (command::FLUSH, 0, 0, 0),
        Op::Trim { offset, length } => (command::TRIM, 0, offset, length),
        Op::WriteZeroes {
            offset,
            length,
            punch,
            fast,
        } => {
            let no_hole = if punch { 0 } else { flag::NO_HOLE };
            let fast = if fast { flag::FAST_ZERO } else { 0 };
            (command::WRITE_ZEROES, no_hole | fast, offset, length)
        }
        Op::Cache { offset, length } => (command::CACHE, 0, offset, length),
        Op::BlockStatus { offset, length } => (command::BLOCK_STATUS, 0, offset, length),
    }
}
