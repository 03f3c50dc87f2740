//! Where a disk stands, asked of QEMU.

use super::{
    AdoptError, Adopted, Export, Method,
    error::during,
    swap::{export_node_name, file_node_name, remove_unused},
};
use crate::{
    inspect::{Disk, Graph, Problem},
    qmp::Qmp,
};

/// Where a disk stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// On its file.
    OnFile {
        /// As it is now.
        disk: Box<Disk>,
        /// Unused nodes of ours; see [`tidy`].
        leftovers: Vec<String>,
    },
    /// On the export.
    OnExport {
        /// What [`adopt`](super::adopt) would have returned.
        adopted: Box<Adopted>,
        /// Unused nodes of ours or of the user's file; see [`tidy`].
        leftovers: Vec<String>,
    },
    /// On something else: somebody else changed it.
    Elsewhere {
        /// On what.
        found: String,
    },
    /// The VM does not have it any more.
    Gone,
}

/// Asks where `disk` stands: on its file or on `export`. `disk` is as it was before it was adopted.
/// Changes nothing.
///
/// # Errors
/// When QEMU does not answer.
pub async fn state_of(qmp: &Qmp, disk: &Disk, export: &Export) -> Result<DiskState, AdoptError> {
    let graph = Graph::query(qmp).await;
    let graph = graph.map_err(during(&disk.id, "looking at the VM's disks"))?;
    let Some(now) = locate(&graph, disk) else {
        return Ok(DiskState::Gone);
    };
    let ours = [
        export_node_name(&disk.id),
        file_node_name(&disk.id),
        disk.nodes.protocol.clone(),
    ];
    let unused = |name: &String| {
        let there = graph.node(name).is_some() && !graph.is_used(name);
        there && !name.starts_with('#')
    };
    let leftovers: Vec<_> = ours.into_iter().filter(unused).collect();
    if let Some(Problem::OnExport { socket, name }) = &now.problem {
        if (socket, name) != (&export.socket, &export.name) {
            return Ok(DiskState::Elsewhere {
                found: format!("the NBD export \"{name}\" at {}", socket.display()),
            });
        }
        let adopted = Box::new(adopted(disk.clone(), &now, export));
        return Ok(DiskState::OnExport { adopted, leftovers });
    }
    if now.file == disk.file {
        let mut now = now;
        // What the agent knows it by must not change.
        now.id.clone_from(&disk.id);
        let disk = Box::new(now);
        return Ok(DiskState::OnFile { disk, leftovers });
    }
    let found = match &now.problem {
        _ if !now.file.as_os_str().is_empty() => now.file.display().to_string(),
        Some(problem) => problem.to_string(),
        None => "another medium".to_owned(),
    };
    Ok(DiskState::Elsewhere { found })
}

/// Removes unused nodes that [`state_of`] found.
pub async fn tidy(qmp: &Qmp, leftovers: &[String]) {
    for node in leftovers {
        remove_unused(qmp, node).await;
    }
}

/// The disks of a VM that are on one of `exports`, in the order of the VM: for a QEMU that was started on
/// exports, as a migration's target is. Their [`Disk::file`] is empty, and the options of the file's node
/// are what the export's node has: where those of the source are known, put them into
/// [`Disk::options`] before [`release`](super::release).
///
/// # Errors
/// When QEMU does not answer.
pub async fn adopted_by_export(qmp: &Qmp, exports: &[Export]) -> Result<Vec<Adopted>, AdoptError> {
    let graph = Graph::query(qmp).await;
    let graph = graph.map_err(during("(any)", "looking at the VM's disks"))?;
    let found = graph.disks().into_iter().filter_map(|disk| {
        let Some(Problem::OnExport { socket, name }) = disk.problem.clone() else {
            return None;
        };
        let mut exports = exports.iter();
        let export = exports.find(|e| e.socket == socket && e.name == name)?;
        let mut before = disk.clone();
        before.problem = None;
        Some(adopted(before, &disk, export))
    });
    Ok(found.collect())
}

fn adopted(before: Disk, now: &Disk, export: &Export) -> Adopted {
    Adopted {
        disk: before,
        export: export.clone(),
        node: now.nodes.protocol.clone(),
        method: match now.nodes.format {
            Some(_) => Method::Child,
            None => Method::Root,
        },
    }
}

/// The disk as it is now: by its device, or else by its drive or its id.
pub(super) fn locate(graph: &Graph, disk: &Disk) -> Option<Disk> {
    let same = |d: &Disk| match (&disk.qom_path, &disk.drive) {
        (Some(path), _) => d.qom_path.as_ref() == Some(path),
        (None, Some(drive)) => d.drive.as_ref() == Some(drive),
        (None, None) => d.id == disk.id,
    };
    graph.disks().into_iter().find(same)
}
