//! The link between the two sites: lanes in order within themselves and not among each other, a rate, a delay, jitter,
//! bounded queues, directions that stall, and breaks that lose everything on the way.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use flimcd_core::Time;
use flimcd_wire::Class;

use crate::{dice::Dice, plan::NetPlan, world::Site};

/// Lanes of a direction: faults, control, and up to three for bulk.
pub(crate) const LANES: usize = 5;

/// Bytes that may wait in a lane before the machine is told that there is no room.
const QUEUE_BYTES: [u64; LANES] = [1 << 20, 4 << 20, 256 << 10, 256 << 10, 256 << 10];

/// One message, as bytes.
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    pub(crate) head: Bytes,
    pub(crate) payload: Bytes,
}

impl Parcel {
    fn len(&self) -> u64 {
        (self.head.len() + self.payload.len()) as u64
    }
}

#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Parcel>,
    waiting_bytes: u64,
    /// On the way, each with the time of its arrival.
    flying: VecDeque<(Time, Parcel)>,
    last_arrival: Time,
}

/// One way of the link, named by who sends.
#[derive(Debug, Default)]
struct Direction {
    lanes: [Lane; LANES],
    /// Something is being put on the wire.
    busy: bool,
    /// Nothing arrives before.
    stalled_until: Time,
    next_bulk: usize,
}

/// See the module.
pub(crate) struct Net {
    plan: NetPlan,
    directions: [Direction; 2],
    /// Counts connections.
    pub(crate) generation: u64,
    /// Whether there is a connection, known to the sites or not.
    pub(crate) connected: bool,
    /// Whether a site has been told of it.
    pub(crate) up: [bool; 2],
    /// What arrives at a site after this time, of a connection that broke, is lost.
    cut: [Time; 2],
}

/// What to do after something was put on the wire.
pub(crate) struct Departure {
    /// The lane it travels on.
    pub(crate) lane: usize,
    /// When it arrives.
    pub(crate) arrival: Time,
    /// When the wire is free again.
    pub(crate) free: Time,
}

impl Net {
    pub(crate) fn new(plan: NetPlan) -> Self {
        Self {
            plan,
            directions: [Direction::default(), Direction::default()],
            generation: 0,
            connected: false,
            up: [false; 2],
            cut: [Time(u64::MAX); 2],
        }
    }

    fn lane_of(&mut self, from: Site, class: Class) -> usize {
        match class {
            Class::Fault => 0,
            Class::Control => 1,
            Class::Ram | Class::Prefetch | Class::Bulk => {
                let direction = &mut self.directions[from.index()];
                direction.next_bulk = (direction.next_bulk + 1) % self.plan.bulk_lanes;
                2 + direction.next_bulk
            }
        }
    }

    /// Whether a message of this class can be taken.
    pub(crate) fn has_room(&self, from: Site, class: Class) -> bool {
        let lanes = &self.directions[from.index()].lanes;
        let free = |lane: usize| lanes[lane].waiting_bytes < QUEUE_BYTES[lane];
        match class {
            Class::Fault => free(0),
            Class::Control => free(1),
            _ => (2..2 + self.plan.bulk_lanes).all(free),
        }
    }

    /// Takes a message. True when the wire was idle and has to be started.
    pub(crate) fn send(&mut self, from: Site, class: Class, parcel: Parcel) -> bool {
        if !self.connected {
            return false;
        }
        let lane = self.lane_of(from, class);
        let direction = &mut self.directions[from.index()];
        direction.lanes[lane].waiting_bytes += parcel.len();
        direction.lanes[lane].waiting.push_back(parcel);
        !std::mem::replace(&mut direction.busy, true)
    }

    /// Puts the next message on the wire.
    pub(crate) fn depart(&mut self, from: Site, now: Time, dice: &mut Dice) -> Option<Departure> {
        let fair = dice.permille(200);
        let direction = &mut self.directions[from.index()];
        let mut filled = (0..LANES).filter(|&lane| !direction.lanes[lane].waiting.is_empty());
        // Nearly always the most urgent lane; the kernel's sockets know nothing of urgency.
        let lane = if fair {
            filled.next_back()
        } else {
            filled.next()
        };
        let Some(lane) = lane else {
            direction.busy = false;
            return None;
        };
        let lane_of = &mut direction.lanes[lane];
        let parcel = lane_of.waiting.pop_front()?;
        lane_of.waiting_bytes -= parcel.len();
        let wire_ns = (parcel.len() + 60) * 1_000_000_000 / self.plan.rate_bytes_per_sec;
        let free = now + Duration::from_nanos(wire_ns);
        let jitter_us = if dice.permille(self.plan.spike_permille) {
            self.plan.jitter_us * 20 + 5_000
        } else {
            self.plan.jitter_us
        };
        let arrival = free + self.plan.delay + dice.micros(0, jitter_us);
        let arrival = arrival.max(lane_of.last_arrival);
        lane_of.last_arrival = arrival;
        lane_of.flying.push_back((arrival, parcel));
        Some(Departure {
            lane,
            arrival,
            free,
        })
    }

    /// Until when nothing sent by `from` arrives, if that is later than now.
    pub(crate) fn stalled_until(&self, from: Site, now: Time) -> Option<Time> {
        let until = self.directions[from.index()].stalled_until;
        (until > now).then_some(until)
    }

    /// Nothing sent by `from` arrives before `until`.
    pub(crate) fn stall(&mut self, from: Site, until: Time) {
        let stalled = &mut self.directions[from.index()].stalled_until;
        *stalled = until.max(*stalled);
    }

    /// Ends all stalls.
    pub(crate) fn heal(&mut self) {
        for direction in &mut self.directions {
            direction.stalled_until = Time::ZERO;
        }
    }

    /// The next message of a lane arrives; `None` when it is lost.
    pub(crate) fn arrive(&mut self, from: Site, lane: usize, now: Time) -> Option<Parcel> {
        let (_, parcel) = self.directions[from.index()].lanes[lane]
            .flying
            .pop_front()?;
        let to = from.other().index();
        (self.up[to] && now <= self.cut[to]).then_some(parcel)
    }

    /// The connection breaks. What is on the way to a site arrives until `cut`.
    pub(crate) fn disconnect(&mut self, cut: [Time; 2]) {
        self.connected = false;
        self.cut = cut;
        for direction in &mut self.directions {
            direction.busy = false;
            for lane in &mut direction.lanes {
                lane.waiting.clear();
                lane.waiting_bytes = 0;
            }
        }
    }

    /// There is a new connection, of which the sites hear at `up_at`.
    pub(crate) fn connect(&mut self, up_at: [Time; 2]) {
        self.generation += 1;
        self.connected = true;
        self.cut = [Time(u64::MAX); 2];
        for from in Site::BOTH {
            let direction = &mut self.directions[from.index()];
            for lane in &mut direction.lanes {
                lane.flying.clear();
                lane.last_arrival = up_at[from.other().index()];
            }
        }
    }

    /// The rate and twice the delay.
    pub(crate) fn estimate(&self) -> (u64, Duration) {
        (self.plan.rate_bytes_per_sec, self.plan.delay * 2)
    }
}
