//! From a client's bytes to requests, without I/O.
//!
//! [`Receiver`] owns the memory that bytes are received into, so that the payload of a large write
//! goes from the socket straight to where the disk takes it from. What comes out is checked: flags,
//! lengths and ranges are sound for the export, or it is a [`Received::Refused`] with the
//! protocol's error. Only a wrong magic number ends the connection, because after it nobody knows
//! where the next request begins.
//!
//! Memory: one inbox, and one payload of at most the export's longest request. A longer payload is
//! skipped without being kept. How many requests may be alive at once is the caller's business.

use flimcd_volume::device::{BufPool, IoBuf};

use crate::{
    handshake::Agreed,
    proto::{Errno, REQUEST_BYTES, REQUEST_MAGIC, Reader, command, flag},
};

/// Bytes of the inbox: some 60 writes of 4 KiB.
const INBOX_BYTES: usize = 256 << 10;
/// The inbox is moved to its front when less than this is free at its end.
const INBOX_LOW_BYTES: usize = 64 << 10;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Content.
    Read {
        /// In one piece: no hole chunks.
        in_one_piece: bool,
    },
    /// Write the payload.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// No more requests: finish and close.
    Disconnect,
    /// Make durable what was answered before.
    Flush,
    /// The content is not needed any more.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// It will be read soon.
    Cache,
    /// Make it read as zero.
    WriteZeroes {
        /// Space may be given back.
        punch: bool,
        /// Fail rather than be slow.
        fast: bool,
        /// Durable before the reply.
        fua: bool,
    },
    /// What is allocated.
    BlockStatus {
        /// One extent is enough.
        one: bool,
    },
}

/// A request that makes sense for the export.
#[derive(Debug)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
    /// Of a write: `length` bytes.
    pub payload: IoBuf,
}

/// What came out of the client's bytes.
#[derive(Debug)]
pub enum Received {
    /// To be done.
    Request(Request),
    /// To be answered with this error.
    Refused {
        /// The client's name for the request.
        cookie: u64,
        /// The protocol's error.
        error: Errno,
        /// Whether a structured answer has to be given even without anything else.
        command: u16,
    },
}

/// The client sent something that is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client sent {0:#010x} where a request must begin")]
pub struct BadMagic(pub u32);

/// Turns bytes into requests.
///
/// # Contract
/// Put bytes where [`space`](Self::space) says, tell how many by [`filled`](Self::filled), and call
/// [`next`](Self::next) until it has none.
/// `next` may be put off when too much is being worked on; `space` then runs out by itself.
#[derive(Debug)]
pub struct Receiver {
    inbox: Box<[u8]>,
    /// Bytes that are in the inbox and not used.
    start: usize,
    end: usize,
    /// A write whose payload is still arriving; the inbox is empty then.
    partial: Option<(Request, usize)>,
    /// Bytes of a refused payload still to come.
    skip: u64,
    agreed: Agreed,
}

impl Receiver {
    /// A receiver for a connection on which `agreed` holds, with the bytes that came behind the
    /// handshake.
    #[must_use]
    pub fn new(agreed: Agreed, after_handshake: &[u8]) -> Self {
        let mut inbox = vec![0; INBOX_BYTES.max(after_handshake.len())].into_boxed_slice();
        inbox[..after_handshake.len()].copy_from_slice(after_handshake);
        Self {
            inbox,
            start: 0,
            end: after_handshake.len(),
            partial: None,
            skip: 0,
            agreed,
        }
    }

    /// What was agreed on.
    #[must_use]
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Where the next bytes go: first this, then that. Both empty when the inbox is full.
    pub fn space(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.inbox.len() - self.end < INBOX_LOW_BYTES {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let payload = match &mut self.partial {
            Some((request, done)) => &mut request.payload[*done..],
            None => &mut [],
        };
        (payload, &mut self.inbox[self.end..])
    }

    /// `bytes` more bytes are where [`space`](Self::space) said.
    ///
    /// # Panics
    /// When that is more than fitted.
    pub fn filled(&mut self, bytes: usize) {
        let mut bytes = bytes;
        if let Some((request, done)) = &mut self.partial {
            let mine = bytes.min(request.payload.len() - *done);
            *done += mine;
            bytes -= mine;
        }
        assert!(
            bytes <= self.inbox.len() - self.end,
            "more bytes than there was space for"
        );
        self.end += bytes;
    }

    /// The next request that is there as a whole.
    ///
    /// # Errors
    /// When the bytes are no request. The connection must be closed.
    pub fn next(&mut self, pool: &mut BufPool) -> Result<Option<Received>, BadMagic> {
        if let Some((request, done)) = &self.partial
            && *done < request.payload.len()
        {
            return Ok(None);
        }
        if let Some((request, _)) = self.partial.take() {
            return Ok(Some(Received::Request(request)));
        }
        if self.skip > 0 {
            let bytes = self.skip.min((self.end - self.start) as u64);
            self.skip -= bytes;
            self.start += usize::try_from(bytes).unwrap_or(0);
        }
        let bytes = &self.inbox[self.start..self.end];
        let Some(header) = parse_header(bytes)? else {
            return Ok(None);
        };
        self.start += REQUEST_BYTES;
        let is_write = header.command == command::WRITE;
        match self.check(&header) {
            Err(error) => {
                if is_write {
                    self.skip = header.length.into();
                }
                let Header {
                    cookie, command, ..
                } = header;
                Ok(Some(Received::Refused {
                    cookie,
                    error,
                    command,
                }))
            }
            Ok(command) => {
                let Header {
                    cookie,
                    offset,
                    length,
                    ..
                } = header;
                let payload = if is_write {
                    pool.take(length as usize)
                } else {
                    IoBuf::empty()
                };
                let request = Request {
                    cookie,
                    command,
                    offset,
                    length,
                    payload,
                };
                Ok(if is_write {
                    self.begin_payload(request)
                } else {
                    Some(request)
                }
                .map(Received::Request))
            }
        }
    }

    /// Moves what is there of the payload; the request, when that is all of it.
    fn begin_payload(&mut self, mut request: Request) -> Option<Request> {
        let there = (self.end - self.start).min(request.payload.len());
        request.payload[..there].copy_from_slice(&self.inbox[self.start..self.start + there]);
        self.start += there;
        if there == request.payload.len() {
            return Some(request);
        }
        self.partial = Some((request, there));
        None
    }

    fn check(&self, header: &Header) -> Result<Command, Errno> {
        let info = &self.agreed.info;
        let has = |bit: u16| header.flags & bit != 0;
        let fua = has(flag::FUA);
        let (command, allowed) = match header.command {
            command::READ => {
                let df = if self.agreed.structured { flag::DF } else { 0 };
                // Harmless, and some clients set it on everything.
                (
                    Command::Read {
                        in_one_piece: has(flag::DF),
                    },
                    df | flag::FUA,
                )
            }
            command::WRITE => (Command::Write { fua }, flag::FUA),
            command::DISCONNECT => return Ok(Command::Disconnect),
            command::FLUSH => {
                // Offset and length are reserved; clients that set them mean no harm.
                return if header.flags & !flag::FUA == 0 {
                    Ok(Command::Flush)
                } else {
                    Err(Errno::Inval)
                };
            }
            command::TRIM => (Command::Trim { fua }, flag::FUA),
            command::CACHE => (Command::Cache, flag::FUA),
            command::WRITE_ZEROES => {
                let (punch, fast) = (!has(flag::NO_HOLE), has(flag::FAST_ZERO));
                let allowed = flag::FUA | flag::NO_HOLE | flag::FAST_ZERO;
                (Command::WriteZeroes { punch, fast, fua }, allowed)
            }
            command::BLOCK_STATUS if self.agreed.allocation => {
                let one = has(flag::REQ_ONE);
                (Command::BlockStatus { one }, flag::REQ_ONE | flag::FUA)
            }
            _ => return Err(Errno::Inval),
        };
        if header.flags & !allowed != 0 || header.length == 0 {
            return Err(Errno::Inval);
        }
        let changes = matches!(
            command,
            Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. }
        );
        if changes && info.read_only {
            return Err(Errno::Perm);
        }
        let moves_data = matches!(command, Command::Read { .. } | Command::Write { .. });
        if moves_data && header.length > info.request_bytes_max {
            return Err(Errno::Inval);
        }
        let end = header.offset.checked_add(header.length.into());
        if end.is_none_or(|end| end > info.size) {
            let grows = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
            return Err(if grows { Errno::NoSpc } else { Errno::Inval });
        }
        Ok(command)
    }
}

struct Header {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

fn parse_header(bytes: &[u8]) -> Result<Option<Header>, BadMagic> {
    let mut reader = Reader(bytes);
    let header = (|| {
        let magic = reader.u32()?;
        let (flags, command) = (reader.u16()?, reader.u16()?);
        let (cookie, offset, length) = (reader.u64()?, reader.u64()?, reader.u32()?);
        Some((
            magic,
            Header {
                flags,
                command,
                cookie,
                offset,
                length,
            },
        ))
    })();
    match header {
        Some((REQUEST_MAGIC, header)) => Ok(Some(header)),
        Some((magic, _)) => Err(BadMagic(magic)),
        // Garbage need not be waited for to the end.
        None => match Reader(bytes).u32() {
            Some(magic) if magic != REQUEST_MAGIC => Err(BadMagic(magic)),
            _ => Ok(None),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::handshake::ExportInfo;

    fn agreed(structured: bool, read_only: bool) -> Agreed {
        let info = ExportInfo {
            size: 1 << 20,
            read_only,
            block_size_min: 1,
            block_size_preferred: 4096,
            request_bytes_max: 256 << 10,
        };
        Agreed {
            name: "disk".to_owned(),
            info,
            structured,
            allocation: structured,
        }
    }

    fn header(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    /// Everything that comes out of `bytes` when they arrive in pieces of the given lengths, in
    /// turn.
    fn receive(agreed: Agreed, bytes: &[u8], pieces: &[usize]) -> Vec<String> {
        let mut receiver = Receiver::new(agreed, &[]);
        let (mut pool, mut rest, mut out) = (BufPool::new(1 << 20), bytes, Vec::new());
        for &piece in pieces.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (payload, inbox) = receiver.space();
            let mut left = piece.min(rest.len());
            let mut filled = 0;
            for part in [payload, inbox] {
                let count = part.len().min(left);
                part[..count].copy_from_slice(&rest[..count]);
                (rest, left, filled) = (&rest[count..], left - count, filled + count);
            }
            receiver.filled(filled);
            while let Some(received) = receiver.next(&mut pool).unwrap() {
                out.push(match received {
                    Received::Request(request) => {
                        let sum: u64 = request.payload.iter().map(|&b| u64::from(b)).sum();
                        let Request {
                            cookie,
                            command,
                            offset,
                            length,
                            ..
                        } = request;
                        format!("{cookie} {command:?} {offset}+{length} {sum}")
                    }
                    Received::Refused { cookie, error, .. } => format!("{cookie} {error:?}"),
                });
            }
        }
        out
    }

    #[test]
    fn each_command_is_checked() {
        let check = |structured, read_only, number, flags, offset, length, want: &str| {
            let bytes = header(number, flags, 5, offset, length);
            let got = receive(agreed(structured, read_only), &bytes, &[usize::MAX]);
            assert_eq!(
                got,
                [format!("5 {want}")],
                "{number} {flags} {offset} {length}"
            );
        };
        let read = "Read { in_one_piece: true } 0+512 0";
        check(true, false, command::READ, flag::DF, 0, 512, read);
        check(false, false, command::READ, flag::DF, 0, 512, "Inval");
        check(true, false, command::READ, 0, 0, (256 << 10) + 1, "Inval");
        check(true, false, command::READ, 0, (1 << 20) - 511, 512, "Inval");
        check(true, true, command::WRITE, 0, 0, 0, "Inval");
        check(true, true, command::TRIM, 0, 0, 512, "Perm");
        check(true, true, command::WRITE_ZEROES, 0, 0, 512, "Perm");
        let zeroes = "WriteZeroes { punch: false, fast: true, fua: true } 0+1048576 0";
        let all = flag::FUA | flag::NO_HOLE | flag::FAST_ZERO;
        check(true, false, command::WRITE_ZEROES, all, 0, 1 << 20, zeroes);
        check(true, false, command::WRITE_ZEROES, flag::DF, 0, 1, "Inval");
        check(true, false, command::WRITE_ZEROES, 0, 1, 1 << 20, "NoSpc");
        check(
            true,
            false,
            command::BLOCK_STATUS,
            flag::REQ_ONE,
            0,
            9,
            "BlockStatus { one: true } 0+9 0",
        );
        check(false, false, command::BLOCK_STATUS, 0, 0, 9, "Inval");
        check(
            true,
            false,
            command::CACHE,
            0,
            0,
            1 << 20,
            "Cache 0+1048576 0",
        );
        check(true, false, command::FLUSH, 0, 0, 0, "Flush 0+0 0");
        check(true, true, command::DISCONNECT, 0, 0, 0, "Disconnect 0+0 0");
        check(true, false, 77, 0, 0, 0, "Inval");
    }

    #[test]
    fn garbage_is_known_by_its_first_four_bytes() {
        let mut receiver = Receiver::new(agreed(true, false), b"GET ");
        assert!(receiver.next(&mut BufPool::new(0)).is_err());
    }

    proptest! {
        #[test]
        fn where_the_bytes_are_cut_changes_nothing(
            requests in prop::collection::vec((0u16..9, 0u64..1 << 20, 0u32..300_000), 1..12),
            pieces in prop::collection::vec(1usize..200_000, 1..6),
        ) {
            let mut bytes = Vec::new();
            for (index, &(number, offset, length)) in requests.iter().enumerate() {
                bytes.extend(header(number, 0, index as u64, offset, length));
                if number == command::WRITE {
                    bytes.extend((0..length).map(|i| i.to_le_bytes()[0]));
                }
            }
            let whole = receive(agreed(true, false), &bytes, &[usize::MAX]);
            prop_assert_eq!(whole.len(), requests.len());
            prop_assert_eq!(receive(agreed(true, false), &bytes, &pieces), whole);
        }
    }
}
