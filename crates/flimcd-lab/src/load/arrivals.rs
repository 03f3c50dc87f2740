//! When requests of an open load are due: in bursts, at a mean rate.

use std::time::Duration;

use super::{PlannedOp, RequestSource};
use crate::rng::{Rng, mix};

/// Requests of a burst, on average; the number is geometrically distributed.
pub(super) const BURST_MEAN: f64 = 12.0;
/// Gaps within a burst, as a share of the mean gap.
const GAP_SHARE: f64 = 0.2;
/// Distinguishes the draws of times from those of requests.
const SALT: u64 = 0x6172_7269_7661_6c73;

/// Times of requests: bursts of [`BURST_MEAN`] requests that come five times as fast as on average, with
/// exponential gaps within them and between them. The mean over a long time is the rate asked for.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    rng: Rng,
    at_s: f64,
    within_s: f64,
    between_s: f64,
}

impl Arrivals {
    /// `rate_per_sec` is the mean, more than 0.
    pub(super) fn new(rate_per_sec: f64, seed: u64) -> Self {
        let mean = 1.0 / rate_per_sec;
        let within_s = mean * GAP_SHARE;
        Self {
            rng: Rng::new(mix(seed ^ SALT)),
            at_s: 0.0,
            within_s,
            between_s: BURST_MEAN * mean - (BURST_MEAN - 1.0) * within_s,
        }
    }

    /// When the next request is due.
    pub(super) fn next_due(&mut self) -> Duration {
        let is_first = self.rng.chance(1.0 / BURST_MEAN);
        let mean = if is_first {
            self.between_s
        } else {
            self.within_s
        };
        // An exponential draw; its argument is in 0..=1 without 0.
        self.at_s -= (1.0 - self.rng.unit()).ln() * mean;
        Duration::try_from_secs_f64(self.at_s).unwrap_or(Duration::MAX)
    }
}

/// Gives the requests of another source times. A flush is due with the request before it.
#[derive(Debug)]
pub(super) struct Paced<S> {
    requests: S,
    arrivals: Arrivals,
    last: Duration,
}

impl<S: RequestSource> Paced<S> {
    /// `rate_per_sec` is the mean of reads and writes, more than 0.
    pub(super) fn new(requests: S, rate_per_sec: f64, seed: u64) -> Self {
        Self {
            requests,
            arrivals: Arrivals::new(rate_per_sec, seed),
            last: Duration::ZERO,
        }
    }
}

impl<S: RequestSource> RequestSource for Paced<S> {
    fn next_op(&mut self) -> Option<PlannedOp> {
        let mut op = self.requests.next_op()?;
        if op.length > 0 {
            self.last = self.arrivals.next_due();
        }
        op.due = Some(self.last);
        Some(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_rate_is_kept_and_requests_come_in_bursts() {
        for seed in 1..4 {
            let mut arrivals = Arrivals::new(200.0, seed);
            let times: Vec<f64> = (0..100_000)
                .map(|_| arrivals.next_due().as_secs_f64())
                .collect();
            let rate = 100_000.0 / times.last().unwrap();
            assert!((194.0..206.0).contains(&rate), "{rate}");
            let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
            // An even stream of exponential gaps has 1.
            let spread = variance / gaps.len() as f64 / mean.powi(2);
            assert!(spread > 5.0, "{spread}");
        }
    }
}
