//! Taking a running machine under care, and giving it back.
//!
//! ```text
//!  adopt     record (Adopting) → volumes on the files that QEMU still has open, without locks → per disk: QEMU takes
//!            the export, record → locks → record (InCare)
//!  give back record (Releasing) → per disk: locks given up, QEMU takes the file, volume removed → record removed
//! ```
//! Undoing an adoption is giving back, in whatever state it is; so is what a restart finds in `Adopting` and
//! `Releasing`. All of it asks QEMU first where a disk stands, and does nothing twice.
//!
//! A task of its own does either, so that a client that hangs up does not stop it half-way.

use flimcd_core::VolumeName;
use flimcd_qemu::{DiskState, Export, Qmp, QmpError};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{sync::oneshot, time::Instant};

use super::{
    CareState, VmDisk, VmRecord, Work, Working, care_error,
    plan::{Plan, same_path},
    qmp_error,
};
use crate::{
    agent::Agent,
    api::{AdoptVm, ApiCode, ErrorBody, OwnershipState, VmInfo},
    error::{io_error, refuse},
    hosting::Hosted,
    ops::{blocking, busy, not_owner},
};

/// How long guests wait for this agent to come back before QEMU fails their requests.
const RECONNECT_DELAY_S: u32 = 3600;
/// How long QEMU may take to close its connection to an export that it does not use any more.
const HANG_UP: Duration = Duration::from_secs(30);
/// First and last pause between attempts to finish what a restart found.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// Whether there is a QEMU to talk to.
enum Reached {
    Yes(Qmp),
    /// None listens at the socket, and none is connected to the exports.
    Gone,
}

impl Agent {
    /// Takes a running machine under care, or only looks at it.
    pub(crate) async fn adopt_vm(self: &Arc<Self>, request: AdoptVm) -> Result<VmInfo, ErrorBody> {
        self.check_socket(&request.qmp)?;
        let qmp = Qmp::connect(&request.qmp).await;
        let qmp = qmp.map_err(|error| qmp_error(&error))?;
        let found = flimcd_qemu::inspect(&qmp).await;
        let found = found.map_err(|error| qmp_error(&error.0))?;
        let plan = Plan::new(&request, &found, |name| self.hosting.has(name))?;
        let working = self.vms.begin(&plan.record.name, Work::Adopting)?;
        if request.dry_run {
            return Ok(plan.info);
        }
        plan.check()?;
        let name = plan.record.name.clone();
        let agent = self.clone();
        self.in_task(async move {
            let _working = working;
            agent.vms.give_qmp(&plan.record.name, qmp.clone());
            agent
                .bring_into_care(plan.record, request.tenant.as_deref(), &qmp)
                .await
        })
        .await?;
        self.vm_info(&name).await
    }

    /// A monitor may only belong to one machine.
    fn check_socket(&self, qmp: &Path) -> Result<(), ErrorBody> {
        if !qmp.is_absolute() {
            let message = format!("the path {} is not absolute", qmp.display());
            let hint = "the agent has another working directory: give the whole path";
            return Err(refuse(ApiCode::BadRequest, message, hint));
        }
        let all = self.vms.all();
        let Some(other) = all.iter().find(|record| same_path(&record.qmp, qmp)) else {
            return Ok(());
        };
        let name = &other.name;
        Err(refuse(
            ApiCode::Exists,
            format!(
                "the QEMU at {} is under care already, as {name}",
                qmp.display()
            ),
            format!(
                "`flimcd vm show {name}` shows it; if that one is gone, `flimcd vm release {name}` forgets it"
            ),
        ))
    }

    /// Does something that goes on when nobody waits for it any more, and that a stopping agent waits for.
    async fn in_task<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ErrorBody>> + Send + 'static,
    ) -> Result<T, ErrorBody> {
        let (done, answer) = oneshot::channel();
        self.spawn(async move {
            // Nobody may be waiting any more.
            let _ = done.send(work.await);
        });
        let lost = |_| io_error("the agent", &io::Error::other("a task has failed"));
        answer.await.map_err(lost)?
    }

    async fn bring_into_care(
        self: &Arc<Self>,
        mut record: VmRecord,
        tenant: Option<&str>,
        qmp: &Qmp,
    ) -> Result<(), ErrorBody> {
        let name = record.name.clone();
        if let Err(error) = self.save_vm(&record).await {
            self.vms.drop_qmp(&name);
            return Err(error);
        }
        let taken = match self.take_disks(&mut record, tenant, qmp).await {
            Ok(()) => {
                record.state = CareState::InCare;
                self.save_vm(&record).await
            }
            failed => failed,
        };
        let Err(mut error) = taken else {
            tracing::info!(vm = %name, disks = record.disks.len(), "machine adopted");
            return Ok(());
        };
        tracing::error!(vm = %name, "adopting failed and is undone: {error}");
        if let Err(undoing) = self.give_back(&mut record).await {
            tracing::error!(vm = %name, "undoing an adoption failed: {undoing}");
            let more = format!("; undoing it failed too: {undoing}");
            error.message.push_str(&more);
            error.hint = Some(format!(
                "`flimcd vm release {name}` tries again; `flimcd vm show {name}` shows where it stands"
            ));
            self.vms.set_problem(&name, Some(error.message.clone()));
        }
        Err(error)
    }

    /// All disks become volumes, and QEMU takes their exports.
    async fn take_disks(
        self: &Arc<Self>,
        record: &mut VmRecord,
        tenant: Option<&str>,
        qmp: &Qmp,
    ) -> Result<(), ErrorBody> {
        let mut hosted = Vec::new();
        for disk in &record.disks {
            hosted.push(self.import_disk(disk, tenant).await?);
        }
        for (at, hosted) in hosted.iter().enumerate() {
            let disk = &mut record.disks[at];
            let begin = Instant::now();
            let adopted = flimcd_qemu::adopt(qmp, &disk.found, &export_of(hosted)).await;
            disk.adopted = Some(adopted.map_err(|error| care_error(&error))?);
            tracing::info!(
                vm = %record.name, disk = %disk.found.id, volume = %disk.volume,
                ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX), "disk taken over"
            );
            self.save_vm(record).await?;
            lock_image(hosted).await?;
        }
        Ok(())
    }

    async fn import_disk(
        self: &Arc<Self>,
        disk: &VmDisk,
        tenant: Option<&str>,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        let (agent, disk, tenant) = (self.clone(), disk.clone(), tenant.map(str::to_owned));
        blocking(move || {
            disk.found.grow_file().map_err(|error| {
                io_error(&format!("making room in {}", disk.image.display()), &error)
            })?;
            agent
                .hosting
                .import_in_use(&disk.volume, &disk.image, tenant.as_deref())
        })
        .await
    }

    /// Gives a machine back to its files, or forgets it where its QEMU is gone.
    pub(crate) async fn release_vm(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<VmInfo, ErrorBody> {
        let working = self.vms.begin(name, Work::Releasing)?;
        let mut record = self.vms.get(name)?;
        self.check_releasable(&record)?;
        let mut info = self.vm_info(name).await?;
        let agent = self.clone();
        self.in_task(async move {
            let _working = working;
            if record.state == CareState::InCare {
                record.state = CareState::Releasing;
                agent.save_vm(&record).await?;
            }
            let result = agent.give_back(&mut record).await;
            let problem = result.as_ref().err().map(ToString::to_string);
            agent.vms.set_problem(&record.name, problem);
            result
        })
        .await?;
        tracing::info!(vm = %name, "machine released");
        info.released();
        Ok(info)
    }

    /// What has moved, or is moving, is not here to be given back.
    fn check_releasable(&self, record: &VmRecord) -> Result<(), ErrorBody> {
        for disk in &record.disks {
            if let Some((id, _)) = self.registry.running_on(&disk.volume) {
                return Err(busy(&disk.volume, id));
            }
            // It may not have been made yet, or be removed already.
            let Ok(hosted) = self.hosting.get(&disk.volume) else {
                continue;
            };
            match hosted.describe(None) {
                info if matches!(info.ownership, OwnershipState::Owner) => {}
                info => return Err(not_owner(&disk.volume, info.ownership, info.peer.as_ref())),
            }
        }
        Ok(())
    }

    /// Puts all disks back onto their files wherever they stand now, and forgets them one by one, and the machine
    /// in the end. What could not be given back stays in the record and is served.
    async fn give_back(self: &Arc<Self>, record: &mut VmRecord) -> Result<(), ErrorBody> {
        let reached = self.reach(record).await?;
        let before = record.disks.len();
        while let Some(disk) = record.disks.last() {
            if let Err(error) = self.give_disk_back(disk, &reached).await {
                if record.state == CareState::Releasing && record.disks.len() == before {
                    // As if nothing had been asked.
                    record.state = CareState::InCare;
                    self.save_vm(record).await?;
                }
                return Err(error);
            }
            record.disks.pop();
            self.save_vm(record).await?;
        }
        let (vms, name) = (self.vms.clone(), record.name.clone());
        blocking(move || {
            vms.remove(&name)
                .map_err(|error| io_error("forgetting the machine", &error))
        })
        .await
    }

    async fn give_disk_back(
        self: &Arc<Self>,
        disk: &VmDisk,
        reached: &Reached,
    ) -> Result<(), ErrorBody> {
        let Ok(hosted) = self.hosting.get(&disk.volume) else {
            // Not made yet, or removed already.
            return Ok(());
        };
        if let Reached::Yes(qmp) = reached {
            hosted.volume().give_up_image_locks();
            let begin = Instant::now();
            if let Err(error) = put_back(qmp, disk, &export_of(&hosted)).await {
                if let Err(error) = lock_image(&hosted).await {
                    tracing::warn!(volume = %disk.volume, "its image stays without locks: {error}");
                }
                return Err(error);
            }
            tracing::info!(
                disk = %disk.found.id, volume = %disk.volume,
                ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX), "disk given back"
            );
        }
        wait_hung_up(&hosted).await?;
        let (agent, volume) = (self.clone(), disk.volume.clone());
        blocking(move || agent.hosting.remove(&volume, false, false, || Ok(()))).await?;
        Ok(())
    }

    /// The machine's QEMU, if there is one.
    async fn reach(&self, record: &VmRecord) -> Result<Reached, ErrorBody> {
        let error = match self.vms.try_qmp(&record.name).await? {
            Ok(qmp) => return Ok(Reached::Yes(qmp)),
            Err(error) => error,
        };
        if !is_gone(&error) {
            return Err(qmp_error(&error));
        }
        let is_connected = |disk: &&VmDisk| {
            let hosted = self.hosting.get(&disk.volume);
            hosted.is_ok_and(|hosted| hosted.volume().connections() > 0)
        };
        match record.disks.iter().find(is_connected) {
            None => Ok(Reached::Gone),
            Some(disk) => Err(refuse(
                ApiCode::Qemu,
                format!(
                    "nobody answers at the monitor {}, but a guest still uses volume {}",
                    record.qmp.display(),
                    disk.volume
                ),
                "if QEMU runs, put its socket back there; if not, stop what is connected to the volume's export",
            )),
        }
    }

    /// Makes a record of a machine durable.
    pub(crate) async fn save_vm(&self, record: &VmRecord) -> Result<(), ErrorBody> {
        let (vms, record) = (self.vms.clone(), record.clone());
        blocking(move || {
            vms.save(record)
                .map_err(|error| io_error("recording the machine", &error))
        })
        .await
    }

    /// Finishes what a killed agent had begun, in the background, until it is done or the agent stops.
    pub(crate) fn resume_vms(self: &Arc<Self>) {
        for record in self.vms.all() {
            if record.state == CareState::InCare {
                continue;
            }
            match self.vms.begin(&record.name, Work::Releasing) {
                Ok(working) => {
                    let agent = self.clone();
                    self.spawn(async move { agent.finish_giving_back(record, working).await });
                }
                Err(error) => tracing::error!(vm = %record.name, "cannot go on: {error}"),
            }
        }
    }

    async fn finish_giving_back(self: Arc<Self>, mut record: VmRecord, working: Working) {
        let mut stop = self.stop_signal();
        let mut pause = RETRY.0;
        let name = record.name.clone();
        tracing::info!(
            vm = %name, state = ?record.state,
            "an agent that ended in the middle had begun to take or give back this machine; its disks are put back onto their files"
        );
        loop {
            let Err(error) = self.give_back(&mut record).await else {
                tracing::info!(vm = %name, "machine given back");
                break;
            };
            tracing::error!(vm = %name, "giving the machine back failed, tries again: {error}");
            self.vms.set_problem(&name, Some(error.to_string()));
            tokio::select! {
                _ = stop.wait_for(|&stop| stop) => break,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(RETRY.1);
            // It may stand in care again, where nothing had been given back.
            if record.state == CareState::InCare {
                break;
            }
        }
        drop(working);
    }
}

/// Puts one disk back onto its file, wherever it stands.
async fn put_back(qmp: &Qmp, disk: &VmDisk, export: &Export) -> Result<(), ErrorBody> {
    let state = flimcd_qemu::state_of(qmp, &disk.found, export).await;
    match state.map_err(|error| care_error(&error))? {
        DiskState::OnFile { leftovers, .. } => flimcd_qemu::tidy(qmp, &leftovers).await,
        DiskState::OnExport { adopted, leftovers } => {
            flimcd_qemu::tidy(qmp, &leftovers).await;
            let adopted = disk.adopted.as_ref().unwrap_or(&adopted);
            let released = flimcd_qemu::release(qmp, adopted, &disk.image).await;
            released.map_err(|error| care_error(&error))?;
        }
        // Nobody uses the export, then; a connection that is left shows afterwards.
        DiskState::Elsewhere { found } => tracing::warn!(
            volume = %disk.volume,
            "somebody has put the machine's disk onto {found}; it is left there"
        ),
        DiskState::Gone => tracing::warn!(
            volume = %disk.volume, "the machine does not have this disk any more; it is forgotten"
        ),
    }
    Ok(())
}

/// Where QEMU finds a volume.
fn export_of(hosted: &Hosted) -> Export {
    let export = hosted.export();
    Export {
        socket: export.socket,
        name: export.export,
        reconnect_delay_s: RECONNECT_DELAY_S,
    }
}

/// Takes the locks on an image that QEMU has just let go.
async fn lock_image(hosted: &Arc<Hosted>) -> Result<(), ErrorBody> {
    let volume = hosted.volume().clone();
    blocking(move || {
        volume
            .take_image_locks()
            .map_err(|error| refuse(ApiCode::Image, error.to_string(), ""))
    })
    .await
}

/// Waits until no guest is connected to a volume any more: QEMU closes its connection a moment after it has let go.
async fn wait_hung_up(hosted: &Hosted) -> Result<(), ErrorBody> {
    let begin = Instant::now();
    while hosted.volume().connections() > 0 {
        if begin.elapsed() > HANG_UP {
            let message = format!("a guest still uses volume {}", hosted.name());
            let hint = "close what else is connected to its export, then try again";
            return Err(refuse(ApiCode::Busy, message, hint));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Whether an error says that there is no QEMU, and not only that it does not answer.
pub(super) fn is_gone(error: &QmpError) -> bool {
    match error {
        QmpError::Connect { source, .. } => matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        ),
        _ => false,
    }
}
