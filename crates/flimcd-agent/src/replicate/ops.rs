//! What the API can ask about replicas that are kept up to date.

use flimcd_core::VolumeName;
use std::sync::Arc;

use super::{Last, Schedule};
use crate::{
    agent::Agent,
    api::{
        ApiCode, ErrorBody, ReplicateRequest, ReplicationState, ReplicationStatus, RestoredReplica,
    },
    error::{io_error, refuse},
    migration::{Command, progress::unix_ms},
    records::Record as _,
};

/// The shortest time from one increment to the next.
const EVERY_S_MIN: u64 = 1;

impl Agent {
    /// Keeps a replica of a volume from now on.
    pub(crate) async fn replicate(
        self: &Arc<Self>,
        name: VolumeName,
        request: ReplicateRequest,
    ) -> Result<ReplicationStatus, ErrorBody> {
        if request.every_s.is_some_and(|every| every < EVERY_S_MIN) {
            let message = "increments cannot follow each other in less than a second".to_owned();
            return Err(refuse(ApiCode::BadRequest, message, "name a longer time"));
        }
        let (volumes, _) = self.volumes_to_migrate(std::slice::from_ref(&name), &request.to)?;
        let id = volumes.all()[0].id();
        let before = self.replications.get(&name).filter(|old| old.id == id);
        let same_site = before.as_ref().filter(|old| old.to == request.to);
        if before.as_ref().is_some_and(|old| old.running.is_some()) && same_site.is_none() {
            let message = format!("an increment of {name} is on its way to another site");
            let hint = "wait for its end, or `flimcd replicate stop` it first";
            return Err(refuse(ApiCode::Busy, message, hint));
        }
        let running = same_site.and_then(|old| old.running);
        self.replications.put(Schedule {
            format: Schedule::FORMAT,
            volume: name.clone(),
            id,
            to: request.to,
            every_ms: request.every_s.map(|every| every.saturating_mul(1000)),
            bandwidth_bytes_per_sec: request.bandwidth_bytes_per_sec,
            due_unix_ms: running.is_none().then(unix_ms),
            running,
            began_unix_ms: same_site.map_or(0, |old| old.began_unix_ms),
            last: same_site.and_then(|old| old.last.clone()),
            increments: same_site.map_or(0, |old| old.increments),
            error: None,
            stopped: None,
        });
        self.store_schedule(self.replications.get(&name)).await;
        self.replication(&name)
    }

    /// All replications, by volume.
    pub(crate) fn replications(&self) -> Vec<ReplicationStatus> {
        let all = self.replications.all();
        all.iter()
            .map(|schedule| self.describe_schedule(schedule))
            .collect()
    }

    /// One of them.
    pub(crate) fn replication(&self, name: &VolumeName) -> Result<ReplicationStatus, ErrorBody> {
        let found = self.replications.get(name);
        let found = found.ok_or_else(|| not_replicated(name))?;
        Ok(self.describe_schedule(&found))
    }

    /// Ends a replication; an increment that runs is broken off.
    pub(crate) async fn stop_replication(
        self: &Arc<Self>,
        name: &VolumeName,
    ) -> Result<ReplicationStatus, ErrorBody> {
        let taken = self.replications.take(name);
        let mut schedule = taken.ok_or_else(|| not_replicated(name))?;
        if let Some(running) = schedule.running.and_then(|id| self.registry.running(id)) {
            let (answer, answered) = tokio::sync::oneshot::channel();
            if running.commands.send(Command::Cancel(answer)).await.is_ok() {
                // Refused when it is over anyway.
                let _ = answered.await;
            }
        }
        schedule.running = None;
        schedule.due_unix_ms = None;
        schedule.stopped = Some("stopped by an operator".to_owned());
        self.store_schedule(Some(schedule.clone())).await;
        Ok(self.describe_schedule(&schedule))
    }

    fn describe_schedule(&self, schedule: &Schedule) -> ReplicationStatus {
        let now = unix_ms();
        let running = schedule.running.and_then(|id| self.registry.running(id));
        let running = running.map(|running| running.status.borrow().clone());
        let last = schedule.last.as_ref();
        let of = |now: Option<u64>, last: fn(&Last) -> u64| {
            now.or_else(|| schedule.last.as_ref().map(last))
                .unwrap_or(0)
        };
        let is_late = (schedule.due_unix_ms).is_some_and(|due| due.saturating_add(2000) < now);
        let waits_for = running.as_ref().and_then(|status| status.error.clone());
        let state = match schedule {
            _ if schedule.stopped.is_some() => ReplicationState::Stopped,
            _ if waits_for.is_some() => ReplicationState::Behind,
            _ if schedule.running.is_some() => ReplicationState::Running,
            _ if schedule.error.is_some() || is_late => ReplicationState::Behind,
            _ if schedule.due_unix_ms.is_none() => ReplicationState::Done,
            _ => ReplicationState::Waiting,
        };
        ReplicationStatus {
            volume: schedule.volume.clone(),
            to: schedule.to.clone(),
            state,
            every_s: schedule.every_ms.map(|every| every / 1000),
            bandwidth_bytes_per_sec: schedule.bandwidth_bytes_per_sec,
            consistent_unix_ms: last.map(|last| last.consistent_unix_ms),
            lag_ms: last.map(|last| now.saturating_sub(last.consistent_unix_ms)),
            next_due_unix_ms: schedule.due_unix_ms,
            running: schedule.running,
            bytes_sent: of(running.as_ref().map(|s| s.bytes_sent), |last| {
                last.bytes_sent
            }),
            bytes_on_link: of(running.as_ref().map(|s| s.bytes_on_link), |last| {
                last.bytes_on_link
            }),
            duration_ms: last.map(|last| last.duration_ms),
            stall_ms: last.and_then(|last| last.stall_ms),
            increments: schedule.increments,
            behind: (schedule.stopped.clone())
                .or(waits_for)
                .or_else(|| schedule.error.clone()),
        }
    }

    /// Puts a replica that stands here back to its last consistent moment.
    pub(crate) async fn restore_replica(
        self: &Arc<Self>,
        name: &VolumeName,
        force: bool,
    ) -> Result<RestoredReplica, ErrorBody> {
        let hosted = self.hosting.get(name)?;
        let record = hosted.record();
        if let Some((id, _)) = self.registry.running_on(name) {
            let message = format!("content of {name} arrives here, by migration {id}");
            let hint = "end it first with `flimcd cancel`, if its source is lost for good";
            return Err(refuse(ApiCode::Busy, message, hint));
        }
        if !record.is_replica() || record.consistent.is_none() {
            let message =
                format!("{name} is not a replica here that a consistent moment is known of");
            return Err(refuse(
                ApiCode::BadRequest,
                message,
                "`flimcd replica list` shows what there is",
            ));
        }
        let owner = record.ownership.peer();
        let is_up = owner.and_then(|peer| self.link_to(peer));
        if !force && is_up.is_some_and(|link| link.handle().status().is_up) {
            let message = format!(
                "the site that owns {name} is connected, and will go on updating this replica"
            );
            let hint = "stop the replication there first; --force restores it all the same";
            return Err(refuse(ApiCode::Busy, message, hint));
        }
        let (agent, volume) = (self.clone(), name.clone());
        let restored = tokio::task::spawn_blocking(move || agent.hosting.restore_replica(&volume));
        let restored = restored.await.unwrap_or_else(|panic| {
            Err(io_error(
                "restoring the replica",
                &std::io::Error::other(panic),
            ))
        });
        let (consistent, blocks) = restored?;
        tracing::info!(volume = %name, blocks, "the replica is of its last consistent moment again");
        self.note_in_library(name).await;
        Ok(RestoredReplica {
            volume: name.clone(),
            consistent_unix_ms: consistent.as_of_unix_ms,
            blocks,
            image: record.image,
        })
    }
}

fn not_replicated(name: &VolumeName) -> ErrorBody {
    let message = format!("no replica of {name} is kept from here");
    refuse(
        ApiCode::UnknownVolume,
        message,
        "`flimcd replicate list` shows what is",
    )
}
