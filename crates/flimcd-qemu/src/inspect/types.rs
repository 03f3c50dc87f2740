//! What is said about a VM and its disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{commands::RunState, qmp::Version};

/// A virtual machine as found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inspected {
    /// QEMU's version.
    pub version: Version,
    /// What `-name` says.
    pub vm_name: Option<String>,
    /// Whether the guest runs.
    pub status: RunState,
    /// The guest's memory, with what was plugged in.
    pub memory_bytes: u64,
    /// Its disks. Empty drives are left out.
    pub disks: Vec<Disk>,
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Short name, stable as long as the VM is started the same way: the device's id, the drive's or the
    /// node's name. Lower-case letters, digits and `-`, at most 20 of them, unique in the VM.
    pub id: String,
    /// The device's id as QEMU was given it.
    pub qdev: Option<String>,
    /// The device in QEMU's object tree.
    pub qom_path: Option<String>,
    /// Name of the block backend (`-drive id=`).
    pub drive: Option<String>,
    /// Format of the image.
    pub format: DiskFormat,
    /// The image file, absolute. Empty for a disk that is not on a file.
    pub file: PathBuf,
    /// Backing files, nearest first, absolute where QEMU says so.
    pub backing: Vec<PathBuf>,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// Length of the image file.
    pub file_bytes: u64,
    /// Length that the image file must have before it is exported: an export cannot grow, and a qcow2
    /// file must be able to. Not less than `file_bytes`. See [`Disk::grow_file`].
    pub export_bytes: u64,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// What has to be the same afterwards.
    pub options: DiskOptions,
    /// The nodes.
    pub nodes: Nodes,
    /// Why it cannot be adopted.
    pub problem: Option<Problem>,
}

/// Format of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The file's bytes are the guest's.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// One that is not supported.
    Other(String),
}

impl std::fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Other(name) => name,
        })
    }
}

/// Options of a disk, as they were found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOptions {
    /// Whether the guest is told that there is a write cache, at the time of looking: a guest's driver
    /// may change it. (A BIOS without a guest behind it does so, on virtio.) It belongs to the guest's
    /// device, and neither adopting nor releasing touches it.
    pub writeback: bool,
    /// Of the format's node; `None` when the guest's device sits right on the file's.
    pub format: Option<NodeOptions>,
    /// Of the file's node.
    pub protocol: ProtocolOptions,
}

/// Options that every node has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeOptions {
    /// `cache.direct`.
    pub cache_direct: bool,
    /// `cache.no-flush`.
    pub cache_no_flush: bool,
    /// `detect-zeroes`: "off", "on", "unmap".
    pub detect_zeroes: String,
}

/// Options of the node of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolOptions {
    /// Those of every node.
    pub node: NodeOptions,
    /// `discard`: "unmap" or "ignore".
    pub discard: String,
    /// `aio`: "threads", "native", "io_uring".
    pub aio: String,
    /// `locking`: "auto", "on", "off".
    pub locking: String,
    /// Whether `discard`, `aio` and `locking` were seen on QEMU's command line. QEMU does not tell them;
    /// for a disk that was plugged in later its defaults are assumed, and discard passed on.
    pub seen: bool,
}

/// The nodes of a disk, by name. Names that begin with `#` were made up by QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// What the guest's device uses: the format's node, or a filter on it.
    pub root: String,
    /// The format's; `None` when the device sits right on the file's.
    pub format: Option<String>,
    /// The file's.
    pub protocol: String,
}

/// Why a disk cannot be adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// It cannot change, so there is nothing to follow.
    #[error("it is read only: it is left alone; have the same file at the target")]
    ReadOnly,
    /// Not a local file.
    #[error(
        "it is on `{0}`, not on a file: only image files can be adopted; storage that both sites reach needs no move"
    )]
    Protocol(String),
    /// It is on an export already.
    #[error("it is on the NBD export \"{name}\" at {} already: release it there first", socket.display())]
    OnExport {
        /// The export's socket.
        socket: PathBuf,
        /// The export's name.
        name: String,
    },
    /// Unknown format.
    #[error(
        "its format {0} is not supported: convert the image to raw or qcow2 (`qemu-img convert`)"
    )]
    Format(String),
    /// A node in between that we do not know.
    #[error("there is a `{0}` node between the guest's device and its image: remove it first")]
    Filter(String),
    /// Content in a second file.
    #[error(
        "its content is in a second file (`data-file`): convert the image to one file (`qemu-img convert -O qcow2`)"
    )]
    DataFile,
    /// Encrypted.
    #[error(
        "the image is encrypted, and QEMU would have to be given the key again: encrypt inside the guest"
    )]
    Encrypted,
    /// The image writes late.
    #[error(
        "the image has lazy_refcounts, which QEMU writes out after the guest has stopped, when its export is frozen: \
         switch them off (`qemu-img amend -o lazy_refcounts=off FILE` while the VM is off)"
    )]
    LazyRefcounts,
    /// The same with bitmaps.
    #[error(
        "it has dirty bitmaps ({0}), which would stay behind or be written after the guest has stopped: remove them \
         (`block-dirty-bitmap-remove`), and make a full backup after the move"
    )]
    Bitmaps(String),
    /// A job works on it.
    #[error("the job {0} works on a disk of this VM: wait for its end or cancel it")]
    Job(String),
    /// An old QEMU with I/O threads.
    #[error(
        "QEMU {0} aborts when nodes are exchanged under a device with an I/O thread: use QEMU 9.0 or later, or start \
         the VM without `iothread`"
    )]
    IoThreads(String),
    /// The image is damaged.
    #[error(
        "QEMU has marked the image as corrupt: repair it first (`qemu-img check -r all FILE` while the VM is off)"
    )]
    Corrupt,
    /// The file is not there.
    #[error("cannot look at {}: {reason}; the agent must see the image under the same path as QEMU", file.display())]
    NoFile {
        /// The image.
        file: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// Another file under this path.
    #[error(
        "{} is not the file that QEMU has open: it was replaced or is mounted elsewhere; the agent must see the same file",
        file.display()
    )]
    OtherFile {
        /// The path.
        file: PathBuf,
    },
    /// The length does not fit.
    #[error(
        "its size of {0} bytes is no multiple of 512: pad the image while the VM is off (`qemu-img resize`)"
    )]
    Size(u64),
}
