//! Types of the API for plans: what a migration would cost.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use serde::{Deserialize, Serialize};
use std::fmt;
use utoipa::ToSchema;

use super::ContentStats;

/// `POST /v1/plans`: finds out what a migration would cost, and moves nothing. Answered with a [`PlanStatus`] at once;
/// `GET /v1/plans/{id}` says how it goes on, `DELETE /v1/plans/{id}` ends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// The volumes, which would move together.
    #[schema(value_type = Vec<String>)]
    pub volumes: Vec<VolumeName>,
    /// The site that they would move to; a configured peer.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// What the link carries; as measured, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_sec: Option<u64>,
    /// Look at so many pieces of 256 KiB, drawn at random, and not at everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<u32>,
    /// Watch the guest for so many seconds at least; 3 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch_s: Option<u32>,
}

/// Where a plan stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PlanPhase {
    /// Waits for the target's answer.
    Connecting,
    /// The volumes are being looked at, and the target asked.
    Comparing,
    /// The guest is being watched.
    Watching,
    /// Done.
    Completed,
    /// Ended by the operator.
    Cancelled,
    /// Ended by an error.
    Failed,
}

impl PlanPhase {
    /// Whether it has ended.
    #[must_use]
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

impl fmt::Display for PlanPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Comparing => "comparing",
            Self::Watching => "watching",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

/// `GET /v1/plans/{id}`: a plan. Figures are of what was looked at while it runs, and of the whole once it is completed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanStatus {
    /// Identity.
    #[schema(value_type = String)]
    pub id: MigrationId,
    /// The volumes that would move together.
    #[schema(value_type = Vec<String>)]
    pub volumes: Vec<VolumeName>,
    /// Where to.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// Where it stands.
    pub phase: PlanPhase,
    /// Size of the volumes together.
    pub bytes_total: u64,
    /// Bytes that a migration would look at. The rest are holes, or have not changed since the copy at the target.
    pub bytes_to_move: u64,
    /// Bytes that this plan looks at.
    pub bytes_to_read: u64,
    /// And has looked at.
    pub bytes_read: u64,
    /// What stands at the target: whether what changed since is known.
    pub base: PlanBase,
    /// Image at the target that the volumes were compared with.
    pub library_image: Option<String>,
    /// How content would travel, with a strategy that uses what the target has.
    pub content: ContentStats,
    /// Of a sample: half of the interval around each figure of `content` that has the truth 95 times in 100.
    pub content_error_95: Option<ContentStats>,
    /// Bytes on the link that all of it would take, once, both ways and with the link's own.
    pub bytes_on_link: u64,
    /// Of a sample: as `content_error_95`.
    pub bytes_on_link_error_95: Option<u64>,
    /// What the guest does.
    pub guest: GuestActivity,
    /// What the link carries: as asked for, else as measured, else not known.
    pub rate_bytes_per_sec: Option<u64>,
    /// The rate was asked for and not measured.
    pub rate_is_given: bool,
    /// Round trip of the link.
    pub rtt_ms: Option<f64>,
    /// What each strategy would take; once it is completed.
    pub estimates: Vec<StrategyEstimate>,
    /// When it began.
    pub started_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// What went wrong, if it failed.
    pub error: Option<String>,
    /// What has to be known to read the figures.
    pub notes: Vec<String>,
}

/// What stands at the target where volumes would arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PlanBase {
    /// Nothing, or it is not known yet.
    #[default]
    Nothing,
    /// A copy from which what changed since is known: only that is looked at.
    KnownCopy,
    /// A copy of some time: everything is compared.
    UnknownCopy,
}

/// What guests did while a plan was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestActivity {
    /// How long they were watched.
    pub watched_s: f64,
    /// Bytes that they wrote per second; the same block counts each time.
    pub written_bytes_per_sec: f64,
    /// Reads per second.
    pub reads_per_sec: f64,
}

/// What a migration would take with one strategy. Times are unknown while nobody knows what the link carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StrategyEstimate {
    /// `precopy`, `precopy-zstd`, `postcopy` or `flimcd`.
    pub strategy: String,
    /// Bytes on the link.
    pub bytes_on_link: u64,
    /// Seconds until the guest can run at the target.
    pub moves_s: Option<f64>,
    /// Seconds until everything is there.
    pub total_s: Option<f64>,
    /// How long the guest's requests are refused, as the source sees it.
    pub downtime_ms: Option<f64>,
    /// Reads at the target that would wait for the source.
    pub misses: Option<u64>,
    /// Whether what is left ever gets small enough for a short downtime.
    pub converges: bool,
}

/// What was planned for a migration that runs or has ended: the last plan of the same volumes to the same site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Planned {
    /// The plan.
    #[schema(value_type = String)]
    pub id: MigrationId,
    /// When it was made.
    pub unix_ms: u64,
    /// It looked at a sample only.
    pub is_sample: bool,
    /// How content would travel; none for a strategy that does not use what the target has.
    pub content: Option<ContentStats>,
    /// What the migration's strategy would take.
    pub estimate: StrategyEstimate,
}
