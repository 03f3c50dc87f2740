//! Numbers of the NBD protocol, as the NBD project's `doc/proto.md` gives them. Everything on the
//! wire is big endian.

/// First eight bytes of a server, "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": second eight bytes of a server, and first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes in a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes in a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes in a chunk's header.
pub const CHUNK_BYTES: usize = 20;
/// Bytes in an option's header.
pub const OPTION_BYTES: usize = 16;
/// Bytes in the header of a reply to an option.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Longest export name and longest text, by the protocol.
pub const NAME_BYTES_MAX: usize = 4096;

/// Handshake flags; the client's have the same values.
pub mod handshake {
    /// The fixed newstyle handshake.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after `OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the handshake.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Types of information about an export.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod export {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of structured replies.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod chunk {
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The one metadata context there is.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number in block status replies.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// In `base:allocation`: nothing is allocated.
pub const STATE_HOLE: u32 = 1;
/// In `base:allocation`: reads as zero.
pub const STATE_ZERO: u32 = 2;

/// Why a request failed, in the protocol's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u32)]
pub enum Errno {
    /// Not allowed: the export is read-only.
    #[error("operation not permitted")]
    Perm = 1,
    /// The medium failed.
    #[error("input/output error")]
    Io = 5,
    /// Out of memory.
    #[error("out of memory")]
    NoMem = 12,
    /// The request makes no sense.
    #[error("invalid request")]
    Inval = 22,
    /// The medium is full, or the write is beyond its end.
    #[error("no space left on the device")]
    NoSpc = 28,
    /// The reply would be too long.
    #[error("value too large")]
    Overflow = 75,
    /// Cannot be done, or not fast.
    #[error("operation not supported")]
    NotSup = 95,
    /// The server is going away, or the volume went.
    #[error("the server is shutting down, or the volume has moved")]
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The meaning of a number on the wire; unknown ones are read as EINVAL, as the protocol says.
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}

/// Reads big-endian numbers from the front of a slice; `None` when it is too short.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text with its length in four bytes before it.
    pub(crate) fn text(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        std::str::from_utf8(self.bytes(len)?).ok()
    }
}
