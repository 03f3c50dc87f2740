//! Commands about block devices.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Nothing, command};
use crate::qmp::Command;

command! {
    /// All block devices of the guest.
    QueryBlock = "query-block" -> Vec<BlockInfo> {}
}
command! {
    /// All nodes.
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<NodeInfo> {
        /// Without the details of backing files.
        flat: bool,
    }
}
command! {
    /// Statistics of nodes; used for which node is the child of which.
    QueryBlockstats = "query-blockstats" -> Vec<NodeStats> {
        /// Nodes, not devices.
        query_nodes: bool,
    }
}
command! {
    /// Threads for devices' I/O.
    QueryIothreads = "query-iothreads" -> Vec<Value> {}
}
command! {
    /// Jobs that run.
    QueryJobs = "query-jobs" -> Vec<JobInfo> {}
}
command! {
    /// Removes a node that nobody uses.
    BlockdevDel = "blockdev-del" -> Nothing {
        /// The node.
        node_name: String,
    }
}
command! {
    /// Copies a node to another, and can put that in its place.
    BlockdevMirror = "blockdev-mirror" -> Nothing {
        /// Name for the job.
        job_id: String,
        /// Node to copy.
        device: String,
        /// Node to copy to.
        target: String,
        /// How much: "none" only what is written from now on.
        sync: &'static str,
        /// "write-blocking": a guest's write is done when both have it.
        copy_mode: &'static str,
        /// Whether the finished job goes away by itself.
        auto_dismiss: bool,
    }
}
command! {
    /// Ends a mirror that is ready: the target takes the source's place.
    JobComplete = "job-complete" -> Nothing {
        /// The job.
        id: String,
    }
}
command! {
    /// Ends a job, leaving things as they are.
    BlockJobCancel = "block-job-cancel" -> Nothing {
        /// The job.
        device: String,
        /// Without waiting for what is in flight.
        force: bool,
    }
}
command! {
    /// Forgets a job that has ended.
    JobDismiss = "job-dismiss" -> Nothing {
        /// The job.
        id: String,
    }
}

/// Adds a node. The options are QEMU's `BlockdevOptions`.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd {
    /// `driver`, `node-name` and the driver's own.
    pub options: Value,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Nothing;
}

/// A block device.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockInfo {
    /// Name of its block backend; empty for `-blockdev`.
    pub device: String,
    /// Path or id of the guest's device.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether the medium can be changed.
    #[serde(default)]
    pub removable: bool,
    /// What is in it; nothing in an empty drive.
    #[serde(default)]
    pub inserted: Option<NodeInfo>,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeInfo {
    /// Its name; `#…` when QEMU made it up.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Driver.
    pub drv: String,
    /// File name, or an address of another kind.
    pub file: String,
    /// Read only.
    #[serde(default)]
    pub ro: bool,
    /// Encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// Cache settings.
    pub cache: CacheInfo,
    /// What happens to writes of zeroes: "off", "on", "unmap".
    #[serde(rename = "detect_zeroes", default)]
    pub detect_zeroes: String,
    /// What is known of the image.
    pub image: ImageInfo,
    /// Dirty bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<BitmapInfo>,
}

/// Cache settings of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheInfo {
    /// Whether the device says that it has a write cache. Only meaningful in [`BlockInfo`].
    pub writeback: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// What QEMU knows of an image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Size the guest sees, in bytes.
    pub virtual_size: u64,
    /// Format or protocol.
    pub format: String,
    /// Bytes per cluster.
    #[serde(default)]
    pub cluster_size: Option<u64>,
    /// Internal snapshots.
    #[serde(default)]
    pub snapshots: Vec<Value>,
    /// What only its format has.
    #[serde(default)]
    pub format_specific: Option<FormatSpecific>,
}

/// What only one format has.
#[derive(Clone, Debug, Deserialize)]
pub struct FormatSpecific {
    /// The format.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its members, which differ from format to format.
    #[serde(default)]
    pub data: Value,
}

/// A dirty bitmap.
#[derive(Clone, Debug, Deserialize)]
pub struct BitmapInfo {
    /// Its name; none for one of a job.
    #[serde(default)]
    pub name: Option<String>,
    /// Whether it is kept in the image.
    #[serde(default)]
    pub persistent: bool,
    /// Whether a job uses it.
    #[serde(default)]
    pub busy: bool,
}

/// A node and its children.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeStats {
    /// The node.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Its `file` child (QEMU calls it parent).
    #[serde(default)]
    pub parent: Option<Box<Self>>,
    /// Its `backing` child.
    #[serde(default)]
    pub backing: Option<Box<Self>>,
}

/// A job.
#[derive(Clone, Debug, Deserialize)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// "mirror", "backup", "commit", "stream", …
    #[serde(rename = "type")]
    pub kind: String,
    /// "created", "running", "ready", "concluded", …
    pub status: String,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
}
