//! Requests and answers of the agent's HTTP API. The command line uses exactly these types, and the
//! OpenAPI document is made from them.
//!
//! Sizes are in bytes, rates in bytes per second, times in seconds unless the name says otherwise,
//! moments in milliseconds since 1970 (`*_unix_ms`). Ids are hexadecimal text.

use flimcd_core::{MigrationId, SiteName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};
use utoipa::ToSchema;

use super::{CheckStatus, Planned, Predicted};

/// `GET /v1/status`: the agent and everything it has at hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The site this agent stands for.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// Version of the agent.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When it started.
    pub started_unix_ms: u64,
    /// Address on which peers reach it, when it listens; with the real port if 0 was configured.
    pub listen: Option<String>,
    /// The links to its peers, configured or connected.
    pub links: Vec<LinkStatus>,
    /// All volumes.
    pub volumes: Vec<VolumeInfo>,
    /// Migrations that run, and the last one of each volume.
    pub migrations: Vec<MigrationStatus>,
}

/// The link to one peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkStatus {
    /// The peer.
    #[schema(value_type = String)]
    pub peer: SiteName,
    /// Where it is dialled, if the configuration says.
    pub address: Option<String>,
    /// Whether frames can pass now. A link is only dialled when a migration needs it.
    pub up: bool,
    /// Delivery rate that was seen last.
    pub rate_bytes_per_sec: Option<u64>,
    /// Lowest round trip that was seen lately.
    pub rtt_ms: Option<f64>,
    /// Bytes sent on its sockets, TLS included.
    pub bytes_sent: u64,
    /// Bytes received on its sockets, TLS included.
    pub bytes_received: u64,
    /// Why it is not up, or went down last.
    pub last_error: Option<String>,
}

/// One volume as this agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeInfo {
    /// Identity, the same wherever the volume goes.
    #[schema(value_type = String)]
    pub id: VolumeId,
    /// Name, unique in this agent.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// Whose it is; content is only shared inside a tenant.
    pub tenant: String,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// Bytes that the image takes on its file system.
    pub allocated_bytes: u64,
    /// Generation of ownership.
    pub epoch: u64,
    /// What this agent is to the volume.
    pub ownership: OwnershipState,
    /// The other site, while or after it moves.
    #[schema(value_type = Option<String>)]
    pub peer: Option<SiteName>,
    /// The image file.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// Where a guest finds it.
    pub export: Option<ExportInfo>,
    /// Guest connections that are open.
    pub guest_connections: usize,
    /// The running migration.
    #[schema(value_type = Option<String>)]
    pub migration: Option<MigrationId>,
    /// Of a volume that has moved away whole: the copy that stayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaInfo>,
}

/// A copy that stayed when a volume moved away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicaInfo {
    /// Since when, as milliseconds since 1970.
    pub since_unix_ms: u64,
    /// Nobody has written to its image since, so that a way back sends what changed without comparing.
    pub is_untouched: bool,
    /// Its image was there before the volume, and stays when the copy is dropped.
    pub imported: bool,
}

/// Query of `DELETE /v1/replicas/{name}`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams,
)]
#[serde(deny_unknown_fields)]
pub struct DropQuery {
    /// Leave the image file.
    #[serde(default)]
    pub keep_image: bool,
}

/// What an agent is to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OwnershipState {
    /// The guest runs on it here.
    Owner,
    /// The guest is stopped for the hand-over, and the target has not answered yet.
    Prepared,
    /// It has moved away; blocks may still be fetched from here.
    Released,
    /// It is coming here, and not owned yet.
    Incoming,
    /// It is owned here, and blocks are still missing.
    Arriving,
}

impl fmt::Display for OwnershipState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "owner",
            Self::Prepared => "prepared",
            Self::Released => "released",
            Self::Incoming => "incoming",
            Self::Arriving => "arriving",
        })
    }
}

/// `POST /v1/volumes/{name}/export`: where a guest finds the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportInfo {
    /// Unix socket of the NBD server.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Name of the export.
    pub export: String,
    /// The same as an NBD URI, for `nbdinfo`, `qemu-img` and others.
    pub uri: String,
}

/// `POST /v1/volumes`: makes an empty volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// Its size, 1 byte to 64 TiB.
    pub size_bytes: u64,
    /// Whose it is; `default` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// `POST /v1/volumes/import`: takes an image file under care, where it lies, without copying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportVolume {
    /// Name to give it.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// Absolute path of the raw image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Whose it is; `default` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// Query of `DELETE /v1/volumes/{name}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveQuery {
    /// Whether the image file goes too. It stays if this is left out.
    #[serde(default)]
    pub delete_image: bool,
}

/// Answer to `DELETE /v1/volumes/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedVolume {
    /// The volume that is no longer under care.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// Its image.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// Whether the image was deleted.
    pub image_deleted: bool,
}

/// How a migration goes about it: `flimcd`, and those of the literature to compare it with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Everything, then rounds of what got dirty, then stop and copy.
    Precopy,
    /// Switch at once, then fetch on demand and push the rest.
    Postcopy,
    /// One pass; writes follow as deltas, and writers are slowed down when they come too fast.
    ForwardWrites,
    /// One pass; writes to what has gone over are answered when both sides have them.
    Mirror,
    /// A frozen base, then what was written meanwhile, and so on, then stop and copy.
    Snapshot,
    /// Rounds, then the switch with a bitmap of what is dirty, then push and pull.
    Bitmap,
    /// What is written least first, and after the switch what is read most.
    WorkloadAware,
    /// What is written too often stays for after the switch.
    HybridThreshold,
    /// Copy what is not hot, switch when the cost model says so, fetch the rest.
    #[default]
    Flimcd,
}

impl Strategy {
    /// All strategies.
    pub const ALL: [Self; 9] = [
        Self::Flimcd,
        Self::Precopy,
        Self::Postcopy,
        Self::ForwardWrites,
        Self::Mirror,
        Self::Snapshot,
        Self::Bitmap,
        Self::WorkloadAware,
        Self::HybridThreshold,
    ];

    /// Its name, as in the API and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::ForwardWrites => "forward-writes",
            Self::Mirror => "mirror",
            Self::Snapshot => "snapshot",
            Self::Bitmap => "bitmap",
            Self::WorkloadAware => "workload-aware",
            Self::HybridThreshold => "hybrid-threshold",
            Self::Flimcd => "flimcd",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(text: &str) -> Result<Self, UnknownStrategy> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.name() == text)
            .ok_or_else(|| UnknownStrategy(text.to_owned()))
    }
}

/// A name that is no strategy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no strategy {0:?}; use one of {names}", names = Strategy::ALL.map(Strategy::name).join(", "))]
pub struct UnknownStrategy(String);

/// When the switchover may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Switchover {
    /// Once the migration is ready and no guest is connected to the source's export, or once asked.
    #[default]
    Auto,
    /// Only once asked by `POST /v1/volumes/{name}/switchover`.
    Manual,
}

/// `POST /v1/volumes/{name}/migrate`. Answered with a [`MigrationStatus`] once it is under way;
/// whether the target accepts shows in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The site to move to; a configured peer.
    #[schema(value_type = String)]
    pub to: SiteName,
    /// How to go about it.
    #[serde(default)]
    pub strategy: Strategy,
    /// Ceiling on the link for all that goes to this peer; the configuration's if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_sec: Option<u64>,
    /// When the switchover may happen.
    #[serde(default)]
    pub switchover: Switchover,
    /// Whether content is compressed; the strategy's own default if left out (`precopy` does not,
    /// the others do).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<bool>,
    /// Whether what an image of the target's library has at the same place need not be sent; the strategy's own
    /// default if left out (`precopy` sends everything, the others do not).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<bool>,
    /// Whether the source keeps its copy when everything has arrived, so that a way back costs what changed; true if left out.
    /// Otherwise the volume is removed there, with its image unless that was imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_replica: Option<bool>,
    /// Whether the copy that stays is compared with what arrived, in the background, when everything is there; as the
    /// configuration says if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<bool>,
}

/// `POST /v1/migrations`: moves several volumes together, with one switch for all of them. Answered as
/// `POST /v1/volumes/{name}/migrate` is; asked for one of them, `switchover` and `cancel` are about all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateTogether {
    /// The volumes, each once.
    #[schema(value_type = Vec<String>)]
    pub volumes: Vec<VolumeName>,
    /// Where to and how.
    pub request: MigrateRequest,
}

/// On which side of a migration an agent stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The volume leaves here.
    Source,
    /// The volume arrives here.
    Target,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waits for the link, or for the peer's answer.
    Connecting,
    /// The guest runs at the source, and its blocks are being copied.
    Precopy,
    /// The guest is stopped, and ownership is being handed over.
    Switchover,
    /// The guest may run at the target, and blocks are still missing there.
    Postcopy,
    /// Done: the target owns the volume and has all of it.
    Completed,
    /// Ended by the operator before the switch; the guest was never touched.
    Cancelled,
    /// Ended by an error before the switch; the guest was never touched.
    Failed,
}

impl Phase {
    /// Whether the migration has ended.
    #[must_use]
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::Postcopy => "postcopy",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

/// `GET /v1/migrations/{id}`: one migration, running or ended, as one side sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationStatus {
    /// Identity, the same on both sides.
    #[schema(value_type = String)]
    pub id: MigrationId,
    /// The volumes that move together.
    #[schema(value_type = Vec<String>)]
    pub volumes: Vec<VolumeName>,
    /// The move of the machine that they belong to, if they move with one.
    #[schema(value_type = Option<String>)]
    pub session: Option<MigrationId>,
    /// Which side this agent is.
    pub role: Role,
    /// The other side.
    #[schema(value_type = String)]
    pub peer: SiteName,
    /// How it goes about it; only the source knows.
    pub strategy: Option<Strategy>,
    /// When the switchover may happen; only the source knows.
    pub switchover: Option<Switchover>,
    /// Where it stands.
    pub phase: Phase,
    /// Whether the link to the peer is up.
    pub link_up: bool,
    /// The source would switch now, and waits until it may.
    pub ready_for_switchover: bool,
    /// Size of the volumes together.
    pub bytes_total: u64,
    /// Bytes of content that were sent (source) or received (target), compressed as they travelled.
    pub bytes_sent: u64,
    /// How it travelled.
    #[serde(default)]
    pub content: ContentStats,
    /// Image of the target's library that the volume is compared with.
    #[serde(default)]
    pub library_image: Option<String>,
    /// Bytes on the link's sockets, both ways and TLS included, since this migration began here.
    /// Other migrations to the same peer at the same time are in it.
    pub bytes_on_link: u64,
    /// Blocks (4 KiB) that the target does not have yet, as far as this side knows.
    pub blocks_pending: u64,
    /// Blocks that changed at the source after they were sent, and so were or will be sent again.
    pub blocks_dirtied: u64,
    /// Rate of `bytes_sent` over the last seconds.
    pub rate_bytes_per_sec: u64,
    /// Seconds until all blocks are at the target, if the rate stays; unknown while nothing moves.
    pub eta_s: Option<f64>,
    /// Reads that the guest made at the target since the switch.
    pub guest_reads: u64,
    /// Reads among them that touched a missing block.
    pub guest_reads_missed: u64,
    /// Blocks missing at the target after the switch.
    pub missing_blocks: u64,
    /// Blocks that were missing at the moment of the switch.
    pub missing_blocks_at_switch: Option<u64>,
    /// When it began on this side.
    pub started_unix_ms: u64,
    /// When the target became the owner, as this side learnt it.
    pub switched_unix_ms: Option<u64>,
    /// When it ended on this side.
    pub ended_unix_ms: Option<u64>,
    /// Source: from the refusal of guest I/O until the source knew that the target serves it.
    /// It holds one round trip more than what a guest sees.
    pub downtime_ms: Option<f64>,
    /// What went wrong, if it failed; or what is in the way now (link down, peer refuses).
    pub error: Option<String>,
    /// What the machines reported on the way, newest last, at most 32.
    pub notes: Vec<String>,
    /// What the last plan of the same volumes and site expected; only the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planned: Option<Planned>,
    /// What was expected of the time after the switch when it was made; only the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Predicted>,
    /// Whether the copies at source and target are equal, once that is looked at; only the source knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckStatus>,
}

impl MigrationStatus {
    /// The names of its volumes, for people.
    #[must_use]
    pub fn names(&self) -> String {
        let names: Vec<_> = self.volumes.iter().map(VolumeName::as_str).collect();
        names.join(", ")
    }
}

/// How content has travelled. Blocks have 4 KiB; what was sent several times counts each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContentStats {
    /// Blocks of zeroes: no bytes.
    pub zero_blocks: u64,
    /// Blocks that the target has at the same place, in a copy or an image of its library.
    pub same_blocks: u64,
    /// Blocks that the target has elsewhere.
    #[serde(default)]
    pub elsewhere_blocks: u64,
    /// Blocks that had come before in this migration.
    #[serde(default)]
    pub repeated_blocks: u64,
    /// Blocks that were compressed.
    pub compressed_blocks: u64,
    /// What they came to.
    pub compressed_bytes: u64,
    /// Blocks that were sent as they are.
    pub raw_blocks: u64,
}

/// `POST /v1/library`: takes an image into the library, where it lies. Answered at once; the image is usable when
/// its state is `ready`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddLibraryImage {
    /// Its name; made from the file's if left out.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VolumeName>,
    /// Absolute path of the image: raw, or qcow2 with its backing chain.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Whose volumes may share content with it; `default` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Volumes of all tenants may share content with it.
    #[serde(default)]
    pub public: bool,
    /// The library makes a copy of its own.
    #[serde(default)]
    pub copy: bool,
}

/// An image of the library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LibraryImage {
    /// Its name: an image's own, or the volume's.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// What it is.
    #[serde(default)]
    pub kind: LibraryKind,
    /// The image that it was added with, as a part of its backing chain.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_of: Option<VolumeName>,
    /// The file.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Whose volumes may share content with it; everybody's if there is none.
    pub tenant: Option<String>,
    /// The file is the library's own copy.
    pub is_copy: bool,
    /// Size of the image.
    pub size_bytes: u64,
    /// Bytes of it in chunks (64 KiB) that are not zero, once it was read.
    pub data_bytes: Option<u64>,
    /// Whether it can be used.
    pub state: LibraryState,
    /// How much of it has been read.
    pub scanned_bytes: u64,
    /// Root of its fingerprints: the same for the same content, none for zeroes.
    pub root: Option<String>,
    /// Why it is not used.
    pub problem: Option<String>,
    /// When it was added.
    pub added_unix_ms: u64,
    /// When its fingerprints were made.
    pub scanned_unix_ms: Option<u64>,
}

/// What an image of the library is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LibraryKind {
    /// Somebody has added it.
    #[default]
    Image,
    /// A copy of a volume that has moved away. It is here by itself.
    Replica,
    /// A volume that is owned here. It is here by itself; what was found in it may have been overwritten.
    Volume,
}

impl fmt::Display for LibraryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Image => "image",
            Self::Replica => "replica",
            Self::Volume => "volume",
        })
    }
}

/// Whether an image of the library can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LibraryState {
    /// It is being read, or waits for that.
    Scanning,
    /// Volumes that arrive are compared with it.
    Ready,
    /// The file was changed or is gone; it is not used before it was verified.
    Stale,
    /// It could not be read; `verify` tries again.
    Failed,
}

impl fmt::Display for LibraryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scanning => "scanning",
            Self::Ready => "ready",
            Self::Stale => "stale",
            Self::Failed => "failed",
        })
    }
}

/// What every answer with a status of 400 or more has as its body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
pub struct ErrorBody {
    /// What went wrong, for programs.
    pub code: ApiCode,
    /// What was tried and what went wrong, for people.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ApiCode {
    /// The request is malformed or a value in it is impossible.
    BadRequest,
    /// No such volume.
    UnknownVolume,
    /// No such machine under care.
    UnknownVm,
    /// No such migration.
    UnknownMigration,
    /// No such image in the library.
    UnknownImage,
    /// No such site in the configuration.
    UnknownSite,
    /// No such path or method.
    UnknownPath,
    /// The configuration forbids it.
    NotAllowed,
    /// A volume of this name exists.
    Exists,
    /// The volume is migrating, or in another state that forbids it.
    Busy,
    /// Something else uses the image, or the file cannot be used as one.
    Image,
    /// QEMU cannot be reached, or refused, or its machine cannot be taken.
    Qemu,
    /// It is too late: the switch has happened or has begun.
    TooLate,
    /// A disk or the operating system failed.
    Io,
    /// The agent is stopping.
    Stopping,
}
