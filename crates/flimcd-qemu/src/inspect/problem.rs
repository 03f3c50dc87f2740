//! Why a disk cannot be adopted.

use std::path::PathBuf;

use super::{Disk, DiskFormat, Graph, Problem, names::export_of};
use crate::commands::{ImageInfo, NodeInfo};

impl Graph {
    pub(super) fn problem(
        &self,
        disk: &Disk,
        image: &ImageInfo,
        protocol: &NodeInfo,
        metadata: Option<std::io::Result<std::fs::Metadata>>,
    ) -> Option<Problem> {
        if disk.read_only {
            return Some(Problem::ReadOnly);
        }
        if let Some((socket, name)) = export_of(protocol) {
            return Some(Problem::OnExport { socket, name });
        }
        if protocol.drv != "file" {
            return Some(Problem::Protocol(protocol.drv.clone()));
        }
        if let Some(version) = &self.old_with_iothreads {
            return Some(Problem::IoThreads(version.clone()));
        }
        if let DiskFormat::Other(name) = &disk.format {
            return Some(Problem::Format(name.clone()));
        }
        let file = disk.file.clone();
        match metadata {
            None => {
                let reason =
                    "QEMU names it relative to a directory that is not known here".to_owned();
                let file = PathBuf::from(&protocol.file);
                return Some(Problem::NoFile { file, reason });
            }
            Some(Err(error)) => {
                let reason = error.to_string();
                return Some(Problem::NoFile { file, reason });
            }
            Some(Ok(metadata)) if self.process.has_open(&metadata) == Some(false) => {
                return Some(Problem::OtherFile { file });
            }
            Some(Ok(_)) => {}
        }
        if disk.format == DiskFormat::Raw && !disk.file_bytes.is_multiple_of(512) {
            return Some(Problem::Size(disk.file_bytes));
        }
        self.problem_of_content(disk, image)
    }

    fn problem_of_content(&self, disk: &Disk, image: &ImageInfo) -> Option<Problem> {
        let names = [Some(&disk.nodes.root), disk.nodes.format.as_ref()];
        let nodes = names
            .into_iter()
            .flatten()
            .filter_map(|n| self.nodes.get(n));
        let bitmaps = nodes.clone().flat_map(|n| &n.dirty_bitmaps);
        let mut bitmaps: Vec<_> = bitmaps.filter_map(|b| b.name.clone()).collect();
        if nodes.clone().any(|n| n.encrypted) {
            return Some(Problem::Encrypted);
        }
        if let Some(specific) = &image.format_specific {
            let is = |key: &str| specific.data.get(key).is_some_and(|v| v == true);
            if specific.data.get("data-file").is_some() {
                return Some(Problem::DataFile);
            }
            if is("corrupt") {
                return Some(Problem::Corrupt);
            }
            if is("lazy-refcounts") {
                return Some(Problem::LazyRefcounts);
            }
            let stored = specific.data.get("bitmaps").and_then(|b| b.as_array());
            let stored = stored.into_iter().flatten().filter_map(|b| b.get("name"));
            bitmaps.extend(stored.filter_map(|n| n.as_str()).map(str::to_owned));
        }
        bitmaps.sort();
        bitmaps.dedup();
        if !bitmaps.is_empty() {
            return Some(Problem::Bitmaps(bitmaps.join(", ")));
        }
        // A job's name does not tell which disks it works on.
        let mut jobs = self.jobs.iter().filter(|j| {
            let block = ["mirror", "backup", "commit", "stream", "create"];
            block.contains(&j.kind.as_str()) && !["concluded", "null"].contains(&j.status.as_str())
        });
        jobs.next()
            .map(|j| Problem::Job(format!("{} ({})", j.id, j.kind)))
    }
}
