//! How machines look in the API.

use flimcd_core::VolumeName;
use flimcd_qemu::{Qmp, QmpError, commands};
use std::{fs, sync::Arc, time::Duration};

use super::{CareState, VmDisk, VmRecord, care::is_gone, plan::describe};
use crate::{
    agent::Agent,
    api::{ApiCode, ErrorBody, VmCare, VmDiskInfo, VmInfo},
    error::refuse,
};

/// How long a list waits for one QEMU.
const ASKING: Duration = Duration::from_secs(5);

/// What QEMU says now.
struct Now {
    status: String,
    version: Option<String>,
    memory_bytes: Option<u64>,
    problem: Option<String>,
}

impl Agent {
    /// All machines under care, by name.
    pub(crate) async fn list_vms(self: &Arc<Self>) -> Vec<VmInfo> {
        // All at once: one that does not answer must not hold up the others.
        let asked: Vec<_> = self
            .vms
            .all()
            .into_iter()
            .map(|record| {
                let agent = self.clone();
                tokio::spawn(async move { agent.describe_vm(record).await })
            })
            .collect();
        let mut infos = Vec::new();
        for one in asked {
            infos.extend(one.await);
        }
        infos
    }

    /// One machine under care.
    pub(crate) async fn vm_info(&self, name: &VolumeName) -> Result<VmInfo, ErrorBody> {
        Ok(self.describe_vm(self.vms.get(name)?).await)
    }

    async fn describe_vm(&self, record: VmRecord) -> VmInfo {
        let now = tokio::time::timeout(ASKING, self.ask(&record)).await;
        let now = now.unwrap_or_else(|_| Now {
            status: "unknown".to_owned(),
            version: None,
            memory_bytes: None,
            problem: Some(format!(
                "QEMU's monitor {} does not answer",
                record.qmp.display()
            )),
        });
        let migration = record
            .disks
            .iter()
            .find_map(|disk| Some(self.registry.running_on(&disk.volume)?.0));
        VmInfo {
            care: care_of(&record),
            status: now.status,
            qemu_version: now.version,
            memory_bytes: now.memory_bytes,
            disks: self.disk_infos(&record),
            migration,
            problem: self.vms.problem(&record.name).or(now.problem),
            name: record.name,
            qmp: record.qmp,
        }
    }

    fn disk_infos(&self, record: &VmRecord) -> Vec<VmDiskInfo> {
        let describe = |disk: &VmDisk| {
            let mut info = describe(&disk.found);
            info.volume = Some(disk.volume.clone());
            info.image.clone_from(&disk.image);
            if let Ok(found) = fs::metadata(&disk.image) {
                info.file_bytes = found.len();
            }
            if let Ok(hosted) = self.hosting.get(&disk.volume)
                && !hosted.is_served()
            {
                info.refused = Some(format!(
                    "the volume is not served, because something else uses its image: `flimcd vm release {}` forgets \
                     the machine if it runs on its files",
                    record.name
                ));
            }
            info
        };
        record.disks.iter().map(describe).collect()
    }

    async fn ask(&self, record: &VmRecord) -> Now {
        let qmp = match self.vms.try_qmp(&record.name).await {
            Ok(Ok(qmp)) => qmp,
            Ok(Err(error)) => return not_reached(record, &error),
            Err(error) => return not_reached_for(error.to_string()),
        };
        match status_and_memory(&qmp).await {
            Ok((status, memory_bytes)) => Now {
                status,
                version: Some(qmp.version().to_string()),
                memory_bytes: Some(memory_bytes),
                problem: None,
            },
            Err(error) => not_reached(record, &error),
        }
    }

    /// What is a disk of a machine is moved and given up with the machine.
    pub(crate) fn check_not_of_vm(&self, volume: &VolumeName) -> Result<(), ErrorBody> {
        let Some(vm) = self.vms.of_volume(volume) else {
            return Ok(());
        };
        let name = vm.name;
        Err(refuse(
            ApiCode::Busy,
            format!("{volume} is a disk of VM {name}, which is under care"),
            format!(
                "`flimcd vm release {name}` gives the machine its files back; `flimcd vm migrate {name}` moves it whole"
            ),
        ))
    }
}

async fn status_and_memory(qmp: &Qmp) -> Result<(String, u64), QmpError> {
    let status = qmp.execute(commands::QueryStatus {}).await?.status;
    let memory = qmp.execute(commands::QueryMemory {}).await?;
    let bytes = memory.base_memory.saturating_add(memory.plugged_memory);
    Ok((status.to_string(), bytes))
}

fn not_reached(record: &VmRecord, error: &QmpError) -> Now {
    if !is_gone(error) {
        return not_reached_for(error.to_string());
    }
    let name = &record.name;
    Now {
        status: "gone".to_owned(),
        version: None,
        memory_bytes: None,
        problem: Some(format!(
            "no QEMU is at {} any more; its images are whole, and `flimcd vm release {name}` forgets the machine",
            record.qmp.display()
        )),
    }
}

fn not_reached_for(problem: String) -> Now {
    Now {
        status: "unknown".to_owned(),
        version: None,
        memory_bytes: None,
        problem: Some(problem),
    }
}

const fn care_of(record: &VmRecord) -> VmCare {
    match record.state {
        CareState::Adopting => VmCare::Adopting,
        CareState::InCare => VmCare::InCare,
        CareState::Releasing => VmCare::Releasing,
    }
}
