//! What an adoption would do: which disks, under which names, and what is in the way.

use flimcd_core::VolumeName;
use flimcd_qemu::{Disk, Inspected, Problem, RunState};
use std::{fs, path::Path};

use super::{CareState, VmDisk, VmRecord};
use crate::{
    api::{AdoptVm, ApiCode, ErrorBody, VmCare, VmDiskInfo, VmInfo},
    error::refuse,
};

/// What was found, and what would become of it.
pub(super) struct Plan {
    /// As the API shows it.
    pub(super) info: VmInfo,
    /// The record to begin with.
    pub(super) record: VmRecord,
}

impl Plan {
    /// Makes the plan. `is_taken` knows the volumes that there are.
    pub(super) fn new(
        request: &AdoptVm,
        found: &Inspected,
        is_taken: impl Fn(&VolumeName) -> bool,
    ) -> Result<Self, ErrorBody> {
        let name = name_of(request, found)?;
        let mut disks = Vec::new();
        let mut infos = Vec::new();
        for disk in &found.disks {
            let mut info = describe(disk);
            match &disk.problem {
                Some(problem @ Problem::ReadOnly) => info.left_out = Some(problem.to_string()),
                Some(problem) => info.refused = Some(problem.to_string()),
                None => match volume_name(&name, disk, &is_taken) {
                    Ok(volume) => {
                        info.volume = Some(volume.clone());
                        disks.push(VmDisk {
                            volume,
                            image: disk.file.clone(),
                            found: disk.clone(),
                            adopted: None,
                        });
                    }
                    Err(why) => info.refused = Some(why),
                },
            }
            infos.push(info);
        }
        let info = VmInfo {
            name: name.clone(),
            qmp: request.qmp.clone(),
            care: VmCare::Found,
            status: found.status.to_string(),
            qemu_version: Some(found.version.to_string()),
            memory_bytes: Some(found.memory_bytes),
            disks: infos,
            migration: None,
            problem: in_the_way(found.status),
        };
        let record = VmRecord::new(name, request.qmp.clone(), CareState::Adopting, disks);
        Ok(Self { info, record })
    }

    /// Whether it can be done.
    pub(super) fn check(&self) -> Result<(), ErrorBody> {
        let refused: Vec<_> = self
            .info
            .disks
            .iter()
            .filter_map(|disk| Some(format!("disk {}: {}", disk.id, disk.refused.as_ref()?)))
            .collect();
        let name = &self.info.name;
        if !refused.is_empty() {
            let message = format!(
                "{name} cannot be adopted, nothing was changed: {}",
                refused.join("; ")
            );
            let hint = "all disks are taken or none; `flimcd vm adopt --dry-run` shows them";
            return Err(refuse(ApiCode::Qemu, message, hint));
        }
        if let Some(why) = &self.info.problem {
            let message = format!("{name} cannot be adopted, nothing was changed: {why}");
            return Err(refuse(
                ApiCode::Qemu,
                message,
                "try again once that is over",
            ));
        }
        if self.record.disks.is_empty() {
            let message = format!("{name} has no disk that could be adopted");
            let hint = "`flimcd vm adopt --dry-run` shows what it has";
            return Err(refuse(ApiCode::Qemu, message, hint));
        }
        Ok(())
    }
}

/// Why a machine's disks may not be touched now.
fn in_the_way(status: RunState) -> Option<String> {
    let why = match status {
        RunState::Inmigrate => "its QEMU waits for a machine that migrates to it",
        RunState::FinishMigrate | RunState::Postmigrate => "its QEMU has migrated it elsewhere",
        RunState::SaveVm => "its QEMU is saving a snapshot",
        RunState::RestoreVm => "its QEMU is restoring a snapshot",
        _ => return None,
    };
    Some(why.to_owned())
}

/// The name that the machine gets.
fn name_of(request: &AdoptVm, found: &Inspected) -> Result<VolumeName, ErrorBody> {
    if let Some(name) = &request.name {
        return Ok(name.clone());
    }
    let hint = "name it with --name";
    let Some(name) = &found.vm_name else {
        let message = "the QEMU at this socket was started without -name";
        return Err(refuse(ApiCode::BadRequest, message, hint));
    };
    name.parse().map_err(|error| {
        let message = format!("QEMU's name for the machine cannot be used: {error}");
        refuse(ApiCode::BadRequest, message, hint)
    })
}

/// The name of a disk's volume, or why it cannot have one.
fn volume_name(
    vm: &VolumeName,
    disk: &Disk,
    is_taken: impl Fn(&VolumeName) -> bool,
) -> Result<VolumeName, String> {
    let name: VolumeName = format!("{vm}-{}", disk.id)
        .parse()
        .map_err(|error| format!("{error}; give the machine a shorter name with --name"))?;
    if is_taken(&name) {
        return Err(format!(
            "there is a volume {name} already; remove it, or give the machine another name with --name"
        ));
    }
    Ok(name)
}

/// A disk as QEMU has it.
pub(super) fn describe(disk: &Disk) -> VmDiskInfo {
    VmDiskInfo {
        id: disk.id.clone(),
        volume: None,
        format: disk.format.to_string(),
        size_bytes: disk.size_bytes,
        file_bytes: disk.file_bytes,
        image: disk.file.clone(),
        backing: disk.backing.clone(),
        options: options_of(disk),
        left_out: None,
        refused: None,
    }
}

/// How QEMU uses a disk, for people.
pub(super) fn options_of(disk: &Disk) -> String {
    let options = &disk.options;
    let top = options.format.as_ref().unwrap_or(&options.protocol.node);
    let cache = match (options.writeback, top.cache_direct, top.cache_no_flush) {
        (true, false, false) => "writeback",
        (true, true, false) => "none",
        (false, false, false) => "writethrough",
        (false, true, false) => "directsync",
        (_, _, true) => "unsafe",
    };
    format!(
        "cache {cache}, discard {}, detect-zeroes {}, aio {}",
        options.protocol.discard, top.detect_zeroes, options.protocol.aio
    )
}

/// Whether two paths lead to the same file.
pub(super) fn same_path(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

#[cfg(test)]
mod tests;
