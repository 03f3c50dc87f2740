//! Replicas that are kept up to date by increments.
//!
//! ```text
//!  schedule (durable) ── due ──► increment: a migration that never switches ── ended ──► schedule: what it came to, next due
//! ```
//! One task, [`keep`], begins what is due; another for each increment waits for its end. A schedule is a file in
//! `STATE_DIR/replications`, named like its volume, and replaced before and after each increment: a restart finds the increment either
//! running again, ended, or forgotten. What the replica is, is not said here but in the volume's record at the target.
//!
//! An increment makes way for a migration of its volume, which goes over the replica. When the volume has moved away, its schedule stops and says so.

mod ops;
mod schedule;

use flimcd_core::{MigrationId, VolumeName};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    agent::Agent,
    api::{MigrateRequest, OwnershipState, Phase, Strategy, Switchover},
    migration::{Command, progress::unix_ms},
};
pub(crate) use schedule::Replications;
use schedule::{Last, Schedule};

/// Before something that failed is tried again, if the schedule has no shorter time.
const RETRY_MS: u64 = 30_000;
/// How long nothing is looked at, at most: the clock may be set.
const LOOK: Duration = Duration::from_secs(30);

/// Begins increments when they are due, until the agent stops.
pub(crate) async fn keep(agent: Arc<Agent>) {
    let mut stop = agent.stop_signal();
    for schedule in agent.replications.all() {
        if let Some(id) = schedule.running {
            agent.spawn(watch(agent.clone(), schedule.volume, id));
        }
    }
    loop {
        let mut changed = std::pin::pin!(agent.replications.changed.notified());
        changed.as_mut().enable();
        let now = unix_ms();
        let mut next = LOOK;
        for schedule in agent.replications.all() {
            if schedule.running.is_some() || schedule.stopped.is_some() {
                continue;
            }
            match schedule.due_unix_ms {
                Some(due) if due <= now => agent.begin_increment(schedule).await,
                Some(due) => next = next.min(Duration::from_millis(due - now)),
                None => {}
            }
        }
        tokio::select! {
            _ = stop.wait_for(|&stop| stop) => return,
            () = changed => {}
            () = tokio::time::sleep(next) => {}
        }
    }
}

/// Waits for the end of an increment, and takes note of it.
async fn watch(agent: Arc<Agent>, volume: VolumeName, id: MigrationId) {
    let mut stop = agent.stop_signal();
    tokio::select! {
        _ = stop.wait_for(|&stop| stop) => return,
        () = agent.registry.wait_ended(id) => {}
    }
    let now = unix_ms();
    let record = agent.registry.ended(id);
    let changed = agent.replications.change(&volume, |schedule| {
        if schedule.running != Some(id) {
            return;
        }
        schedule.running = None;
        let Some(record) = &record else {
            // Killed before it was on record.
            schedule.due_unix_ms = Some(now);
            return;
        };
        schedule.ended(&record.status, now);
    });
    agent.store_schedule(changed).await;
    if let Some(record) = record
        && record.status.phase == Phase::Completed
    {
        tracing::info!(
            volume = %volume, to = %record.peer, bytes = record.status.bytes_sent,
            stall_ms = record.status.downtime_ms, "the replica is up to date"
        );
    }
}

impl Agent {
    /// An increment is due.
    async fn begin_increment(self: &Arc<Self>, schedule: Schedule) {
        let name = &schedule.volume;
        let now = unix_ms();
        if let Some(why) = self.gone(&schedule) {
            let changed = self.replications.change(name, |schedule| {
                schedule.stopped = Some(why);
                schedule.due_unix_ms = None;
            });
            return self.store_schedule(changed).await;
        }
        let request = MigrateRequest {
            to: schedule.to.clone(),
            strategy: Strategy::Precopy,
            bandwidth_bytes_per_sec: schedule.bandwidth_bytes_per_sec,
            switchover: Switchover::Manual,
            compress: Some(true),
            library: Some(true),
            keep_replica: None,
            check: Some(false),
        };
        let begun = match self.registry.running_on(name) {
            Some((id, _)) => Err(format!("migration {id} of the volume runs")),
            None => (self.begin_sending(vec![name.clone()], request, None, true))
                .await
                .map_err(|error| error.to_string()),
        };
        let changed = self.replications.change(name, |schedule| match &begun {
            Ok(status) => {
                schedule.running = Some(status.id);
                schedule.began_unix_ms = now;
                schedule.due_unix_ms = None;
            }
            Err(why) => {
                schedule.error = Some(why.clone());
                schedule.due_unix_ms = Some(now + schedule.retry_ms());
            }
        });
        self.store_schedule(changed).await;
        if let Ok(status) = begun {
            self.spawn(watch(self.clone(), name.clone(), status.id));
        }
    }

    /// Why there is nothing more to replicate here.
    fn gone(&self, schedule: &Schedule) -> Option<String> {
        let Ok(hosted) = self.hosting.get(&schedule.volume) else {
            return Some("the volume is not here any more".to_owned());
        };
        if hosted.volume().id() != schedule.id {
            return Some("another volume has this name now".to_owned());
        }
        let peer = hosted.record().ownership.peer().cloned();
        (hosted.state() == OwnershipState::Released).then(|| {
            let site = peer.map_or_else(|| "another site".to_owned(), |site| site.to_string());
            format!(
                "the volume has moved to {site}; ask the agent there to replicate it, if it should"
            )
        })
    }

    /// Increments of these volumes make way for a migration, and come back when it has failed.
    pub(crate) async fn end_increments(&self, names: &[VolumeName]) {
        for name in names {
            let schedule = self.replications.get(name);
            let Some(id) = schedule.and_then(|schedule| schedule.running) else {
                continue;
            };
            let Some(running) = self.registry.running(id) else {
                continue;
            };
            tracing::info!(volume = %name, increment = %id, "makes way for a migration");
            let (answer, answered) = tokio::sync::oneshot::channel();
            if running.commands.send(Command::Cancel(answer)).await.is_ok() {
                // Refused when it is over anyway.
                let _ = answered.await;
            }
            self.registry.wait_ended(id).await;
        }
    }

    /// Writes a schedule that was changed; a failure is logged, and costs what a restart knows.
    pub(crate) async fn store_schedule(self: &Arc<Self>, schedule: Option<Schedule>) {
        let Some(schedule) = schedule else { return };
        let agent = self.clone();
        let saved = tokio::task::spawn_blocking(move || {
            if let Err(error) = agent.replications.save(&schedule) {
                tracing::error!(volume = %schedule.volume, "its replication cannot be recorded: {error}");
            }
        });
        if let Err(panic) = saved.await {
            tracing::error!("recording a replication failed: {panic}");
        }
        self.replications.changed.notify_waiters();
    }
}

/// Schedules by volume.
type Known = BTreeMap<VolumeName, Schedule>;
