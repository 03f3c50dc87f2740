//! Replicas that are kept up to date.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// `POST /v1/volumes/{name}/replicate`. A schedule that the volume has already is replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplicateRequest {
    /// The site that the replica is at; a configured peer.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// From the beginning of one increment to that of the next; once and at once if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_s: Option<u64>,
    /// Ceiling on the link for all that goes to this peer while an increment does; the configuration's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_sec: Option<u64>,
}

/// Where the replication of a volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationState {
    /// An increment is being sent.
    Running,
    /// The next one is not due.
    Waiting,
    /// The last one failed, or one is due and cannot begin: `behind` says why.
    Behind,
    /// Asked for once, and done.
    Done,
    /// Nothing more is sent: `behind` says why.
    Stopped,
}

/// The replication of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReplicationStatus {
    /// The volume.
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// The site that the replica is at.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// Where it stands.
    pub state: ReplicationState,
    /// Seconds from the beginning of one increment to that of the next; none if once.
    pub every_s: Option<u64>,
    /// Ceiling on the link while an increment is sent.
    pub bandwidth_bytes_per_sec: Option<u64>,
    /// The moment that the replica is of, or can be put back to, in milliseconds since 1970; none before the first.
    pub consistent_unix_ms: Option<u64>,
    /// How long ago that is.
    pub lag_ms: Option<u64>,
    /// When the next increment is due.
    pub next_due_unix_ms: Option<u64>,
    /// The increment that is being sent.
    #[schema(value_type = Option<String>)]
    pub running: Option<MigrationId>,
    /// Bytes of content that the increment that runs, or the last one, has handed to the link.
    pub bytes_sent: u64,
    /// The same on the link, with all overhead.
    pub bytes_on_link: u64,
    /// How long the last one took.
    pub duration_ms: Option<u64>,
    /// How long the guest stood in it.
    pub stall_ms: Option<f64>,
    /// Increments that were completed.
    pub increments: u64,
    /// Why the replica is older than it should be, or is not kept any more.
    pub behind: Option<String>,
}

/// `POST /v1/replicas/{name}/restore`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreReplica {
    /// Although the site that owns the volume is connected.
    #[serde(default)]
    pub force: bool,
}

/// A replica that is of one moment again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoredReplica {
    /// The volume.
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// The moment that it is of, by the source's clock, in milliseconds since 1970.
    pub consistent_unix_ms: u64,
    /// Blocks (4 KiB) that were put back; 0 if it was whole.
    pub blocks: u64,
    /// Its image.
    #[schema(value_type = String)]
    pub image: PathBuf,
}
