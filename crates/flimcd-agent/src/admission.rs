//! The target's door: what a peer may begin here, and what it is told when it may not.
//!
//! | the `Open` is about | answer |
//! | --- | --- |
//! | a migration that runs here | its driver's (it never comes here) |
//! | one that completed here | `Accept` with `Complete` |
//! | one that ended early here | `Failed`; if the source has offered ownership, `Accept` first, so that it can ask for a refusal |
//! | an unknown one, the source owns the volume | checks, then a new volume; or `Failed` and nothing changed |
//! | an unknown one, ownership was offered | it is recorded as ended for good, then as above |
//!
//! # Room
//! Only the volume's size is known beforehand, not how much of it is data. Blocks that find no room after
//! the switch would leave the guest without them, so by default the whole size must fit beside the
//! other volumes that are still arriving and `limits.reserve`; `limits.overcommit` lets sparse volumes in that
//! do not. Before the switch a full disk ends the migration cleanly either way.

use flimcd_core::{Epoch, MigrationId, SiteName};
use flimcd_migrate::{TargetConfig, TargetStart};
use flimcd_wire::{Accept, ErrorCode, Message, Open, SeqRuns, SourceStage, TargetStage, WireError};
use std::sync::Arc;

use crate::{
    agent::Agent,
    api::{ErrorBody, OwnershipState, Phase, Role},
    hosting::Hosted,
    links::{Admit, Inbox, PeerLink},
    migration::{
        Command, Outcome, Setup, TargetBegin, TargetDriver, progress::fresh_status,
        store::MigrationRecord,
    },
    tasks::{self, Begin, ended_early},
};

impl Admit for Agent {
    fn admit(self: Arc<Self>, link: &Arc<PeerLink>, id: MigrationId, open: Open, inbox: Inbox) {
        let (agent, link) = (self.clone(), link.clone());
        let task = async move {
            if *agent.stop_signal().borrow() {
                return;
            }
            agent.opened(&link, id, open, inbox).await;
        };
        self.spawn(async move {
            if let Err(error) = tokio::spawn(task).await {
                tracing::error!(migration = %id, "taking a migration in has failed: {error}");
            }
        });
    }

    fn cancel_switch(self: Arc<Self>, link: &Arc<PeerLink>, id: MigrationId, epoch: Epoch) {
        // The record of an ended migration is durable, and an ended migration never owns anything.
        let refused = self.registry.ended(id).is_some_and(|record| {
            record.peer == *link.peer()
                && record.role == Role::Target
                && record.status.phase != Phase::Completed
        });
        if refused {
            let (agent, link) = (self.clone(), link.clone());
            agent.spawn(async move {
                link.send(id, Message::SwitchRefused { epoch }).await;
            });
        }
    }

    fn peer_is_up(self: Arc<Self>, link: &Arc<PeerLink>) {
        let (agent, link) = (self.clone(), link.clone());
        self.spawn(async move { agent.say_farewells(&link).await });
    }
}

impl Agent {
    /// A peer's `Open` that no driver waits for.
    async fn opened(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: Open,
        inbox: Inbox,
    ) {
        if let Some(record) = self.registry.ended(id) {
            link.unregister(id);
            if record.role == Role::Target && record.peer == *link.peer() {
                answer_ended(link, &record, open.stage).await;
            }
            return;
        }
        let size = open.volumes[0].size.bytes();
        let peer = link.peer().clone();
        let status = fresh_status(id, open.volumes[0].name.clone(), Role::Target, peer, size);
        let record =
            MigrationRecord::new(Role::Target, open.volumes[0].id, open.epoch, None, status);
        match self.take_in(link, &record, &open).await {
            Ok((hosted, begin)) => {
                tracing::info!(
                    migration = %id, volume = %record.volume, from = %record.peer,
                    "a volume is arriving"
                );
                let begun = TargetBegin {
                    config: target_config(id, &hosted),
                    start: TargetStart::Fresh,
                };
                run_target(self, hosted, link.clone(), record, begin, inbox, begun).await;
            }
            Err(error) => {
                tracing::warn!(
                    migration = %id, volume = %record.volume, from = %record.peer,
                    "refused a migration: {}", error.text
                );
                link.unregister(id);
                if open.stage == SourceStage::Owner {
                    link.send(id, Message::Failed(error)).await;
                } else {
                    // It must never become possible any more: remember that before saying so.
                    let record = ended_early(record, error.text);
                    if tasks::save(&self, record.clone()).await {
                        answer_ended(link, &record, open.stage).await;
                        self.registry.end(record);
                    }
                }
            }
        }
    }

    /// Checks everything, and makes the volume and the record of the migration.
    async fn take_in(
        self: &Arc<Self>,
        link: &Arc<PeerLink>,
        record: &MigrationRecord,
        open: &Open,
    ) -> Result<(Arc<Hosted>, Begin), WireError> {
        self.check_allowed(link.peer(), open)?;
        if open.stage != SourceStage::Owner {
            let text = format!(
                "site {} knows nothing of migration {}; was its state directory lost?",
                self.config.site, record.id
            );
            return Err(WireError::new(ErrorCode::UNKNOWN_MIGRATION, text));
        }
        self.supersede(link.peer(), open).await?;
        let begin = self.begin(record).map_err(|error| to_wire(&error))?;
        let agent = self.clone();
        let (to_save, id, open) = (record.clone(), record.id, open.clone());
        let made = tokio::task::spawn_blocking(move || {
            agent.hosting.check_arrival(&open, &agent.config)?;
            agent.store.save(&to_save).map_err(|error| {
                let text = format!("recording the migration at the target failed: {error}");
                WireError::new(ErrorCode::DISK, text)
            })?;
            let arrived = agent.hosting.take_in(&open, id, &to_save.peer);
            if arrived.is_err() {
                // Nothing is left of it but a line in the log.
                let _ = agent.store.remove(id);
            }
            arrived
        });
        let made = made.await.unwrap_or_else(|panic| {
            Err(WireError::new(
                ErrorCode::OTHER,
                format!("the target's agent failed: {panic}"),
            ))
        });
        match made {
            Ok(hosted) => Ok((hosted, begin)),
            Err(error) => {
                self.registry.forget(record.id);
                Err(error)
            }
        }
    }

    fn check_allowed(&self, peer: &SiteName, open: &Open) -> Result<(), WireError> {
        let allowed = self
            .config
            .peer(peer)
            .is_some_and(|config| config.allows_sending(&open.volumes[0].name));
        if allowed {
            return Ok(());
        }
        let text = format!(
            "site {site} does not take volume {name} from site {peer}; add it to may_send of peer {peer} in \
             the configuration of {site}",
            site = self.config.site,
            name = open.volumes[0].name,
        );
        Err(WireError::new(ErrorCode::NOT_ALLOWED, text))
    }

    /// An older migration of the same volume from the same peer, which the peer has given up without our
    /// hearing of it, makes way.
    async fn supersede(&self, peer: &SiteName, open: &Open) -> Result<(), WireError> {
        let Ok(hosted) = self.hosting.get(&open.volumes[0].name) else {
            return Ok(());
        };
        let is_same = hosted.volume().id() == open.volumes[0].id;
        let Some((old, running)) = self.registry.running_on(&open.volumes[0].name) else {
            return Ok(());
        };
        if !is_same || running.role != Role::Target || running.peer != *peer {
            return Ok(());
        }
        tracing::info!(migration = %old, volume = %open.volumes[0].name, "makes way for a newer migration");
        let (answer, answered) = tokio::sync::oneshot::channel();
        if running.commands.send(Command::Cancel(answer)).await.is_ok()
            && let Ok(Ok(())) = answered.await
        {
            self.registry.wait_ended(old).await;
        }
        Ok(())
    }
}

/// Tells a source how a migration ended here.
async fn answer_ended(link: &Arc<PeerLink>, record: &MigrationRecord, stage: SourceStage) {
    let accept = |stage| {
        Message::Accept(Accept {
            incarnation: rand::random(),
            received: SeqRuns::default(),
            stage,
        })
    };
    if record.status.phase == Phase::Completed {
        let stage = TargetStage::Complete(record.epoch.next());
        link.send(record.id, accept(stage)).await;
        return;
    }
    if matches!(stage, SourceStage::Prepared(_)) {
        link.send(record.id, accept(TargetStage::Incoming)).await;
    }
    let text = record
        .status
        .error
        .clone()
        .unwrap_or_else(|| format!("the migration was {} at the target", record.status.phase));
    let error = WireError::new(ErrorCode::CANCELLED, text);
    link.send(record.id, Message::Failed(error)).await;
}

/// A refusal of the API's kind on the wire.
pub(crate) fn to_wire(error: &ErrorBody) -> WireError {
    WireError::new(ErrorCode::VOLUME_EXISTS, format!("at the target: {error}"))
}

/// What a target machine is about.
pub(crate) fn target_config(id: MigrationId, hosted: &Hosted) -> TargetConfig {
    TargetConfig {
        migration: id,
        size: hosted.volume().size(),
        waits_for_vm: false,
        incarnation: rand::random(),
    }
}

/// Runs the driver of a migration whose target is here, and cleans up after it.
pub(crate) async fn run_target(
    agent: Arc<Agent>,
    hosted: Arc<Hosted>,
    link: Arc<PeerLink>,
    record: MigrationRecord,
    begin: Begin,
    inbox: Inbox,
    begun: TargetBegin,
) {
    let id = record.id;
    let setup = Setup {
        volume: hosted.volume().clone(),
        link: link.clone(),
        inbox,
        commands: begin.commands,
        stop: agent.stop_signal(),
        record: record.clone(),
        store: agent.store.clone(),
        status: begin.status,
    };
    let (record, outcome, discard) = match TargetDriver::new(setup, &begun) {
        Ok(driver) => driver.run().await,
        Err(error) => {
            let text = format!("threads cannot be started: {error}");
            link.send(
                id,
                Message::Failed(WireError::new(ErrorCode::OTHER, text.clone())),
            )
            .await;
            let discard = hosted.state() == OwnershipState::Incoming;
            (ended_early(record, text), Outcome::Ended, discard)
        }
    };
    link.unregister(id);
    if discard && outcome == Outcome::Ended {
        agent.discard(record.volume.clone()).await;
    }
    tasks::finish(&agent, (record, outcome)).await;
}
