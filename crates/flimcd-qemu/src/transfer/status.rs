//! Where a migration stands.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::{
    commands::{QueryMigrate, QueryStatus, RunState},
    qmp::{EventKind, Qmp, QmpError},
};

/// How often the state is asked for beside the events.
const POLL: Duration = Duration::from_millis(250);

/// State of a migration as QEMU calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum TransferState {
    /// None yet.
    None,
    /// Connecting, or at the target: waiting for the source.
    Setup,
    /// Being given up.
    Cancelling,
    /// Given up; the source's guest is as it was.
    Cancelled,
    /// Memory is copied while the guest runs at the source.
    Active,
    /// The guest's state is across, memory follows on demand.
    PostcopyActive,
    /// As `PostcopyActive`, with a broken connection.
    PostcopyPaused,
    /// Recovering from a broken connection: connecting again.
    PostcopyRecoverSetup,
    /// Recovering from a broken connection.
    PostcopyRecover,
    /// Done.
    Completed,
    /// Failed, see [`TransferStatus::error`].
    Failed,
    /// The source's guest has stopped and flushed; QEMU waits for [`continue_switchover`](super::continue_switchover).
    PreSwitchover,
    /// The devices' state is being sent.
    Device,
    /// Post-copy, the devices' state is being loaded (10.1 and later).
    PostcopyDevice,
    /// Waits for the guest to let a device go.
    WaitUnplug,
    /// A fault-tolerant pair.
    Colo,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

impl TransferState {
    /// Whether nothing happens any more without a new command.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl std::fmt::Display for TransferState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransferStatus {
    /// The state.
    pub status: TransferState,
    /// Memory, once there is something to say.
    pub ram: RamStatus,
    /// How long QEMU reckons that the guest would stand still, in ms.
    pub expected_downtime_ms: Option<u64>,
    /// How long it stood still, in ms, as the source's QEMU measures it.
    pub downtime_ms: Option<u64>,
    /// Since the start, in ms.
    pub total_ms: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Memory's part. Bytes unless said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RamStatus {
    /// Bytes sent, with the protocol's own.
    pub transferred_bytes: u64,
    /// Bytes still to send as QEMU knows at the moment.
    pub remaining_bytes: u64,
    /// The memory.
    pub total_bytes: u64,
    /// Passes over the memory so far.
    pub dirty_sync_count: u64,
    /// Pages that the guest writes per second.
    pub dirty_pages_per_sec: u64,
    /// Bytes per page.
    pub page_bytes: u64,
    /// Pages of zeroes, sent as a few bytes.
    pub zero_pages: u64,
    /// Pages sent in full.
    pub normal_pages: u64,
    /// Pages that the target's guest waited for.
    pub postcopy_requests: u64,
    /// Bytes per second at present.
    pub bytes_per_sec: u64,
}

/// A step of a migration that did not work.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The conversation with QEMU or a command failed.
    #[error("{doing}: {source}")]
    Qmp {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: QmpError,
    },
    /// QEMU cannot do what is needed.
    #[error("this QEMU ({version}) cannot {what}; {way_out}")]
    Unsupported {
        /// Its version.
        version: String,
        /// What it lacks.
        what: &'static str,
        /// What to do.
        way_out: &'static str,
    },
    /// Something of the guest cannot be migrated.
    #[error("QEMU cannot migrate this VM: {reasons}; remove what blocks it and try again")]
    Blocked {
        /// QEMU's words.
        reasons: String,
    },
    /// The migration is not where it would have to be.
    #[error("cannot {what} while the migration is {status}{}", detail(.error.as_deref()))]
    State {
        /// What was tried.
        what: &'static str,
        /// Where it is.
        status: TransferState,
        /// Why it failed.
        error: Option<String>,
    },
    /// The guest is not where it would have to be.
    #[error("cannot {what} while the VM is {status}: {way_out}")]
    Guest {
        /// What was tried.
        what: &'static str,
        /// Where it is.
        status: RunState,
        /// What to do.
        way_out: &'static str,
    },
    /// It takes too long.
    #[error("{what} took longer than {seconds} s; the migration is {status}")]
    Slow {
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
        /// Where it is.
        status: TransferState,
    },
}

fn detail(error: Option<&str>) -> String {
    error.map(|e| format!(" ({e})")).unwrap_or_default()
}

/// Names the step that failed.
pub(super) fn doing(what: &'static str) -> impl Fn(QmpError) -> TransferError {
    move |source| TransferError::Qmp {
        doing: what,
        source,
    }
}

/// Where the migration of this QEMU stands, in either direction. A QEMU that never migrated says
/// [`TransferState::None`].
///
/// # Errors
/// When QEMU does not answer.
pub async fn status(qmp: &Qmp) -> Result<TransferStatus, TransferError> {
    let info = qmp.execute(QueryMigrate {}).await;
    let info = info.map_err(doing("asking how the migration goes"))?;
    let ram = info.ram.unwrap_or_default();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped, and a rate for people"
    )]
    let bytes_per_sec = (ram.mbps.clamp(0.0, 1e9) * 125_000.0) as u64;
    Ok(TransferStatus {
        status: info.status.unwrap_or(TransferState::None),
        ram: RamStatus {
            transferred_bytes: ram.transferred,
            remaining_bytes: ram.remaining,
            total_bytes: ram.total,
            dirty_sync_count: ram.dirty_sync_count,
            dirty_pages_per_sec: ram.dirty_pages_rate,
            page_bytes: ram.page_size,
            zero_pages: ram.duplicate,
            normal_pages: ram.normal,
            postcopy_requests: ram.postcopy_requests,
            bytes_per_sec,
        },
        expected_downtime_ms: info.expected_downtime,
        downtime_ms: info.downtime,
        total_ms: info.total_time,
        error: info.error_desc,
    })
}

/// Whether the guest runs, and if not, why.
///
/// # Errors
/// When QEMU does not answer.
pub async fn run_state(qmp: &Qmp) -> Result<RunState, TransferError> {
    let status = qmp.execute(QueryStatus {}).await;
    Ok(status
        .map_err(doing("asking whether the guest runs"))?
        .status)
}

/// Waits until the migration is in a state that `wanted` takes, and returns it. `what` names that for
/// people.
///
/// # Errors
/// [`TransferError::Slow`] after `patience`, or when QEMU does not answer. A failed migration is a state
/// like any other: let `wanted` take it.
pub async fn wait_for(
    qmp: &Qmp,
    what: &'static str,
    patience: Duration,
    wanted: impl Fn(TransferState) -> bool,
) -> Result<TransferStatus, TransferError> {
    // Listen before asking, so that nothing falls in between.
    let mut events = qmp.events();
    let end = Instant::now() + patience;
    loop {
        let now = status(qmp).await?;
        if wanted(now.status) {
            return Ok(now);
        }
        if Instant::now() >= end {
            return Err(TransferError::Slow {
                what,
                seconds: patience.as_secs(),
                status: now.status,
            });
        }
        let next_poll = (Instant::now() + POLL).min(end);
        let change = async {
            loop {
                match events.next().await.map(|e| e.kind) {
                    Some(EventKind::Migration(_) | EventKind::Missed(_)) | None => return,
                    Some(_) => {}
                }
            }
        };
        // Either way the state is asked for next.
        let _ = timeout_at(next_poll, change).await;
    }
}
