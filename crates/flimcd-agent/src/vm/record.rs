//! The machines that this agent cares for: one JSON file each in `STATE_DIR/vms`, replaced atomically, and
//! what is only in memory: who works on a machine now, and the one connection to its monitor.
//!
//! ```text
//!   adopt ──► Adopting ──────────► InCare ◄──────── arrived by a migration
//!                │ failure, restart   │ release           │
//!                ▼                    ▼                   ▼
//!            undone, gone         Releasing ──► gone    gone, once it has moved away
//! ```
//! A record is written *before* what it announces is done to QEMU: an agent that was killed in the middle finds
//! in it what it may have begun, and asks QEMU how far that came. Who owns a disk is in its volume's own record.

use flimcd_core::VolumeName;
use flimcd_qemu::{Adopted, Disk, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Semaphore;

use super::qmp_error;
use crate::{
    api::{ApiCode, ErrorBody},
    error::refuse,
    records::{self, Record},
};

/// Where a machine stands with this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CareState {
    /// Its disks are on their way to our exports; undone after a restart.
    Adopting,
    /// All its disks are on our exports.
    InCare,
    /// Its disks are on their way back to files; gone on with after a restart.
    Releasing,
}

/// What is known durably of one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    /// Version of this format.
    format: u32,
    /// Its name, unique in this agent.
    pub(crate) name: VolumeName,
    /// Socket of its monitor.
    pub(crate) qmp: PathBuf,
    /// Where it stands.
    pub(crate) state: CareState,
    /// Its disks that are volumes, in the guest's order.
    pub(crate) disks: Vec<VmDisk>,
}

/// One disk of a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmDisk {
    /// The volume that it is.
    pub(crate) volume: VolumeName,
    /// The image file.
    pub(crate) image: PathBuf,
    /// As it was found before it was adopted, here or at the site it came from.
    pub(crate) found: Disk,
    /// What a release needs; `None` until QEMU has been asked to take the export.
    pub(crate) adopted: Option<Adopted>,
}

impl Record for VmRecord {
    const FORMAT: u32 = 1;
    const OF: &'static str = "a machine";
    const WITHOUT: &'static str = ", and its disks stay on their exports";

    fn format(&self) -> u32 {
        self.format
    }
}

impl VmRecord {
    /// A record of a machine whose monitor is at `qmp`; [`Vms::save`] makes it known.
    pub(crate) const fn new(
        name: VolumeName,
        qmp: PathBuf,
        state: CareState,
        disks: Vec<VmDisk>,
    ) -> Self {
        Self {
            format: Self::FORMAT,
            name,
            qmp,
            state,
            disks,
        }
    }
}

/// What somebody does with a machine; only one thing at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Takes it under care.
    Adopting,
    /// Gives it back.
    Releasing,
    /// Moves it away.
    Leaving,
    /// Takes it in from another site.
    Arriving,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adopting => "being adopted",
            Self::Releasing => "being released",
            Self::Leaving => "migrating away",
            Self::Arriving => "arriving from another site",
        })
    }
}

/// Somebody works on a machine until this is dropped.
#[derive(Debug)]
pub(crate) struct Working {
    vms: Arc<Vms>,
    name: VolumeName,
}

impl Drop for Working {
    fn drop(&mut self) {
        self.vms.known().work.remove(&self.name);
    }
}

/// The connection to one machine's monitor. QEMU serves one client at a time, so there is one.
#[derive(Debug)]
struct Monitor {
    /// Whoever dials takes it, so that nobody else dials meanwhile.
    turn: Semaphore,
    qmp: Mutex<Option<Qmp>>,
}

impl Monitor {
    fn new(qmp: Option<Qmp>) -> Arc<Self> {
        Arc::new(Self {
            turn: Semaphore::new(1),
            qmp: Mutex::new(qmp),
        })
    }

    fn connected(&self) -> Option<Qmp> {
        let qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.clone().filter(|qmp| !qmp.is_closed())
    }
}

#[derive(Debug, Default)]
struct Known {
    records: BTreeMap<VolumeName, VmRecord>,
    work: BTreeMap<VolumeName, Work>,
    /// What is in the way of a machine now, for people.
    problems: BTreeMap<VolumeName, String>,
    monitors: BTreeMap<VolumeName, Arc<Monitor>>,
}

/// All machines of an agent. See the module.
#[derive(Debug)]
pub(crate) struct Vms {
    dir: PathBuf,
    known: Mutex<Known>,
}

impl Vms {
    /// Opens the directory, which is made if it is not there, and reads all records. Files that cannot be read are
    /// reported in the log and left alone.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Arc<Self>> {
        fs::create_dir_all(&dir)?;
        let records = records::load_all(&dir)?.into_iter();
        let records = records
            .map(|record: VmRecord| (record.name.clone(), record))
            .collect();
        let known = Known {
            records,
            ..Known::default()
        };
        Ok(Arc::new(Self {
            dir,
            known: Mutex::new(known),
        }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All machines, by name.
    pub(crate) fn all(&self) -> Vec<VmRecord> {
        self.known().records.values().cloned().collect()
    }

    /// The machine of this name.
    pub(crate) fn get(&self, name: &VolumeName) -> Result<VmRecord, ErrorBody> {
        let record = self.known().records.get(name).cloned();
        record.ok_or_else(|| unknown(name))
    }

    /// The machine that a volume is a disk of.
    pub(crate) fn of_volume(&self, volume: &VolumeName) -> Option<VmRecord> {
        let known = self.known();
        let mut records = known.records.values();
        let found =
            records.find(|record| record.disks.iter().any(|disk| disk.volume == *volume))?;
        Some(found.clone())
    }

    /// Makes a record durable and known, in the place of one of the same name. Blocks for the disk. Whoever calls
    /// this has the machine to itself: see [`begin`](Self::begin).
    pub(crate) fn save(&self, record: VmRecord) -> io::Result<()> {
        records::save(&self.dir, &record.name, &record)?;
        self.known().records.insert(record.name.clone(), record);
        Ok(())
    }

    /// Forgets a machine, durably, and hangs up its monitor; none is fine. Blocks for the disk.
    pub(crate) fn remove(&self, name: &VolumeName) -> io::Result<()> {
        records::remove(&self.dir, name)?;
        let mut known = self.known();
        known.records.remove(name);
        known.problems.remove(name);
        known.monitors.remove(name);
        Ok(())
    }

    /// Has the machine to oneself until the answer is dropped. `Adopting` and `Arriving` ask for a name that no
    /// machine has yet, the others for one that is known.
    pub(crate) fn begin(
        self: &Arc<Self>,
        name: &VolumeName,
        work: Work,
    ) -> Result<Working, ErrorBody> {
        let mut known = self.known();
        if let Some(other) = known.work.get(name) {
            let message = format!("{name} is {other}");
            let hint = match other {
                Work::Adopting | Work::Releasing => "wait for the end of that".to_owned(),
                Work::Leaving => {
                    format!("wait for its end, or end it with `flimcd vm cancel {name}`")
                }
                Work::Arriving => {
                    "wait for its end, or end it at the site that it comes from".to_owned()
                }
            };
            return Err(refuse(ApiCode::Busy, message, hint));
        }
        let is_known = known.records.contains_key(name);
        match work {
            Work::Adopting | Work::Arriving if is_known => {
                return Err(refuse(
                    ApiCode::Exists,
                    format!("there is a VM {name} under care already"),
                    "choose another name with --name; `flimcd vm list` shows what there is",
                ));
            }
            Work::Releasing | Work::Leaving if !is_known => return Err(unknown(name)),
            _ => {}
        }
        known.work.insert(name.clone(), work);
        Ok(Working {
            vms: self.clone(),
            name: name.clone(),
        })
    }

    /// As [`begin`](Self::begin), for work that a restart goes on with: nobody can have begun another meanwhile.
    pub(crate) fn begin_again(self: &Arc<Self>, name: &VolumeName, work: Work) -> Working {
        self.known().work.insert(name.clone(), work);
        Working {
            vms: self.clone(),
            name: name.clone(),
        }
    }

    /// What is in the way of a machine now.
    pub(crate) fn problem(&self, name: &VolumeName) -> Option<String> {
        self.known().problems.get(name).cloned()
    }

    /// Notes what is in the way of a machine, for `vm show`; until it is forgotten or the agent ends.
    pub(crate) fn set_problem(&self, name: &VolumeName, problem: Option<String>) {
        let mut known = self.known();
        match problem {
            Some(problem) if known.records.contains_key(name) => {
                known.problems.insert(name.clone(), problem);
            }
            _ => {
                known.problems.remove(name);
            }
        }
    }

    /// The connection to a machine's monitor: the one that is open, or a new one where QEMU or this agent was
    /// restarted. Refused when QEMU cannot be reached at the record's socket.
    pub(crate) async fn qmp(&self, name: &VolumeName) -> Result<Qmp, ErrorBody> {
        let reached = self.try_qmp(name).await?;
        reached.map_err(|error| qmp_error(&error))
    }

    /// As [`qmp`](Self::qmp); the inner error says why QEMU cannot be reached.
    pub(super) async fn try_qmp(
        &self,
        name: &VolumeName,
    ) -> Result<Result<Qmp, QmpError>, ErrorBody> {
        let (monitor, socket) = {
            let mut known = self.known();
            let record = known.records.get(name).ok_or_else(|| unknown(name))?;
            let socket = record.qmp.clone();
            let monitor = known.monitors.entry(name.clone());
            (
                monitor.or_insert_with(|| Monitor::new(None)).clone(),
                socket,
            )
        };
        if let Some(qmp) = monitor.connected() {
            return Ok(Ok(qmp));
        }
        // It is never closed.
        let _turn = monitor.turn.acquire().await;
        if let Some(qmp) = monitor.connected() {
            return Ok(Ok(qmp));
        }
        let connected = Qmp::connect(&socket).await;
        if let Ok(qmp) = &connected {
            let mut slot = monitor.qmp.lock().unwrap_or_else(PoisonError::into_inner);
            *slot = Some(qmp.clone());
        }
        Ok(connected)
    }

    /// Uses a connection that is open already for the machine `name` from now on. It may be given before the record
    /// is saved.
    pub(crate) fn give_qmp(&self, name: &VolumeName, qmp: Qmp) {
        let monitor = Monitor::new(Some(qmp));
        self.known().monitors.insert(name.clone(), monitor);
    }

    /// Hangs up a monitor that was given for a machine that did not come about.
    pub(crate) fn drop_qmp(&self, name: &VolumeName) {
        self.known().monitors.remove(name);
    }
}

fn unknown(name: &VolumeName) -> ErrorBody {
    refuse(
        ApiCode::UnknownVm,
        format!("there is no VM {name} under care"),
        "`flimcd vm list` shows those that are; `flimcd vm adopt` takes one",
    )
}

#[cfg(test)]
pub(super) mod tests;
