//! The sending direction of a stream.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{StreamError, UNSENT_BYTES_MAX, WINDOW_BYTES, cost};

/// How far the link can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Link {
    #[default]
    Down,
    /// Up, and the other side has not said where to go on.
    Waiting,
    Ready,
}

/// See the module above.
#[derive(Debug, Default)]
pub(super) struct Sender {
    link: Link,
    /// Number of the first part in `kept`: everything below is acknowledged.
    acked: u64,
    kept: VecDeque<Bytes>,
    kept_cost: usize,
    /// What goes next; between `acked` and the last number.
    next: u64,
    /// Cost of what is kept from `next` on.
    unsent_cost: usize,
    /// Everything below was sent once.
    sent_max: u64,
    /// Number of the end, when there is one.
    end: Option<u64>,
    pushed_bytes: u64,
    acked_bytes: u64,
    #[cfg(test)]
    pub(super) broken: Option<super::tests::Mutation>,
}

impl Sender {
    /// The number after everything there is to send so far, the end counted.
    fn numbered(&self) -> u64 {
        match self.end {
            Some(end) => end + 1,
            None => self.acked + self.kept.len() as u64,
        }
    }

    pub(super) fn handle_link_up(&mut self) {
        self.link = Link::Waiting;
    }

    pub(super) fn handle_link_down(&mut self) {
        self.link = Link::Down;
    }

    pub(super) fn wants_more(&self) -> bool {
        self.end.is_none()
            && self.kept_cost < WINDOW_BYTES - cost_max()
            && self.unsent_cost < UNSENT_BYTES_MAX
    }

    pub(super) fn push(&mut self, part: Bytes) {
        assert!(self.end.is_none(), "a part after the end");
        self.pushed_bytes += part.len() as u64;
        self.kept_cost += cost(&part);
        self.unsent_cost += cost(&part);
        self.kept.push_back(part);
    }

    pub(super) fn push_end(&mut self) {
        if self.end.is_none() {
            self.end = Some(self.numbered());
        }
    }

    /// The other side has everything below `next`.
    pub(super) fn handle_ack(&mut self, stream: u8, next: u64) -> Result<(), StreamError> {
        if next < self.acked || next > self.sent_max {
            return Err(StreamError::Ack { stream, next });
        }
        while self.acked < next {
            if let Some(part) = self.kept.pop_front() {
                self.kept_cost -= cost(&part);
                self.acked_bytes += part.len() as u64;
                if self.acked >= self.next {
                    self.unsent_cost -= cost(&part);
                }
            }
            self.acked += 1;
        }
        match self.link {
            Link::Down => {}
            Link::Waiting => {
                self.link = Link::Ready;
                #[cfg(test)]
                if self.broken == Some(super::tests::Mutation::GoOnWithoutSendingAgain) {
                    return Ok(());
                }
                self.next = next;
                self.unsent_cost = self.kept_cost;
            }
            Link::Ready => self.next = self.next.max(next),
        }
        Ok(())
    }

    pub(super) fn has_next(&self) -> bool {
        self.link == Link::Ready && self.next < self.numbered()
    }

    /// What goes next: a part, or the end.
    pub(super) fn take_next(&mut self) -> Option<(u64, Option<Bytes>)> {
        if !self.has_next() {
            return None;
        }
        let seq = self.next;
        let at = usize::try_from(seq - self.acked).ok()?;
        let part = self.kept.get(at).cloned();
        if let Some(part) = &part {
            self.unsent_cost -= cost(part);
        }
        self.next += 1;
        self.sent_max = self.sent_max.max(self.next);
        Some((seq, part))
    }

    pub(super) fn is_finished(&self) -> bool {
        self.end.is_some_and(|end| self.acked == end + 1)
    }

    pub(super) const fn pushed_bytes(&self) -> u64 {
        self.pushed_bytes
    }

    pub(super) const fn acked_bytes(&self) -> u64 {
        self.acked_bytes
    }
}

/// Most that one part costs.
const fn cost_max() -> usize {
    flimcd_core::limits::MAX_VM_PART_BYTES + super::PART_OVERHEAD_BYTES
}
