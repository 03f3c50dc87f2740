//! How much the link carries, and how fast bulk may go while guests can fault. No clock, no sockets.
//!
//! **Estimate.** Delivered bytes over windows of at least two round trips; the greatest of the recent
//! windows counts (as in BBR: Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue
//! 14(5), 2016, where the bandwidth filter is a windowed maximum of the delivery rate). A window in
//! which there was not always something to send says only what the link carries *at least*.
//!
//! **Pacing.** Bytes that stand in the bottleneck's queue cannot be overtaken, so while guests can
//! fault, bulk is sent at [`CRUISE`] of the estimate: the queue stays empty. A paced link delivers what
//! it is given, which says nothing about what it could carry:
//! - a window that delivered about what was allowed keeps the estimate alive and does not lower it;
//! - a window that delivered clearly less, although there was enough to send, is the network's word
//!   and counts like any other;
//! - a round trip that stays above the minimum says that the estimate is too high: it shrinks step by
//!   step until the queue is gone, at most to half of what the window knew, because with a queue that
//!   others fill there is no end to that;
//! - now and then the pace goes above the estimate for a few round trips. If more arrives, the
//!   estimate rises and the next probe follows at once.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Share of the estimate that bulk may use while guests can fault.
const CRUISE: f64 = 0.96;
/// Pace of a probe, as a multiple of the estimate.
const PROBE: f64 = 1.08;
/// Pace of a probe that follows one that found more.
const PROBE_ON: f64 = 1.25;
/// Pause between two probes.
const PROBE_EVERY: Duration = Duration::from_secs(3);
/// How much more must arrive for a probe to have found something.
const FOUND_MORE: f64 = 1.02;
/// A window that delivered less than this share of the pace was not limited by the pace.
const PACE_LIMITED: f64 = 0.93;
/// How long a measurement counts.
const MEMORY: Duration = Duration::from_secs(10);
/// Shortest window to measure in.
const WINDOW_MIN: Duration = Duration::from_millis(100);
/// Factor for a window whose round trip shows a queue.
const SHRINK: f64 = 0.985;
/// Least share of the best measurement that shrinking may reach.
const SHRINK_FLOOR: f64 = 0.5;
/// Bytes that must have been delivered in a window that had not always something to send, for it to
/// say anything about the link.
const LEAST_BYTES: u64 = 1 << 20;

/// What is known of all bulk connections at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) now: Instant,
    /// Bytes that arrived at the peer since the bundle came up.
    pub(crate) delivered_bytes: u64,
    /// There was always something to send since the last sample.
    pub(crate) is_saturated: bool,
    /// Smoothed round trip.
    pub(crate) rtt: Duration,
    /// Least round trip.
    pub(crate) rtt_min: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    is_on: bool,
    /// Measurements of the last [`MEMORY`], falling, so that the first is the greatest.
    measured: VecDeque<(Instant, f64)>,
    /// Correction of the greatest measurement by what the round trip shows, at most 1.
    trim: f64,
    window: Option<Window>,
    probe: Option<Probe>,
    next_probe: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    start: Instant,
    delivered_bytes: u64,
    is_saturated: bool,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    gain: f64,
    until: Instant,
    /// Windows count as the probe's from here on: earlier ones still show the old pace.
    counts_from: Instant,
}

impl Pacer {
    pub(crate) fn new() -> Self {
        Self {
            trim: 1.0,
            ..Self::default()
        }
    }

    /// Begins or ends pacing.
    pub(crate) fn set_on(&mut self, is_on: bool) {
        if self.is_on != is_on {
            self.is_on = is_on;
            self.trim = 1.0;
            self.probe = None;
            self.next_probe = None;
        }
    }

    /// New connections: their counters begin at zero. What was measured stays a hint.
    pub(crate) fn restart(&mut self) {
        self.window = None;
        self.probe = None;
    }

    /// Bytes per second that the link carries, as far as is known.
    pub(crate) fn estimate(&self) -> Option<f64> {
        Some(self.measured.front()?.1 * self.trim)
    }

    /// Bytes per second that bulk may send; `None` for no bound.
    pub(crate) fn pace(&self) -> Option<f64> {
        if !self.is_on {
            return None;
        }
        let gain = self.probe.map_or(CRUISE, |probe| probe.gain);
        Some(self.estimate()? * gain)
    }

    /// Takes a sample. Call every 50 ms or so.
    pub(crate) fn sample(&mut self, sample: Sample) {
        let Some(window) = &mut self.window else {
            self.begin_window(&sample);
            return;
        };
        window.is_saturated &= sample.is_saturated;
        let window = *window;
        let length = sample.now.saturating_duration_since(window.start);
        if length >= WINDOW_MIN.max(sample.rtt_min * 2) {
            let bytes = sample
                .delivered_bytes
                .saturating_sub(window.delivered_bytes);
            self.measure(&sample, window, bytes, length);
            self.begin_window(&sample);
        }
        self.steer_probe(&sample);
    }

    fn begin_window(&mut self, sample: &Sample) {
        self.window = Some(Window {
            start: sample.now,
            delivered_bytes: sample.delivered_bytes,
            is_saturated: true,
        });
    }

    fn measure(&mut self, sample: &Sample, window: Window, bytes: u64, length: Duration) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "bytes of one window are far below 2^53"
        )]
        let rate = bytes as f64 / length.as_secs_f64();
        let known = self.estimate();
        let is_more = known.is_none_or(|known| rate > known);
        if !window.is_saturated {
            // Only a lower bound: it may raise what is known and keep it alive, never lower it.
            if known.is_some() {
                self.refresh(sample.now);
            }
            if is_more && (known.is_some() || bytes >= LEAST_BYTES) {
                self.remember(sample.now, rate);
            }
            return;
        }
        let pace = self.pace();
        let is_pace_limited = pace.is_some_and(|pace| rate >= pace * PACE_LIMITED);
        self.follow_queue(sample, window, is_more);
        if is_pace_limited && !is_more {
            self.refresh(sample.now);
        } else {
            self.remember(sample.now, rate);
        }
        self.judge_probe(sample, window, rate, known);
    }

    /// Lets the greatest measurement count from now on again.
    fn refresh(&mut self, now: Instant) {
        if let Some((at, _)) = self.measured.front_mut() {
            *at = now;
            let (at, best) = (*at, self.measured[0].1);
            self.measured.clear();
            self.measured.push_back((at, best));
        }
    }

    fn remember(&mut self, now: Instant, rate: f64) {
        if self.estimate().is_some_and(|known| rate > known) {
            self.trim = 1.0;
            self.measured.clear();
        }
        while self
            .measured
            .back()
            .is_some_and(|&(_, other)| other <= rate)
        {
            self.measured.pop_back();
        }
        self.measured.push_back((now, rate));
        while self.measured.len() > 1
            && self
                .measured
                .front()
                .is_some_and(|&(at, _)| now.saturating_duration_since(at) > MEMORY)
        {
            self.measured.pop_front();
            self.trim = 1.0;
        }
    }

    /// While cruising, a lasting queue means that the estimate is above what the link carries.
    fn follow_queue(&mut self, sample: &Sample, window: Window, is_more: bool) {
        let is_cruising = self.is_on && self.probe.is_none() && !is_more;
        // A probe's queue needs a while to drain.
        let is_settled = self.next_probe.is_none_or(|next| {
            window.start + PROBE_EVERY > next + sample.rtt_min * 4 + WINDOW_MIN * 4
        });
        let slack = (sample.rtt_min / 8).max(Duration::from_millis(4));
        if is_cruising && is_settled && sample.rtt > sample.rtt_min + slack {
            self.trim = (self.trim * SHRINK).max(SHRINK_FLOOR);
        }
    }

    /// After a probe's window: go on if it found more.
    fn judge_probe(&mut self, sample: &Sample, window: Window, rate: f64, known: Option<f64>) {
        let Some(probe) = self.probe else { return };
        if window.start >= probe.counts_from && known.is_some_and(|known| rate > known * FOUND_MORE)
        {
            self.probe = Some(Self::probe(PROBE_ON, sample));
        }
    }

    fn steer_probe(&mut self, sample: &Sample) {
        if !self.is_on || self.measured.is_empty() {
            return;
        }
        match (self.probe, self.next_probe) {
            (Some(probe), _) if sample.now < probe.until => {}
            (Some(_), _) | (None, None) => {
                self.probe = None;
                self.next_probe = Some(sample.now + PROBE_EVERY);
            }
            (None, Some(next)) if sample.now >= next => {
                self.probe = Some(Self::probe(PROBE, sample));
            }
            (None, Some(_)) => {}
        }
    }

    fn probe(gain: f64, sample: &Sample) -> Probe {
        let window = WINDOW_MIN.max(sample.rtt_min * 2);
        Probe {
            gain,
            counts_from: sample.now + sample.rtt_min,
            until: sample.now + sample.rtt_min + window * 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(50);
    const RTT: Duration = Duration::from_millis(40);

    /// A link of some rate with an endless queue, driven by a pacer.
    struct Path {
        now: Instant,
        delivered: f64,
        queue: f64,
        carries: f64,
        pacer: Pacer,
    }

    impl Path {
        fn new(carries: f64) -> Self {
            Self {
                now: Instant::now(),
                delivered: 0.0,
                queue: 0.0,
                carries,
                pacer: Pacer::new(),
            }
        }

        /// Runs with `offered` bytes per second (before pacing) for a while.
        fn run(&mut self, offered: f64, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                let pace = self.pacer.pace().unwrap_or(f64::INFINITY);
                let arriving = offered.min(pace).min(self.carries * 1.3) * TICK.as_secs_f64();
                let room = self.carries * TICK.as_secs_f64();
                let sent = (self.queue + arriving).min(room);
                self.queue += arriving - sent;
                self.delivered += sent;
                self.now += TICK;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "test"
                )]
                let delivered_bytes = self.delivered as u64;
                self.pacer.sample(Sample {
                    now: self.now,
                    delivered_bytes,
                    is_saturated: offered >= pace.min(self.carries),
                    rtt: RTT + Duration::from_secs_f64(self.queue / self.carries),
                    rtt_min: RTT,
                });
            }
        }

        fn ratio(&self) -> f64 {
            self.pacer.estimate().unwrap() / self.carries
        }
    }

    #[track_caller]
    fn assert_near(value: f64, low: f64, high: f64) {
        assert!(
            (low..=high).contains(&value),
            "{value} is not in {low}..={high}"
        );
    }

    #[test]
    fn a_paced_link_keeps_its_estimate_and_its_queue_empty() {
        let mut path = Path::new(25e6);
        path.run(1e9, Duration::from_secs(2));
        assert_near(path.ratio(), 0.99, 1.01);
        path.pacer.set_on(true);
        path.run(1e9, Duration::from_secs(60));
        assert_near(path.ratio(), 0.97, 1.01);
        assert_near(path.queue / path.carries, 0.0, 0.04);
    }

    #[test]
    fn more_bandwidth_is_discovered_and_less_is_believed() {
        let mut path = Path::new(25e6);
        path.run(1e9, Duration::from_secs(2));
        path.pacer.set_on(true);
        path.carries = 100e6;
        path.run(1e9, Duration::from_secs(20));
        assert_near(path.ratio(), 0.9, 1.01);
        path.carries = 20e6;
        path.run(1e9, Duration::from_secs(25));
        assert_near(path.ratio(), 0.9, 1.03);
    }

    #[test]
    fn a_trickle_does_not_lower_what_is_known() {
        let mut path = Path::new(25e6);
        assert_eq!(path.pacer.estimate(), None);
        path.run(10e3, Duration::from_secs(5));
        assert_eq!(path.pacer.estimate(), None, "a trickle says nothing");
        path.run(1e9, Duration::from_secs(1));
        path.run(10e3, Duration::from_secs(60));
        assert_near(path.ratio(), 0.99, 1.01);
    }

    #[test]
    fn an_estimate_that_is_too_high_shrinks_until_the_queue_is_gone() {
        let mut path = Path::new(25e6);
        path.run(1e9, Duration::from_secs(1));
        path.pacer.measured[0].1 *= 1.10;
        path.queue = 0.0;
        path.pacer.set_on(true);
        path.run(1e9, Duration::from_secs(10));
        assert_near(path.queue / path.carries, 0.0, 0.04);
        assert_near(path.pacer.pace().unwrap() / path.carries, 0.9, 1.1);
    }
}
