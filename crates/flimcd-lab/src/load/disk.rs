//! The disk as a guest sees it, and two simple ones: memory and a file.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt, path::Path, time::Duration};

/// What to do with a range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskOp {
    /// Fill the request's buffer.
    Read,
    /// Write the request's buffer.
    Write,
    /// The range reads as zero afterwards; it may be deallocated.
    WriteZeroes,
    /// All requests that were answered are durable once this is.
    Flush,
}

/// A request to a disk.
#[derive(Debug)]
pub struct DiskRequest {
    /// Comes back in the reply.
    pub id: u64,
    /// What to do.
    pub op: DiskOp,
    /// First byte. 0 for a flush.
    pub offset: u64,
    /// Bytes. 0 for a flush.
    pub length: u32,
    /// `length` bytes for a read (to fill) and a write; empty for the others.
    pub data: Vec<u8>,
}

/// The answer to a request.
#[derive(Debug)]
pub struct DiskReply {
    /// Of the request.
    pub id: u64,
    /// Whether it was done. An error is one that the disk reported for this request.
    pub result: io::Result<()>,
    /// The request's buffer; filled if it was a read that succeeded.
    pub data: Vec<u8>,
}

/// A disk that takes several requests at once, as a guest's virtual disk does.
///
/// Requests run in any order; a caller that cares does not submit overlapping ones. An error of
/// `submit` or `receive` means that the disk is gone (connection lost), and with it the answers
/// to everything in flight: those requests may have been done or not.
pub trait GuestDisk: Send {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Hands a request over. May block while the disk takes no more.
    ///
    /// # Errors
    /// The disk is gone.
    fn submit(&mut self, request: DiskRequest) -> io::Result<()>;

    /// The next answer, or `None` when none came within `timeout`.
    ///
    /// # Errors
    /// The disk is gone.
    fn receive(&mut self, timeout: Duration) -> io::Result<Option<DiskReply>>;
}

/// A disk in memory.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Vec<u8>,
    replies: VecDeque<DiskReply>,
}

impl MemoryDisk {
    /// A disk with this content.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            replies: VecDeque::new(),
        }
    }

    /// What is on it.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl GuestDisk for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn submit(&mut self, mut request: DiskRequest) -> io::Result<()> {
        let range = usize::try_from(request.offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(request.length as usize)?));
        let result = match range.and_then(|range| self.bytes.get_mut(range)) {
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
            Some(bytes) => {
                match request.op {
                    DiskOp::Read => request.data.copy_from_slice(bytes),
                    DiskOp::Write => bytes.copy_from_slice(&request.data),
                    DiskOp::WriteZeroes => bytes.fill(0),
                    DiskOp::Flush => {}
                }
                Ok(())
            }
        };
        self.replies.push_back(DiskReply {
            id: request.id,
            result,
            data: request.data,
        });
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<DiskReply>> {
        if self.replies.is_empty() {
            std::thread::sleep(timeout);
        }
        Ok(self.replies.pop_front())
    }
}

/// An image file used directly, through the page cache.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
    replies: VecDeque<DiskReply>,
}

impl FileDisk {
    /// Opens an image for reading, and for writing if `writable`.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(writable).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            file,
            size,
            replies: VecDeque::new(),
        })
    }

    fn run(&self, request: &mut DiskRequest) -> io::Result<()> {
        match request.op {
            DiskOp::Read => self.file.read_exact_at(&mut request.data, request.offset),
            DiskOp::Write => self.file.write_all_at(&request.data, request.offset),
            DiskOp::WriteZeroes => {
                let zeroes = vec![0; request.length as usize];
                self.file.write_all_at(&zeroes, request.offset)
            }
            DiskOp::Flush => self.file.sync_data(),
        }
    }
}

impl GuestDisk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn submit(&mut self, mut request: DiskRequest) -> io::Result<()> {
        let result = self.run(&mut request);
        self.replies.push_back(DiskReply {
            id: request.id,
            result,
            data: request.data,
        });
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<DiskReply>> {
        if self.replies.is_empty() {
            std::thread::sleep(timeout);
        }
        Ok(self.replies.pop_front())
    }
}
