//! What the load saw: counts, latencies, stalls, a time series, and the wrong reads.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{Content, DiskOp, WrongRead};

/// Wrong reads and errors of which the details are kept.
const DETAILS_MAX: usize = 16;
/// Longer latencies count as this: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;

/// Latencies in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean_ms: f64,
    /// Median.
    pub p50_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// 99.9th percentile.
    pub p999_ms: f64,
    /// Longest.
    pub max_ms: f64,
}

/// One kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct OpStats {
    /// Completed requests.
    pub ops: u64,
    /// Their bytes.
    pub bytes: u64,
    /// From submission to answer.
    pub latency: Latency,
}

/// A slice of time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Its start, milliseconds since the load started.
    pub at_ms: u64,
    /// Requests completed in it.
    pub ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Median latency of what completed in it, 0 if nothing did.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Longest.
    pub max_ms: f64,
}

/// Everything that was recorded since the load, or a phase of it, started.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadStats {
    /// Name of the phase, `total` for all of it.
    pub phase: String,
    /// Start of the phase, milliseconds since the load started.
    pub start_ms: u64,
    /// End of the phase (or the time of the snapshot).
    pub end_ms: u64,
    /// Reads.
    pub reads: OpStats,
    /// Writes of data.
    pub writes: OpStats,
    /// Writes of zeroes.
    pub zeroes: OpStats,
    /// Flushes.
    pub flushes: OpStats,
    /// All requests together.
    pub all: OpStats,
    /// Reads that returned at least one wrong granule.
    pub reads_wrong: u64,
    /// The first wrong granules.
    pub wrong: Vec<WrongRead>,
    /// Requests answered with an error.
    pub errors: u64,
    /// The first errors.
    pub first_errors: Vec<String>,
    /// Requests that were never answered, because the disk went away.
    pub unanswered: u64,
    /// Longest time in which requests were in flight and none was answered.
    pub stall_ms_max: f64,
    /// Bytes of blocks dirtied that had not been written within the window before.
    pub fresh_dirty_bytes: u64,
    /// Time series; empty in the statistics of a phase.
    pub intervals: Vec<Interval>,
}

#[derive(Clone, Debug)]
struct OpTally {
    ops: u64,
    bytes: u64,
    latency_us: Histogram<u64>,
}

impl OpTally {
    fn new() -> Self {
        let latency_us = Histogram::new(3).expect("3 digits are supported");
        Self {
            ops: 0,
            bytes: 0,
            latency_us,
        }
    }

    fn record(&mut self, bytes: u64, latency: Duration) {
        self.ops += 1;
        self.bytes += bytes;
        let us = u64::try_from(latency.as_micros())
            .unwrap_or(LATENCY_US_MAX)
            .min(LATENCY_US_MAX);
        // The histogram grows by itself; it refuses nothing below the bound.
        let _ = self.latency_us.record(us);
    }

    fn stats(&self) -> OpStats {
        OpStats {
            ops: self.ops,
            bytes: self.bytes,
            latency: latency_of(&self.latency_us),
        }
    }
}

fn latency_of(us: &Histogram<u64>) -> Latency {
    Latency {
        mean_ms: us.mean() / 1e3,
        p50_ms: at_quantile(us, 0.5),
        p90_ms: at_quantile(us, 0.9),
        p99_ms: at_quantile(us, 0.99),
        p999_ms: at_quantile(us, 0.999),
        max_ms: to_ms(us.max()),
    }
}

fn at_quantile(us: &Histogram<u64>, quantile: f64) -> f64 {
    if us.is_empty() {
        0.0
    } else {
        to_ms(us.value_at_quantile(quantile))
    }
}

fn to_ms(us: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "microseconds far below 2^53")]
    let us = us as f64;
    us / 1e3
}

/// What is counted per phase and in total.
#[derive(Clone, Debug)]
struct Tally {
    name: String,
    start: Duration,
    /// Reads, writes, zeroes, flushes.
    ops: [OpTally; 4],
    all: OpTally,
    reads_wrong: u64,
    wrong: Vec<WrongRead>,
    errors: u64,
    first_errors: Vec<String>,
    unanswered: u64,
    stall_max: Duration,
    fresh_dirty_bytes: u64,
}

impl Tally {
    fn new(name: &str, start: Duration) -> Self {
        Self {
            name: name.to_owned(),
            start,
            ops: std::array::from_fn(|_| OpTally::new()),
            all: OpTally::new(),
            reads_wrong: 0,
            wrong: Vec::new(),
            errors: 0,
            first_errors: Vec::new(),
            unanswered: 0,
            stall_max: Duration::ZERO,
            fresh_dirty_bytes: 0,
        }
    }

    fn stats(&self, end: Duration, intervals: Vec<Interval>) -> LoadStats {
        LoadStats {
            phase: self.name.clone(),
            start_ms: whole_ms(self.start),
            end_ms: whole_ms(end),
            reads: self.ops[0].stats(),
            writes: self.ops[1].stats(),
            zeroes: self.ops[2].stats(),
            flushes: self.ops[3].stats(),
            all: self.all.stats(),
            reads_wrong: self.reads_wrong,
            wrong: self.wrong.clone(),
            errors: self.errors,
            first_errors: self.first_errors.clone(),
            unanswered: self.unanswered,
            stall_ms_max: self.stall_max.as_secs_f64() * 1e3,
            fresh_dirty_bytes: self.fresh_dirty_bytes,
            intervals,
        }
    }
}

const fn op_index(op: DiskOp) -> usize {
    match op {
        DiskOp::Read => 0,
        DiskOp::Write => 1,
        DiskOp::WriteZeroes => 2,
        DiskOp::Flush => 3,
    }
}

pub(super) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Records what happens. Times are since the load started.
#[derive(Debug)]
pub(super) struct Recorder {
    total: Tally,
    phase: Tally,
    finished: Vec<LoadStats>,
    interval: Duration,
    intervals: Vec<Interval>,
    current: OpTally,
    current_read_bytes: u64,
    current_write_bytes: u64,
    /// When a request was answered last, or the first of an idle disk was submitted.
    alive_at: Duration,
}

impl Recorder {
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            total: Tally::new("total", Duration::ZERO),
            phase: Tally::new("start", Duration::ZERO),
            finished: Vec::new(),
            interval: interval.max(Duration::from_millis(1)),
            intervals: Vec::new(),
            current: OpTally::new(),
            current_read_bytes: 0,
            current_write_bytes: 0,
            alive_at: Duration::ZERO,
        }
    }

    fn tallies(&mut self) -> [&mut Tally; 2] {
        [&mut self.total, &mut self.phase]
    }

    /// A request went to a disk that had none: stalls count from here.
    pub(super) const fn woke(&mut self, now: Duration) {
        self.alive_at = now;
    }

    /// A request was done.
    pub(super) fn completed(&mut self, op: DiskOp, bytes: u64, latency: Duration, now: Duration) {
        self.roll(now);
        let stall = now.saturating_sub(self.alive_at);
        self.alive_at = now;
        for tally in self.tallies() {
            tally.ops[op_index(op)].record(bytes, latency);
            tally.all.record(bytes, latency);
            tally.stall_max = tally.stall_max.max(stall);
        }
        self.current.record(bytes, latency);
        match op {
            DiskOp::Read => self.current_read_bytes += bytes,
            DiskOp::Write | DiskOp::WriteZeroes => self.current_write_bytes += bytes,
            DiskOp::Flush => {}
        }
    }

    /// A read returned these wrong granules: offset, expected, found.
    pub(super) fn wrong_read(&mut self, granules: &[(u64, Content, Content)], now: Duration) {
        for tally in self.tallies() {
            tally.reads_wrong += 1;
            let room = DETAILS_MAX.saturating_sub(tally.wrong.len());
            let detail = |&(offset, expected, found): &(u64, Content, Content)| WrongRead {
                offset,
                expected,
                found,
                at_ms: whole_ms(now),
            };
            tally.wrong.extend(granules.iter().take(room).map(detail));
        }
    }

    /// A request was answered with an error.
    pub(super) fn failed(&mut self, what: &str, now: Duration) {
        self.alive_at = now;
        for tally in self.tallies() {
            tally.errors += 1;
            if tally.first_errors.len() < DETAILS_MAX {
                tally.first_errors.push(what.to_owned());
            }
        }
    }

    /// So many requests will never be answered.
    pub(super) fn lost(&mut self, requests: u64) {
        for tally in self.tallies() {
            tally.unanswered += requests;
        }
    }

    pub(super) fn dirtied(&mut self, fresh_bytes: u64) {
        for tally in self.tallies() {
            tally.fresh_dirty_bytes += fresh_bytes;
        }
    }

    /// Ends the current phase and starts one called `name`.
    pub(super) fn begin_phase(&mut self, name: &str, now: Duration) {
        let phase = std::mem::replace(&mut self.phase, Tally::new(name, now));
        self.finished.push(phase.stats(now, Vec::new()));
    }

    /// All of it.
    pub(super) fn total(&mut self, now: Duration) -> LoadStats {
        self.roll(now);
        self.total.stats(now, self.intervals.clone())
    }

    /// Every phase, the current one last.
    pub(super) fn phases(&self, now: Duration) -> Vec<LoadStats> {
        let mut phases = self.finished.clone();
        phases.push(self.phase.stats(now, Vec::new()));
        phases
    }

    /// Closes the intervals that ended before `now`, empty ones too.
    fn roll(&mut self, now: Duration) {
        loop {
            let start = self.interval * u32::try_from(self.intervals.len()).unwrap_or(u32::MAX);
            if now < start + self.interval {
                return;
            }
            let latency = latency_of(&self.current.latency_us);
            self.intervals.push(Interval {
                at_ms: whole_ms(start),
                ops: self.current.ops,
                read_bytes: std::mem::take(&mut self.current_read_bytes),
                write_bytes: std::mem::take(&mut self.current_write_bytes),
                p50_ms: latency.p50_ms,
                p99_ms: latency.p99_ms,
                max_ms: latency.max_ms,
            });
            self.current.ops = 0;
            self.current.latency_us.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn intervals_phases_and_stalls() {
        let mut recorder = Recorder::new(ms(100));
        recorder.woke(ms(0));
        recorder.completed(DiskOp::Read, 4096, ms(2), ms(10));
        recorder.begin_phase("move", ms(20));
        recorder.completed(DiskOp::Write, 4096, ms(300), ms(350));
        recorder.woke(ms(1000)); // idle in between: no stall
        recorder.completed(DiskOp::Read, 8192, ms(1), ms(1001));
        let total = recorder.total(ms(1100));
        assert_eq!(
            (total.reads.ops, total.reads.bytes, total.writes.ops),
            (2, 12_288, 1)
        );
        assert_eq!(total.stall_ms_max, 340.0);
        assert_eq!(total.intervals.len(), 11);
        assert_eq!(total.intervals[0].ops, 1);
        assert_eq!(total.intervals[3].write_bytes, 4096);
        assert!(
            (total.intervals[3].max_ms - 300.0).abs() < 1.0,
            "{:?}",
            total.intervals
        );
        assert!(
            total.intervals[4..10]
                .iter()
                .all(|interval| interval.ops == 0)
        );
        let phases = recorder.phases(ms(1100));
        assert_eq!(phases[0].phase, "start");
        assert_eq!((phases[0].all.ops, phases[1].all.ops), (1, 2));
        assert_eq!((phases[1].start_ms, phases[1].end_ms), (20, 1100));
    }
}
