//! Many seeds on several threads, and what they met.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{Failure, Outcome, SimOptions, Summary, run};

/// Failures that are kept; the others are only counted.
const FAILURES_KEPT: usize = 20;

/// What a range of seeds came to.
#[derive(Clone, Debug, Default)]
pub struct RangeReport {
    /// Seeds that were run.
    pub seeds: u64,
    /// Seeds in which a check failed.
    pub failed: u64,
    /// The first of them, by seed.
    pub failures: Vec<Failure>,
    /// Seeds by how their migration ended.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Seeds by strategy.
    pub strategies: BTreeMap<&'static str, u64>,
    /// For everything that can be met: in how many seeds it was, and how often in all.
    pub coverage: BTreeMap<&'static str, (u64, u64)>,
    /// Guests' requests in all.
    pub guest_requests: u64,
    /// Time in the simulations, added up.
    pub virtual_time: Duration,
    /// Time that it took.
    pub elapsed: Duration,
}

impl RangeReport {
    /// Seeds per minute.
    #[must_use]
    pub fn seeds_per_minute(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let seeds = self.seeds as f64;
        seeds * 60.0 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn add(&mut self, result: Result<Summary, Failure>) {
        self.seeds += 1;
        match result {
            Ok(summary) => {
                *self.outcomes.entry(summary.outcome).or_default() += 1;
                *self.strategies.entry(summary.strategy).or_default() += 1;
                self.guest_requests += summary.guest_requests;
                self.virtual_time += summary.virtual_time;
                for (what, count) in summary.coverage {
                    let (seeds, times) = self.coverage.entry(what).or_default();
                    *seeds += 1;
                    *times += count;
                }
            }
            Err(failure) => {
                self.failed += 1;
                self.failures.push(failure);
                self.failures.sort_by_key(|failure| failure.seed);
                self.failures.truncate(FAILURES_KEPT);
            }
        }
    }
}

impl fmt::Display for RangeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} migrations in {:.1} s, {:.0} a minute; {:.0} s of virtual time, {} guest requests",
            self.seeds,
            self.elapsed.as_secs_f64(),
            self.seeds_per_minute(),
            self.virtual_time.as_secs_f64(),
            self.guest_requests
        )?;
        for (outcome, seeds) in &self.outcomes {
            writeln!(f, "  {outcome}: {seeds}")?;
        }
        for (strategy, seeds) in &self.strategies {
            writeln!(f, "  strategy {strategy}: {seeds}")?;
        }
        for (what, (seeds, times)) in &self.coverage {
            writeln!(f, "  {what}: in {seeds} seeds, {times} times")?;
        }
        writeln!(f, "  seeds in which a check failed: {}", self.failed)?;
        for failure in &self.failures {
            writeln!(f, "{failure}")?;
        }
        Ok(())
    }
}

/// Runs all seeds of a range on so many threads.
///
/// # Panics
/// When a thread of the simulator itself panics.
#[must_use]
pub fn run_range(seeds: Range<u64>, threads: usize, options: &SimOptions) -> RangeReport {
    let start = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let report = Mutex::new(RangeReport::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let result = run(seed, options);
                    report.lock().expect("no thread panics").add(result);
                }
            });
        }
    });
    let mut report = report.into_inner().expect("no thread panics");
    report.elapsed = start.elapsed();
    report
}
