//! Progress of a migration: a line that is drawn over on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use flimcd_agent::api::{MigrationStatus, Phase};
use flimcd_core::BLOCK_SIZE;
use indicatif::{ProgressBar, ProgressStyle};

use crate::format;

/// Without a terminal a line is printed this often, and at every new phase.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// What progress can be shown of.
pub(crate) trait Shown {
    /// Where it stands, on one line.
    fn line(&self) -> String;

    /// How much is done, of how much.
    fn done(&self) -> (u64, u64);

    /// Without a terminal a line is printed when this changes.
    fn mark(&self) -> String;

    /// Whether nothing more happens.
    fn has_ended(&self) -> bool;
}

impl Shown for MigrationStatus {
    fn line(&self) -> String {
        line(self)
    }

    fn done(&self) -> (u64, u64) {
        let blocks = self.bytes_total.div_ceil(BLOCK_SIZE);
        (blocks.saturating_sub(self.blocks_pending), blocks)
    }

    fn mark(&self) -> String {
        format!("{} {}", self.phase, self.ready_for_switchover)
    }

    fn has_ended(&self) -> bool {
        self.phase.has_ended()
    }
}

/// Where a migration stands, on one line.
pub(crate) fn line(status: &MigrationStatus) -> String {
    let mut parts = vec![status.phase.to_string()];
    if status.ready_for_switchover && status.phase == Phase::Precopy {
        parts.push("ready to switch".into());
    }
    parts.push(format!("{} sent", format::bytes(status.bytes_sent)));
    if !status.phase.has_ended() {
        parts.push(format::rate(status.rate_bytes_per_sec));
        parts.push(format!(
            "{} left",
            format::bytes(status.blocks_pending * BLOCK_SIZE)
        ));
        if let Some(eta) = status.eta_s {
            parts.push(format!("about {} to go", format::seconds(eta)));
        }
        if !status.link_up {
            parts.push("link down".into());
        }
    }
    if status.guest_reads_missed > 0 || status.phase == Phase::Postcopy {
        parts.push(format!(
            "{} misses in {} reads",
            format::count(status.guest_reads_missed),
            format::count(status.guest_reads)
        ));
    }
    parts.join(", ")
}

/// How content has travelled, and which image of the target's library it was compared with.
pub(crate) fn by_kind(status: &MigrationStatus) -> Option<String> {
    let content = &status.content;
    let kinds = [
        ("zero", content.zero_blocks, None),
        ("same place", content.same_blocks, None),
        ("elsewhere", content.elsewhere_blocks, None),
        ("repeated", content.repeated_blocks, None),
        (
            "compressed",
            content.compressed_blocks,
            Some(content.compressed_bytes),
        ),
        ("raw", content.raw_blocks, None),
    ];
    let parts: Vec<String> = kinds
        .into_iter()
        .filter(|(_, blocks, _)| *blocks > 0)
        .map(|(kind, blocks, bytes)| {
            let from = format::bytes(blocks * BLOCK_SIZE);
            match bytes {
                Some(bytes) => format!("{from} {kind} to {}", format::bytes(bytes)),
                None => format!("{from} {kind}"),
            }
        })
        .collect();
    let image = status.library_image.as_ref();
    let image = image.map_or_else(String::new, |name| format!("; library image {name}"));
    (!parts.is_empty()).then(|| format!("content: {}{image}", parts.join(", ")))
}

/// Shows progress on standard error.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    last: Option<(Instant, String)>,
}

impl Progress {
    /// Progress of something called `label`.
    pub(crate) fn new(label: impl Into<String>) -> Self {
        let label = label.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(1);
            let style = ProgressStyle::with_template("{prefix} {bar:24.cyan/blue} {wide_msg}")
                .expect("a fixed template");
            bar.set_style(style.progress_chars("━╸─"));
            bar.set_prefix(label.clone());
            bar
        });
        Self {
            bar,
            label,
            last: None,
        }
    }

    /// Shows where it stands.
    pub(crate) fn show(&mut self, status: &impl Shown) {
        if let Some(bar) = &self.bar {
            let (done, all) = status.done();
            bar.set_length(all.max(1));
            bar.set_position(done);
            bar.set_message(status.line());
            return;
        }
        let (now, mark) = (Instant::now(), status.mark());
        let due = self
            .last
            .as_ref()
            .is_none_or(|(at, last)| *last != mark || now.duration_since(*at) >= PLAIN_EVERY);
        if due {
            eprintln!("{}: {}", self.label, status.line());
            self.last = Some((now, mark));
        }
    }

    /// Says something that stays.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
