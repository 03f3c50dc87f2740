//! What a restart finds: migrations that go on, and what a killed agent had no time to clean up.

use flimcd_core::VolumeName;
use flimcd_volume::Ownership;
use std::sync::Arc;

use crate::{
    admission::{run_target, target_config},
    agent::Agent,
    api::{OwnershipState, Role},
    hosting::Hosted,
    migration::{Outcome, TargetBegin, progress::unix_ms, store::MigrationRecord},
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
            }
        }
    }

    /// An agent was killed between the record of an arrival and its volume. Nothing had been accepted yet, so the
    /// source asks again as if for the first time.
    async fn forget_arrival(self: &Arc<Self>, record: &MigrationRecord) {
        tracing::info!(
            migration = %record.id, volume = %record.volume,
            "forgets an arrival whose volume had not been made"
        );
        let (agent, id, name) = (self.clone(), record.id, record.volume.clone());
        let forgotten = tokio::task::spawn_blocking(move || {
            agent.hosting.remove_unborn(&name)?;
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
            OwnershipState::Owner => tasks::stop_tracking(hosted.volume()),
            OwnershipState::Incoming if migration.is_some() => {
                self.discard(hosted.name().clone()).await;
            }
            OwnershipState::Released
                if matches!(ownership, Ownership::Released { complete: true, .. }) => {}
            state => tracing::error!(
                volume = %hosted.name(), %state,
                "no migration is known that the volume is in; it waits. Put the file of the migration back into                  the state directory, or remove the volume if the other site has it whole"
            ),
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
        let hosted = self.hosting.by_id(record.volume_id);
        let Some(hosted) = hosted else {
            return match record.role {
                Role::Target => self.forget_arrival(&record).await,
                Role::Source => tasks::stall(&record, &begin, "the volume is not there"),
            };
        };
        let Some(link) = self.link_to(&record.peer) else {
            let why = "the peer is not in the configuration any more";
            return tasks::stall(&record, &begin, why);
        };
        tracing::info!(
            migration = %record.id, volume = %record.volume, role = ?record.role,
            state = %hosted.state(), "goes on with a migration"
        );
        if let Some(phase) = hosted.ended_as(&record) {
            // It ended just before the agent did.
            record.status.phase = phase;
            record.status.ended_unix_ms = Some(unix_ms());
            tasks::save(self, record.clone()).await;
            return tasks::finish(self, (record, Outcome::Ended)).await;
        }
        match record.role {
            Role::Source => tasks::spawn_source(self, hosted, record, begin, false),
            Role::Target => {
                let begun = TargetBegin {
                    config: target_config(record.id, &hosted),
                    start: hosted.target_start(record.refused),
                };
                let inbox = link.register(record.id);
                let agent = self.clone();
                let task = run_target(agent, hosted, link, record.clone(), begin, inbox, begun);
                self.spawn(tasks::guarded(record, task));
            }
        }
    }
}
