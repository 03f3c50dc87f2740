//! What is to be replicated when, and what it came to: in memory, and a file for each volume.

use flimcd_core::{MigrationId, SiteName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

use super::{Known, RETRY_MS};
use crate::{
    api::{MigrationStatus, Phase},
    records::{self, Record},
};

/// The last increment that was completed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Last {
    pub(crate) consistent_unix_ms: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_on_link: u64,
    pub(crate) duration_ms: u64,
    pub(crate) stall_ms: Option<f64>,
}

/// The replication of one volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Schedule {
    pub(crate) format: u32,
    pub(crate) volume: VolumeName,
    pub(crate) id: VolumeId,
    pub(crate) to: SiteName,
    /// None: once.
    pub(crate) every_ms: Option<u64>,
    pub(crate) bandwidth_bytes_per_sec: Option<u64>,
    /// When the next one is to begin; none while one runs, and when none is to.
    pub(crate) due_unix_ms: Option<u64>,
    pub(crate) running: Option<MigrationId>,
    /// When the one that runs, or the last one, began.
    pub(crate) began_unix_ms: u64,
    pub(crate) last: Option<Last>,
    pub(crate) increments: u64,
    /// Why the last try came to nothing.
    pub(crate) error: Option<String>,
    /// Why none is begun any more.
    pub(crate) stopped: Option<String>,
}

impl Record for Schedule {
    const FORMAT: u32 = 1;
    const OF: &'static str = "a replication";
    const WITHOUT: &'static str = ", and its replica gets older";

    fn format(&self) -> u32 {
        self.format
    }
}

impl Schedule {
    /// Until something that failed is tried again.
    pub(crate) fn retry_ms(&self) -> u64 {
        self.every_ms.map_or(RETRY_MS, |every| every.min(RETRY_MS))
    }

    /// An increment has ended.
    pub(crate) fn ended(&mut self, status: &MigrationStatus, now: u64) {
        if status.phase != Phase::Completed {
            let why = status.error.clone();
            self.error =
                Some(why.unwrap_or_else(|| format!("the last increment was {}", status.phase)));
            self.due_unix_ms = Some(now + self.retry_ms());
            return;
        }
        self.error = None;
        self.increments += 1;
        self.last = Some(Last {
            consistent_unix_ms: status.switched_unix_ms.unwrap_or(self.began_unix_ms),
            bytes_sent: status.bytes_sent,
            bytes_on_link: status.bytes_on_link,
            duration_ms: now.saturating_sub(self.began_unix_ms),
            stall_ms: status.downtime_ms,
        });
        // One that took longer than its time is followed at once.
        self.due_unix_ms = self
            .every_ms
            .map(|every| (self.began_unix_ms + every).max(now));
    }
}

/// All schedules.
pub(crate) struct Replications {
    dir: PathBuf,
    known: Mutex<Known>,
    /// Held while a file is written, so that an older one never replaces a newer.
    saving: Mutex<()>,
    pub(super) changed: Notify,
}

impl Replications {
    /// Opens the directory, which is made if it is not there. Blocks.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let all = records::load_all::<Schedule>(&dir)?;
        let known = all
            .into_iter()
            .map(|schedule| (schedule.volume.clone(), schedule));
        Ok(Self {
            known: Mutex::new(known.collect()),
            dir,
            saving: Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn all(&self) -> Vec<Schedule> {
        self.known().values().cloned().collect()
    }

    pub(crate) fn get(&self, volume: &VolumeName) -> Option<Schedule> {
        self.known().get(volume).cloned()
    }

    pub(crate) fn put(&self, schedule: Schedule) {
        self.known().insert(schedule.volume.clone(), schedule);
    }

    pub(crate) fn take(&self, volume: &VolumeName) -> Option<Schedule> {
        self.known().remove(volume)
    }

    /// Changes one; as it is then.
    pub(crate) fn change(
        &self,
        volume: &VolumeName,
        change: impl FnOnce(&mut Schedule),
    ) -> Option<Schedule> {
        let mut known = self.known();
        let schedule = known.get_mut(volume)?;
        change(schedule);
        Some(schedule.clone())
    }

    /// Writes what is known of a schedule's volume now, durably. Blocks.
    pub(crate) fn save(&self, schedule: &Schedule) -> io::Result<()> {
        let _alone = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        match self.get(&schedule.volume) {
            Some(now) => records::save(&self.dir, &schedule.volume, &now),
            None => records::remove(&self.dir, &schedule.volume),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::Role, migration::progress::fresh_status};

    fn schedule() -> Schedule {
        Schedule {
            format: Schedule::FORMAT,
            volume: "vm".parse().unwrap(),
            id: VolumeId(7),
            to: "lisbon".parse().unwrap(),
            every_ms: Some(60_000),
            bandwidth_bytes_per_sec: None,
            due_unix_ms: None,
            running: Some(MigrationId(3)),
            began_unix_ms: 1_000_000,
            last: None,
            increments: 0,
            error: Some("the link was away".to_owned()),
            stopped: None,
        }
    }

    fn status(phase: Phase) -> MigrationStatus {
        let volumes = vec!["vm".parse().unwrap()];
        let to = "lisbon".parse().unwrap();
        let mut status = fresh_status(MigrationId(3), volumes, Role::Source, to, 4096);
        status.phase = phase;
        status.switched_unix_ms = Some(1_002_000);
        status
    }

    #[test]
    fn the_next_is_due_from_the_beginning_of_the_last() {
        let mut one = schedule();
        one.ended(&status(Phase::Completed), 1_005_000);
        assert_eq!(one.due_unix_ms, Some(1_060_000));
        assert_eq!(one.last.unwrap().consistent_unix_ms, 1_002_000);
        assert_eq!((one.error, one.increments), (None, 1));
        let mut late = schedule();
        late.ended(&status(Phase::Completed), 1_100_000);
        assert_eq!(late.due_unix_ms, Some(1_100_000));
        let mut once = Schedule {
            every_ms: None,
            ..schedule()
        };
        once.ended(&status(Phase::Completed), 1_100_000);
        assert_eq!(once.due_unix_ms, None);
    }

    #[test]
    fn what_failed_is_tried_again_and_says_why() {
        let mut one = schedule();
        let mut failed = status(Phase::Failed);
        failed.error = Some("no room".to_owned());
        one.ended(&failed, 1_005_000);
        assert_eq!(one.due_unix_ms, Some(1_005_000 + RETRY_MS));
        assert_eq!((one.error.as_deref(), one.last), (Some("no room"), None));
    }

    #[test]
    fn schedules_survive_and_removed_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Replications::open(dir.path().join("replications")).unwrap();
        let all = open();
        all.put(schedule());
        all.save(&schedule()).unwrap();
        assert_eq!(open().all(), [schedule()]);
        let gone = all.take(&schedule().volume).unwrap();
        all.save(&gone).unwrap();
        assert!(open().all().is_empty());
    }
}
