//! Rates and times of a migration, and the status it begins with.

use flimcd_core::{MigrationId, SiteName, VolumeName};
use flimcd_migrate::ContentCount;
use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::api::{ContentStats, MigrationStatus, Phase, Role};

/// Span over which rates are averaged.
const WINDOW: Duration = Duration::from_secs(3);
/// Least time between two samples.
const SAMPLE: Duration = Duration::from_millis(100);
/// Notes that are kept.
const NOTES_MAX: usize = 32;

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Status of a migration that begins now.
pub(crate) fn fresh_status(
    id: MigrationId,
    volumes: Vec<VolumeName>,
    role: Role,
    peer: SiteName,
    bytes_total: u64,
) -> MigrationStatus {
    MigrationStatus {
        id,
        volumes,
        session: None,
        role,
        peer,
        strategy: None,
        switchover: None,
        phase: Phase::Connecting,
        link_up: false,
        ready_for_switchover: false,
        bytes_total,
        bytes_sent: 0,
        content: ContentStats::default(),
        library_image: None,
        bytes_on_link: 0,
        blocks_pending: 0,
        blocks_dirtied: 0,
        rate_bytes_per_sec: 0,
        eta_s: None,
        guest_reads: 0,
        guest_reads_missed: 0,
        missing_blocks: 0,
        missing_blocks_at_switch: None,
        started_unix_ms: unix_ms(),
        switched_unix_ms: None,
        ended_unix_ms: None,
        downtime_ms: None,
        error: None,
        notes: Vec::new(),
        planned: None,
        predicted: None,
        check: None,
    }
}

/// What was counted before this agent began, and what it has counted itself.
pub(crate) const fn add_content(before: ContentStats, count: ContentCount) -> ContentStats {
    ContentStats {
        zero_blocks: before.zero_blocks + count.zero_blocks,
        same_blocks: before.same_blocks + count.same_blocks,
        elsewhere_blocks: before.elsewhere_blocks + count.elsewhere_blocks,
        repeated_blocks: before.repeated_blocks + count.repeated_blocks,
        compressed_blocks: before.compressed_blocks + count.zstd_blocks,
        compressed_bytes: before.compressed_bytes + count.zstd_bytes,
        raw_blocks: before.raw_blocks + count.raw_blocks,
    }
}

/// Adds a note; the oldest goes when there are too many.
pub(crate) fn add_note(status: &mut MigrationStatus, note: String) {
    if status.notes.len() >= NOTES_MAX {
        status.notes.remove(0);
    }
    status.notes.push(note);
}

/// A rate over the last seconds.
#[derive(Debug, Default)]
pub(crate) struct RateWindow {
    samples: VecDeque<(Instant, u64)>,
}

impl RateWindow {
    /// The counter stands at `total` now. Returns units per second over the window.
    pub(crate) fn update(&mut self, now: Instant, total: u64) -> u64 {
        let is_due = self
            .samples
            .back()
            .is_none_or(|(at, _)| now.duration_since(*at) >= SAMPLE);
        if is_due {
            self.samples.push_back((now, total));
        }
        while self.samples.len() > 2
            && self
                .samples
                .get(1)
                .is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW)
        {
            self.samples.pop_front();
        }
        let Some(&(begin, first)) = self.samples.front() else {
            return 0;
        };
        let span = now.duration_since(begin).as_millis();
        if span == 0 {
            return 0;
        }
        let rate = u128::from(total.saturating_sub(first)) * 1000 / span;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

/// Seconds for `blocks` blocks of `bytes_per_block` bytes on average at this rate.
pub(crate) fn eta_s(blocks: u64, bytes_per_block: f64, rate_bytes_per_sec: u64) -> Option<f64> {
    if rate_bytes_per_sec == 0 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let eta = blocks as f64 * bytes_per_block / rate_bytes_per_sec as f64;
    Some((eta * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_forgets_what_is_long_ago() {
        let mut rate = RateWindow::default();
        let begin = Instant::now();
        assert_eq!(rate.update(begin, 0), 0);
        for step in 1..=40 {
            rate.update(begin + SAMPLE * step, u64::from(step) * 1000);
        }
        assert_eq!(rate.update(begin + SAMPLE * 41, 41_000), 10_000);
        let later = begin + Duration::from_secs(60);
        rate.update(later, 41_000);
        rate.update(later + SAMPLE, 41_000);
        rate.update(later + SAMPLE * 40, 41_000);
        assert_eq!(rate.update(later + SAMPLE * 41, 41_000), 0);
        assert_eq!(eta_s(1000, 4096.0, 0), None);
        assert_eq!(eta_s(1000, 4096.0, 409_600), Some(10.0));
    }
}
