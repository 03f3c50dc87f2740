//! All migrations that this agent knows of: those that run, and the ended ones that are remembered.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, mpsc, watch};

use crate::{
    api::{MigrationStatus, Role},
    migration::{
        Command,
        store::{MigrationRecord, surplus},
    },
};

/// A migration that runs. Its driver holds everything else.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) volumes: Vec<VolumeName>,
    pub(crate) role: Role,
    pub(crate) peer: SiteName,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) status: watch::Receiver<MigrationStatus>,
}

impl Running {
    fn shares_with(&self, other: &Self) -> bool {
        self.volumes
            .iter()
            .any(|volume| other.volumes.contains(volume))
    }
}

#[derive(Debug)]
enum Known {
    Running(Running),
    Ended(Box<MigrationRecord>),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    known: Mutex<BTreeMap<MigrationId, Known>>,
    /// A migration is not running any more.
    ended: Notify,
}

impl Registry {
    fn known(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A migration begins, or goes on after a restart; refused with one that a volume of it is in.
    pub(crate) fn begin(&self, id: MigrationId, running: Running) -> Result<(), Running> {
        let mut known = self.known();
        let other = known.iter().find_map(|(&other, known)| match known {
            Known::Running(other_run) if other == id || other_run.shares_with(&running) => {
                Some(other_run.clone())
            }
            _ => None,
        });
        match other {
            Some(other) => Err(other),
            None => {
                known.insert(id, Known::Running(running));
                Ok(())
            }
        }
    }

    /// A migration did not begin after all.
    pub(crate) fn forget(&self, id: MigrationId) {
        self.known().remove(&id);
        self.ended.notify_waiters();
    }

    /// A migration has ended. Returns those that need not be remembered any more.
    pub(crate) fn end(&self, record: MigrationRecord) -> Vec<MigrationId> {
        let mut known = self.known();
        known.insert(record.id, Known::Ended(Box::new(record)));
        let ended = known.values().filter_map(|known| match known {
            Known::Ended(record) => Some(&**record),
            Known::Running(_) => None,
        });
        let surplus = surplus(ended);
        for id in &surplus {
            known.remove(id);
        }
        drop(known);
        self.ended.notify_waiters();
        surplus
    }

    /// Waits until a migration does not run any more, and what belongs to it is cleaned up.
    pub(crate) async fn wait_ended(&self, id: MigrationId) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            if !matches!(self.known().get(&id), Some(Known::Running(_))) {
                return;
            }
            ended.await;
        }
    }

    /// The running migration of a volume.
    pub(crate) fn running_on(&self, volume: &VolumeName) -> Option<(MigrationId, Running)> {
        self.known().iter().find_map(|(&id, known)| match known {
            Known::Running(running) if running.volumes.contains(volume) => {
                Some((id, running.clone()))
            }
            _ => None,
        })
    }

    /// A running migration.
    pub(crate) fn running(&self, id: MigrationId) -> Option<Running> {
        match self.known().get(&id) {
            Some(Known::Running(running)) => Some(running.clone()),
            _ => None,
        }
    }

    /// The record of an ended migration.
    pub(crate) fn ended(&self, id: MigrationId) -> Option<MigrationRecord> {
        match self.known().get(&id) {
            Some(Known::Ended(record)) => Some((**record).clone()),
            _ => None,
        }
    }

    /// Changes the record of an ended migration; the record as it is then.
    pub(crate) fn change_ended(
        &self,
        id: MigrationId,
        change: impl FnOnce(&mut MigrationRecord),
    ) -> Option<MigrationRecord> {
        match self.known().get_mut(&id) {
            Some(Known::Ended(record)) => {
                change(record);
                Some((**record).clone())
            }
            _ => None,
        }
    }

    /// Ended migrations that a peer has still to be told of.
    pub(crate) fn farewells(&self, peer: &SiteName) -> Vec<MigrationRecord> {
        let known = self.known();
        let records = known.values().filter_map(|known| match known {
            Known::Ended(record) if record.farewell_due && record.peer == *peer => Some(record),
            _ => None,
        });
        records.map(|record| (**record).clone()).collect()
    }

    /// Status of one migration.
    pub(crate) fn status(&self, id: MigrationId) -> Option<MigrationStatus> {
        self.known().get(&id).map(status_of)
    }

    /// Status of all, oldest first.
    pub(crate) fn statuses(&self) -> Vec<MigrationStatus> {
        let mut all: Vec<_> = self.known().values().map(status_of).collect();
        all.sort_by_key(|status| (status.started_unix_ms, status.id));
        all
    }
}

fn status_of(known: &Known) -> MigrationStatus {
    match known {
        Known::Running(running) => running.status.borrow().clone(),
        Known::Ended(record) => record.status.clone(),
    }
}
