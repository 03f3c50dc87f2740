//! A raw image file, or a block device node, as a [`BlockDevice`].
//!
//! Direct I/O goes around the page cache and asks for alignment. What is aligned goes straight to
//! the disk. A read that is not is read in a wider aligned buffer. A write that is not, which
//! includes the tail of an image whose size is no multiple of the disk's sector, goes through the
//! page cache on a second descriptor, alone: [`gate::Gate`] keeps it apart from every aligned write
//! of this device, because the kernel merges it in memory with sectors that a direct write may be
//! replacing on the disk at that moment. Flush covers both, as it works on the file.
//!
//! Where the file system refuses direct I/O, or the kernel io_uring, the device falls back and says
//! so: [`FileDevice::backend`].

mod gate;
mod inline;
mod open;
#[cfg(test)]
mod tests;
mod uring;

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use flimcd_core::{ByteRange, VolumeSize};
use rustix::fs::{FallocateFlags, SeekFrom};

use super::{
    BlockDevice, DataExtent, IoBuf, IoQueue, check_range,
    lock::{self, LockError},
};
use gate::Gate;

pub use open::{Backend, DirectIo, OpenError, OpenOptions, UringUse};

/// Most bytes read or written by one call through a bounce buffer.
const BOUNCE_BYTES: usize = 1 << 20;

/// An open image file. Clones are the same open file.
#[derive(Clone, Debug)]
pub struct FileDevice {
    shared: Arc<Shared>,
}

/// What the device and its queues share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// For aligned I/O: opened with `O_DIRECT` when that is in use.
    main: File,
    /// For writes that direct I/O cannot do; `None` when `main` is buffered itself.
    buffered: Option<File>,
    path: PathBuf,
    size: VolumeSize,
    backend: Backend,
    /// Offsets and lengths must be multiples of this for `main`; 1 when buffered.
    align: u64,
    /// Memory must be aligned to this for `main`; 1 when buffered.
    mem_align: usize,
    gate: Gate,
    /// Whether it may be written.
    read_only: bool,
    /// Whether `main` holds the image locks.
    locked: AtomicBool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // All queues are gone and nothing is in flight, but a ring that the kernel is still taking
        // down may keep the file.
        if *self.locked.get_mut() {
            lock::unlock_image(&self.main);
        }
    }
}

impl FileDevice {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong with the file, or who else uses it.
    pub fn open(path: impl Into<PathBuf>, options: &OpenOptions) -> Result<Self, OpenError> {
        open::open(path.into(), options).map(|shared| Self {
            shared: Arc::new(shared),
        })
    }

    /// Which of direct I/O and io_uring are in use, and why not.
    #[must_use]
    pub fn backend(&self) -> &Backend {
        &self.shared.backend
    }

    /// Takes the image locks now, for a device that was opened without. Nothing happens if it has them. Blocks for a
    /// second before it believes in a conflict. Not to be called by two threads at once.
    ///
    /// # Errors
    /// When somebody else uses the image; the device then works on without locks.
    pub fn take_locks(&self) -> Result<(), LockError> {
        let shared = &self.shared;
        if !shared.locked.load(Ordering::Acquire) {
            lock::lock_image(&shared.main, &shared.path, shared.read_only)?;
            shared.locked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Gives the image locks up while the device stays open, so that somebody else can open the image. Whoever calls this
    /// sees to it that nothing is written here any more once that one writes.
    pub fn give_up_locks(&self) {
        if self.shared.locked.swap(false, Ordering::AcqRel) {
            lock::unlock_image(&self.shared.main);
        }
    }

    /// Whether it holds the image locks.
    #[must_use]
    pub fn has_locks(&self) -> bool {
        self.shared.locked.load(Ordering::Acquire)
    }

    /// Device and inode number of the file that is open, which need not be at its path any more.
    ///
    /// # Errors
    /// What the system says.
    pub fn file_number(&self) -> io::Result<(u64, u64)> {
        let found = self.shared.main.metadata()?;
        Ok((found.dev(), found.ino()))
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.shared.path
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> VolumeSize {
        self.shared.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.shared.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.shared.write_at(offset, data)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.shared.main.sync_data()
    }

    fn write_zeroes(&self, range: ByteRange, punch: bool) -> io::Result<()> {
        self.shared.write_zeroes(range, punch)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.shared.discard(range)
    }

    fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>> {
        self.shared.data_extents(range, max)
    }

    fn zeroes_fast(&self) -> bool {
        self.shared.backend.zeroes_fast
    }

    fn open_queue(&self, depth: u32) -> io::Result<Box<dyn IoQueue>> {
        let shared = Arc::clone(&self.shared);
        if self.shared.backend.io_uring {
            match uring::UringQueue::new(Arc::clone(&shared), depth) {
                Ok(queue) => return Ok(Box::new(queue)),
                Err(error) => tracing::warn!(
                    path = %shared.path.display(), %error,
                    "no io_uring for one more connection, it uses plain calls"
                ),
            }
        }
        Ok(Box::new(inline::InlineQueue::new(shared)))
    }
}

impl Shared {
    /// Whether direct I/O can do this in place.
    fn is_aligned(&self, offset: u64, length: u64) -> bool {
        (offset | length).is_multiple_of(self.align)
    }

    fn is_memory_aligned(&self, data: &[u8]) -> bool {
        (data.as_ptr() as usize).is_multiple_of(self.mem_align)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        if self.is_aligned(offset, buf.len() as u64) && self.is_memory_aligned(buf) {
            return self.main.read_exact_at(buf, offset);
        }
        let mut offset = offset;
        for part in buf.chunks_mut(BOUNCE_BYTES) {
            let (start, length) = self.widened(offset, part.len());
            let mut bounce = IoBuf::zeroed(length);
            let skip = usize_of(offset - start);
            read_at_least(&self.main, &mut bounce, start, skip + part.len())?;
            part.copy_from_slice(&bounce[skip..skip + part.len()]);
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// The aligned range around `length` bytes at `offset`. It may reach beyond the end of the
    /// file: the kernel then reads less.
    fn widened(&self, offset: u64, length: usize) -> (u64, usize) {
        let start = offset - offset % self.align;
        let end = (offset + length as u64).next_multiple_of(self.align);
        (start, usize_of(end - start))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(self.size, offset, data.len() as u64)?;
        let Some(buffered) = &self.buffered else {
            return self.main.write_all_at(data, offset);
        };
        if !self.is_aligned(offset, data.len() as u64) {
            let _alone = self.gate.exclusive();
            return buffered.write_all_at(data, offset);
        }
        let _with_others = self.gate.shared();
        if self.is_memory_aligned(data) {
            return self.main.write_all_at(data, offset);
        }
        let mut offset = offset;
        for part in data.chunks(BOUNCE_BYTES) {
            self.main.write_all_at(&IoBuf::copy_of(part), offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, punch: bool) -> io::Result<()> {
        check_range(self.size, range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let flags = zeroes_flags(punch);
        match rustix::fs::fallocate(&self.main, flags, range.start, range.len()) {
            Ok(()) => Ok(()),
            Err(error) if is_unsupported(error) => self.write_zeroes_as_data(range),
            Err(error) => Err(error.into()),
        }
    }

    fn write_zeroes_as_data(&self, range: ByteRange) -> io::Result<()> {
        let zeroes = IoBuf::zeroed(BOUNCE_BYTES.min(usize_of(range.len())));
        let mut at = range.start;
        while at < range.end {
            // The first write ends at a multiple of the buffer, so that those in the middle are
            // aligned.
            let stop = (at + 1)
                .next_multiple_of(BOUNCE_BYTES as u64)
                .min(range.end);
            let length = usize_of(stop - at).min(zeroes.len());
            self.write_at(at, &zeroes[..length])?;
            at += length as u64;
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        check_range(self.size, range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.main, zeroes_flags(true), range.start, range.len()) {
            Err(error) if !is_unsupported(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>> {
        check_range(self.size, range.start, range.len())?;
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end && extents.len() < max {
            let (end, is_hole) = self.extent_at(at)?;
            let end = end.clamp(at + 1, range.end);
            extents.push(DataExtent {
                range: ByteRange::new(at, end),
                is_hole,
            });
            at = end;
        }
        Ok(extents)
    }

    /// End and kind of the extent that `at` lies in.
    fn extent_at(&self, at: u64) -> io::Result<(u64, bool)> {
        match rustix::fs::seek(&self.main, SeekFrom::Data(at)) {
            Ok(data) if data > at => Ok((data, true)),
            Ok(_) => match rustix::fs::seek(&self.main, SeekFrom::Hole(at)) {
                Ok(hole) => Ok((hole, false)),
                Err(error) if is_unsupported(error) => Ok((self.size.bytes(), false)),
                Err(error) => Err(error.into()),
            },
            // No data up to the end.
            Err(rustix::io::Errno::NXIO) => Ok((self.size.bytes(), true)),
            Err(error) if is_unsupported(error) => Ok((self.size.bytes(), false)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads into `buf` until at least `needed` bytes are there; the file may end between there and the
/// end of `buf`.
fn read_at_least(file: &File, buf: &mut [u8], offset: u64, needed: usize) -> io::Result<()> {
    let mut done = 0;
    while done < needed {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How `fallocate` makes a range read as zero.
fn zeroes_flags(punch: bool) -> FallocateFlags {
    let how = if punch {
        FallocateFlags::PUNCH_HOLE
    } else {
        FallocateFlags::ZERO_RANGE
    };
    how | FallocateFlags::KEEP_SIZE
}

/// What kernels answer for an operation that this kind of file does not have. EINVAL is what a
/// block device says to a range that is no multiple of its sector.
fn is_unsupported(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(
        error,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV
    )
}

/// Lengths inside one buffer always fit.
#[expect(clippy::cast_possible_truncation, reason = "64-bit only: usize is u64")]
const fn usize_of(n: u64) -> usize {
    const { assert!(usize::BITS == 64) }
    n as usize
}
