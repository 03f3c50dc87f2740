//! The target's door: what a peer may begin here, and what it is told when it may not.
//!
//! | the `Open` is about | answer |
//! | --- | --- |
//! | a migration that runs here | its driver's (it never comes here) |
//! | one that completed here | `Accept` with `Complete` |
//! | one that ended early here | `Failed`; if the source has offered ownership, `Accept` first, so that it can ask for a refusal |
//! | an unknown one, the source owns the volumes | checks, then new volumes or copies that stand here, all or none; or `Failed` and nothing changed |
//! | an unknown one, ownership was offered | it is recorded as ended for good, then as above |
//!
//! # Room
//! Only the volumes' sizes are known beforehand, not how much of it is data. Blocks that find no room after
//! the switch would leave the guest without them, so by default their whole size must fit beside the
//! other volumes that are still arriving and `limits.reserve`; `limits.overcommit` lets sparse volumes in that
//! do not. Before the switch a full disk ends the migration cleanly either way.

use flimcd_core::{Epoch, InvalidSize, MigrationId, SiteName, VolumeLayout};
use flimcd_migrate::{TargetConfig, TargetStart};
use flimcd_volume::Ownership;
use flimcd_wire::{
    Accept, Base, CheckOpen, ErrorCode, Message, Open, PlanOpen, SeqRuns, SourceStage, TargetStage,
    VmOpen, WireError,
};
use std::sync::Arc;

use crate::{
    agent::Agent,
    api::{ErrorBody, Phase, Role},
    links::{Admit, Inbox, PeerLink},
    migration::{
        Command, Outcome, TargetBegin, TargetDriver,
        progress::fresh_status,
        store::{MigrationRecord, MovedVolume},
        volumes::VolumeSet,
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

    fn admit_vm(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: VmOpen,
        inbox: Inbox,
    ) {
        let (agent, link) = (self.clone(), link.clone());
        self.spawn(async move {
            if !*agent.stop_signal().borrow() {
                agent.vm_opened(&link, id, open, inbox).await;
            }
        });
    }

    fn admit_plan(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: PlanOpen,
        inbox: Inbox,
    ) {
        let (agent, link) = (self.clone(), link.clone());
        self.spawn(agent.answer_plan(link, id, open, inbox));
    }

    fn admit_check(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: CheckOpen,
        inbox: Inbox,
    ) {
        let (agent, link) = (self.clone(), link.clone());
        self.spawn(agent.answer_check(link, id, open, inbox));
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
        let mut record = arriving_record(id, &open, link.peer().clone());
        match self.take_in(link, &record, &open).await {
            Ok((volumes, begin, bases)) => {
                record.bases = bases;
                tracing::info!(
                    migration = %id, volumes = %record.names(), from = %record.peer,
                    "volumes are arriving"
                );
                let begun = TargetBegin {
                    config: target_config(&record, &volumes),
                    start: TargetStart::Fresh,
                    library: self.library.clone(),
                };
                run_target(self, volumes, link.clone(), record, begin, inbox, begun).await;
            }
            Err(error) => {
                tracing::warn!(
                    migration = %id, volumes = %record.names(), from = %record.peer,
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

    /// Checks everything, and makes the volumes and the record of the migration.
    async fn take_in(
        self: &Arc<Self>,
        link: &Arc<PeerLink>,
        record: &MigrationRecord,
        open: &Open,
    ) -> Result<(Arc<VolumeSet>, Begin, Vec<Base>), WireError> {
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
        let (mut to_save, id, open) = (record.clone(), record.id, open.clone());
        let made = tokio::task::spawn_blocking(move || {
            let sizes = open.volumes.iter().map(|offer| offer.size);
            VolumeLayout::new(sizes).map_err(|error| too_large(&error))?;
            let bases = agent.hosting.check_arrival(&open, &agent.config)?;
            to_save.bases.clone_from(&bases);
            agent.store.save(&to_save).map_err(|error| {
                let text = format!("recording the migration at the target failed: {error}");
                WireError::new(ErrorCode::DISK, text)
            })?;
            let arrived = agent.hosting.take_in(&open, id, &to_save.peer);
            let arrived = arrived.and_then(|hosted| {
                let volumes = hosted.iter().map(|hosted| hosted.volume().clone());
                VolumeSet::new(volumes.collect()).map_err(|error| too_large(&error))
            });
            if arrived.is_err() {
                // Nothing is left of it but a line in the log.
                let _ = agent.store.remove(id);
            }
            Ok((arrived?, bases))
        });
        let made = made.await.unwrap_or_else(|panic| {
            Err(WireError::new(
                ErrorCode::OTHER,
                format!("the target's agent failed: {panic}"),
            ))
        });
        match made {
            Ok((volumes, bases)) => Ok((volumes, begin, bases)),
            Err(error) => {
                self.registry.forget(record.id);
                Err(error)
            }
        }
    }

    pub(crate) fn check_allowed(&self, peer: &SiteName, open: &Open) -> Result<(), WireError> {
        let config = self.config.peer(peer);
        let refused = open
            .volumes
            .iter()
            .find(|offer| !config.is_some_and(|config| config.allows_sending(&offer.name)));
        let Some(refused) = refused else {
            return Ok(());
        };
        let text = format!(
            "site {site} does not take volume {name} from site {peer}; add it to may_send of peer {peer} in \
             the configuration of {site}",
            site = self.config.site,
            name = refused.name,
        );
        Err(WireError::new(ErrorCode::NOT_ALLOWED, text))
    }

    /// Older migrations of the same volumes from the same peer, which the peer has given up without our
    /// hearing of it, make way.
    async fn supersede(&self, peer: &SiteName, open: &Open) -> Result<(), WireError> {
        for offer in &open.volumes {
            let Some((old, running)) = self.registry.running_on(&offer.name) else {
                continue;
            };
            // A volume that is gone already belonged to one that is cleaning up after itself.
            let is_other = (self.hosting.get(&offer.name))
                .is_ok_and(|hosted| hosted.volume().id() != offer.id);
            if is_other || running.role != Role::Target || running.peer != *peer {
                continue;
            }
            tracing::info!(migration = %old, volume = %offer.name, "makes way for a newer migration");
            let (answer, answered) = tokio::sync::oneshot::channel();
            // One that takes no commands any more has ended, and only its cleaning up is waited for.
            let refused = running.commands.send(Command::Cancel(answer)).await.is_ok()
                && matches!(answered.await, Ok(Err(_)));
            if !refused {
                self.registry.wait_ended(old).await;
            }
        }
        Ok(())
    }
}

/// The record of a migration that a peer begins.
fn arriving_record(id: MigrationId, open: &Open, peer: SiteName) -> MigrationRecord {
    let moved: Vec<_> = open
        .volumes
        .iter()
        .map(|offer| MovedVolume {
            id: offer.id,
            name: offer.name.clone(),
        })
        .collect();
    let names = moved.iter().map(|volume| volume.name.clone()).collect();
    let bytes = open.volumes.iter().map(|offer| offer.size.bytes()).sum();
    let mut status = fresh_status(id, names, Role::Target, peer, bytes);
    status.session = open.session;
    MigrationRecord::new(Role::Target, moved, open.epoch, None, status)
}

fn too_large(error: &InvalidSize) -> WireError {
    let text = format!("the volumes of the migration together: {error}");
    WireError::new(ErrorCode::SIZE, text)
}

/// Tells a source how a migration ended here.
async fn answer_ended(link: &Arc<PeerLink>, record: &MigrationRecord, stage: SourceStage) {
    let accept = |stage| {
        Message::Accept(Accept {
            incarnation: rand::random(),
            received: SeqRuns::default(),
            stage,
            bases: Vec::new(),
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
pub(crate) fn target_config(record: &MigrationRecord, volumes: &VolumeSet) -> TargetConfig {
    TargetConfig {
        migration: record.id,
        size: volumes.layout().size(),
        waits_for_vm: record.session.is_some(),
        incarnation: rand::random(),
        bases: (record.bases.iter().copied())
            .chain(std::iter::repeat(Base::Zeroes))
            .take(record.volumes.len())
            .collect(),
    }
}

/// Runs the driver of a migration whose target is here, and cleans up after it.
pub(crate) async fn run_target(
    agent: Arc<Agent>,
    volumes: Arc<VolumeSet>,
    link: Arc<PeerLink>,
    record: MigrationRecord,
    begin: Begin,
    inbox: Inbox,
    begun: TargetBegin,
) {
    let id = record.id;
    let hook = begin.hook.clone();
    let setup = tasks::setup(&agent, &volumes, &link, inbox, record.clone(), begin);
    let (record, outcome, discard) = match TargetDriver::new(setup, &begun) {
        Ok(driver) => driver.run().await,
        Err(error) => {
            let text = format!("threads cannot be started: {error}");
            link.send(
                id,
                Message::Failed(WireError::new(ErrorCode::OTHER, text.clone())),
            )
            .await;
            // Volumes that guests were let into stay as they are.
            let discard = volumes
                .ownerships()
                .iter()
                .all(|ownership| matches!(ownership, Ownership::Incoming { .. }));
            (ended_early(record, text), Outcome::Ended, discard)
        }
    };
    link.unregister(id);
    if discard && outcome == Outcome::Ended {
        agent.discard_arrival(&record, &volumes).await;
    }
    tasks::finish(&agent, hook.as_ref(), (record, outcome)).await;
}
