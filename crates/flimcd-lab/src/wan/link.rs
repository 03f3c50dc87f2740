//! One direction of a link as a pure function of arrivals: packet length and time in, departure
//! time or drop out. No clock, no I/O; both front ends and any simulation share it.

use std::time::Duration;

use flimcd_core::Time;
use serde::Serialize;

use super::LinkModel;
use crate::rng::Rng;

/// How much longer a packet takes that others are to overtake, at the least.
const HOLD_BACK_MIN: Duration = Duration::from_millis(1);
/// How many full-size packets overtake it when the link is busy.
const HOLD_BACK_PACKETS: u64 = 4;
/// Length of the packets that count for that.
const FULL_PACKET_BYTES: u64 = 1500;

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It arrives at the other end at this time.
    Deliver(Time),
    /// It never arrives.
    Drop(DropCause),
}

/// Why a packet never arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropCause {
    /// The queue had no room.
    Queue,
    /// Lost at random on the way.
    Loss,
    /// The link is cut.
    Cut,
}

/// What one direction of a link did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkCounters {
    /// Packets (or segments, in the TCP relay) that were let through.
    pub packets: u64,
    /// Bytes that were let through.
    pub bytes: u64,
    /// Packets dropped because the queue was full.
    pub dropped_queue: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
    /// Packets that came while the link was cut.
    pub dropped_cut: u64,
    /// Most bytes that waited at once.
    pub queue_bytes_max: u64,
}

/// One direction of a link.
///
/// The caller offers packets in order of arrival, with times that never go back, and delivers
/// each at the time of its verdict.
#[derive(Clone, Debug)]
pub struct Link {
    model: LinkModel,
    rng: Rng,
    is_cut: bool,
    /// When everything accepted so far has been sent.
    free_at: Time,
    /// Latest delivery so far: jitter never takes a packet past its predecessor.
    last_delivery: Time,
    counters: LinkCounters,
}

impl Link {
    /// A link with nothing on it; `seed` decides which packets are lost, late or held back.
    #[must_use]
    pub fn new(model: LinkModel, seed: u64) -> Self {
        Self {
            model,
            rng: Rng::new(seed),
            is_cut: false,
            free_at: Time::ZERO,
            last_delivery: Time::ZERO,
            counters: LinkCounters::default(),
        }
    }

    /// The model in force.
    #[must_use]
    pub const fn model(&self) -> &LinkModel {
        &self.model
    }

    /// Changes the model from now on; what is on its way arrives as decided before, and what
    /// waits keeps its turn.
    pub fn set_model(&mut self, model: LinkModel) {
        self.model = model;
    }

    /// Cuts the link (every packet is dropped) or joins it again.
    pub const fn set_cut(&mut self, is_cut: bool) {
        self.is_cut = is_cut;
    }

    /// Whether the link is cut.
    #[must_use]
    pub const fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// What went through and what did not.
    #[must_use]
    pub const fn counters(&self) -> LinkCounters {
        self.counters
    }

    /// Bytes that wait to be sent at `now`.
    #[must_use]
    pub fn backlog_bytes(&self, now: Time) -> u64 {
        let waiting = self.free_at.since(now).as_nanos() * u128::from(self.model.rate_bits_per_sec);
        u64::try_from(waiting.div_ceil(8_000_000_000)).unwrap_or(u64::MAX)
    }

    /// From when on a packet of `len` bytes finds room; `now` or earlier if it does already. An
    /// empty queue takes any packet, so that a small queue never blocks for ever.
    #[must_use]
    pub fn room_at(&self, len: u64) -> Time {
        self.drained_at(self.model.queue_limit_bytes().saturating_sub(len))
    }

    /// From when on no more than `bytes` wait, if nothing is added.
    #[must_use]
    pub fn drained_at(&self, bytes: u64) -> Time {
        let drain = u64::try_from(self.model.transmission(bytes).as_nanos()).unwrap_or(u64::MAX);
        Time(self.free_at.0.saturating_sub(drain))
    }

    /// Decides about a packet of `len` bytes that arrives at `now`.
    pub fn offer(&mut self, now: Time, len: u64) -> Verdict {
        if self.is_cut {
            self.counters.dropped_cut += 1;
            return Verdict::Drop(DropCause::Cut);
        }
        let backlog = self.backlog_bytes(now);
        if backlog > 0 && backlog + len > self.model.queue_limit_bytes() {
            self.counters.dropped_queue += 1;
            return Verdict::Drop(DropCause::Queue);
        }
        self.counters.queue_bytes_max = self.counters.queue_bytes_max.max(backlog + len);
        self.free_at = self.free_at.max(now) + self.model.transmission(len);
        // A packet that gets lost on the way has used the link all the same.
        if self.rng.chance(self.model.loss) {
            self.counters.dropped_loss += 1;
            return Verdict::Drop(DropCause::Loss);
        }
        self.counters.packets += 1;
        self.counters.bytes += len;
        let arrival = self.free_at + self.propagation();
        if self.rng.chance(self.model.reorder) {
            let overtakers = self
                .model
                .transmission(HOLD_BACK_PACKETS * FULL_PACKET_BYTES);
            return Verdict::Deliver(arrival + overtakers.max(HOLD_BACK_MIN));
        }
        self.last_delivery = self.last_delivery.max(arrival);
        Verdict::Deliver(self.last_delivery)
    }

    /// Delay of one packet, with its share of the jitter.
    fn propagation(&mut self) -> Duration {
        if self.model.jitter.is_zero() {
            return self.model.delay;
        }
        let spread = u64::try_from(self.model.jitter.as_nanos()).unwrap_or(u64::MAX / 4);
        let shift = self.rng.below(spread * 2 + 1);
        (self.model.delay + Duration::from_nanos(shift)).saturating_sub(self.model.jitter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn link(text: &str) -> Link {
        Link::new(text.parse().unwrap(), 7)
    }

    fn delivery(verdict: Verdict) -> Time {
        match verdict {
            Verdict::Deliver(at) => at,
            Verdict::Drop(cause) => panic!("dropped: {cause:?}"),
        }
    }

    #[test]
    fn an_empty_link_adds_transmission_and_delay() {
        let mut link = link("8mbit,40ms"); // 1 byte per µs
        assert_eq!(delivery(link.offer(Time(0), 1000)), Time(21 * MS));
        // The second waits for the first, the third comes late enough not to.
        assert_eq!(delivery(link.offer(Time(0), 1000)), Time(22 * MS));
        assert_eq!(link.backlog_bytes(Time(MS)), 1000);
        assert_eq!(delivery(link.offer(Time(10 * MS), 1000)), Time(31 * MS));
    }

    #[test]
    fn the_queue_is_bounded_and_drains_at_the_rate() {
        let mut link = link("8mbit,40ms,queue=10KB");
        let accepted = (0..30)
            .filter(|_| matches!(link.offer(Time(0), 1000), Verdict::Deliver(_)))
            .count();
        assert_eq!(accepted, 10);
        assert_eq!(link.counters().dropped_queue, 20);
        assert_eq!(link.counters().queue_bytes_max, 10_000);
        assert_eq!(link.room_at(1000), Time(MS));
        assert_eq!(
            link.offer(Time(MS - 1), 1000),
            Verdict::Drop(DropCause::Queue)
        );
        assert_eq!(delivery(link.offer(Time(MS), 1000)), Time(31 * MS));
    }

    #[test]
    fn a_packet_larger_than_the_queue_passes_an_idle_link() {
        let mut link = link("8mbit,0.2ms,queue=100B");
        assert_eq!(delivery(link.offer(Time(0), 5000)), Time(5 * MS + MS / 10));
        assert_eq!(link.offer(Time(0), 1), Verdict::Drop(DropCause::Queue));
    }

    #[test]
    fn goodput_under_saturation_is_the_rate() {
        let mut link = link("200mbit,40ms");
        let mut last = Time(0);
        for i in 0..100_000u64 {
            if let Verdict::Deliver(at) = link.offer(Time(i * 30_000), 1500) {
                last = last.max(at);
            }
        }
        let sent = link.counters().bytes as f64 * 8.0 / (last.0 - 20 * MS) as f64 * 1e9;
        assert!((sent / 200e6 - 1.0).abs() < 0.001, "{sent}");
    }

    #[test]
    fn loss_is_random_at_the_stated_share_and_repeatable() {
        let run = || {
            let mut link = link("1gbit,1ms,loss=1%,queue=1GB");
            let lost: Vec<u64> = (0..100_000)
                .filter(|i| link.offer(Time(i * 20_000), 1500) == Verdict::Drop(DropCause::Loss))
                .collect();
            lost
        };
        let lost = run();
        assert!((900..1100).contains(&lost.len()), "{}", lost.len());
        assert_eq!(lost, run());
    }

    #[test]
    fn jitter_stays_in_its_band_and_keeps_order() {
        let mut link = link("1gbit,40ms,jitter=3ms");
        let mut last = Time(0);
        let mut spread = (u64::MAX, 0);
        for i in 0..10_000u64 {
            let sent = Time(i * 10 * MS);
            let at = delivery(link.offer(sent, 125));
            assert!(at >= last);
            last = at;
            let took = at.0 - sent.0;
            spread = (spread.0.min(took), spread.1.max(took));
        }
        assert!(spread.0 >= 17 * MS && spread.0 < 18 * MS, "{spread:?}");
        assert!(
            spread.1 <= 23 * MS + 1000 && spread.1 > 22 * MS,
            "{spread:?}"
        );
    }

    #[test]
    fn reordering_lets_later_packets_overtake() {
        let mut link = link("100mbit,10ms,reorder=5%");
        let times: Vec<Time> = (0..1000)
            .map(|i| delivery(link.offer(Time(i * 200_000), 1500)))
            .collect();
        let overtaken = times.windows(2).filter(|pair| pair[1] < pair[0]).count();
        assert!((25..90).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn a_cut_link_drops_until_it_is_joined() {
        let mut link = link("8mbit,2ms");
        link.set_cut(true);
        assert_eq!(link.offer(Time(0), 100), Verdict::Drop(DropCause::Cut));
        link.set_cut(false);
        assert_eq!(delivery(link.offer(Time(0), 1000)), Time(2 * MS));
        assert_eq!(link.counters().dropped_cut, 1);
    }
}
