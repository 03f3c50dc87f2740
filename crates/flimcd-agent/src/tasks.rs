//! The tasks around drivers: how a migration begins, goes on after a restart, and ends.

use flimcd_core::{BlockSet, MigrationId};
use flimcd_migrate::{SealLimits, SourceConfig, SourceMachine, SourceStart, policy::Policy};
use flimcd_wire::{Message, VolumeOffer};
use std::{io, sync::Arc};
use tokio::sync::{mpsc, watch};

use crate::{
    agent::Agent,
    api::{MigrationStatus, Phase},
    links::{Inbox, PeerLink},
    migration::{
        Command, Outcome, Setup, SourceDriver, choose_policy, hooks::DisksHook, progress::unix_ms,
        settle, store::MigrationRecord, volumes::VolumeSet,
    },
};

/// The ends of a running migration that belong to its driver.
pub(crate) struct Begin {
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) status: watch::Sender<MigrationStatus>,
    /// Of a machine's disks.
    pub(crate) hook: Option<DisksHook>,
}

/// Starts the task of a migration whose source is here, from its beginning or from its record.
pub(crate) fn spawn_source(
    agent: &Arc<Agent>,
    volumes: Arc<VolumeSet>,
    record: MigrationRecord,
    begin: Begin,
    is_fresh: bool,
) {
    let task = run_source(agent.clone(), volumes, record.clone(), begin, is_fresh);
    agent.spawn(guarded(record, task));
}

async fn run_source(
    agent: Arc<Agent>,
    volumes: Arc<VolumeSet>,
    record: MigrationRecord,
    begin: Begin,
    is_fresh: bool,
) {
    let Some(link) = agent.link_to(&record.peer) else {
        return stall(
            &record,
            &begin,
            "the peer is not in the configuration any more",
        );
    };
    let (Some(request), Some(policy)) = (record.request.clone(), policy_of(&record)) else {
        return stall(
            &record,
            &begin,
            "its record does not say what was asked for",
        );
    };
    let prepared = {
        let (volumes, record) = (volumes.clone(), record.clone());
        let asks = policy.uses_library();
        let prepare = move || {
            let (mut start, data, bases) = prepare(&volumes, &record, is_fresh)?;
            if let (SourceStart::Fresh { data, .. }, true) = (&mut start, asks) {
                *data = volumes.whole_chunks(data);
            }
            let sample = if asks {
                volumes.sample(&data)
            } else {
                Vec::new()
            };
            Ok((start, sample, bases, volumes.heat()))
        };
        tokio::task::spawn_blocking(prepare).await
    };
    let (start, sample, bases, heat) =
        match prepared.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(prepared) => prepared,
            Err(error) if is_fresh => {
                let why = format!("finding the data of the volume failed: {error}");
                return fail(&agent, record, begin.hook.as_ref(), why).await;
            }
            Err(error) => {
                let why = format!("finding out what the target lacks failed: {error}");
                return stall(&record, &begin, &why);
            }
        };
    let ceiling = request.bandwidth_bytes_per_sec;
    let configured = agent.config.limits.bandwidth.map(|rate| rate.0);
    link.handle().set_ceiling(ceiling.or(configured));
    let config = SourceConfig {
        migration: record.id,
        volumes: offers(&volumes, &record, &bases),
        session: record.session,
        size: volumes.layout().size(),
        epoch: record.epoch,
        incarnation: rand::random(),
    };
    let id = record.id;
    let hook = begin.hook.clone();
    let is_increment = record.increment;
    let inbox = link.register(id);
    let setup = setup(&agent, &volumes, &link, inbox, record.clone(), begin);
    let make = |now| {
        let mut machine = SourceMachine::new(config, policy, start, now);
        machine.set_sample(sample);
        machine.set_heat(&heat.reads, &heat.writes);
        if is_increment {
            machine.replicate(SealLimits::default());
        }
        machine
    };
    let ended = match SourceDriver::new(setup, make) {
        Ok(driver) => driver.run().await,
        Err(error) => {
            tracing::error!(migration = %id, "the migration's threads cannot be started: {error}");
            (
                ended_early(record, format!("threads cannot be started: {error}")),
                Outcome::Ended,
            )
        }
    };
    link.unregister(id);
    link.handle().set_ceiling(configured);
    finish(&agent, hook.as_ref(), ended).await;
}

/// What the target is told of the volumes.
fn offers(
    volumes: &VolumeSet,
    record: &MigrationRecord,
    bases: &[Option<MigrationId>],
) -> Vec<VolumeOffer> {
    let bases = bases.iter().copied().chain(std::iter::repeat(None));
    let moved = record.volumes.iter().cloned().zip(bases);
    let offer = |(volume, (moved, base)): (&Arc<flimcd_volume::Volume>, _)| {
        let crate::migration::store::MovedVolume { id, name } = moved;
        VolumeOffer {
            id,
            name,
            size: volume.size(),
            base,
        }
    };
    volumes.all().iter().zip(moved).map(offer).collect()
}

/// Runs the task of a migration. If it panics, the migration stands still and a restart goes on with it:
/// its record does not say that it has ended.
pub(crate) async fn guarded(
    record: MigrationRecord,
    task: impl Future<Output = ()> + Send + 'static,
) {
    if let Err(error) = tokio::spawn(task).await {
        tracing::error!(
            migration = %record.id, volumes = %record.names(),
            "the migration's task has failed; restart the agent to go on with it: {error}"
        );
    }
}

/// A migration that cannot go on now, and must not be given up: the other side may own the volume.
pub(crate) fn stall(record: &MigrationRecord, begin: &Begin, why: &str) {
    tracing::error!(
        migration = %record.id, volumes = %record.names(),
        "the migration waits until the agent is started again without this: {why}"
    );
    begin.status.send_modify(|status| {
        status.error = Some(format!("{why}; put that right and start the agent again"));
    });
}

/// What the driver of a migration is made from.
pub(crate) fn setup(
    agent: &Arc<Agent>,
    volumes: &Arc<VolumeSet>,
    link: &Arc<PeerLink>,
    inbox: Inbox,
    record: MigrationRecord,
    begin: Begin,
) -> Setup {
    Setup {
        volumes: volumes.clone(),
        inbox,
        link: link.clone(),
        commands: begin.commands,
        stop: agent.stop_signal(),
        record,
        store: agent.store.clone(),
        status: begin.status,
        hook: begin.hook,
    }
}

/// Begins to track the guest's writes, and finds out what the target lacks; that a second time to be looked at.
fn prepare(
    volumes: &VolumeSet,
    record: &MigrationRecord,
    is_fresh: bool,
) -> io::Result<(SourceStart, BlockSet, Vec<Option<MigrationId>>)> {
    if is_fresh {
        let begun = volumes.begin_migration(&record.peer, record.id)?;
        let start = SourceStart::Fresh {
            data: begun.data.clone(),
            changed: begun.changed,
        };
        return Ok((start, begun.data, begun.bases));
    }
    let offered = record.epoch.next();
    let stage = settle::source_stage(record.id, offered, &volumes.ownerships());
    let stage = stage.ok_or_else(|| io::Error::other(CONTRADICTION))?;
    let unacked = volumes.resume_migration(&record.peer, record.id)?;
    let data = unacked.clone();
    Ok((SourceStart::Resume { stage, unacked }, data, Vec::new()))
}

/// Volumes of one migration whose records cannot have been written by it.
pub(crate) const CONTRADICTION: &str =
    "the records of its volumes contradict each other; was one of them put back from a copy?";

fn policy_of(record: &MigrationRecord) -> Option<Box<dyn Policy>> {
    let request = record.request.as_ref()?;
    choose_policy(request.strategy, request.compress, request.library)
}

/// Takes note of what a driver came to.
pub(crate) async fn finish(
    agent: &Arc<Agent>,
    hook: Option<&DisksHook>,
    (record, outcome): (MigrationRecord, Outcome),
) {
    if outcome == Outcome::Paused {
        return;
    }
    tracing::info!(
        migration = %record.id, volumes = %record.names(), role = ?record.role,
        "the migration has ended: {}", record.status.phase
    );
    if let Some(hook) = hook {
        hook.tell_end(&record);
    }
    let surplus = agent.registry.end(record.clone());
    agent.after_migration(&record).await;
    for moved in &record.volumes {
        agent.note_in_library(&moved.name).await;
    }
    forget_surplus(agent, surplus).await;
}

async fn forget_surplus(agent: &Arc<Agent>, surplus: Vec<MigrationId>) {
    let store = agent.store.clone();
    let removed = tokio::task::spawn_blocking(move || {
        surplus.into_iter().try_for_each(|id| store.remove(id))
    });
    if let Ok(Err(error)) = removed.await {
        tracing::warn!("an old migration's record cannot be removed: {error}");
    }
}

/// A record that ends with an error.
pub(crate) fn ended_early(mut record: MigrationRecord, why: String) -> MigrationRecord {
    record.status.phase = Phase::Failed;
    record.status.error = Some(why);
    record.status.ended_unix_ms = Some(unix_ms());
    record
}

/// Ends a migration that could not begin, or go on.
pub(crate) async fn fail(
    agent: &Arc<Agent>,
    record: MigrationRecord,
    hook: Option<&DisksHook>,
    why: String,
) {
    tracing::error!(migration = %record.id, volumes = %record.names(), "the migration failed: {why}");
    let record = ended_early(record, why);
    save(agent, record.clone()).await;
    finish(agent, hook, (record, Outcome::Ended)).await;
}

/// Writes a record; a failure is logged.
pub(crate) async fn save(agent: &Arc<Agent>, record: MigrationRecord) -> bool {
    let store = agent.store.clone();
    let id = record.id;
    let saved = tokio::task::spawn_blocking(move || store.save(&record)).await;
    match saved.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(migration = %id, "the migration's record cannot be written: {error}");
            false
        }
    }
}

impl Agent {
    /// Tells a peer of migrations that ended here while it was not connected.
    pub(crate) async fn say_farewells(self: &Arc<Self>, link: &Arc<PeerLink>) {
        for mut record in self.registry.farewells(link.peer()) {
            if link.send(record.id, Message::Cancel).await {
                record.farewell_due = false;
                if save(self, record.clone()).await {
                    forget_surplus(self, self.registry.end(record)).await;
                }
            }
        }
    }
}
