//! Requests and answers of the API that are about running machines.

use flimcd_core::{MigrationId, VolumeName};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf};
use utoipa::ToSchema;

/// `POST /v1/vms`: takes the disks of a running QEMU under care, without a restart and without copying. Answered with a
/// [`VmInfo`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdoptVm {
    /// Absolute path of QEMU's monitor socket (QMP).
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Name to give the machine; the one that QEMU was started with (`-name`) if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub name: Option<VolumeName>,
    /// Whose its volumes are; `default` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Only look, and say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// One running machine as this agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its name, unique in this agent; its volumes are called `NAME-DISK`.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// QEMU's monitor socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Where it stands with this agent.
    pub care: VmCare,
    /// Its QEMU's state in QEMU's own words (`running`, `paused`, …); `gone` where no QEMU is there any more,
    /// `unknown` where its monitor cannot be asked now.
    pub status: String,
    /// Version of its QEMU, where that could be asked.
    pub qemu_version: Option<String>,
    /// Its memory, where QEMU could be asked.
    pub memory_bytes: Option<u64>,
    /// Its disks.
    pub disks: Vec<VmDiskInfo>,
    /// The migration that it or one of its disks is in.
    #[schema(value_type = Option<String>)]
    pub migration: Option<MigrationId>,
    /// What is in the way now, and what to do about it.
    pub problem: Option<String>,
}

impl VmInfo {
    /// As it is once it has been given back: nothing here is its any more.
    pub(crate) fn released(&mut self) {
        self.care = VmCare::Released;
        self.problem = None;
        for disk in &mut self.disks {
            disk.volume = None;
        }
    }
}

/// Where a machine stands with an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmCare {
    /// Looked at only: nothing was changed.
    Found,
    /// Its disks are being taken over.
    Adopting,
    /// All its disks are served by this agent.
    InCare,
    /// Its disks are being given back.
    Releasing,
    /// Its disks are plain files again, and this agent has forgotten it.
    Released,
}

impl fmt::Display for VmCare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Found => "found",
            Self::Adopting => "adopting",
            Self::InCare => "in care",
            Self::Releasing => "releasing",
            Self::Released => "released",
        })
    }
}

/// One disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDiskInfo {
    /// Short name inside the machine.
    pub id: String,
    /// The volume that it is, or would be; none where it is left as it is.
    #[schema(value_type = Option<String>)]
    pub volume: Option<VolumeName>,
    /// Format of the image: `raw`, `qcow2`, …
    pub format: String,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// Length of the image file.
    pub file_bytes: u64,
    /// The image file.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// The image's backing files, nearest first. They stay where they are and are not moved.
    #[schema(value_type = Vec<String>)]
    pub backing: Vec<PathBuf>,
    /// How QEMU uses it, for people: cache mode, discard, …
    pub options: String,
    /// Why it is left as it is, if it is.
    pub left_out: Option<String>,
    /// Why the machine cannot be adopted with it, and the way out.
    pub refused: Option<String>,
}
