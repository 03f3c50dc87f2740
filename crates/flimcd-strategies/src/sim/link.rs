//! The link between the sites in virtual time.
//!
//! A sender puts its most urgent message on the wire, a piece at a time (a millisecond's worth), so that what is urgent waits
//! for a piece at most. Before the wire each class has a short queue, as a socket with little unsent data has. A piece arrives
//! after half the round trip and what stands in the bottleneck's queue: next to nothing while bulk is paced, else
//! [`STANDING_QUEUE`], since a congestion control fills it. Loss costs goodput and no more, as measured with BBR.

use std::{collections::VecDeque, time::Duration};

use flimcd_core::Time;
use flimcd_wire::{Body, Class, Frame, Message};

use crate::LinkModel;

/// Bytes before the wire, by class, beyond which a machine is told that there is no room.
const QUEUE_BYTES: [(Class, u64); 5] = [
    (Class::Fault, 1 << 20),
    (Class::Control, 4 << 20),
    (Class::Ram, 256 << 10),
    (Class::Prefetch, 128 << 10),
    (Class::Bulk, 128 << 10),
];
/// Part of a round trip that bulk that is not paced keeps in the bottleneck's queue: a fault took 54 to 74 ms on a path of 40 ms.
const STANDING_QUEUE: f64 = 0.5;
/// And bulk that is: 42 to 46 ms.
const PACED_QUEUE: f64 = 0.05;
/// What is left of the rate for content: headers of TCP, IP and TLS, and what the congestion control leaves.
const GOODPUT: f64 = 0.937;
/// Goodput that a share of lost packets costs: 2.5 points at 0.1%.
const LOSS_COST: f64 = 25.0;
/// Part of the rate that bulk gets while it is paced.
const PACED_SHARE: f64 = 0.95;

struct Waiting {
    message: Message,
    bytes_left: u64,
}

/// One way of the link.
pub(super) struct Direction {
    queues: [VecDeque<Waiting>; 5],
    queued: [u64; 5],
    is_busy: bool,
    /// The piece on the wire.
    class: usize,
    piece: u64,
    last_arrival: [Time; 5],
    /// When bulk was last put on the wire.
    bulk_at: Option<Time>,
    pub(super) is_paced: bool,
    bytes_per_sec: f64,
    model: LinkModel,
    jitter: u64,
    /// Bytes put on the wire, with their headers.
    pub(super) bytes: u64,
}

/// A message that has left.
pub(super) struct Departed {
    pub(super) arrival: Time,
    pub(super) class: Class,
    pub(super) message: Message,
}

impl Direction {
    pub(super) fn new(model: LinkModel, seed: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = model.rate_bits_per_sec as f64 / 8.0;
        let goodput = (GOODPUT - LOSS_COST * model.loss).max(0.1);
        Self {
            queues: Default::default(),
            queued: [0; 5],
            is_busy: false,
            class: 0,
            piece: 0,
            last_arrival: [Time::ZERO; 5],
            bulk_at: None,
            is_paced: false,
            bytes_per_sec: rate * goodput,
            model,
            jitter: seed,
            bytes: 0,
        }
    }

    /// What the link delivers, as it would be measured.
    pub(super) fn goodput(&self) -> f64 {
        self.bytes_per_sec
    }

    pub(super) fn has_room(&self, class: Class) -> bool {
        let (_, room) = QUEUE_BYTES[index(class)];
        self.queued[index(class)] < room
    }

    /// Takes a message. True when the wire has to be started.
    pub(super) fn send(&mut self, class: Class, message: Message) -> bool {
        let frame = Frame {
            migration: flimcd_core::MigrationId(1),
            class,
            message,
        };
        let body = Body::Frame(frame);
        let bytes = flimcd_wire::encode(&body).len() as u64;
        let Body::Frame(Frame { message, .. }) = body else {
            unreachable!("it was made above")
        };
        self.queued[index(class)] += bytes;
        self.queues[index(class)].push_back(Waiting {
            message,
            bytes_left: bytes,
        });
        !std::mem::replace(&mut self.is_busy, true)
    }

    /// Puts the next piece on the wire; `None` when there is none. The answer is when it has left.
    pub(super) fn next_piece(&mut self, now: Time) -> Option<Time> {
        let class = (0..5).find(|&class| !self.queues[class].is_empty());
        let Some(class) = class else {
            self.is_busy = false;
            return None;
        };
        let is_bulk = class >= index(Class::Prefetch);
        let rate = if is_bulk && self.is_paced {
            self.bytes_per_sec * PACED_SHARE
        } else {
            self.bytes_per_sec
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive rate"
        )]
        let piece_max = (rate / 1000.0).max(1500.0) as u64;
        let waiting = self.queues[class].front_mut()?;
        let piece = waiting.bytes_left.min(piece_max);
        waiting.bytes_left -= piece;
        self.queued[class] -= piece;
        (self.class, self.piece) = (class, piece);
        if is_bulk {
            self.bulk_at = Some(now);
        }
        self.bytes += piece;
        #[expect(clippy::cast_precision_loss, reason = "a piece is small")]
        let takes = Duration::from_secs_f64(piece as f64 / rate);
        Some(now + takes)
    }

    /// The piece has left, and with it perhaps its message.
    pub(super) fn departed(&mut self, now: Time) -> Option<Departed> {
        let queue = &mut self.queues[self.class];
        if queue.front()?.bytes_left > 0 {
            return None;
        }
        let waiting = queue.pop_front()?;
        let rtt = Duration::from_secs_f64(self.model.rtt_ms / 1000.0);
        let bulk_is_near = self.bulk_at.is_some_and(|at| now.since(at) < rtt);
        let queue_share = match (bulk_is_near, self.is_paced) {
            (false, _) => 0.0,
            (true, true) => PACED_QUEUE,
            (true, false) => STANDING_QUEUE,
        };
        self.jitter = super::content::mix(self.jitter);
        #[expect(clippy::cast_precision_loss, reason = "53 bits")]
        let jitter_ms = self.model.jitter_ms * (self.jitter >> 11) as f64 / (1u64 << 53) as f64;
        let late = rtt.mul_f64(0.5 + queue_share) + Duration::from_secs_f64(jitter_ms / 1000.0);
        let arrival = (now + late).max(self.last_arrival[self.class]);
        self.last_arrival[self.class] = arrival;
        Some(Departed {
            arrival,
            class: QUEUE_BYTES[self.class].0,
            message: waiting.message,
        })
    }
}

const fn index(class: Class) -> usize {
    class as usize - 1
}
