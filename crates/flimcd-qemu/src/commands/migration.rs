//! Commands about migration.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Nothing, command};
use crate::{qmp::Command, transfer::TransferState};

command! {
    /// Switches migration's capabilities.
    MigrateSetCapabilities = "migrate-set-capabilities" -> Nothing {
        /// Those to change.
        capabilities: Vec<Capability>,
    }
}
command! {
    /// The capabilities that this QEMU has.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<Capability> {}
}
command! {
    /// How the migration goes.
    QueryMigrate = "query-migrate" -> MigrationInfo {}
}
command! {
    /// Starts an outgoing migration.
    Migrate = "migrate" -> Nothing {
        /// Where to, "unix:PATH".
        uri: String,
    }
}
command! {
    /// From now on memory follows on demand.
    MigrateStartPostcopy = "migrate-start-postcopy" -> Nothing {}
}
command! {
    /// Goes on after a pause.
    MigrateContinue = "migrate-continue" -> Nothing {
        /// The pause.
        state: TransferState,
    }
}
command! {
    /// Gives an outgoing migration up.
    MigrateCancel = "migrate_cancel" -> Nothing {}
}
command! {
    /// Pauses a migration whose memory follows on demand, as a broken connection would.
    MigratePause = "migrate-pause" -> Nothing {}
}
command! {
    /// Goes on after a broken connection, on the target.
    MigrateRecover = "migrate-recover" -> Nothing {
        /// Where to listen.
        uri: String,
    }
}

/// A capability and whether it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Its name.
    pub capability: String,
    /// On or off.
    pub state: bool,
}

/// Sets parameters of the migration; those that are `None` stay.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateSetParameters {
    /// Longest stop of the guest that QEMU aims at, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// Bytes per second; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Bytes per second that QEMU reckons with for the stop; 0 to let it measure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<u64>,
    /// Bytes per second of background transfer in post-copy; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<u64>,
}

impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Nothing;
}

/// Starts to listen for a migration.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateIncoming {
    /// Where, "unix:PATH".
    pub uri: String,
    /// Whether QEMU exits when it fails (from 9.1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_on_error: Option<bool>,
}

impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Reply = Nothing;
}

/// Goes on after a broken connection, on the source.
#[derive(Clone, Debug, Serialize)]
pub struct MigrateResume {
    /// Where to, "unix:PATH".
    pub uri: String,
    /// Always true.
    pub resume: bool,
}

impl Command for MigrateResume {
    const NAME: &'static str = "migrate";
    type Reply = Nothing;
}

/// The answer to [`QueryMigrate`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where it is; none before the first.
    #[serde(default)]
    pub status: Option<TransferState>,
    /// Memory.
    #[serde(default)]
    pub ram: Option<RamInfo>,
    /// How long the stop would be, in ms.
    #[serde(default)]
    pub expected_downtime: Option<u64>,
    /// How long the stop was, in ms.
    #[serde(default)]
    pub downtime: Option<u64>,
    /// Since the start, in ms.
    #[serde(default)]
    pub total_time: Option<u64>,
    /// Why it failed.
    #[serde(default)]
    pub error_desc: Option<String>,
    /// Why it cannot be.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// Addresses it listens on.
    #[serde(default)]
    pub socket_address: Vec<Value>,
}

/// Memory's part of [`MigrationInfo`]. Bytes unless said.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamInfo {
    /// Sent.
    #[serde(default)]
    pub transferred: u64,
    /// To send.
    #[serde(default)]
    pub remaining: u64,
    /// The memory.
    #[serde(default)]
    pub total: u64,
    /// Pages of zeroes, sent as such.
    #[serde(default)]
    pub duplicate: u64,
    /// Pages sent in full.
    #[serde(default)]
    pub normal: u64,
    /// Passes over memory.
    #[serde(default)]
    pub dirty_sync_count: u64,
    /// Pages written by the guest per second.
    #[serde(default)]
    pub dirty_pages_rate: u64,
    /// Bytes per page.
    #[serde(default)]
    pub page_size: u64,
    /// Megabits per second.
    #[serde(default)]
    pub mbps: f64,
    /// Pages that the target asked for.
    #[serde(default)]
    pub postcopy_requests: u64,
    /// Sent before the stop.
    #[serde(default)]
    pub precopy_bytes: u64,
    /// Sent during the stop.
    #[serde(default)]
    pub downtime_bytes: u64,
    /// Sent after the stop.
    #[serde(default)]
    pub postcopy_bytes: u64,
}
