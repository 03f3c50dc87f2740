//! What is counted during a run.

use std::time::Duration;

use flimcd_core::{BlockRange, Time};

use crate::{Phase, ReadLatency, Region, Sample};

/// Parts of the disk that are told apart.
const REGIONS_MAX: u64 = 1024;

/// See the module.
pub(super) struct Figures {
    begin: Time,
    interval: Duration,
    next_sample: Time,
    sample: Sample,
    latencies_ms: Vec<f64>,
    pub(super) samples: Vec<Sample>,
    pub(super) regions: Vec<Region>,
    blocks_per_region: u64,
    last_answer: Time,
    stall_ms: f64,
    /// Latencies of reads after the switch.
    after_ms: Vec<f64>,
    pub(super) reads_after: u64,
    pub(super) answered: u64,
    bytes_before: u64,
    misses_before: u64,
}

impl Figures {
    pub(super) fn new(begin: Time, interval: Duration, blocks: u64) -> Self {
        let regions = blocks.clamp(1, REGIONS_MAX);
        let blocks_per_region = blocks.div_ceil(regions);
        Self {
            begin,
            interval,
            next_sample: begin + interval,
            sample: empty(),
            latencies_ms: Vec::new(),
            samples: Vec::new(),
            regions: vec![Region::default(); index(blocks.div_ceil(blocks_per_region))],
            blocks_per_region,
            last_answer: begin,
            stall_ms: 0.0,
            after_ms: Vec::new(),
            reads_after: 0,
            answered: 0,
            bytes_before: 0,
            misses_before: 0,
        }
    }

    /// Seconds since the request to migrate.
    pub(super) fn seconds(&self, at: Time) -> f64 {
        at.since(self.begin).as_secs_f64()
    }

    fn region(&mut self, block: u64) -> Option<&mut Region> {
        self.regions.get_mut(index(block / self.blocks_per_region))
    }

    /// The guest's requests begin to be made.
    pub(super) fn asked(&mut self, blocks: BlockRange, writes: bool, is_miss: bool) {
        if let Some(region) = self.region(blocks.start) {
            region.reads += u64::from(!writes);
            region.writes += u64::from(writes);
            region.misses += u64::from(is_miss);
        }
    }

    /// Content of these blocks has arrived.
    pub(super) fn arrived(&mut self, now: Time, blocks: BlockRange) {
        let at_s = self.seconds(now);
        for block in [blocks.start, blocks.end.saturating_sub(1)] {
            if let Some(region) = self.region(block) {
                region.sent_at_s = Some(at_s);
            }
        }
    }

    /// A request was answered. `others_waited`: some were under way since the last answer.
    pub(super) fn answered(&mut self, now: Time, issued: Time, writes: bool, after_switch: bool) {
        let ms = now.since(issued).as_secs_f64() * 1000.0;
        let since = self.last_answer.max(issued);
        self.stall_ms = self.stall_ms.max(now.since(since).as_secs_f64() * 1000.0);
        self.last_answer = now;
        self.answered += 1;
        self.sample.reads += u64::from(!writes);
        self.sample.writes += u64::from(writes);
        self.latencies_ms.push(ms);
        if after_switch && !writes {
            self.reads_after += 1;
            self.after_ms.push(ms);
        }
    }

    /// Closes intervals that are over.
    pub(super) fn tick(&mut self, now: Time, phase: Phase, bytes: u64, misses: u64) {
        while self.next_sample <= now {
            let at_s = self.seconds(self.next_sample);
            self.latencies_ms.sort_by(f64::total_cmp);
            self.samples.push(Sample {
                at_s,
                phase,
                bytes: bytes - self.bytes_before,
                misses: misses - self.misses_before,
                latency_p99_ms: percentile(&self.latencies_ms, 0.99),
                latency_max_ms: percentile(&self.latencies_ms, 1.0),
                ..self.sample
            });
            (self.bytes_before, self.misses_before) = (bytes, misses);
            self.sample = empty();
            self.latencies_ms.clear();
            self.next_sample = self.next_sample + self.interval;
        }
    }

    pub(super) const fn stall_ms(&self) -> f64 {
        self.stall_ms
    }

    pub(super) fn latency_after(&mut self) -> ReadLatency {
        self.after_ms.sort_by(f64::total_cmp);
        ReadLatency {
            p50_ms: percentile(&self.after_ms, 0.5),
            p99_ms: percentile(&self.after_ms, 0.99),
            max_ms: percentile(&self.after_ms, 1.0),
        }
    }
}

const fn empty() -> Sample {
    Sample {
        at_s: 0.0,
        phase: Phase::Before,
        reads: 0,
        writes: 0,
        latency_p99_ms: 0.0,
        latency_max_ms: 0.0,
        bytes: 0,
        misses: 0,
    }
}

/// Of values in ascending order; 0 if there are none.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(0.0)
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
