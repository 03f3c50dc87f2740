//! Opening an image: which descriptors, which alignment, which fallbacks, whose locks.
//!
//! The locks are on the descriptor that rings use. After a `kill -9` the kernel takes a ring down
//! in its own time, and until then writes of the dead process may still reach the disk: as long as
//! that is so, the ring keeps the descriptor, the descriptor the locks, and the locks keep a
//! successor out.

use std::{
    fmt,
    fs::{File, OpenOptions as FileOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use flimcd_core::{InvalidSize, VolumeSize};
use rustix::fs::{AtFlags, StatxFlags};

use super::{Shared, gate::Gate, uring};
use crate::device::lock::{self, LockError};

/// Whether to go around the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Where the file system can.
    #[default]
    Auto,
    /// Or fail.
    On,
    /// Never.
    Off,
}

/// Whether to use io_uring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UringUse {
    /// Where the kernel allows it.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Page cache or not.
    pub direct: DirectIo,
    /// Ring or plain calls.
    pub io_uring: UringUse,
    /// Without the right to write.
    pub read_only: bool,
    /// Whether to take the locks that QEMU's tools respect, and to respect theirs. Off only for an
    /// image that a running QEMU hands over while it still has it open.
    pub lock: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            direct: DirectIo::Auto,
            io_uring: UringUse::Auto,
            read_only: false,
            lock: true,
        }
    }
}

/// How a device does its I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Whether the page cache is avoided.
    pub direct: bool,
    /// Whether queues use io_uring.
    pub io_uring: bool,
    /// Whether zeroing and punching are done by the file system.
    pub zeroes_fast: bool,
    /// Why something wanted is not in use, for people.
    pub fallback: Option<String>,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let calls = if self.io_uring {
            "io_uring"
        } else {
            "pread/pwrite"
        };
        let cache = if self.direct { "direct" } else { "buffered" };
        write!(f, "{cache} {calls}")?;
        match &self.fallback {
            Some(why) => write!(f, " ({why})"),
            None => Ok(()),
        }
    }
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened at all.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A directory, a pipe, …
    #[error(
        "{path} is neither a regular file nor a block device: give the path of a raw disk image"
    )]
    NotAnImage {
        /// The image.
        path: PathBuf,
    },
    /// Empty or too big.
    #[error("{path}: {source}")]
    Size {
        /// The image.
        path: PathBuf,
        /// What is wrong with its size.
        source: InvalidSize,
    },
    /// [`DirectIo::On`] was asked for in vain.
    #[error("{path}: this file system has no direct I/O ({why}): use `auto` or `off`")]
    NoDirectIo {
        /// The image.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
    /// Somebody else uses the image.
    #[error(transparent)]
    Locked(#[from] LockError),
}

pub(super) fn open(path: PathBuf, options: &OpenOptions) -> Result<Shared, OpenError> {
    let fail = |source| OpenError::Open {
        path: path.clone(),
        source,
    };
    let mut plain = open_file(&path, options, 0).map_err(fail)?;
    let kind = plain.metadata().map_err(fail)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::NotAnImage { path });
    }
    let bytes = plain.seek(SeekFrom::End(0)).map_err(fail)?;
    let size = VolumeSize::new(bytes).map_err(|source| OpenError::Size {
        path: path.clone(),
        source,
    })?;

    let direct = match options.direct {
        DirectIo::Off => Err("direct I/O is switched off".to_owned()),
        DirectIo::Auto | DirectIo::On => open_direct(&path, options),
    };
    let mut fallbacks = Vec::new();
    let (main, buffered, align, mem_align) = match direct {
        Ok((file, align)) => (file, Some(plain), align.offset, align.memory),
        Err(why) if options.direct == DirectIo::On => {
            return Err(OpenError::NoDirectIo { path, why });
        }
        Err(why) => {
            if options.direct == DirectIo::Auto {
                fallbacks.push(format!("no direct I/O: {why}"));
            }
            (plain, None, 1, 1)
        }
    };
    if options.lock {
        lock::lock_image(&main, &path, options.read_only)?;
    }
    let io_uring = match options.io_uring {
        UringUse::Off => false,
        UringUse::Auto => uring::probe()
            .map_err(|why| fallbacks.push(format!("no io_uring: {why}")))
            .is_ok(),
    };
    let backend = Backend {
        direct: buffered.is_some(),
        io_uring,
        zeroes_fast: kind.is_file(),
        fallback: (!fallbacks.is_empty()).then(|| fallbacks.join("; ")),
    };
    Ok(Shared {
        main,
        buffered,
        path,
        size,
        backend,
        align,
        mem_align,
        gate: Gate::default(),
        read_only: options.read_only,
        locked: options.lock.into(),
    })
}

fn open_file(path: &Path, options: &OpenOptions, flags: i32) -> io::Result<File> {
    FileOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path)
}

/// What direct I/O on a file needs, in bytes.
struct DirectAlign {
    offset: u64,
    memory: usize,
}

/// When the kernel does not tell.
const SAFE_ALIGN: u32 = 4096;

fn open_direct(path: &Path, options: &OpenOptions) -> Result<(File, DirectAlign), String> {
    let file = open_file(path, options, libc::O_DIRECT).map_err(|e| e.to_string())?;
    let stat = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let (offset, memory) = match stat {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (stat.stx_dio_offset_align, stat.stx_dio_mem_align)
        }
        _ => (SAFE_ALIGN, SAFE_ALIGN),
    };
    if offset == 0 || memory == 0 {
        return Err("the file system does direct I/O on other files, not on this one".to_owned());
    }
    if offset > SAFE_ALIGN || memory > SAFE_ALIGN {
        return Err(format!(
            "direct I/O needs an alignment of {offset} bytes here"
        ));
    }
    Ok((
        file,
        DirectAlign {
            offset: offset.into(),
            memory: memory as usize,
        },
    ))
}
