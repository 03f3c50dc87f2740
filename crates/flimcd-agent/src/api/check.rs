//! End checks: whether the copy that stayed at the source is what arrived at the target.

use flimcd_core::VolumeName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where an end check stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckPhase {
    /// It compares, or waits for the link.
    #[default]
    Running,
    /// Every block that the guest at the target has not written is equal.
    Equal,
    /// Blocks differ.
    Different,
    /// It could not be carried through: `error` says why.
    Stopped,
}

impl CheckPhase {
    /// Whether it has ended.
    #[must_use]
    pub const fn has_ended(self) -> bool {
        !matches!(self, Self::Running)
    }
}

/// A run of blocks that differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DifferentBlocks {
    /// The volume.
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// The first block (4 KiB).
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

/// An end check: the copy that stayed at the source against the volume at the target, by hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckStatus {
    /// Where it stands.
    pub phase: CheckPhase,
    /// Blocks (4 KiB) of the volumes together.
    pub blocks_total: u64,
    /// Blocks that are equal.
    pub blocks_equal: u64,
    /// Blocks that the guest at the target has written since the switch: they are not compared.
    pub blocks_written: u64,
    /// Blocks that differ.
    pub blocks_different: u64,
    /// The first of them.
    pub different: Vec<DifferentBlocks>,
    /// When it began.
    pub started_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// What went wrong: what differs, or why it was not carried through.
    pub error: Option<String>,
}
