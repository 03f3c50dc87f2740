//! Durable records of migrations: one JSON file each in `STATE_DIR/migrations`, replaced atomically.
//!
//! They say what a restart has to pick up again, and keep what an ended migration came to. Who owns
//! the volume is *not* decided here but by the volume's own record: a file here is written before
//! the volume's record first names the migration, and gets its end after the volume's record.

use flimcd_core::{Epoch, MigrationId, SiteName, VolumeId, VolumeName};
use flimcd_wire::Base;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, io, path::PathBuf};

use crate::{
    api::{MigrateRequest, MigrationStatus, Role},
    check::found_difference,
    records::{self, Record},
};

/// Ended migrations that are kept of the same volumes.
const KEPT_PER_VOLUME: usize = 10;

/// One of the volumes of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MovedVolume {
    pub(crate) id: VolumeId,
    pub(crate) name: VolumeName,
}

/// What is known durably of one migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MigrationRecord {
    /// Version of this format.
    pub(crate) format: u32,
    pub(crate) id: MigrationId,
    pub(crate) role: Role,
    /// In the order of the layout.
    pub(crate) volumes: Vec<MovedVolume>,
    pub(crate) peer: SiteName,
    /// The session of the machine that the volumes belong to, if they move with one.
    pub(crate) session: Option<MigrationId>,
    /// The source's epoch when the migration began: the highest of the volumes'.
    pub(crate) epoch: Epoch,
    /// What was asked for; at the source only.
    pub(crate) request: Option<MigrateRequest>,
    /// The operator has asked for the switch.
    pub(crate) switchover_asked: bool,
    /// The operator has asked for its end.
    pub(crate) cancel_asked: bool,
    /// Target: the epoch that will never be owned here.
    pub(crate) refused: Option<Epoch>,
    /// Source: ended early, and the target has not been told.
    pub(crate) farewell_due: bool,
    /// Target: what stood there for each volume before anything arrived; zeroes where it is left out.
    #[serde(default)]
    pub(crate) bases: Vec<Base>,
    /// Of the source: an increment of a replica, which never switches.
    #[serde(default)]
    pub(crate) increment: bool,
    /// As it was when this was written; final once its phase is.
    pub(crate) status: MigrationStatus,
}

impl Record for MigrationRecord {
    const FORMAT: u32 = 2;
    const OF: &'static str = "a migration";
    const WITHOUT: &'static str = ", and a volume that it was about waits";

    fn format(&self) -> u32 {
        self.format
    }
}

impl MigrationRecord {
    /// A record of a migration that begins.
    pub(crate) fn new(
        role: Role,
        volumes: Vec<MovedVolume>,
        epoch: Epoch,
        request: Option<MigrateRequest>,
        status: MigrationStatus,
    ) -> Self {
        Self {
            format: Self::FORMAT,
            id: status.id,
            role,
            volumes,
            peer: status.peer.clone(),
            session: status.session,
            epoch,
            request,
            switchover_asked: false,
            cancel_asked: false,
            refused: None,
            farewell_due: false,
            bases: Vec::new(),
            increment: false,
            status,
        }
    }

    /// The names of its volumes, for people.
    pub(crate) fn names(&self) -> String {
        self.status.names()
    }

    /// Whether nothing is left to do.
    pub(crate) fn has_ended(&self) -> bool {
        self.status.phase.has_ended()
    }
}

/// The directory of records.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the directory, which is made if it is not there, and reads all records. Files that
    /// cannot be read are reported in the log and left alone.
    pub(crate) fn open(dir: PathBuf) -> io::Result<(Self, Vec<MigrationRecord>)> {
        fs::create_dir_all(&dir)?;
        let mut records: Vec<MigrationRecord> = records::load_all(&dir)?;
        records.sort_by_key(|record| record.status.started_unix_ms);
        Ok((Self { dir }, records))
    }

    /// Writes a record durably. Blocks for the disk.
    pub(crate) fn save(&self, record: &MigrationRecord) -> io::Result<()> {
        records::save(&self.dir, &record.id, record)
    }

    /// Removes a record; none is fine. Blocks for the disk.
    pub(crate) fn remove(&self, id: MigrationId) -> io::Result<()> {
        records::remove(&self.dir, &id)
    }
}

/// Ended migrations that are too many for their volumes, oldest first. Those that the target has
/// still to be told of are never among them, nor those whose copies differ.
pub(crate) fn surplus<'a>(ended: impl Iterator<Item = &'a MigrationRecord>) -> Vec<MigrationId> {
    let mut by_volumes: BTreeMap<&[VolumeName], Vec<&MigrationRecord>> = BTreeMap::new();
    for record in ended {
        let records = by_volumes.entry(&record.status.volumes).or_default();
        records.push(record);
    }
    let mut surplus = Vec::new();
    for mut records in by_volumes.into_values() {
        records.sort_by_key(|record| record.status.ended_unix_ms);
        let many = records.len().saturating_sub(KEPT_PER_VOLUME);
        let old = records[..many].iter();
        surplus.extend(
            old.filter(|record| !record.farewell_due && !found_difference(&record.status))
                .map(|record| record.id),
        );
    }
    surplus
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::Phase, migration::progress::fresh_status};

    fn record(id: u64, phase: Phase) -> MigrationRecord {
        let mut status = fresh_status(
            MigrationId(id),
            vec!["vm".parse().unwrap()],
            Role::Source,
            "lisbon".parse().unwrap(),
            4096,
        );
        status.phase = phase;
        status.ended_unix_ms = phase.has_ended().then_some(id);
        let volumes = vec![MovedVolume {
            id: VolumeId(7),
            name: "vm".parse().unwrap(),
        }];
        MigrationRecord::new(Role::Source, volumes, Epoch(3), None, status)
    }

    #[test]
    fn records_survive_and_broken_ones_do_not_stop_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (store, none) = Store::open(dir.path().join("m")).unwrap();
        assert!(none.is_empty());
        let mut one = record(1, Phase::Precopy);
        store.save(&one).unwrap();
        one.refused = Some(Epoch(4));
        store.save(&one).unwrap();
        store.save(&record(2, Phase::Failed)).unwrap();
        fs::write(dir.path().join("m/3.json"), "{").unwrap();
        fs::write(dir.path().join("m/4.tmp"), "half").unwrap();
        let (store, all) = Store::open(dir.path().join("m")).unwrap();
        let ids: Vec<_> = all
            .iter()
            .map(|r| (r.id.0, r.has_ended(), r.refused))
            .collect();
        assert_eq!(ids, [(1, false, Some(Epoch(4))), (2, true, None)]);
        store.remove(MigrationId(1)).unwrap();
        store.remove(MigrationId(1)).unwrap();
        assert_eq!(Store::open(dir.path().join("m")).unwrap().1.len(), 1);
    }

    #[test]
    fn the_oldest_are_surplus() {
        let mut all: Vec<_> = (0..14).map(|id| record(id, Phase::Completed)).collect();
        all[1].farewell_due = true;
        let surplus: Vec<_> = surplus(all.iter()).iter().map(|id| id.0).collect();
        assert_eq!(surplus, [0, 2, 3]);
    }
}
