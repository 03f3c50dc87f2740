//! Image locks that QEMU and its tools respect, and ours with them.
//!
//! QEMU (`block/file-posix.c`, "raw_apply_lock_bytes") says what it does with an image by shared
//! OFD locks on single bytes of the file: byte 100 + n for a permission it uses, byte 200 + n for a
//! permission it does not let others use. n is 0 for consistent reads, 1 for writes, 2 for writes
//! that change nothing, 3 for resizing. After taking its own, it looks whether somebody else holds
//! a byte that contradicts. We do the same, as a disk that is used for reading and writing by one
//! party: two agents on one image refuse each other by the same bytes.
//!
//! The locks live as long as the open file description, which can outlive a killed process by the
//! moment that the kernel needs to end its I/O. So a conflict counts only when it lasts for a
//! second.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const PERMISSION_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Permissions as QEMU numbers them, with a word for people.
type Permission = (i64, &'static str);
const READ: Permission = (0, "reading");
const WRITE: Permission = (1, "writing");
const RESIZE: Permission = (3, "resizing");

/// Why the locks could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process uses the image.
    #[error(
        "{path} is in use by another process, which holds it open for {what}: stop that process \
         (a running VM, qemu-img, another agent), or hand the VM over first; nothing was changed"
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// What the other one does with it or forbids.
        what: &'static str,
    },
    /// The file system has no such locks.
    #[error("cannot lock {path}: {source}")]
    System {
        /// The image.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// How long a conflict may last before it is one.
const PATIENCE: Duration = Duration::from_secs(1);

/// Takes the locks of a user that reads, and writes unless `read_only`, and that wants nobody else
/// to write or resize.
///
/// # Errors
/// [`LockError::InUse`] when somebody else's locks contradict, for longer than a process needs to
/// die. What was locked is let go then.
pub fn lock_image(file: &File, path: &Path, read_only: bool) -> Result<(), LockError> {
    let begin = Instant::now();
    loop {
        match try_lock(file, path, read_only) {
            Err(LockError::InUse { .. }) if begin.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

pub(super) fn try_lock(file: &File, path: &Path, read_only: bool) -> Result<(), LockError> {
    let used: &[Permission] = if read_only { &[READ] } else { &[READ, WRITE] };
    let unshared = [WRITE, RESIZE];
    let system = |source| LockError::System {
        path: path.to_owned(),
        source,
    };
    let mine = used
        .iter()
        .map(|(n, _)| PERMISSION_BASE + n)
        .chain(unshared.iter().map(|(n, _)| UNSHARED_BASE + n));
    for byte in mine {
        set_lock(file, byte, 1, libc::F_RDLCK).map_err(system)?;
    }
    let theirs = used
        .iter()
        .map(|&(n, word)| (UNSHARED_BASE + n, word))
        .chain(
            unshared
                .iter()
                .map(|&(n, word)| (PERMISSION_BASE + n, word)),
        );
    for (byte, what) in theirs {
        if is_locked_by_other(file, byte).map_err(system)? {
            unlock_image(file);
            return Err(LockError::InUse {
                path: path.to_owned(),
                what,
            });
        }
    }
    Ok(())
}

/// Gives back what [`lock_image`] took, without waiting for the last user of the open file
/// description.
pub fn unlock_image(file: &File) {
    // It only fails for a descriptor that is none.
    let _ = set_lock(
        file,
        PERMISSION_BASE,
        UNSHARED_BASE - PERMISSION_BASE + 100,
        libc::F_UNLCK,
    );
}

fn one_byte(byte: i64, kind: i32) -> libc::flock {
    // SAFETY: flock is a plain C structure for which zero is a valid value of every field.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[expect(clippy::cast_possible_truncation, reason = "the constants are 0 to 2")]
    {
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
    }
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set_lock(file: &File, byte: i64, count: i64, kind: i32) -> io::Result<()> {
    let mut lock = one_byte(byte, kind);
    lock.l_len = count;
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `lock` outlives the
    // call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether a write lock on `byte` would meet a lock of another open file description.
fn is_locked_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(byte, libc::F_WRLCK);
    // SAFETY: as in `set_lock`, and the kernel writes only into `lock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
