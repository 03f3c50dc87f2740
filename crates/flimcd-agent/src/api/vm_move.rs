//! Requests and answers of the API that are about moving running machines.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use utoipa::ToSchema;

use super::types::{MigrationStatus, Role, Strategy};

/// How the guest's memory goes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RamMode {
    /// All of it before the switch.
    Precopy,
    /// What is left after one pass follows the switch.
    Postcopy,
    /// Before the switch; what does not converge follows it.
    #[default]
    Auto,
}

impl RamMode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Precopy, Self::Postcopy, Self::Auto];

    /// Its name, as in the API and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::Auto => "auto",
        }
    }
}

impl FromStr for RamMode {
    type Err = UnknownRamMode;

    fn from_str(text: &str) -> Result<Self, UnknownRamMode> {
        let mut all = Self::ALL.into_iter();
        all.find(|mode| mode.name() == text)
            .ok_or_else(|| UnknownRamMode(text.to_owned()))
    }
}

/// A name that is no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory cannot go {0:?}; use one of precopy, postcopy, auto")]
pub struct UnknownRamMode(String);

/// `POST /v1/vms/{name}/migrate`. Answered with a [`VmMoveStatus`] once it is under way; whether the target accepts
/// shows in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveVm {
    /// The site to move to; a configured peer.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// How long the guest may stand, in milliseconds, as a goal; 300 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// How the memory goes.
    #[serde(default)]
    pub ram: RamMode,
    /// Ceiling on the link for all that goes to this peer; the configuration's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_sec: Option<u64>,
    /// How the disks go.
    #[serde(default)]
    pub strategy: Strategy,
    /// Whether the target gives the disks back as plain files once it has all of them.
    #[serde(default)]
    pub release: bool,
}

/// Where the move of a machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmPhase {
    /// The disks go over, the guest runs at the source.
    Disks,
    /// Its memory goes over, the guest runs at the source.
    Ram,
    /// The guest stands; the rest of its state and the disks' ownership go over.
    Switchover,
    /// Back to a guest at the source.
    Returning,
    /// The guest runs at the target; what is left of its disks and memory follows.
    Postcopy,
    /// Done: the source is not needed any more.
    Completed,
    /// Ended by the operator before the switch; the guest is at the source.
    Cancelled,
    /// Ended by an error; the error says where the guest is.
    Failed,
}

impl VmPhase {
    /// Whether the move has ended.
    #[must_use]
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

impl fmt::Display for VmPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disks => "disks",
            Self::Ram => "ram",
            Self::Switchover => "switchover",
            Self::Returning => "returning",
            Self::Postcopy => "postcopy",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

/// `GET /v1/vms/{name}/migration`: the last move of a machine, as one side sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmMoveStatus {
    /// Identity, the same on both sides.
    #[schema(value_type = String)]
    pub id: MigrationId,
    /// The machine.
    #[schema(value_type = String)]
    pub vm: VolumeName,
    /// Which side this agent is.
    pub role: Role,
    /// The site at the other end.
    #[schema(value_type = String)]
    pub peer: SiteName,
    /// Where it stands.
    pub phase: VmPhase,
    /// The migration of its disks, once there is one.
    pub disks: Option<MigrationStatus>,
    /// Which transfer of the memory this is, from 1; 0 before the first.
    pub attempt: u32,
    /// Size of the memory.
    pub ram_bytes_total: u64,
    /// Bytes of memory that are not at the target, as far as the hypervisor knows; only the source knows.
    pub ram_bytes_left: u64,
    /// Bytes that the hypervisor has sent, all attempts.
    pub ram_bytes_read: u64,
    /// Bytes that they became on the link, all attempts.
    pub ram_bytes_sent: u64,
    /// Passes over the memory.
    pub ram_rounds: u64,
    /// When it began on this side.
    pub started_unix_ms: u64,
    /// When the guest was stopped.
    pub stopped_unix_ms: Option<u64>,
    /// When the guest ran at the target, as this side learnt it.
    pub switched_unix_ms: Option<u64>,
    /// When it ended on this side.
    pub ended_unix_ms: Option<u64>,
    /// From the guest's stop at the source to its start at the target, as the source measures it (the news of the start
    /// travels half a round trip, which is taken off).
    pub downtime_ms: Option<f64>,
    /// What went wrong, if it failed; or what is in the way now.
    pub error: Option<String>,
    /// What was noted on the way, newest last, at most 32.
    pub notes: Vec<String>,
}
