//! What a plan counts, and what it says at its end.

use flimcd_core::BLOCK_SIZE;
use flimcd_migrate::ContentCount;
use std::time::{Duration, Instant};

use super::{
    estimate::{Facts, estimate},
    sample::{Piece, Scaled, scale},
};
use crate::{
    api::{ContentStats, GuestActivity, PlanPhase, PlanRequest, PlanStatus},
    migration::{
        progress::{add_content, unix_ms},
        volumes::VolumeSet,
    },
};

/// TLS records have so many bytes of content, and cost so many more.
const TLS_RECORD: u64 = 16 << 10;
/// See [`TLS_RECORD`].
const TLS_OVERHEAD: u64 = 22;

/// What was counted. The pieces themselves are kept only for a sample.
pub(super) struct Figures {
    blocks: u64,
    content: ContentStats,
    link_bytes: u64,
    sample: Option<Vec<Piece<8>>>,
    /// Bytes that are not zero of some pieces, and what they come to packed.
    whole: (u64, u64),
}

impl Figures {
    /// Nothing yet; `is_sample` if not all pieces are to come.
    pub(super) fn new(is_sample: bool) -> Self {
        Self {
            blocks: 0,
            content: ContentStats::default(),
            link_bytes: 0,
            sample: is_sample.then(Vec::new),
            whole: (0, 0),
        }
    }

    /// A piece.
    pub(super) fn add(
        &mut self,
        blocks: u64,
        count: ContentCount,
        link_bytes: u64,
        whole: Option<(u64, u64)>,
    ) {
        self.blocks += blocks;
        self.content = add_content(self.content, count);
        self.link_bytes += link_bytes;
        if let Some((content, packed)) = whole {
            self.whole = (self.whole.0 + content, self.whole.1 + packed);
        }
        if let Some(sample) = &mut self.sample {
            let content = add_content(ContentStats::default(), count);
            sample.push(Piece {
                size: float(blocks),
                figures: numbers(&content, link_bytes),
            });
        }
    }

    /// What a byte of content comes to when it is packed.
    fn packed(&self) -> f64 {
        let (content, packed) = self.whole;
        if content == 0 {
            return 1.0;
        }
        (float(packed) / float(content)).min(1.0)
    }
}

/// What guests have done since then.
pub(super) struct Guests {
    since: Instant,
    written_bytes: u64,
    reads: u64,
}

impl Guests {
    /// Begins to watch.
    pub(super) fn watch(volumes: &VolumeSet) -> Self {
        let (written_bytes, reads) = Self::counts(volumes);
        Self {
            since: Instant::now(),
            written_bytes,
            reads,
        }
    }

    fn counts(volumes: &VolumeSet) -> (u64, u64) {
        let stats = volumes.all().iter().map(|volume| volume.stats());
        stats.fold((0, 0), |(bytes, reads), stats| {
            (bytes + stats.written_bytes, reads + stats.guest_reads)
        })
    }

    /// Requests of guests so far.
    pub(super) fn requests(volumes: &VolumeSet) -> u64 {
        let stats = volumes.all().iter().map(|volume| volume.stats());
        stats
            .map(|stats| stats.guest_reads + stats.guest_writes + stats.flushes)
            .sum()
    }

    /// How much of `least` is left.
    pub(super) fn still_to_watch(&self, least: Duration) -> Duration {
        least.saturating_sub(self.since.elapsed())
    }

    /// What they did.
    pub(super) fn activity(&self, volumes: &VolumeSet) -> GuestActivity {
        let watched_s = self.since.elapsed().as_secs_f64();
        let (written_bytes, reads) = Self::counts(volumes);
        let per_sec = |now: u64, then: u64| float(now.saturating_sub(then)) / watched_s.max(1e-3);
        GuestActivity {
            watched_s,
            written_bytes_per_sec: per_sec(written_bytes, self.written_bytes),
            reads_per_sec: per_sec(reads, self.reads),
        }
    }
}

/// Everything that a plan has found out.
pub(super) struct Summary {
    pub(super) figures: Figures,
    /// Blocks that a migration would look at.
    pub(super) blocks: u64,
    /// Pieces that these are, for a sample.
    pub(super) all_pieces: Option<u64>,
    /// What asking for what is at the same place takes on the link.
    pub(super) seed_bytes: u64,
    pub(super) guest: GuestActivity,
    pub(super) measured: Option<u64>,
    pub(super) rtt: Option<Duration>,
}

/// Says how a plan has ended well.
pub(super) fn summarise(status: &mut PlanStatus, request: &PlanRequest, summary: &Summary) {
    let figures = &summary.figures;
    let (content, link_bytes) = match (&figures.sample, summary.all_pieces) {
        (Some(sample), Some(pieces)) => {
            let block = float(BLOCK_SIZE);
            let most = [1.0, 1.0, 1.0, 1.0, 1.0, block, 1.0, block];
            let scaled = scale(sample, float(summary.blocks), pieces, most);
            let (content, link) = stats(scaled.map(|scaled: Scaled| scaled.figure));
            let (errors, link_error) = stats(scaled.map(|scaled| scaled.error_95));
            status.content_error_95 = Some(errors);
            status.bytes_on_link_error_95 = Some(link_error);
            status.notes.push(
                "a sample does not see content that is repeated inside of the volume: it counts as new"
                    .to_owned(),
            );
            (content, link)
        }
        _ => (figures.content, figures.link_bytes),
    };
    status.content = content;
    let bytes = link_bytes + summary.seed_bytes;
    status.bytes_on_link = bytes + bytes / TLS_RECORD * TLS_OVERHEAD;
    status.guest = summary.guest;
    status.rate_is_given = request.bandwidth_bytes_per_sec.is_some();
    status.rate_bytes_per_sec = request.bandwidth_bytes_per_sec.or(summary.measured);
    status.rtt_ms = summary.rtt.map(|rtt| rtt.as_secs_f64() * 1000.0);
    if status.rate_bytes_per_sec.is_none() {
        let note = "nothing was sent over the link yet that tells its rate: give one with --bandwidth for times";
        status.notes.push(note.to_owned());
    } else if !status.rate_is_given {
        let note = "the rate is what the link carried lately, which is less than it could where little was sent: give one with --bandwidth";
        status.notes.push(note.to_owned());
    }
    let content_blocks = summary.blocks.saturating_sub(content.zero_blocks);
    status.estimates = estimate(&Facts {
        volume_bytes: float(status.bytes_total),
        content_bytes: float(content_blocks * BLOCK_SIZE),
        packed: figures.packed(),
        link_bytes: float(status.bytes_on_link),
        bytes_per_sec: status.rate_bytes_per_sec.map(float),
        rtt_s: summary.rtt.unwrap_or_default().as_secs_f64(),
        written_per_sec: summary.guest.written_bytes_per_sec,
        reads_per_sec: summary.guest.reads_per_sec,
    });
    status.ended_unix_ms = Some(unix_ms());
    status.phase = PlanPhase::Completed;
}

fn numbers(content: &ContentStats, link_bytes: u64) -> [f64; 8] {
    [
        content.zero_blocks,
        content.same_blocks,
        content.elsewhere_blocks,
        content.repeated_blocks,
        content.compressed_blocks,
        content.compressed_bytes,
        content.raw_blocks,
        link_bytes,
    ]
    .map(float)
}

fn stats(numbers: [f64; 8]) -> (ContentStats, u64) {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate of a number that fits"
    )]
    let [
        zero,
        same,
        elsewhere,
        repeated,
        compressed,
        compressed_bytes,
        raw,
        link,
    ] = numbers.map(|number| number.round() as u64);
    let content = ContentStats {
        zero_blocks: zero,
        same_blocks: same,
        elsewhere_blocks: elsewhere,
        repeated_blocks: repeated,
        compressed_blocks: compressed,
        compressed_bytes,
        raw_blocks: raw,
    };
    (content, link)
}

fn float(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure of an estimate")]
    let float = number as f64;
    float
}
