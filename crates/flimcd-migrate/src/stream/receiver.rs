//! The receiving direction of a stream.

use std::collections::VecDeque;

use bytes::Bytes;
use flimcd_core::Time;

use super::{ACK_BYTES, ACK_DELAY, Delivery, StreamError, WINDOW_BYTES, cost};

/// See the module above.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// Whether anything may be said.
    is_up: bool,
    /// Nothing has been acknowledged on this link yet.
    is_greeting: bool,
    /// Everything below is with the hypervisor.
    delivered: u64,
    /// Parts from `delivered` on. The first of them may be on its way to the hypervisor.
    queue: VecDeque<Bytes>,
    queued_cost: usize,
    is_delivering: bool,
    /// Number of the end, when it has come.
    end: Option<u64>,
    /// Delivered and not acknowledged.
    unacked_bytes: usize,
    /// When it has to be.
    ack_at: Option<Time>,
    delivered_bytes: u64,
    #[cfg(test)]
    pub(super) broken: Option<super::tests::Mutation>,
}

impl Receiver {
    pub(super) fn handle_link_up(&mut self) {
        self.is_up = true;
        self.is_greeting = true;
    }

    pub(super) fn handle_link_down(&mut self) {
        self.is_up = false;
    }

    /// The number that comes next, the end counted.
    fn expected(&self) -> u64 {
        match self.end {
            Some(end) => end + 1,
            None => self.delivered + self.queue.len() as u64,
        }
    }

    pub(super) fn handle_part(
        &mut self,
        stream: u8,
        seq: u64,
        payload: &[u8],
    ) -> Result<(), StreamError> {
        if self.end.is_some_and(|end| seq >= end) {
            return Err(StreamError::AfterEnd { stream, got: seq });
        }
        let expected = self.expected();
        #[cfg(test)]
        let expected = match self.broken {
            Some(super::tests::Mutation::TakeTwice) => seq,
            _ => expected,
        };
        if seq < expected {
            return Ok(());
        }
        if seq > expected {
            let got = seq;
            return Err(StreamError::Gap {
                stream,
                got,
                expected,
            });
        }
        // A copy, since the payload may hold a far larger buffer of the link's.
        let part = Bytes::copy_from_slice(payload);
        if self.queued_cost + cost(&part) > WINDOW_BYTES {
            return Err(StreamError::Window { stream });
        }
        self.queued_cost += cost(&part);
        self.queue.push_back(part);
        Ok(())
    }

    pub(super) fn handle_end(&mut self, stream: u8, seq: u64) -> Result<(), StreamError> {
        let expected = self.expected();
        match self.end {
            Some(end) if end == seq => Ok(()),
            Some(_) => Err(StreamError::AfterEnd { stream, got: seq }),
            None if seq == expected => {
                self.end = Some(seq);
                Ok(())
            }
            None => Err(StreamError::Gap {
                stream,
                got: seq,
                expected,
            }),
        }
    }

    pub(super) fn has_delivery(&self) -> bool {
        let has_end = self.end == Some(self.delivered);
        !self.is_delivering && (has_end || !self.queue.is_empty())
    }

    pub(super) fn poll_delivery(&mut self) -> Option<Delivery> {
        if self.is_delivering {
            return None;
        }
        let delivery = match self.queue.front() {
            Some(part) => Delivery::Part(part.clone()),
            None if self.end == Some(self.delivered) => Delivery::End,
            None => return None,
        };
        self.is_delivering = true;
        Some(delivery)
    }

    pub(super) fn handle_delivered(&mut self, now: Time) {
        assert!(self.is_delivering, "nothing was being delivered");
        self.is_delivering = false;
        self.delivered += 1;
        let ack_at = match self.queue.pop_front() {
            Some(part) => {
                self.queued_cost -= cost(&part);
                self.delivered_bytes += part.len() as u64;
                self.unacked_bytes += part.len();
                if self.unacked_bytes >= ACK_BYTES {
                    now
                } else {
                    now + ACK_DELAY
                }
            }
            None => now,
        };
        self.ack_at = Some(self.ack_at.map_or(ack_at, |at| at.min(ack_at)));
    }

    /// When an acknowledgement has to go out.
    pub(super) fn ack_due(&self) -> Option<Time> {
        match self.is_up {
            true if self.is_greeting => Some(Time::ZERO),
            true => self.ack_at,
            false => None,
        }
    }

    pub(super) fn ack_is_due(&self, now: Time) -> bool {
        self.ack_due().is_some_and(|at| at <= now)
    }

    /// Everything below is acknowledged by this.
    pub(super) fn make_ack(&mut self) -> u64 {
        self.is_greeting = false;
        self.unacked_bytes = 0;
        self.ack_at = None;
        #[cfg(test)]
        if self.broken == Some(super::tests::Mutation::AckWhatIsQueued) {
            return self.expected();
        }
        self.delivered
    }

    pub(super) fn is_finished(&self) -> bool {
        self.end.is_some_and(|end| self.delivered == end + 1)
    }

    pub(super) const fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }
}
