//! End checks: after a migration, whether what arrived is what the source has, block by block, for all that the guest at the target has
//! not written since.
//!
//! ```text
//!  migration completed ─► Checks ─► source::Checker ─── CheckOpen, CheckAsk… ───► target::Answering ─► Volume
//!                            │            │ reads the copy that stayed                 reads, leaves out what was written
//!                            └────────────┴─► the migration's status and record
//! ```
//! The source drives: it holds the copy, which nobody writes. A check has no state of its own that survives the agent; one that was not
//! carried through begins again with the agent, as long as the copy stands. It ends without a verdict when the copy is dropped, when either
//! volume moves on, and when it is not known any more what the guest at the target has written.
//!
//! A difference is an error of this program or of a disk, so it is logged as one, stays in the migration's record, and keeps the copy
//! from being dropped automatically ([`crate::replicas`]): it may be what the data has to be put right from.

mod hash;
mod source;
mod target;

use flimcd_core::MigrationId;
use flimcd_wire::Message;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

use crate::{
    agent::Agent,
    api::{ApiCode, CheckPhase, CheckStatus, ErrorBody, MigrationStatus, Phase, Role},
    error::refuse,
    hosting::Hosted,
    migration::{progress::unix_ms, store::MigrationRecord},
    tasks,
};

/// The migrations that are being checked.
#[derive(Debug, Default)]
pub(crate) struct Checks(Mutex<BTreeSet<MigrationId>>);

impl Checks {
    fn running(&self) -> MutexGuard<'_, BTreeSet<MigrationId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for `what`; `None` when the agent stops before. Reading a disk is waited for without this: whoever stops an agent may take
/// its images away at once.
async fn unless_stopped<T>(
    stop: &mut watch::Receiver<bool>,
    what: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        done = what => Some(done),
        _ = stop.wait_for(|&stop| stop) => None,
    }
}

/// Whether a check has found that the copies of a migration differ.
pub(crate) fn found_difference(status: &MigrationStatus) -> bool {
    let check = status.check.as_ref();
    check.is_some_and(|check| check.phase == CheckPhase::Different)
}

/// Whether `hosted` is the copy that `migration` left here.
fn is_copy_of(hosted: &Hosted, migration: MigrationId) -> bool {
    let record = hosted.record();
    record.is_replica() && record.last_migration == Some(migration)
}

impl Agent {
    /// Begins the check of a migration that has ended here, if it is one to be checked and has not been.
    pub(crate) fn check_in_background(self: &Arc<Self>, record: &MigrationRecord) {
        let asked = record.request.as_ref().and_then(|request| request.check);
        let check = record.status.check.as_ref();
        let has_been = check.is_some_and(|check| check.phase.has_ended());
        if has_been || !asked.unwrap_or(self.config.check) {
            return;
        }
        if let Err(error) = self.begin_check(record.id) {
            tracing::info!(migration = %record.id, "the copies are not compared: {}", error.message);
        }
    }

    /// Begins the check of a migration, once more if need be. One that runs goes on.
    pub(crate) fn begin_check(
        self: &Arc<Self>,
        id: MigrationId,
    ) -> Result<MigrationStatus, ErrorBody> {
        let record = self.record_to_check(id)?;
        let copies = self.copies_of(&record)?;
        let Some(link) = self.link_to(&record.peer) else {
            let message = format!("there is no link to site {}", record.peer);
            return Err(refuse(ApiCode::UnknownSite, message, ""));
        };
        let blocks = |hosted: &Arc<Hosted>| hosted.volume().size().blocks();
        let fresh = CheckStatus {
            blocks_total: copies.iter().map(blocks).sum(),
            started_unix_ms: unix_ms(),
            ..CheckStatus::default()
        };
        // One lock for both, so that whoever finds one running finds it in the status, too.
        let mut running = self.checks.running();
        if !running.insert(id) {
            return Ok(self.registry.status(id).unwrap_or(record.status));
        }
        let noted = self.note_check(id, fresh.clone());
        drop(running);
        let status = noted.map_or(record.status, |record| record.status);
        let agent = self.clone();
        self.spawn(async move {
            let session = MigrationId(rand::random());
            let mut checker = source::Checker {
                agent: agent.clone(),
                inbox: link.register(session),
                link: link.clone(),
                session,
                migration: id,
                copies,
                stop: agent.stop_signal(),
                status: fresh,
            };
            let ended = checker.run().await;
            let _ = unless_stopped(&mut checker.stop, link.send(session, Message::Cancel)).await;
            link.unregister(session);
            match ended {
                Some(ended) => agent.end_check(id, checker.status, ended).await,
                None => {
                    agent.checks.running().remove(&id);
                }
            }
        });
        Ok(status)
    }

    fn record_to_check(&self, id: MigrationId) -> Result<MigrationRecord, ErrorBody> {
        if self.registry.running(id).is_some() {
            let hint = "it is checked when it has ended";
            return Err(refuse(
                ApiCode::Busy,
                format!("migration {id} still runs"),
                hint,
            ));
        }
        let Some(record) = self.registry.ended(id) else {
            let message = format!("there is no migration {id}");
            let hint = "`flimcd status` shows those that are remembered";
            return Err(refuse(ApiCode::UnknownMigration, message, hint));
        };
        if record.role == Role::Target {
            let message =
                format!("migration {id} arrived here, and is checked from where it came from");
            let hint = format!("ask the agent of site {}", record.peer);
            return Err(refuse(ApiCode::BadRequest, message, hint));
        }
        if record.status.phase != Phase::Completed {
            let message = format!(
                "migration {id} has moved nothing: it is {}",
                record.status.phase
            );
            return Err(refuse(ApiCode::BadRequest, message, ""));
        }
        Ok(record)
    }

    fn copies_of(&self, record: &MigrationRecord) -> Result<Vec<Arc<Hosted>>, ErrorBody> {
        let copy = |moved: &crate::migration::store::MovedVolume| {
            let hosted = self.hosting.by_id(moved.id);
            let copy = hosted.filter(|hosted| is_copy_of(hosted, record.id));
            copy.ok_or_else(|| {
                let message = format!(
                    "the copy of {} that stayed here is gone, or has moved on",
                    moved.name
                );
                let hint = "only while both copies stand can they be compared";
                refuse(ApiCode::Busy, message, hint)
            })
        };
        record.volumes.iter().map(copy).collect()
    }

    /// Puts the state of a check into the status of its migration.
    fn note_check(&self, id: MigrationId, check: CheckStatus) -> Option<MigrationRecord> {
        self.registry
            .change_ended(id, |record| record.status.check = Some(check))
    }

    async fn end_check(
        self: &Arc<Self>,
        id: MigrationId,
        mut status: CheckStatus,
        ended: Result<(), String>,
    ) {
        status.ended_unix_ms = Some(unix_ms());
        match ended {
            Ok(()) if status.blocks_different == 0 => {
                status.phase = CheckPhase::Equal;
                tracing::info!(
                    migration = %id, written = status.blocks_written,
                    "checked: {} blocks equal", status.blocks_equal
                );
            }
            Ok(()) => status.phase = CheckPhase::Different,
            Err(_) if status.blocks_different > 0 => status.phase = CheckPhase::Different,
            Err(why) => {
                tracing::warn!(migration = %id, "the copies were not compared to the end: {why}");
                status.phase = CheckPhase::Stopped;
                status.error = Some(why);
            }
        }
        if status.phase == CheckPhase::Different {
            let error = describe(&status);
            tracing::error!(
                migration = %id,
                "THE COPIES DIFFER. {error}. The copy here is kept; find out which one is right before the guest goes on with wrong data"
            );
            status.error = Some(error);
        }
        let noted = {
            let mut running = self.checks.running();
            running.remove(&id);
            self.note_check(id, status)
        };
        if let Some(record) = noted {
            tasks::save(self, record).await;
        }
    }
}

/// What differs, for people.
fn describe(status: &CheckStatus) -> String {
    let named: Vec<_> = (status.different.iter())
        .map(|run| match run.blocks {
            1 => format!("block {} of {}", run.first, run.volume),
            blocks => format!(
                "blocks {} to {} of {}",
                run.first,
                run.first + blocks - 1,
                run.volume
            ),
        })
        .collect();
    let named_blocks: u64 = status.different.iter().map(|run| run.blocks).sum();
    let more = match status.blocks_different - named_blocks {
        0 => String::new(),
        more => format!(" and {more} others"),
    };
    format!("source and target differ in {}{more}", named.join(", "))
}
