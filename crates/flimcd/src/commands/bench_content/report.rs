//! The figures of `flimcd bench content`, for scripts and for people.

use std::{fmt, fs, path::Path};

use anyhow::Context as _;
use flimcd_agent::api::ContentStats;
use flimcd_core::BLOCK_SIZE;
use flimcd_lab::{
    report::{Align, LinkReport, Table},
    wan::WanBytes,
};
use serde::Serialize;

use super::images::Changed;
use crate::format;

/// What [`Row::bound_bytes`] is.
pub(super) const BOUND_IS: &str = "1.05 × the changed blocks, compressed by zstd level 1, each run of them on its own and at most 64 KiB \
                                   at once, + 0.05% of the image; against it stand all bytes on the link, both directions";
const COMPRESSED_FACTOR: f64 = 1.05;
const IMAGE_FACTOR: f64 = 0.0005;

/// Everything of one run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) link: LinkReport,
    /// Of the images, unless a row says otherwise.
    pub(super) size_bytes: u64,
    pub(super) seed: u64,
    pub(super) cases: Vec<String>,
    pub(super) bound_is: &'static str,
    pub(super) notes: Vec<String>,
    pub(super) rows: Vec<Row>,
}

/// One measurement.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Row {
    pub(super) case: String,
    /// What the target holds, and how it differs.
    pub(super) variant: String,
    /// Who moved it: `flimcd`, a strategy, or another program.
    pub(super) by: String,
    /// Why it was left out.
    pub(super) skipped: Option<String>,
    /// Why there are no figures although it was tried.
    pub(super) failed: Option<String>,
    /// From the request, or the start of the program, to its end.
    pub(super) seconds: Option<f64>,
    /// All bytes on the link, both directions: packets with a router, payload with a relay.
    pub(super) bytes_on_link: Option<u64>,
    /// Of them from the site that has the image to the other one.
    pub(super) bytes_forward: Option<u64>,
    /// How content travelled, as the agent reports it.
    pub(super) content: Option<ContentStats>,
    /// The image that moved.
    pub(super) image: Option<ImageRow>,
    /// What differs from what the target held.
    pub(super) changed: Option<Changed>,
    /// See [`BOUND_IS`].
    pub(super) bound_bytes: Option<u64>,
    pub(super) is_within_bound: Option<bool>,
    /// The same with 16 changed blocks compressed together wherever they lie.
    pub(super) gathered_bound_bytes: Option<u64>,
    /// Share of the image's non-zero bytes that were neither sent raw nor compressed.
    pub(super) not_sent_share: Option<f64>,
    /// Whether what arrived is what had to arrive, byte by byte.
    pub(super) image_is_right: Option<bool>,
    /// Packets that the emulator handed over too late: many mean that the machine was too busy.
    pub(super) late_packets: Option<u64>,
    /// Whatever else belongs to it.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub(super) details: serde_json::Value,
}

/// What is known of an image.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct ImageRow {
    pub(super) size_bytes: u64,
    pub(super) non_zero_bytes: u64,
    /// Bytes that it takes at its source, and at the target afterwards.
    pub(super) allocated_source_bytes: u64,
    pub(super) allocated_target_bytes: u64,
}

impl Row {
    pub(super) fn new(case: &str, variant: &str, by: &str) -> Self {
        Self {
            case: case.to_owned(),
            variant: variant.to_owned(),
            by: by.to_owned(),
            ..Self::default()
        }
    }

    pub(super) fn skipped(case: &str, variant: &str, by: &str, why: impl fmt::Display) -> Self {
        Self {
            skipped: Some(why.to_string()),
            ..Self::new(case, variant, by)
        }
    }

    pub(super) fn failed(case: &str, variant: &str, by: &str, error: &anyhow::Error) -> Self {
        Self {
            failed: Some(format!("{error:#}")),
            ..Self::new(case, variant, by)
        }
    }

    /// The link's share of it.
    pub(super) fn measured(mut self, seconds: f64, forward: u64, bytes: &WanBytes) -> Self {
        self.seconds = Some(seconds);
        self.bytes_on_link = Some(bytes.both());
        self.bytes_forward = Some(forward);
        self.late_packets = Some(bytes.late_packets);
        self.with_bound()
    }

    /// What had to cross.
    pub(super) fn with_changed(mut self, changed: Changed, size_bytes: u64) -> Self {
        let bound = |compressed: u64| {
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "bytes of an image"
            )]
            let bytes =
                (compressed as f64 * COMPRESSED_FACTOR + size_bytes as f64 * IMAGE_FACTOR) as u64;
            bytes
        };
        self.bound_bytes = Some(bound(changed.compressed_bytes));
        self.gathered_bound_bytes = Some(bound(changed.gathered_bytes));
        self.changed = Some(changed);
        self.with_bound()
    }

    fn with_bound(mut self) -> Self {
        if let (Some(bytes), Some(bound)) = (self.bytes_on_link, self.bound_bytes) {
            self.is_within_bound = Some(bytes <= bound);
        }
        self
    }

    /// How content travelled. Blocks that were sent more than once count each time.
    pub(super) fn with_content(mut self, content: ContentStats, non_zero_bytes: u64) -> Self {
        let sent = (content.compressed_blocks + content.raw_blocks) * BLOCK_SIZE;
        #[expect(clippy::cast_precision_loss, reason = "bytes of an image")]
        let share = sent as f64 / non_zero_bytes.max(1) as f64;
        self.not_sent_share = Some((1.0 - share).max(0.0));
        self.content = Some(content);
        self
    }
}

impl fmt::Display for Row {
    /// One line as soon as it is there.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12} {}, {}: ", self.case, self.variant, self.by)?;
        if let Some(why) = &self.skipped {
            return write!(f, "SKIPPED: {why}");
        }
        if let Some(why) = &self.failed {
            return write!(f, "FAILED: {why}");
        }
        let (seconds, bytes) = (
            self.seconds.unwrap_or(f64::NAN),
            self.bytes_on_link.unwrap_or(0),
        );
        write!(
            f,
            "{}, {} on the link",
            format::seconds(seconds),
            format::bytes(bytes)
        )?;
        if let Some(bound) = self.bound_bytes {
            write!(f, ", bound {}", format::bytes(bound))?;
        }
        Ok(())
    }
}

impl Report {
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(path, text).with_context(|| {
            format!(
                "the figures cannot be written to {}; name another file with --json",
                path.display()
            )
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let right = |name| (name, Align::Right);
        let mut table = Table::new(
            ["CASE", "TARGET HOLDS", "MOVED BY"]
                .map(|name| (name, Align::Left))
                .into_iter()
                .chain(
                    [
                        "TIME", "LINK MB", "BOUND MB", "× BOUND", "NOT SENT", "ZERO", "SAME",
                        "ELSEW", "REPEAT", "ZSTD", "RAW", "IMAGE",
                    ]
                    .map(right),
                ),
        );
        for row in &self.rows {
            table.row(cells(row));
        }
        write!(f, "{table}")?;
        writeln!(
            f,
            "Kinds in MB of content; ZSTD before compression. Bound: {BOUND_IS}."
        )?;
        for row in &self.rows {
            let (case, variant, by) = (&row.case, &row.variant, &row.by);
            if let Some(why) = &row.skipped {
                writeln!(f, "SKIPPED {case} ({variant}, {by}): {why}")?;
            }
            if let Some(why) = &row.failed {
                writeln!(f, "FAILED {case} ({variant}, {by}): {why}")?;
            }
            if let Some(text) = row.details.get("note").and_then(|note| note.as_str()) {
                writeln!(f, "{case} ({variant}, {by}): {text}")?;
            }
        }
        Ok(())
    }
}

fn cells(row: &Row) -> Vec<String> {
    let none = || "–".to_owned();
    let megabytes = |bytes: Option<u64>| {
        bytes.map_or_else(none, |bytes| {
            format!("{}.{:02}", bytes / 1_000_000, bytes % 1_000_000 / 10_000)
        })
    };
    let blocks = |of: fn(&ContentStats) -> u64| {
        megabytes(row.content.as_ref().map(|content| of(content) * BLOCK_SIZE))
    };
    #[expect(clippy::cast_precision_loss, reason = "bytes of an image")]
    let ratio = row
        .bytes_on_link
        .zip(row.bound_bytes)
        .map(|(bytes, bound)| format!("{:.2}", bytes as f64 / bound.max(1) as f64));
    let share = row
        .not_sent_share
        .map(|share| format!("{:.1}%", share * 100.0));
    let image = match (&row.skipped, &row.failed, row.image_is_right) {
        (Some(_), ..) => "skipped".to_owned(),
        (_, Some(_), _) => "failed".to_owned(),
        (.., Some(true)) => "right".to_owned(),
        (.., Some(false)) => "WRONG".to_owned(),
        (.., None) => none(),
    };
    vec![
        row.case.clone(),
        row.variant.clone(),
        row.by.clone(),
        row.seconds.map_or_else(none, |s| format!("{s:.1} s")),
        megabytes(row.bytes_on_link),
        megabytes(row.bound_bytes),
        ratio.unwrap_or_else(none),
        share.unwrap_or_else(none),
        blocks(|content| content.zero_blocks),
        blocks(|content| content.same_blocks),
        blocks(|content| content.elsewhere_blocks),
        blocks(|content| content.repeated_blocks),
        blocks(|content| content.compressed_blocks),
        blocks(|content| content.raw_blocks),
        image,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_as_stated_and_decides() {
        let changed = Changed {
            blocks: 10,
            bytes: 40_960,
            compressed_bytes: 20_000,
            gathered_bytes: 16_000,
        };
        let bytes = WanBytes {
            a_to_b: 21_000,
            b_to_a: 400,
            late_packets: 0,
        };
        let row = |bytes: &WanBytes| {
            Row::new("replica-1", "random", "flimcd")
                .with_changed(changed, 1_000_000)
                .measured(1.0, bytes.a_to_b, bytes)
        };
        let within = row(&bytes);
        assert_eq!(within.bound_bytes, Some(21_500));
        assert_eq!(within.gathered_bound_bytes, Some(17_300));
        assert_eq!(within.is_within_bound, Some(true));
        let beyond = row(&WanBytes {
            b_to_a: 501,
            ..bytes
        });
        assert_eq!(beyond.is_within_bound, Some(false));
    }
}
