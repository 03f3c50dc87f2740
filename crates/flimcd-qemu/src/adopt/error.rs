//! Why a disk could not be adopted or released.

use std::path::PathBuf;

use crate::{inspect::Problem, qmp::QmpError};

/// Why a disk could not be adopted or released.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It is of a kind that cannot be.
    #[error("cannot adopt disk {disk}: {problem}")]
    Refused {
        /// The disk.
        disk: String,
        /// Why, and the way out.
        problem: Problem,
    },
    /// The VM does not have it any more.
    #[error(
        "the VM has no disk {disk} any more: it was unplugged; look at the VM again (`flimcd vm show`)"
    )]
    Gone {
        /// The disk.
        disk: String,
    },
    /// Somebody else changed it.
    #[error(
        "disk {disk} is on {found}, neither on its file nor on our export: somebody else changed it; nothing was done"
    )]
    Changed {
        /// The disk.
        disk: String,
        /// What it is on.
        found: String,
    },
    /// QEMU cannot use the export.
    #[error(
        "QEMU cannot open the agent's export \"{name}\" at {} for disk {disk}: {source}; the disk is on its file \
         as before; check that QEMU's user may connect to the socket", socket.display()
    )]
    Export {
        /// The disk.
        disk: String,
        /// The agent's socket.
        socket: PathBuf,
        /// The export.
        name: String,
        /// Why not.
        source: QmpError,
    },
    /// The export is of something else.
    #[error(
        "the export for disk {disk} has {found} bytes and not the {expected} of its image: it is of another file, \
         or was opened before the image was extended; the disk is on its file as before"
    )]
    ExportSize {
        /// The disk.
        disk: String,
        /// Bytes wanted.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// QEMU cannot open the file.
    #[error(
        "QEMU cannot open {} for disk {disk}: {source}; the disk is on its export as before; check the path and \
         the rights of QEMU's user", file.display()
    )]
    File {
        /// The disk.
        disk: String,
        /// The image.
        file: PathBuf,
        /// Why not.
        source: QmpError,
    },
    /// QEMU refused to swap.
    #[error("QEMU refused to move disk {disk} from {from} to {to}: {reason}; nothing was changed")]
    Swap {
        /// The disk.
        disk: String,
        /// Node it was on.
        from: String,
        /// Node it was to be on.
        to: String,
        /// QEMU's words.
        reason: String,
    },
    /// The swap's outcome is not what it should be.
    #[error(
        "disk {disk} was moved to {to}, but {reason}; it works, and `flimcd vm release` puts it back"
    )]
    Odd {
        /// The disk.
        disk: String,
        /// Node it is on.
        to: String,
        /// What differs.
        reason: String,
    },
    /// The conversation with QEMU failed, so where the disk is has to be asked for again.
    #[error("{doing} for disk {disk}: {source}")]
    Qmp {
        /// The disk.
        disk: String,
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: QmpError,
    },
}

/// Names the disk and the step that failed.
pub(super) fn during(disk: &str, doing: &'static str) -> impl Fn(QmpError) -> AdoptError {
    let disk = disk.to_owned();
    move |source| AdoptError::Qmp {
        disk: disk.clone(),
        doing,
        source,
    }
}
