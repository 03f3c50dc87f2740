//! QEMU's own migration with local disks, as the measure for ours: `blockdev-mirror` to an NBD export of
//! the target's QEMU, then the migration of memory, over the same emulated WAN.
//!
//! ```text
//!  target: nbd-server-start, block-export-add, migrate-incoming
//!  source: blockdev-add nbd, blockdev-mirror                    mirror_s: until every mirror is ready
//!          migrate                                              ram_s: until pre-switchover, guest stops
//!          block-job-cancel (ready: ends in sync)               drain_ms
//!          migrate-continue … completed
//!  target: completed, nbd-server-stop, cont                     stop_to_resume_ms: until the guest runs
//! ```
//! QEMU gets the settings that suit it best, chosen by the caller case by case: background or
//! write-blocking copies, several streams with zstd for memory, BBR. That a mirror never gets ready
//! is a result ([`Outcome::NotConverged`]), not an error.

mod commands;
mod report;
mod run;
mod watch;

use std::{path::Path, time::Duration};

use flimcd_qemu::qmp::QmpError;
use serde::Serialize;

use super::{AtTarget, GuestImage, ImageError, QemuError, Stage, StageError, StageOptions, Tools};

pub use report::{BaselineReport, Outcome, Phase};
pub use run::migrate;

/// How the mirror treats writes of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// They are copied later: the guest is not slowed down, and the mirror may never get ready.
    Background,
    /// They are done when both sides have them: the guest waits for the WAN.
    WriteBlocking,
}

/// What of a disk is mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sync {
    /// Everything.
    Full,
    /// What is in the topmost file, the overlay, alone. Right when the target's disk is an overlay
    /// over the same backing file.
    Top,
}

/// How memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ram {
    /// Over one connection.
    Precopy,
    /// Over so many connections, compressed with zstd.
    Multifd(u8),
    /// One pass, then on demand.
    Postcopy,
}

/// Settings of QEMU's migration.
#[derive(Clone, Debug, Serialize)]
pub struct BaselineOptions {
    /// How the mirror treats writes.
    pub copy_mode: CopyMode,
    /// What is mirrored.
    pub sync: Sync,
    /// Bytes of the mirror's blocks; QEMU's default when `None`.
    pub granularity: Option<u32>,
    /// How memory is moved.
    pub ram: Ram,
    /// QEMU's `downtime-limit`.
    pub downtime_limit_ms: u64,
    /// Congestion control of all connections between the sites; the machine's default when `None`.
    pub congestion_control: Option<String>,
    /// A mirror that is not ready by then counts as never.
    pub mirror_max: Duration,
    /// Likewise for memory.
    pub ram_max: Duration,
    /// Seconds of load at the target that still belong to the result.
    pub settle_s: usize,
    /// Compares the disks before the guest goes on, which makes the stop much longer: then no figure of
    /// the stop means anything.
    pub compares: bool,
}

impl Default for BaselineOptions {
    /// Background, everything, four compressed streams, BBR.
    fn default() -> Self {
        Self {
            copy_mode: CopyMode::Background,
            sync: Sync::Full,
            granularity: None,
            ram: Ram::Multifd(4),
            downtime_limit_ms: 300,
            congestion_control: Some("bbr".to_owned()),
            mirror_max: Duration::from_secs(300),
            ram_max: Duration::from_secs(120),
            settle_s: 3,
            compares: false,
        }
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// The stage could not be set up.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// A guest.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// Images could not be compared or checked.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A monitor.
    #[error("{side} QEMU: {source}")]
    Qmp {
        /// "the source" or "the target".
        side: &'static str,
        /// What went wrong.
        source: QmpError,
    },
    /// QEMU gave up.
    #[error("QEMU's migration failed at {what}: {text}")]
    Failed {
        /// What it was at.
        what: &'static str,
        /// What QEMU said.
        text: String,
    },
    /// No runtime for the monitors.
    #[error("the runtime cannot be started: {0}")]
    Runtime(std::io::Error),
}

/// One whole run: sets the stage in `dir`, migrates, lets the guest verify itself at the target, switches
/// it off and checks its file systems. Blocks; must not be called from a task.
///
/// # Errors
/// [`BaselineError`]; a migration that does not converge is none.
pub fn run_case(
    tools: &Tools,
    dir: &Path,
    image: &GuestImage,
    stage: &StageOptions,
    have: AtTarget,
    options: &BaselineOptions,
) -> Result<BaselineReport, BaselineError> {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }
        .enable_all()
        .build()
        .map_err(BaselineError::Runtime)?;
    let stage = Stage::start(tools, dir, image, stage)?;
    let target = stage.spawn_target(stage.target_disks(have)?)?;
    let mut report = runtime.block_on(migrate(&stage, &target, options))?;
    if report.outcome == Outcome::Completed {
        report.verified = Some(target.control("verify")?);
        report.complaints = [stage.source.complaints(), target.complaints()].concat();
        let disks = target.spec().disks.clone();
        target.power_off()?;
        for disk in &disks {
            disk.check_file_system(tools)?;
        }
    }
    Ok(report)
}
