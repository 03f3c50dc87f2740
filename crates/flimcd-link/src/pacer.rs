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
//!   step until the queue is gone, at most to half of what was measured, because with a queue that
//!   others fill there is no end to that;
//! - now and then the pace goes a little above the estimate for a few round trips. If more arrives,
//!   the estimate rises and a bolder probe follows at once; if not, a slower stretch drains what has
//!   queued up meanwhile.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Share of the estimate that bulk may use while guests can fault.
const CRUISE: f64 = 0.99;
/// Pace of a probe, as a multiple of the estimate. What goes beyond the path's rate may queue up for
/// as long as the probe takes: 3% for 500 ms are 15 ms.
const PROBE: f64 = 1.03;
/// Pace after a probe that found nothing, until what it left in the queue has drained.
const DRAIN: f64 = 0.9;
/// Longest such stretch.
const DRAIN_MAX: Duration = Duration::from_millis(400);
/// Pace of a probe that follows one that found more.
const PROBE_ON: f64 = 1.25;
/// Pause between two probes.
const PROBE_EVERY: Duration = Duration::from_secs(4);
/// Length of a probe in round trips. BBR, which believes that the path carries what it was allowed to
/// send so far, looks for more only one round trip out of eight, and the probe has to cover that one.
const PROBE_ROUNDS: u32 = 10;
/// Windows in a row that must show a queue before the estimate shrinks.
const QUEUED_WINDOWS: u32 = 3;
/// How much more must arrive for a probe to have found something.
const FOUND_MORE: f64 = 1.01;
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
/// Least pace in bytes per second. What a slower one would keep out of a queue is worth less than what it costs when the
/// estimate is wrong: agents that are starved of their processor deliver little, which looks like a slow network.
const PACE_MIN: f64 = 1e6;
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
    /// Windows in a row whose round trip showed a queue.
    queued_windows: u32,
    window: Option<Window>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    start: Instant,
    delivered_bytes: u64,
    is_saturated: bool,
}

/// What a paced link is doing.
#[derive(Clone, Copy, Debug, Default)]
enum Stage {
    /// Nothing is known yet, or pacing is off.
    #[default]
    Start,
    /// A little below the estimate.
    Cruise { since: Instant },
    /// Above it. Windows begin after a round trip, because what arrives before shows the old pace.
    Probe {
        gain: f64,
        since: Instant,
        counts_from: Instant,
    },
    /// Further below it.
    Drain { until: Instant },
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
            self.stage = Stage::Start;
        }
    }

    /// New connections: their counters begin at zero. What was measured stays a hint.
    pub(crate) fn restart(&mut self) {
        self.window = None;
        self.stage = Stage::Start;
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
        let gain = match self.stage {
            Stage::Start | Stage::Cruise { .. } => CRUISE,
            Stage::Probe { gain, .. } => gain,
            Stage::Drain { .. } => DRAIN,
        };
        Some((self.estimate()? * gain).max(PACE_MIN))
    }

    /// Takes a sample. Call every 50 ms or so.
    pub(crate) fn sample(&mut self, sample: Sample) {
        let known = self.estimate();
        let measured = self.measure(&sample);
        if self.is_on && self.estimate().is_some() {
            self.steer(&sample, known, measured);
        }
    }

    /// Ends the window if it is long enough; its rate, if it was saturated.
    fn measure(&mut self, sample: &Sample) -> Option<f64> {
        if let Stage::Probe { counts_from, .. } = self.stage
            && sample.now < counts_from
        {
            return None;
        }
        let Some(window) = &mut self.window else {
            self.begin_window(sample);
            return None;
        };
        window.is_saturated &= sample.is_saturated;
        let window = *window;
        let length = sample.now.saturating_duration_since(window.start);
        if length < WINDOW_MIN.max(sample.rtt_min * 2) {
            return None;
        }
        self.begin_window(sample);
        let bytes = sample
            .delivered_bytes
            .saturating_sub(window.delivered_bytes);
        #[expect(
            clippy::cast_precision_loss,
            reason = "bytes of one window are far below 2^53"
        )]
        let rate = bytes as f64 / length.as_secs_f64();
        if window.is_saturated {
            self.learn(sample, rate);
            Some(rate)
        } else {
            self.learn_at_least(sample, rate, bytes);
            None
        }
    }

    fn begin_window(&mut self, sample: &Sample) {
        self.window = Some(Window {
            start: sample.now,
            delivered_bytes: sample.delivered_bytes,
            is_saturated: true,
        });
    }

    /// A window without enough to send is a lower bound: it may raise what is known and keep it alive.
    fn learn_at_least(&mut self, sample: &Sample, rate: f64, bytes: u64) {
        match self.estimate() {
            Some(known) if rate > known => self.remember(sample.now, rate),
            Some(_) => self.refresh(sample.now),
            None if bytes >= LEAST_BYTES => self.remember(sample.now, rate),
            None => {}
        }
    }

    fn learn(&mut self, sample: &Sample, rate: f64) {
        let is_more = self.estimate().is_none_or(|known| rate > known);
        let is_pace_limited = self.pace().is_some_and(|pace| rate >= pace * PACE_LIMITED);
        let slack = (sample.rtt_min / 8).max(Duration::from_millis(4));
        let is_cruising = matches!(self.stage, Stage::Cruise { .. });
        if is_cruising && !is_more && sample.rtt > sample.rtt_min + slack {
            self.queued_windows += 1;
        } else {
            self.queued_windows = 0;
        }
        if self.queued_windows >= QUEUED_WINDOWS {
            self.trim = (self.trim * SHRINK).max(SHRINK_FLOOR);
        }
        if is_pace_limited && !is_more {
            self.refresh(sample.now);
        } else {
            self.remember(sample.now, rate);
        }
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

    fn steer(&mut self, sample: &Sample, known: Option<f64>, measured: Option<f64>) {
        let now = sample.now;
        match self.stage {
            Stage::Start => self.stage = Stage::Cruise { since: now },
            Stage::Cruise { since } if now >= since + PROBE_EVERY => self.probe(PROBE, sample),
            Stage::Drain { until } if now >= until => self.stage = Stage::Cruise { since: now },
            Stage::Cruise { .. } | Stage::Drain { .. } => {}
            Stage::Probe { gain, since, .. } => {
                let took = now.saturating_duration_since(since);
                let found = measured
                    .zip(known)
                    .is_some_and(|(rate, known)| rate > known * FOUND_MORE);
                if found {
                    self.probe(PROBE_ON, sample);
                } else if took >= WINDOW_MIN * 2 + sample.rtt_min * PROBE_ROUNDS {
                    let drain = took.mul_f64((gain - 1.0) / (1.0 - DRAIN)).min(DRAIN_MAX);
                    self.stage = Stage::Drain { until: now + drain };
                }
            }
        }
    }

    fn probe(&mut self, gain: f64, sample: &Sample) {
        self.window = None;
        self.stage = Stage::Probe {
            gain,
            since: sample.now,
            counts_from: sample.now + sample.rtt_min,
        };
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
