//! The demo's figures: the lab's report, filled in and written.

use std::{fs, path::Path};

use anyhow::Context as _;
use flimcd_lab::report::{DemoReport, LowerBound};
use flimcd_lab::wan::LinkModel;
use serde::Serialize;

use super::image::{BaseFacts, ImageFacts};

/// How [`bound`] is computed, for people.
pub(crate) const BOUND_HOW: &str =
    "the image's non-zero blocks at the start, zstd level 1 in chunks of 64 KiB, ÷ rate + 1 RTT";

/// What no strategy that copies so much can beat.
pub(crate) fn bound(encoded_bytes: u64, link: &LinkModel) -> LowerBound {
    LowerBound::new(encoded_bytes, link)
}

/// Settings that make the same run again.
#[derive(Debug, Serialize)]
pub(crate) struct Settings<'a> {
    pub(crate) image: &'a ImageFacts,
    pub(crate) base: Option<&'a BaseFacts>,
    pub(crate) load: &'a LoadFacts,
    pub(crate) lower_bound_is: &'static str,
}

/// What the report says of the guest.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LoadFacts {
    /// The load in words.
    pub(crate) what: String,
    /// All of its parameters.
    pub(crate) parameters: serde_json::Value,
}

/// Figures beside the lab's own: more than a table can show.
#[derive(Debug, Serialize)]
pub(crate) struct Details {
    /// From the request until the guest ran at the target.
    pub(crate) time_to_switch_s: f64,
    pub(crate) migration_time_to_lower_bound: f64,
    /// Reads before, during and after the migration; every byte of each was checked.
    pub(crate) guest_reads_total: u64,
    pub(crate) guest_writes_total: u64,
    /// Reads at the target until it had every block.
    pub(crate) guest_reads_at_target: u64,
    /// 99th percentile of the guest's wait before the migration, to compare with.
    pub(crate) guest_stall_ms_p99_before: f64,
    /// Bytes of blocks that the guest dirtied anew during the migration.
    pub(crate) guest_dirty_bytes: u64,
    pub(crate) missing_blocks_at_switch: Option<u64>,
    /// How content travelled.
    pub(crate) content: flimcd_agent::api::ContentStats,
    /// The target's disk, read through NBD at the end and compared with what it must hold.
    pub(crate) final_check_bytes: u64,
    /// The first wrong places, from reads and from the final check, as text.
    pub(crate) wrong: Vec<String>,
    pub(crate) first_errors: Vec<String>,
}

/// What the guests could complain about, as sentences.
pub(crate) fn faults(report: &DemoReport) -> Vec<String> {
    let mut faults = Vec::new();
    for run in &report.strategies {
        let mut fault = |count: u64, what: &str| {
            if count > 0 {
                faults.push(format!("{}: {count} {what}", run.strategy));
            }
        };
        fault(run.guest_reads_wrong, "guest reads were wrong");
        fault(
            run.final_blocks_wrong,
            "blocks of the disk were wrong at the end",
        );
        fault(run.guest_errors, "guest requests failed");
    }
    faults
}

/// Writes the figures to `path`.
pub(crate) fn write(report: &DemoReport, path: &Path) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(path, text).with_context(|| {
        format!(
            "the report cannot be written to {}; name another file with --json",
            path.display()
        )
    })
}
