//! What a guest may ask for, and the answers.

use std::io;

use flimcd_core::{ByteRange, VolumeSize};

use crate::{device::IoBuf, rules::GuestOp};

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write,
    /// Make the range zero.
    WriteZeroes {
        /// Whether space may be given back.
        punch: bool,
    },
    /// The content is not needed any more. Shrinks inwards to whole blocks.
    Trim,
    /// Make everything that was replied to durable. Offset and length are ignored.
    Flush,
    /// The range will be read soon: returns once its blocks are here.
    Cache,
}

/// A guest's request.
#[derive(Debug)]
pub struct GuestRequest {
    /// Chosen by the caller, handed back with the reply.
    pub id: u64,
    /// What to do.
    pub kind: RequestKind,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether the request is durable when it is replied to.
    pub fua: bool,
    /// `length` bytes or more for a read or a write, comes back with the reply; may be empty for the rest.
    pub buf: IoBuf,
}

/// The answer to a request.
#[derive(Debug)]
pub struct GuestReply {
    /// The request's id.
    pub id: u64,
    /// How it went.
    pub result: Result<(), GuestError>,
    /// The request's buffer, filled by a read.
    pub buf: IoBuf,
}

/// Why a guest's request failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Not inside of the volume.
    #[error("the range does not lie inside of the volume")]
    OutOfRange,
    /// The volume has another owner.
    #[error("the volume has moved to another site: connect to its socket there")]
    Moved,
    /// The volume has not arrived.
    #[error("the volume has not arrived: it can only be read before the switch")]
    NotHere,
    /// The device failed.
    #[error(transparent)]
    Io(io::Error),
}

impl GuestRequest {
    pub(super) fn check(&self, size: VolumeSize) -> Result<(), GuestError> {
        let in_range = self
            .offset
            .checked_add(self.length)
            .is_some_and(|end| end <= size.bytes());
        let fits = match self.kind {
            RequestKind::Read | RequestKind::Write => self.length <= self.buf.len() as u64,
            _ => true,
        };
        if self.kind == RequestKind::Flush || (in_range && fits) {
            Ok(())
        } else {
            Err(GuestError::OutOfRange)
        }
    }

    /// What it is for the rules, and on which bytes; `None` when there is nothing to do. Only for checked requests other
    /// than flushes.
    pub(super) fn guest_op(&self, size: VolumeSize) -> Option<(GuestOp, ByteRange)> {
        let range = ByteRange::at(self.offset, self.length);
        let (op, range) = match self.kind {
            RequestKind::Read | RequestKind::Cache => (GuestOp::Read, range),
            RequestKind::Write => (GuestOp::Write, range),
            RequestKind::WriteZeroes { .. } => (GuestOp::WriteZeroes, range),
            RequestKind::Trim => (GuestOp::Trim, range.blocks_covered(size).bytes(size)),
            RequestKind::Flush => return None,
        };
        (!range.is_empty()).then_some((op, range))
    }

    pub(super) fn reply(self, result: Result<(), GuestError>) -> GuestReply {
        GuestReply {
            id: self.id,
            result,
            buf: self.buf,
        }
    }
}
