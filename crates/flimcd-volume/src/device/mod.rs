//! Block devices under a volume: the traits, the file back end, image locks and fault layers.
//!
//! A [`BlockDevice`] is a plain array of bytes that keeps what is written to it. It knows nothing
//! of owners, migrations or missing blocks: those rules are the volume's. Two ways lead into it:
//! - the blocking calls of [`BlockDevice`], from any thread, for transfers and bookkeeping;
//! - an [`IoQueue`] per thread for guest I/O, where many requests are in flight at once.
//!
//! Both may be used at the same time on the same device. Requests that overlap while in flight have
//! no order: each byte ends as one of the writes left it, and a read sees, byte by byte, the old or
//! the new content. A caller that needs order waits for the completion of the first. Bytes that no
//! write in flight covers never change, whatever the alignment of the neighbours.

mod buf;
pub mod fault;
mod file;
pub mod lock;

use std::{io, os::fd::BorrowedFd};

use flimcd_core::{ByteRange, VolumeSize};

pub use buf::{BufPool, IoBuf};
pub use file::{Backend, DirectIo, FileDevice, OpenError, OpenOptions, UringUse};

/// A run of bytes that a device reports as data or as a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataExtent {
    /// The bytes, never empty.
    pub range: ByteRange,
    /// Whether nothing is allocated there, so that it reads as zero without I/O.
    pub is_hole: bool,
}

/// An array of [`VolumeSize`] bytes.
///
/// # Contract
/// - Offsets and lengths are in bytes, of any alignment. A range that does not lie inside
///   [`size`](Self::size) is a caller's bug and answered with [`io::ErrorKind::InvalidInput`].
/// - A completed write is seen by every read that starts afterwards, by any path into the device.
/// - [`sync_data`](Self::sync_data) makes every write, zeroing and discard that *completed before
///   the call* durable. Those in flight at the time may or may not be.
/// - An error leaves the range's content unknown (old, new, or a mix), and everything else
///   untouched. A full disk is reported as [`io::ErrorKind::StorageFull`].
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in bytes. Never changes.
    fn size(&self) -> VolumeSize;

    /// Fills `buf` with the bytes from `offset`.
    ///
    /// # Errors
    /// What the medium reports; never a short read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the medium reports; never a short write.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes what completed before the call durable.
    ///
    /// # Errors
    /// What the medium reports. After an error nothing may be assumed durable since the last
    /// success.
    fn sync_data(&self) -> io::Result<()>;

    /// Makes `range` read as zero. With `punch` the device may give the space back, without it the
    /// space stays, or becomes, allocated where the medium can do that.
    ///
    /// # Errors
    /// What the medium reports.
    fn write_zeroes(&self, range: ByteRange, punch: bool) -> io::Result<()>;

    /// Says that the content of `range` is not needed any more. It reads as before or as zero
    /// afterwards.
    ///
    /// # Errors
    /// What the medium reports; a medium that cannot discard succeeds and does nothing.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// Where in `range` data and holes lie: contiguous extents in ascending order, the first
    /// starting at
    /// `range.start`, neighbours of different kind, at most `max` of them. Fewer bytes than `range`
    /// are covered only when there are `max` extents. A device that does not know says data. At
    /// least one extent for a range that is not empty.
    ///
    /// # Errors
    /// What the medium reports.
    fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>>;

    /// Whether [`write_zeroes`](Self::write_zeroes) is much faster than writing that many zero
    /// bytes.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// A queue for one thread with room for `depth` requests in flight; more may be pushed and
    /// wait.
    ///
    /// # Errors
    /// When the resources for it (a ring, a descriptor) cannot be had.
    fn open_queue(&self, depth: u32) -> io::Result<Box<dyn IoQueue>>;
}

/// What an [`IoOp`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Fills `buf[..length]`.
    Read,
    /// Writes `buf[..length]`.
    Write,
    /// As [`BlockDevice::sync_data`]: covers what was handed out by [`IoQueue::completions`], or
    /// completed by any other path, before this was pushed. Offset and length are ignored.
    Sync,
    /// As [`BlockDevice::write_zeroes`].
    WriteZeroes {
        /// Whether space may be given back.
        punch: bool,
    },
    /// As [`BlockDevice::discard`].
    Discard,
}

/// A request to an [`IoQueue`].
#[derive(Debug)]
pub struct IoOp {
    /// Chosen by the caller, handed back with the completion.
    pub id: u64,
    /// What to do.
    pub kind: IoKind,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// At least `length` bytes for reads and writes; [`IoBuf::empty`] is fine for the rest. After a
    /// read the bytes beyond `length` are unspecified.
    pub buf: IoBuf,
}

/// The end of an [`IoOp`].
#[derive(Debug)]
pub struct IoDone {
    /// The request's id.
    pub id: u64,
    /// How it went, as for the same call of [`BlockDevice`].
    pub result: io::Result<()>,
    /// The request's buffer.
    pub buf: IoBuf,
}

/// Asynchronous I/O for one thread.
///
/// # Contract
/// [`push`](Self::push) any number of requests, then [`submit`](Self::submit) once. After every
/// `submit`, call [`completions`](Self::completions) before waiting for [`poll_fd`](Self::poll_fd):
/// some requests finish inside `submit`. After the descriptor became readable, call `submit` and
/// `completions` again: `submit` also carries on what had to wait. Every pushed request completes
/// exactly once, in any order, unless the queue is dropped. Dropping the queue waits for what is in
/// flight; what it was is then done or not, and no completion is delivered.
///
/// A thread with writes in flight on its queue must not call [`BlockDevice::write_at`] on the same device
/// with a range that direct I/O cannot do: that call may wait for those very writes.
pub trait IoQueue: Send {
    /// Takes a request; nothing happens to it before [`submit`](Self::submit).
    fn push(&mut self, op: IoOp);

    /// Starts everything pushed so far.
    ///
    /// # Errors
    /// When the queue itself is broken, not when a request fails: the queue is then of no more use.
    fn submit(&mut self) -> io::Result<()>;

    /// As [`submit`](Self::submit), for a caller that has nothing else to do: may do the I/O right
    /// here and wait for it, which saves the way through the kernel's queues when only one request
    /// is wanted.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    fn submit_inline(&mut self) -> io::Result<()> {
        self.submit()
    }

    /// Appends the requests that have ended to `out`. Never blocks.
    fn completions(&mut self, out: &mut Vec<IoDone>);

    /// Readable when [`completions`](Self::completions) may have something; `None` when everything
    /// completes inside
    /// `submit`.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// Checks `offset..offset+length` against `size`.
pub(crate) fn check_range(size: VolumeSize, offset: u64, length: u64) -> io::Result<ByteRange> {
    match offset.checked_add(length) {
        Some(end) if end <= size.bytes() => Ok(ByteRange::new(offset, end)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{length} bytes at {offset} do not fit in a device of {} bytes",
                size.bytes()
            ),
        )),
    }
}
