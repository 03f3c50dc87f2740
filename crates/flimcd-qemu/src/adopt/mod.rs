//! Putting an agent's export in the place of an image file, and back, while the guest runs.
//!
//! ```text
//!            before                     adopted                      released
//!   device ► format ► file      device ► format ► nbd        device ► format ► file
//!   device ► file               device ► nbd                 device ► file
//! ```
//! The export is of the *same file*, so nothing is copied. The format's node stays, with everything it
//! has in memory, and so do the guest's device and its write cache. Two ways:
//! - **A format's node** (raw, qcow2) gets another `file` child, by the human monitor's
//!   `qemu-io NODE "reopen -o file=NEW"`. QMP's `blockdev-reopen` resets every option that is not
//!   repeated, cannot tell them all (`discard`, qcow2's caches), and refuses nodes whose name QEMU made
//!   up, which is every node of a VM started with `-drive`. The human monitor's keeps them all, except
//!   `detect-zeroes` of `-drive`, which is repeated. Both go through the same code in QEMU: requests
//!   are drained, the image's caches are written, and all options change or none.
//! - **A file's node right under the device** cannot be given a child. There `blockdev-mirror` with
//!   `sync=none` copies nothing, and its end puts the new node in the old one's place. In between every
//!   write goes to both, which is the same bytes to the same file. (A qcow2 image must never go this
//!   way: two nodes would each allocate clusters in one file. Nor `qom-set drive`: QEMU 10.0 aborts when
//!   the device has an I/O thread.)
//!
//! # Locks
//! QEMU locks an image by the permissions it uses. While both have the file open, the exporter must not
//! hold locks: it opens the file without, adopts, then may take them; and it lets them go before
//! [`release`], which QEMU would refuse otherwise ("Failed to get write lock").
//!
//! # Failure
//! A swap that QEMU refuses changes nothing, and the unused new node is removed. The old node is removed
//! last. So at any moment a disk is on its file or on its export, perhaps with an unused node beside it:
//! [`state_of`] says so, [`adopt`] and [`release`] go on from either, and [`tidy`] removes what is unused. An
//! unused node holds no lock.
//!
//! While a swap runs, QEMU's main loop waits for the disk's requests. The export must answer until it is
//! done: swapping a frozen export would hang the VM.

mod error;
mod release;
mod state;
mod swap;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::AdoptError;
pub use release::release;
pub use state::{DiskState, adopted_by_export, state_of, tidy};

use crate::{
    inspect::{Disk, DiskFormat, Graph},
    qmp::Qmp,
};
use error::during;

/// An agent's export of an image file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Unix socket of the NBD server, absolute.
    pub socket: PathBuf,
    /// Name of the export.
    pub name: String,
    /// How long the guest's requests wait for an agent that is away, before they fail.
    pub reconnect_delay_s: u32,
}

/// How a disk was put on its export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The format's node got another child.
    Child,
    /// The node under the device was replaced.
    Root,
}

/// A disk on its export: everything that [`release`] and a restarted agent need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The disk as it was before.
    pub disk: Disk,
    /// Where it is now.
    pub export: Export,
    /// The node on the export.
    pub node: String,
    /// How it got there, and gets back.
    pub method: Method,
}

/// Puts the export in the place of the disk's file. The guest may run. Writes out what the host's page
/// cache holds of the file first, so that the guest does not wait for that.
///
/// A disk that is on this export already is fine, as is one that an earlier attempt left half way.
///
/// # Errors
/// [`AdoptError`]; unless it says otherwise, the disk is on its file as before.
pub async fn adopt(qmp: &Qmp, disk: &Disk, export: &Export) -> Result<Adopted, AdoptError> {
    let disk = match state_of(qmp, disk, export).await? {
        DiskState::OnExport { adopted, leftovers } => {
            tidy(qmp, &leftovers).await;
            return Ok(*adopted);
        }
        DiskState::OnFile { disk, leftovers } => {
            tidy(qmp, &leftovers).await;
            *disk
        }
        DiskState::Elsewhere { found } => {
            return Err(AdoptError::Changed {
                disk: disk.id.clone(),
                found,
            });
        }
        DiskState::Gone => {
            return Err(AdoptError::Gone {
                disk: disk.id.clone(),
            });
        }
    };
    if let Some(problem) = disk.problem {
        return Err(AdoptError::Refused {
            disk: disk.id,
            problem,
        });
    }
    write_out(&disk.id, &disk.file).await;
    let node = swap::export_node_name(&disk.id);
    swap::add_export(qmp, &disk, export, &node).await?;
    let method = match disk.nodes.format {
        Some(_) => Method::Child,
        None => Method::Root,
    };
    let swapped = match check_size(qmp, &disk, &node).await {
        Ok(()) => swap::swap(qmp, &disk, method, &disk.nodes.protocol, &node).await,
        Err(error) => Err(error),
    };
    if let Err(error) = swapped {
        swap::remove_unused(qmp, &node).await;
        return Err(error);
    }
    // A node whose name QEMU made up goes away by itself.
    swap::remove_unused(qmp, &disk.nodes.protocol).await;
    tracing::info!(
        disk = disk.id,
        ?method,
        export = export.name,
        "disk adopted"
    );
    Ok(Adopted {
        disk,
        export: export.clone(),
        node,
        method,
    })
}

/// Lets the host write the file's dirty pages while the guest runs: the swap flushes, and would make the
/// guest wait for all of them.
async fn write_out(id: &str, file: &Path) {
    let file = file.to_owned();
    let synced = tokio::task::spawn_blocking(move || std::fs::File::open(file)?.sync_data()).await;
    if let Ok(Err(error)) = synced {
        tracing::warn!(disk = id, %error, "cannot write the image out ahead");
    }
}

/// An export of another size is not of this file.
async fn check_size(qmp: &Qmp, disk: &Disk, node: &str) -> Result<(), AdoptError> {
    let graph = Graph::query(qmp).await;
    let graph = graph.map_err(during(&disk.id, "looking at the export's node"))?;
    let found = graph.node(node).map_or(0, |n| n.image.virtual_size);
    let (expected, fits) = match disk.format {
        DiskFormat::Raw => (disk.file_bytes, found == disk.file_bytes),
        _ => (disk.export_bytes, found >= disk.export_bytes),
    };
    if fits {
        return Ok(());
    }
    Err(AdoptError::ExportSize {
        disk: disk.id.clone(),
        expected,
        found,
    })
}
