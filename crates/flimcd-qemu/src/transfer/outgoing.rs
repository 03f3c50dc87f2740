//! The source's side.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    incoming::set_capabilities,
    status::{TransferError, TransferState, TransferStatus, doing, run_state, status, wait_for},
};
use crate::{
    commands::{
        Cont, Migrate, MigrateCancel, MigrateContinue, MigrateSetParameters, MigrateStartPostcopy,
        QueryMigrate, RunState,
    },
    qmp::Qmp,
};

/// How long QEMU may take to give a migration up.
const CANCEL_PATIENCE: Duration = Duration::from_secs(30);

/// The least downtime limit that QEMU takes for one, and the most that it takes.
const LEAST_DOWNTIME_MS: u64 = 1;
const MOST_DOWNTIME_MS: u64 = 2_000_000;

/// What a migration is told at its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutgoingSettings {
    /// Where to: "unix:PATH" of the agent's socket.
    pub uri: String,
    /// Longest stop of the guest that QEMU aims at. It is a goal for memory alone: the disks' hand-over
    /// comes on top. `None`: QEMU goes on sending until the guest is stopped, and [`finish`]; before 8.1 it stops the guest by
    /// itself if not one page was written during a pass.
    pub downtime_limit_ms: Option<u64>,
    /// Most bytes per second, `None` for no limit: the link's pacing is the agent's.
    pub max_bandwidth_bytes_per_sec: Option<u64>,
    /// Whether memory may follow on demand after [`start_postcopy`].
    pub postcopy: bool,
}

/// Starts to send the guest's memory. Returns when QEMU has taken the order, not when it is connected.
/// The guest is stopped by QEMU when it reckons that the rest fits the downtime limit, and then waits in
/// [`TransferState::PreSwitchover`] for [`continue_switchover`].
///
/// # Errors
/// [`TransferError::Blocked`] when a device cannot be migrated, [`TransferError::Unsupported`] when this
/// QEMU lacks what is needed, [`TransferError::State`] while another migration runs.
pub async fn start_outgoing(qmp: &Qmp, settings: &OutgoingSettings) -> Result<(), TransferError> {
    let info = qmp.execute(QueryMigrate {}).await;
    let info = info.map_err(doing("asking whether the VM can be migrated"))?;
    if !info.blocked_reasons.is_empty() {
        return Err(TransferError::Blocked {
            reasons: info.blocked_reasons.join("; "),
        });
    }
    let before = info.status.unwrap_or(TransferState::None);
    if before != TransferState::None && !before.is_final() {
        return Err(TransferError::State {
            what: "start a migration",
            status: before,
            error: info.error_desc,
        });
    }
    let stopped_by_us = settings.downtime_limit_ms.is_none();
    set_capabilities(qmp, settings.postcopy, stopped_by_us).await?;
    let parameters = MigrateSetParameters {
        downtime_limit: Some(settings.downtime_limit_ms.unwrap_or(LEAST_DOWNTIME_MS)),
        max_bandwidth: Some(settings.max_bandwidth_bytes_per_sec.unwrap_or(0)),
        max_postcopy_bandwidth: Some(settings.max_bandwidth_bytes_per_sec.unwrap_or(0)),
        // QEMU looks for pages that were written since only when less is left than fits the limit, so zero would
        // not do; with this it is less than a page.
        avail_switchover_bandwidth: (settings.downtime_limit_ms.is_none()
            && qmp.version().is_at_least(8, 2))
        .then_some(1_000_000),
    };
    let set = qmp.execute(parameters).await;
    set.map_err(doing("setting the migration's limits"))?;
    let uri = settings.uri.clone();
    let started = qmp.execute(Migrate { uri }).await;
    started.map_err(doing("starting the migration"))?;
    Ok(())
}

/// Has QEMU finish as soon as possible, whatever is left: for a guest that was stopped.
///
/// # Errors
/// When QEMU refuses.
pub async fn finish(qmp: &Qmp) -> Result<(), TransferError> {
    let parameters = MigrateSetParameters {
        downtime_limit: Some(MOST_DOWNTIME_MS),
        max_bandwidth: None,
        max_postcopy_bandwidth: None,
        avail_switchover_bandwidth: None,
    };
    let done = qmp.execute(parameters).await;
    done.map(|_| ()).map_err(doing("finishing the migration"))
}

/// Lets memory follow on demand: the guest stops as soon as may be, and goes on at the target.
///
/// # Errors
/// When the migration was not started with `postcopy`, or is not active.
pub async fn start_postcopy(qmp: &Qmp) -> Result<(), TransferError> {
    let done = qmp.execute(MigrateStartPostcopy {}).await;
    done.map(|_| ()).map_err(doing("starting post-copy"))
}

/// Sends the rest: after this the guest may run at the target.
///
/// A source whose stream is broken already is not told to go on, because with post-copy it would never come
/// back ([`rescue_guest`](super::rescue_guest)). From here until the state is completed or
/// `postcopy-active`, the caller must keep the stream's socket open, whatever becomes of the target.
///
/// # Errors
/// [`TransferError::State`] when the migration does not wait in [`TransferState::PreSwitchover`], or its
/// stream is broken: then [`cancel`] brings the guest back.
pub async fn continue_switchover(qmp: &Qmp) -> Result<(), TransferError> {
    let state = TransferState::PreSwitchover;
    let refused = |now: TransferStatus, error: Option<String>| TransferError::State {
        what: "end the switchover",
        status: now.status,
        error: now.error.or(error),
    };
    let now = status(qmp).await?;
    if now.status != state || now.error.is_some() {
        return Err(refused(now, None));
    }
    match qmp.execute(MigrateContinue { state }).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_fatal() => Err(doing("ending the switchover")(error)),
        Err(error) => Err(refused(status(qmp).await?, Some(error.to_string()))),
    }
}

/// Gives the migration up and returns when the guest is back in its state: running if it ran before. A
/// migration that has failed or was cancelled already, or never began, is fine.
///
/// # Errors
/// [`TransferError::State`] when it is too late: completed, or memory follows on demand already.
pub async fn cancel(qmp: &Qmp) -> Result<RunState, TransferError> {
    let now = status(qmp).await?;
    let too_late = |status| {
        use TransferState as S;
        matches!(
            status,
            S::Completed
                | S::PostcopyActive
                | S::PostcopyDevice
                | S::PostcopyPaused
                | S::PostcopyRecover
                | S::PostcopyRecoverSetup
        )
    };
    if too_late(now.status) {
        return Err(TransferError::State {
            what: "cancel",
            status: now.status,
            error: None,
        });
    }
    if now.status != TransferState::None && !now.status.is_final() {
        let cancelled = qmp.execute(MigrateCancel {}).await;
        cancelled.map_err(doing("cancelling the migration"))?;
    }
    let settled = |s: TransferState| s == TransferState::None || s.is_final();
    let end = wait_for(qmp, "cancelling", CANCEL_PATIENCE, settled).await?;
    if too_late(end.status) {
        return Err(TransferError::State {
            what: "cancel",
            status: end.status,
            error: None,
        });
    }
    settle_guest(qmp).await
}

/// QEMU starts the guest again from a bottom half, after the migration's state has changed.
async fn settle_guest(qmp: &Qmp) -> Result<RunState, TransferError> {
    let mut events = qmp.events();
    let patience = tokio::time::Instant::now() + CANCEL_PATIENCE;
    loop {
        let state = run_state(qmp).await?;
        if state != RunState::FinishMigrate {
            return Ok(state);
        }
        if tokio::time::timeout_at(patience, events.next())
            .await
            .is_err()
        {
            return Err(TransferError::Guest {
                what: "bring the guest back",
                status: state,
                way_out: "QEMU did not resume it: `flimcd vm show` says how its migration ended",
            });
        }
    }
}

/// Lets the guest run here (QMP `cont`). Only for the one site that owns its disks.
///
/// # Errors
/// When QEMU refuses.
pub async fn resume_guest(qmp: &Qmp) -> Result<(), TransferError> {
    let done = qmp.execute(Cont {}).await;
    done.map(|_| ()).map_err(doing("letting the guest run"))
}
