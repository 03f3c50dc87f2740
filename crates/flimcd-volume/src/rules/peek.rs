//! Reads before the switch: questions to the source.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use flimcd_core::{BlockRange, limits::MAX_BLOCKS_PER_MESSAGE};

use super::{Admission, GuestOp, Mode, Refusal, Rules, Ticket, ops::State};

/// Questions that are with the source at once: with the longest, 16 MiB of answers.
const ASKED_MAX: usize = 16;

/// A question to the source: what stands in these blocks now?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Its number, never used again.
    pub number: u64,
    /// At most [`MAX_BLOCKS_PER_MESSAGE`] blocks.
    pub range: BlockRange,
}

/// An answer that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Whose read it is.
    pub ticket: Ticket,
    /// The blocks it was about.
    pub range: BlockRange,
}

/// What was asked and has to be asked.
#[derive(Debug, Default)]
pub(super) struct Peeks {
    /// Whether reads before the switch are answered by the source at all.
    pub(super) is_on: bool,
    last: u64,
    open: BTreeMap<u64, Answered>,
    /// Of those, the ones that have to be asked.
    waiting: VecDeque<u64>,
    /// Of those, the ones that the source has.
    asked: BTreeSet<u64>,
    /// Questions that a read still waits for.
    left: HashMap<Ticket, usize>,
}

impl Peeks {
    fn add(&mut self, ticket: Ticket, blocks: BlockRange) {
        let mut start = blocks.start;
        let mut count = 0;
        while start < blocks.end {
            let end = blocks.end.min(start + MAX_BLOCKS_PER_MESSAGE);
            let range = BlockRange::new(start, end);
            self.last += 1;
            self.open.insert(self.last, Answered { ticket, range });
            self.waiting.push_back(self.last);
            count += 1;
            start = end;
        }
        self.left.insert(ticket, count);
    }

    /// Forgets what a read wanted to know.
    pub(super) fn forget(&mut self, ticket: Ticket) {
        if self.left.remove(&ticket).is_some() {
            self.open.retain(|_, peek| peek.ticket != ticket);
            let open = &self.open;
            self.waiting.retain(|number| open.contains_key(number));
            self.asked.retain(|number| open.contains_key(number));
        }
    }

    pub(super) fn clear(&mut self) {
        self.open.clear();
        self.waiting.clear();
        self.asked.clear();
        self.left.clear();
    }

    pub(super) fn has_output(&self) -> bool {
        !self.waiting.is_empty() && self.asked.len() < ASKED_MAX
    }

    pub(super) fn memory_bytes(&self) -> usize {
        const ENTRY: usize = size_of::<(u64, Answered)>() + 3 * size_of::<u64>();
        self.open.len() * ENTRY + self.left.capacity() * size_of::<(Ticket, usize)>()
    }
}

impl Rules {
    /// Whether a read before the switch is answered with what the source has, and a write refused; else
    /// both wait for the switch. Requests that wait are decided again.
    pub fn set_peeking(&mut self, is_on: bool) {
        if self.peeks.is_on == is_on {
            return;
        }
        self.peeks.is_on = is_on;
        if self.mode != Mode::Incoming {
            return;
        }
        self.peeks.clear();
        if is_on {
            for ticket in std::mem::take(&mut self.parked) {
                if self.peek(ticket) {
                    self.parked.push(ticket);
                } else {
                    self.answer(ticket, Admission::Refused(Refusal::NotHere));
                }
            }
        }
    }

    /// Whether reads are answered by the source now.
    #[must_use]
    pub fn is_peeking(&self) -> bool {
        self.mode == Mode::Incoming && self.peeks.is_on
    }

    /// Asks the source for a parked read; false for anything but a read.
    pub(super) fn peek(&mut self, ticket: Ticket) -> bool {
        let op = self.ops.op_mut(ticket);
        if op.kind != GuestOp::Read {
            return false;
        }
        // Whatever comes of it: it was no read of the guest that runs here.
        op.missed = true;
        self.stats.peeks += 1;
        let blocks = op.blocks_touched();
        self.peeks.add(ticket, blocks);
        true
    }

    /// Ends a parked request without I/O. The caller has taken it out of `parked`.
    fn answer(&mut self, ticket: Ticket, admission: Admission) {
        self.ops.remove(ticket, State::Parked);
        self.woken.push_back((ticket, admission));
    }

    /// The next question for the source, unless enough are with it. Each is given once, until
    /// [`requeue_peeks`](Self::requeue_peeks).
    pub fn poll_peek(&mut self) -> Option<Peek> {
        if !self.peeks.has_output() {
            return None;
        }
        let number = self.peeks.waiting.pop_front()?;
        self.peeks.asked.insert(number);
        let range = self.peeks.open.get(&number)?.range;
        Some(Peek { number, range })
    }

    /// Whether [`poll_peek`](Self::poll_peek) has something.
    #[must_use]
    pub fn has_peeks(&self) -> bool {
        self.peeks.has_output()
    }

    /// The read that waits for the answer to `number`, and the blocks; `None` when it is not wanted any more.
    #[must_use]
    pub fn peeked(&self, number: u64) -> Option<Answered> {
        self.peeks.open.get(&number).copied()
    }

    /// The answer to a question is here; `ok` says whether the source could read the blocks. With the last of its
    /// answers a read ends as [`Admission::Answered`], with a bad one as refused. An answer that is not wanted
    /// changes nothing.
    pub fn end_peek(&mut self, number: u64, ok: bool) {
        let Some(Answered { ticket, .. }) = self.peeks.open.remove(&number) else {
            return;
        };
        self.peeks.asked.remove(&number);
        self.peeks.waiting.retain(|waiting| *waiting != number);
        let left = self.peeks.left.get(&ticket).copied().unwrap_or(1) - 1;
        if ok && left > 0 {
            self.peeks.left.insert(ticket, left);
            return;
        }
        self.peeks.forget(ticket);
        self.parked.retain(|parked| *parked != ticket);
        let admission = if ok {
            Admission::Answered
        } else {
            Admission::Refused(Refusal::Unreadable)
        };
        self.answer(ticket, admission);
    }

    /// Asks every open question again, because questions or answers may be lost with a link.
    pub fn requeue_peeks(&mut self) {
        let peeks = &mut self.peeks;
        peeks.asked.clear();
        peeks.waiting = peeks.open.keys().copied().collect();
    }
}
