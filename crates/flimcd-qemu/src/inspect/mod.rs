//! What disks a VM has, what must be the same after adopting and releasing, and what cannot be adopted.
//!
//! A disk is a chain of nodes: `device → [filters] → format (raw, qcow2) → file`, with the format's
//! backing chain beside it. QMP tells sizes, cache settings and names; which node is whose child comes
//! from `query-blockstats`, the only stable command that says so; `aio` and `discard` are on no answer and
//! come from the command line of QEMU's process.

mod names;
mod problem;
mod process;
mod size;
mod types;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use crate::{
    commands::{
        BlockInfo, ImageInfo, JobInfo, NodeInfo, NodeStats, QueryBlock, QueryBlockstats,
        QueryIothreads, QueryJobs, QueryMemory, QueryName, QueryNamedBlockNodes, QueryStatus,
    },
    qmp::{Qmp, QmpError},
};
use names::{device_names, disk_id};
use process::Process;
pub use types::{
    Disk, DiskFormat, DiskOptions, Inspected, NodeOptions, Nodes, Problem, ProtocolOptions,
};

/// Longest [`Disk::id`].
pub const MAX_DISK_ID_BYTES: usize = 20;
/// Filters that may stand above a format's node: they pass requests on.
const FILTERS: [&str; 2] = ["throttle", "copy-on-read"];

/// Looking at a VM failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot see the VM's disks: {0}")]
pub struct InspectError(#[from] pub QmpError);

/// Looks at a VM. Changes nothing.
///
/// # Errors
/// When QEMU does not answer. What is wrong with a disk is in its [`Disk::problem`].
pub async fn inspect(qmp: &Qmp) -> Result<Inspected, InspectError> {
    let name = qmp.execute(QueryName {}).await?;
    let status = qmp.execute(QueryStatus {}).await?;
    let memory = qmp.execute(QueryMemory {}).await?;
    let graph = Graph::query(qmp).await?;
    Ok(Inspected {
        version: qmp.version().clone(),
        vm_name: name.name,
        status: status.status,
        memory_bytes: memory.base_memory + memory.plugged_memory,
        disks: graph.disks(),
    })
}

/// The block graph of a VM at one moment.
#[derive(Debug)]
pub(crate) struct Graph {
    devices: Vec<BlockInfo>,
    nodes: BTreeMap<String, NodeInfo>,
    /// A node's `file` child.
    file_child: BTreeMap<String, String>,
    /// A node's `backing` child.
    backing_child: BTreeMap<String, String>,
    jobs: Vec<JobInfo>,
    /// The version, if this QEMU is old and has I/O threads: 7.2 aborts ("job->paused").
    old_with_iothreads: Option<String>,
    process: Process,
}

impl Graph {
    pub(crate) async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        let devices = qmp.execute(QueryBlock {}).await?;
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        let stats = qmp.execute(QueryBlockstats { query_nodes: true }).await?;
        let jobs = qmp.execute(QueryJobs {}).await?;
        let named = |n: NodeInfo| Some((n.node_name.clone()?, n));
        // Only the devices' statistics have backing files, only the nodes' have every node.
        let tops = qmp.execute(QueryBlockstats { query_nodes: false }).await?;
        let mut old_with_iothreads = None;
        if !qmp.version().is_at_least(9, 0) && !qmp.execute(QueryIothreads {}).await?.is_empty() {
            old_with_iothreads = Some(qmp.version().to_string());
        }
        let children = stats.into_iter().filter_map(|s| {
            let child = s.parent?.node_name?;
            Some((s.node_name?, child))
        });
        let mut backing_child = BTreeMap::new();
        for top in tops {
            collect_backing(top, &mut backing_child);
        }
        Ok(Self {
            devices,
            nodes: nodes.into_iter().filter_map(named).collect(),
            file_child: children.collect(),
            backing_child,
            jobs,
            old_with_iothreads,
            process: Process::look(qmp.pid()),
        })
    }

    /// A node by name.
    pub(crate) fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.nodes.get(name)
    }

    /// The `file` child of a node.
    pub(crate) fn child(&self, name: &str) -> Option<&str> {
        self.file_child.get(name).map(String::as_str)
    }

    /// Whether any node has this one as its `file` child, or a device uses it.
    pub(crate) fn is_used(&self, name: &str) -> bool {
        let roots = self.devices.iter().filter_map(|d| d.inserted.as_ref());
        let mut roots = roots.filter_map(|n| n.node_name.as_deref());
        roots.any(|root| root == name) || self.file_child.values().any(|child| child == name)
    }

    /// The disks, with unique ids.
    pub(crate) fn disks(&self) -> Vec<Disk> {
        let mut taken = BTreeSet::new();
        let mut disks = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            let Some(root) = &device.inserted else {
                continue;
            };
            let Some(mut disk) = self.disk(device, root) else {
                continue;
            };
            if disk.id.is_empty() {
                disk.id = format!("disk-{index}");
            }
            let base = disk.id.clone();
            let mut count = 2;
            while !taken.insert(disk.id.clone()) {
                let suffix = format!("-{count}");
                disk.id = base
                    .chars()
                    .take(MAX_DISK_ID_BYTES - suffix.len())
                    .collect();
                disk.id.push_str(&suffix);
                count += 1;
            }
            disks.push(disk);
        }
        disks
    }

    fn disk(&self, device: &BlockInfo, root: &NodeInfo) -> Option<Disk> {
        let root_name = root.node_name.clone()?;
        let (format, protocol, filter) = self.chain(&root_name);
        let protocol_info = self.nodes.get(&protocol)?;
        let format_info = format.as_ref().and_then(|name| self.nodes.get(name));
        let image = format_info.map_or(&root.image, |_| self.image_of(root));
        let file = self.process.absolute(&protocol_info.file);
        let on_file = protocol_info.drv == "file";
        let metadata = file.as_ref().filter(|_| on_file).map(std::fs::metadata);
        let kind = match format_info.map(|f| f.drv.as_str()) {
            None | Some("raw") => DiskFormat::Raw,
            Some("qcow2") => DiskFormat::Qcow2,
            Some(other) => DiskFormat::Other(other.to_owned()),
        };
        let file_bytes = match &metadata {
            Some(Ok(metadata)) => metadata.len(),
            _ => protocol_info.image.virtual_size,
        };
        let export_bytes = match kind {
            DiskFormat::Qcow2 => size::qcow2_export_bytes(image, file_bytes),
            _ => file_bytes,
        };
        let (qdev, qom_path) = device_names(device.qdev.as_deref());
        let drive = Some(device.device.clone()).filter(|d| !d.is_empty());
        let mut disk = Disk {
            id: disk_id(qdev.as_deref(), drive.as_deref(), &root_name),
            options: self.options(device, root, format_info, protocol_info, drive.as_deref()),
            qdev,
            qom_path,
            drive,
            format: kind,
            file: file.clone().filter(|_| on_file).unwrap_or_default(),
            backing: self.backing(format.as_deref()),
            size_bytes: root.image.virtual_size,
            file_bytes,
            export_bytes,
            read_only: root.ro,
            nodes: Nodes {
                root: root_name,
                format,
                protocol,
            },
            problem: None,
        };
        disk.problem = filter.map(Problem::Filter);
        if disk.problem.is_none() {
            disk.problem = self.problem(&disk, image, protocol_info, metadata);
        }
        Some(disk)
    }

    /// From the root down: the format's node, the file's, and a node in between that we do not know.
    fn chain(&self, root: &str) -> (Option<String>, String, Option<String>) {
        let mut name = root.to_owned();
        let mut format = None;
        let mut unknown = None;
        while let Some(child) = self.file_child.get(&name) {
            let driver = self.nodes.get(&name).map_or("", |n| n.drv.as_str());
            if format.is_some() {
                // Something between the format and its file.
                unknown.get_or_insert_with(|| driver.to_owned());
            } else if !FILTERS.contains(&driver) {
                format = Some(name.clone());
            }
            name.clone_from(child);
        }
        // A filter right on the file has no format's node to keep: treated as the file being the root
        // would replace the filter.
        if format.is_none() && name != root {
            let driver = self.nodes.get(root).map_or("", |n| n.drv.as_str());
            unknown.get_or_insert_with(|| driver.to_owned());
        }
        (format, name, unknown)
    }

    /// `query-block` gives the details of the whole chain, but a filter's image is its own.
    fn image_of<'a>(&'a self, root: &'a NodeInfo) -> &'a ImageInfo {
        let mut name = root.node_name.as_deref().unwrap_or_default();
        let mut info = root;
        while FILTERS.contains(&info.drv.as_str()) {
            let Some(child) = self.child(name) else { break };
            let Some(child_info) = self.nodes.get(child) else {
                break;
            };
            (name, info) = (child, child_info);
        }
        &info.image
    }

    fn backing(&self, format: Option<&str>) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut name = format.unwrap_or_default();
        while let Some(child) = self.backing_child.get(name) {
            let file = self.nodes.get(child).map_or("", |n| n.file.as_str());
            files.push(self.process.absolute(file).unwrap_or_else(|| file.into()));
            name = child;
        }
        files
    }

    fn options(
        &self,
        device: &BlockInfo,
        root: &NodeInfo,
        format: Option<&NodeInfo>,
        protocol: &NodeInfo,
        drive: Option<&str>,
    ) -> DiskOptions {
        let name = |n: &NodeInfo| n.node_name.clone().unwrap_or_default();
        let format_name = format.map(name);
        let line = self.process.line();
        let file = self.process.absolute(&protocol.file);
        let is_file = |f: &str| file.is_some() && self.process.absolute(f) == file;
        let seen = line.of_file(&name(protocol), format_name.as_deref(), drive, is_file);
        // What QEMU takes when nothing is said. A file under a format's node passes discard on.
        let default_discard = if format.is_some() { "unmap" } else { "ignore" };
        let get = |key: &str, default: &str| {
            let value = seen.as_ref().and_then(|o| o.get(key));
            value.map_or(default, String::as_str).to_owned()
        };
        let named = seen.is_some() && !name(protocol).starts_with('#');
        DiskOptions {
            writeback: device.inserted.as_ref().unwrap_or(root).cache.writeback,
            format: format.map(NodeOptions::of),
            protocol: ProtocolOptions {
                node: NodeOptions::of(protocol),
                // A node with a name of its own ignores discard unless told otherwise.
                discard: match get("discard", if named { "ignore" } else { default_discard })
                    .as_str()
                {
                    "on" | "unmap" => "unmap".to_owned(),
                    _ => "ignore".to_owned(),
                },
                aio: get("aio", "threads"),
                locking: get("locking", "auto"),
                seen: seen.is_some(),
            },
        }
    }
}

fn collect_backing(node: NodeStats, found: &mut BTreeMap<String, String>) {
    if let Some(backing) = node.backing {
        if let (Some(name), Some(child)) = (node.node_name, backing.node_name.clone()) {
            found.insert(name, child);
        }
        collect_backing(*backing, found);
    }
    if let Some(child) = node.parent {
        collect_backing(*child, found);
    }
}

impl NodeOptions {
    pub(crate) fn of(node: &NodeInfo) -> Self {
        Self {
            cache_direct: node.cache.direct,
            cache_no_flush: node.cache.no_flush,
            detect_zeroes: node.detect_zeroes.clone(),
        }
    }
}
