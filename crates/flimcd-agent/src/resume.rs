//! What a restart finds: migrations that go on, and what a killed agent had no time to clean up.

use flimcd_core::VolumeName;
use flimcd_migrate::TargetStart;
use flimcd_volume::Ownership;
use std::sync::Arc;

use crate::{
    admission::{run_target, target_config},
    agent::Agent,
    api::{OwnershipState, Phase, Role},
    hosting::Hosted,
    migration::{
        Outcome, TargetBegin, progress::unix_ms, settle, store::MigrationRecord, volumes::VolumeSet,
    },
    tasks,
};

impl Agent {
    /// Goes on with the migrations that a restart finds, before any link is up.
    pub(crate) async fn resume(self: &Arc<Self>, records: Vec<MigrationRecord>) {
        for record in records {
            if record.has_ended() {
                if record.farewell_due {
                    self.link_to(&record.peer);
                }
                self.registry.end(record);
            } else {
                self.resume_one(record).await;
            }
        }
        for hosted in self.hosting.all() {
            if self.registry.running_on(hosted.name()).is_none() {
                self.tidy_up(&hosted).await;
                self.note_in_library(hosted.name()).await;
            }
        }
    }

    /// An agent was killed between the record of an arrival and the last of its volumes. Nothing had been accepted
    /// yet, so the source asks again as if for the first time.
    async fn forget_arrival(self: &Arc<Self>, record: &MigrationRecord) {
        tracing::info!(
            migration = %record.id, volumes = %record.names(),
            "forgets an arrival whose volumes had not been made"
        );
        let (agent, id, moved) = (self.clone(), record.id, record.volumes.clone());
        let forgotten = tokio::task::spawn_blocking(move || {
            for volume in moved {
                match agent.hosting.by_id(volume.id) {
                    // A copy that it was about to be written over.
                    Some(hosted) if hosted.record().is_replica() => {}
                    Some(_) => agent.hosting.discard(&volume.name)?,
                    None => agent.hosting.remove_unborn(&volume.name)?,
                }
            }
            agent.store.remove(id)
        });
        if let Ok(Err(error)) = forgotten.await {
            tracing::error!(migration = %id, "cleaning up failed: {error}");
        }
        self.registry.forget(id);
    }

    /// What an agent that was killed between the end of a migration and the work after it has left.
    async fn tidy_up(self: &Arc<Self>, hosted: &Arc<Hosted>) {
        let ownership = hosted.record().ownership;
        let migration = ownership.migration().and_then(|id| self.registry.ended(id));
        match hosted.state() {
            // Where there is a copy elsewhere, what it lacks is kept.
            OwnershipState::Owner if hosted.record().baseline.is_some() => {}
            OwnershipState::Owner => {
                if let Err(error) = hosted.volume().stop_tracking() {
                    tracing::warn!(
                        volume = %hosted.name(), "forgetting what a target lacks failed: {error}"
                    );
                }
            }
            OwnershipState::Incoming if migration.is_some() => {
                self.discard(hosted.name().clone()).await;
            }
            OwnershipState::Released
                if matches!(ownership, Ownership::Released { complete: true, .. }) =>
            {
                if let Some(record) = migration {
                    self.after_migration(&record).await;
                }
            }
            state => tracing::error!(
                volume = %hosted.name(), %state,
                "no migration is known that the volume is in; it waits. Put the file of the migration back into                  the state directory, or remove the volume if the other site has it whole"
            ),
        }
    }

    /// Removes the volumes of an arrival that was cut short.
    pub(crate) async fn discard_arrival(
        self: &Arc<Self>,
        record: &MigrationRecord,
        volumes: &Arc<VolumeSet>,
    ) {
        let (id, peer, set) = (record.id, record.peer.clone(), volumes.clone());
        // Only where taking them over went wrong on the way, and putting that back did, too.
        let put_back = tokio::task::spawn_blocking(move || set.take_arrival_back(id, &peer)).await;
        if let Ok(Err(error)) = put_back {
            tracing::error!(migration = %id, "putting the records of volumes back failed: {error}");
        }
        for volume in &record.volumes {
            self.discard(volume.name.clone()).await;
        }
    }

    /// Removes a volume whose arrival was cut short.
    pub(crate) async fn discard(self: &Arc<Self>, name: VolumeName) {
        let (agent, volume) = (self.clone(), name.clone());
        let discarded = tokio::task::spawn_blocking(move || agent.hosting.discard(&volume)).await;
        if let Ok(Err(error)) = discarded {
            tracing::error!(volume = %name, "removing what had arrived failed: {error}");
        }
    }

    async fn resume_one(self: &Arc<Self>, mut record: MigrationRecord) {
        let begin = match self.begin(&record) {
            Ok(begin) => begin,
            Err(error) => {
                tracing::error!(migration = %record.id, "cannot go on: {error}");
                return;
            }
        };
        let volumes = match self.volumes_of(&record) {
            Ok(volumes) => volumes,
            Err(Unusable::NotBorn) => return self.forget_arrival(&record).await,
            Err(Unusable::Because(why)) => return tasks::stall(&record, &begin, why),
        };
        let Some(link) = self.link_to(&record.peer) else {
            let why = "the peer is not in the configuration any more";
            return tasks::stall(&record, &begin, why);
        };
        let ownerships = volumes.ownerships();
        tracing::info!(
            migration = %record.id, volumes = %record.names(), role = ?record.role, ?ownerships,
            "goes on with a migration"
        );
        if settle::is_complete(record.role, record.id, &ownerships) {
            // It ended just before the agent did.
            record.status.phase = Phase::Completed;
            record.status.ended_unix_ms = Some(unix_ms());
            tasks::save(self, record.clone()).await;
            return tasks::finish(self, begin.hook.as_ref(), (record, Outcome::Ended)).await;
        }
        match record.role {
            Role::Source => tasks::spawn_source(self, volumes, record, begin, false),
            Role::Target => {
                let offered = record.epoch.next();
                let Some(stage) = settle::target_stage(record.id, offered, &ownerships) else {
                    return tasks::stall(&record, &begin, tasks::CONTRADICTION);
                };
                let begun = TargetBegin {
                    config: target_config(&record, &volumes),
                    start: TargetStart::Resume {
                        stage,
                        refused: record.refused,
                        missing_blocks: volumes.missing_count(),
                    },
                    library: self.library.clone(),
                };
                let inbox = link.register(record.id);
                let agent = self.clone();
                let task = run_target(agent, volumes, link, record.clone(), begin, inbox, begun);
                self.spawn(tasks::guarded(record, task));
            }
        }
    }

    /// The volumes of a migration that goes on.
    fn volumes_of(&self, record: &MigrationRecord) -> Result<Arc<VolumeSet>, Unusable> {
        let moved = record.volumes.iter();
        let found: Vec<_> = moved
            .filter_map(|volume| self.hosting.by_id(volume.id))
            .collect();
        // A copy that this arrival was to be written over, and did not get to.
        let is_untouched =
            |hosted: &Arc<Hosted>| record.role == Role::Target && hosted.record().is_replica();
        if found.len() < record.volumes.len() || found.iter().any(is_untouched) {
            // Only what no guest has seen may be thrown away.
            let are_empty = found
                .iter()
                .all(|hosted| hosted.state() == OwnershipState::Incoming || is_untouched(hosted));
            return Err(if record.role == Role::Target && are_empty {
                Unusable::NotBorn
            } else {
                Unusable::Because("a volume of it is not there")
            });
        }
        let volumes = found.iter().map(|hosted| hosted.volume().clone());
        VolumeSet::new(volumes.collect())
            .map_err(|_| Unusable::Because("its volumes are larger than one migration may be"))
    }
}

/// Why a migration cannot go on with its volumes.
enum Unusable {
    /// They have not all been made yet.
    NotBorn,
    Because(&'static str),
}
