//! Back onto a file.

use std::path::Path;

use super::{
    AdoptError, Adopted, DiskState,
    error::during,
    state::{locate, state_of},
    swap, tidy, write_out,
};
use crate::{
    inspect::{Disk, Graph},
    qmp::Qmp,
};

/// Puts `image` in the place of the export, with the options as they were before [`adopt`](super::adopt).
/// It must have the export's content: it is the same file. The exporter must have let its locks go.
/// A disk that is on `image` already is fine. At a migration's target, memory should have arrived: a request
/// that waits for its page would hold the swap up.
///
/// # Errors
/// [`AdoptError`]; unless it says otherwise, the disk is on its export as before.
pub async fn release(qmp: &Qmp, adopted: &Adopted, image: &Path) -> Result<(), AdoptError> {
    let mut recorded = adopted.disk.clone();
    image.clone_into(&mut recorded.file);
    let id = recorded.id.clone();
    let current = match state_of(qmp, &recorded, &adopted.export).await? {
        DiskState::OnFile { leftovers, .. } => {
            tidy(qmp, &leftovers).await;
            return Ok(());
        }
        DiskState::OnExport { adopted, leftovers } => {
            tidy(qmp, &leftovers).await;
            *adopted
        }
        DiskState::Elsewhere { found } => return Err(AdoptError::Changed { disk: id, found }),
        DiskState::Gone => return Err(AdoptError::Gone { disk: id }),
    };
    let graph = Graph::query(qmp).await;
    let graph = graph.map_err(during(&id, "looking at its nodes"))?;
    let Some(now) = locate(&graph, &recorded) else {
        return Err(AdoptError::Gone { disk: id });
    };
    // The format's options are kept by the swap; those of now are the ones to compare with.
    let disk = Disk {
        nodes: now.nodes,
        options: crate::inspect::DiskOptions {
            format: now.options.format,
            ..recorded.options.clone()
        },
        ..recorded.clone()
    };
    write_out(&id, image).await;
    let node = file_node(&graph, &recorded);
    swap::add_file(qmp, &id, &recorded.options.protocol, image, &node).await?;
    if let Err(error) = swap::swap(qmp, &disk, current.method, &current.node, &node).await {
        swap::remove_unused(qmp, &node).await;
        return Err(error);
    }
    swap::remove_unused(qmp, &current.node).await;
    tracing::info!(disk = id, image = %image.display(), "disk released");
    Ok(())
}

/// The name that the file's node had, if it is free and was not made up by QEMU.
fn file_node(graph: &Graph, recorded: &Disk) -> String {
    let before = &recorded.nodes.protocol;
    if !before.starts_with('#') && graph.node(before).is_none() {
        return before.clone();
    }
    swap::file_node_name(&recorded.id)
}
