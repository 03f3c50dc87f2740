//! Reads before the switch, on their way between the drivers: see `flimcd_volume::rules`.
//!
//! They go beside the machines, which know nothing of them: a question changes nothing on either side. Numbers on the wire
//! are the asking driver's; a question is asked anew, under a new number, after every link-up, and the answering
//! driver drops what it has read for an earlier link.

use bytes::Bytes;
use flimcd_core::BlockRange;
use flimcd_wire::{Class, Message};
use std::collections::{HashMap, VecDeque};

use super::volumes::{PeekId, VolumeSet};

/// Questions under way at once, of all volumes of a migration: 16 MiB of answers.
const ASKED_MAX: usize = 16;

/// The target's part.
#[derive(Default)]
pub(crate) struct Asking {
    last: u64,
    /// What the source has been asked, or will be.
    open: HashMap<u64, PeekId>,
    unsent: VecDeque<Message>,
}

impl Asking {
    /// Takes the volumes' questions.
    pub(crate) fn take(&mut self, volumes: &VolumeSet) {
        while self.open.len() < ASKED_MAX
            && let Some((id, range)) = volumes.poll_peek()
        {
            self.last += 1;
            let number = self.last;
            self.open.insert(number, id);
            self.unsent.push_back(Message::Peek { number, range });
        }
    }

    /// The link is up: what an earlier one carried is lost.
    pub(crate) fn handle_link_up(&mut self, volumes: &VolumeSet) {
        self.open.clear();
        self.unsent.clear();
        volumes.requeue_peeks();
        self.take(volumes);
    }

    /// An answer; nothing happens when it is not waited for.
    pub(crate) fn handle_peeked(&mut self, volumes: &VolumeSet, number: u64, payload: &Bytes) {
        if let Some(id) = self.open.remove(&number) {
            volumes.answer_peek(id, (!payload.is_empty()).then_some(payload));
            self.take(volumes);
        }
    }

    /// What to send next.
    pub(crate) fn poll(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        poll(&mut self.unsent, has_room)
    }
}

/// The source's part.
#[derive(Default)]
pub(crate) struct Answering {
    /// Counts link-ups.
    link: u64,
    /// Questions whose blocks are being read.
    reading: usize,
    unsent: VecDeque<Message>,
}

/// A question that may be read for: with the result it goes to [`Answering::handle_read`].
pub(crate) struct Question {
    pub(crate) number: u64,
    pub(crate) range: BlockRange,
    link: u64,
}

impl Answering {
    /// The link is up: nobody waits for what was asked before.
    pub(crate) fn handle_link_up(&mut self) {
        self.link += 1;
        self.unsent.clear();
    }

    /// The target asks; `None` when it has asked for more than it may. A target that keeps to its own limit
    /// never does.
    pub(crate) fn handle_peek(&mut self, number: u64, range: BlockRange) -> Option<Question> {
        if self.reading + self.unsent.len() >= 2 * ASKED_MAX {
            return None;
        }
        self.reading += 1;
        let link = self.link;
        Some(Question {
            number,
            range,
            link,
        })
    }

    /// The blocks were read; `None` if they could not be.
    pub(crate) fn handle_read(&mut self, question: &Question, bytes: Option<Bytes>) {
        self.reading -= 1;
        if question.link == self.link {
            self.unsent.push_back(Message::Peeked {
                number: question.number,
                payload: bytes.unwrap_or_default(),
            });
        }
    }

    /// What to send next.
    pub(crate) fn poll(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        poll(&mut self.unsent, has_room)
    }
}

fn poll(
    unsent: &mut VecDeque<Message>,
    has_room: &dyn Fn(Class) -> bool,
) -> Option<(Class, Message)> {
    if unsent.is_empty() || !has_room(Class::Fault) {
        return None;
    }
    Some((Class::Fault, unsent.pop_front()?))
}
