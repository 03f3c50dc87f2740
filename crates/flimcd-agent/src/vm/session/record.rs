//! What is known durably of a machine's move: one JSON file each in `STATE_DIR/moves`, replaced atomically.
//!
//! It says what a restart has to pick up. Who owns the disks is in the volumes' own records, and how their migration
//! stands in its own; a move is recorded before the migration of its disks begins, and forgotten after it has ended.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use flimcd_qemu::Disk;
use serde::{Deserialize, Serialize};
use std::{fs, io, path::PathBuf};

use crate::{
    api::{MoveVm, Role, VmMoveStatus},
    records::{self, Record},
};

/// What the target has to know to start a machine; travels as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    /// Version of the source's QEMU.
    pub(crate) qemu: String,
    /// The guest's memory.
    pub(crate) memory_bytes: u64,
    /// Whether the guest ran when the move began, and goes on at the target.
    pub(crate) was_running: bool,
    /// Whether memory may follow the switch.
    pub(crate) postcopy: bool,
    /// Whether the target gives the disks back as plain files at the end.
    pub(crate) release: bool,
    /// The disks that move, in the order of their migration's volumes.
    pub(crate) disks: Vec<MovedDisk>,
}

/// One disk that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MovedDisk {
    /// Its volume.
    pub(crate) volume: VolumeName,
    /// As it was found before it was adopted.
    pub(crate) found: Disk,
}

/// The machine that was started for an attempt, at the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Launched {
    /// For which attempt.
    pub(crate) attempt: u32,
    /// Its monitor.
    pub(crate) qmp: PathBuf,
    /// Its process, if the agent started it.
    pub(crate) pid: Option<u32>,
}

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SessionRecord {
    format: u32,
    pub(crate) id: MigrationId,
    pub(crate) role: Role,
    pub(crate) vm: VolumeName,
    pub(crate) peer: SiteName,
    /// What was asked for; at the source only.
    pub(crate) request: Option<MoveVm>,
    pub(crate) description: Description,
    /// Target: the last attempt's machine.
    pub(crate) launched: Option<Launched>,
    /// As it was when this was written; final once its phase is.
    pub(crate) status: VmMoveStatus,
}

impl Record for SessionRecord {
    const FORMAT: u32 = 1;
    const OF: &'static str = "a machine's move";
    const WITHOUT: &'static str = ", and its disks wait";

    fn format(&self) -> u32 {
        self.format
    }
}

impl SessionRecord {
    pub(crate) fn new(
        status: VmMoveStatus,
        request: Option<MoveVm>,
        description: Description,
    ) -> Self {
        Self {
            format: Self::FORMAT,
            id: status.id,
            role: status.role,
            vm: status.vm.clone(),
            peer: status.peer.clone(),
            request,
            description,
            launched: None,
            status,
        }
    }
}

/// The directory of records.
#[derive(Clone, Debug)]
pub(crate) struct SessionStore {
    dir: PathBuf,
}

impl SessionStore {
    /// Opens the directory, which is made if it is not there, and reads all records. Files that cannot be read are
    /// reported in the log and left alone.
    pub(crate) fn open(dir: PathBuf) -> io::Result<(Self, Vec<SessionRecord>)> {
        fs::create_dir_all(&dir)?;
        let mut records: Vec<SessionRecord> = records::load_all(&dir)?;
        records.sort_by_key(|record| record.status.started_unix_ms);
        Ok((Self { dir }, records))
    }

    /// Writes a record durably. Blocks for the disk.
    pub(crate) fn save(&self, record: &SessionRecord) -> io::Result<()> {
        records::save(&self.dir, &record.id, record)
    }

    /// Forgets a record; none is fine. Blocks for the disk.
    pub(crate) fn remove(&self, id: MigrationId) -> io::Result<()> {
        records::remove(&self.dir, &id)
    }
}
