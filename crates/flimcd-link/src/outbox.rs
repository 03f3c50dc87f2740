//! Frames that wait to be sent: one bounded queue per class, shared by the lanes that carry it.
//!
//! What goes next is decided by the lane that has room, at the moment it has room. The queues belong
//! to one generation; when it ends they are emptied, and nothing that was meant for it is sent later.
//! They open when the consumer has *seen* the generation's `Up`, so that whoever answers to events in
//! order never sends into a generation it does not know of.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use flimcd_wire::{Body, Class, Encoded, Frame, LinkMessage, encode};
use tokio::sync::Notify;

use crate::lane::{self, CONTROL};

/// Pings and pongs that wait at most; a peer that floods pings gets fewer answers.
const LINK_MESSAGES_MAX: usize = 16;
/// Lanes there can be: control, faults, bulk.
pub(crate) const LANES_MAX: usize = 2 + crate::config::BULK_CONNECTIONS_MAX as usize;

/// Why a frame was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SendError {
    /// The class's queue is full; here is the frame again. Wait for room.
    #[error("the queue of this class is full")]
    Full(Box<Frame>),
    /// The link is down, or its `Up` was not seen yet, or the generation asked for is over.
    #[error("the link is down")]
    Down,
}

/// See the module.
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
    /// Per lane: there may be something to send.
    work: [Notify; LANES_MAX],
    /// Some queue has room, or opened.
    room: Notify,
}

struct Inner {
    /// The generation that frames are taken for.
    open: Option<u64>,
    queues: [VecDeque<Encoded>; Class::ALL.len()],
    queued_bytes: [usize; Class::ALL.len()],
    bulk_limit: usize,
    ram_limit: usize,
    link: VecDeque<LinkMessage>,
}

pub(crate) const fn slot(class: Class) -> usize {
    class as usize - 1
}

impl Inner {
    /// Bytes in a queue from which on it is full.
    fn limit(&self, class: Class) -> usize {
        match class {
            Class::Fault | Class::Control => 4 << 20,
            Class::Ram => self.ram_limit,
            Class::Prefetch | Class::Bulk => self.bulk_limit,
        }
    }

    fn has_room(&self, class: Class) -> bool {
        self.queued_bytes[slot(class)] < self.limit(class)
    }
}

impl Outbox {
    pub(crate) const BULK_LIMIT_MIN: usize = 256 * 1024;
    pub(crate) const BULK_LIMIT_MAX: usize = 4 << 20;
    /// Less than for bulk: what waits here when a guest is stopped makes it stand longer.
    const RAM_LIMIT_MIN: usize = 64 * 1024;
    const RAM_LIMIT_MAX: usize = 1 << 20;

    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                open: None,
                queues: Default::default(),
                queued_bytes: [0; Class::ALL.len()],
                bulk_limit: Self::BULK_LIMIT_MIN,
                ram_limit: Self::RAM_LIMIT_MIN,
                link: VecDeque::new(),
            }),
            work: Default::default(),
            room: Notify::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes frames for `generation` from now on.
    pub(crate) fn open(&self, generation: u64) {
        self.inner().open = Some(generation);
        self.room.notify_waiters();
    }

    /// Empties the queues and takes nothing until it is opened again.
    pub(crate) fn close(&self) {
        let mut inner = self.inner();
        inner.open = None;
        for queue in &mut inner.queues {
            queue.clear();
        }
        inner.queued_bytes = [0; Class::ALL.len()];
        inner.link.clear();
    }

    /// How many bytes of RAM, prefetch and bulk should wait, each, within the bounds of each.
    pub(crate) fn set_queue_limit(&self, bytes: usize) {
        let mut inner = self.inner();
        inner.bulk_limit = bytes.clamp(Self::BULK_LIMIT_MIN, Self::BULK_LIMIT_MAX);
        inner.ram_limit = bytes.clamp(Self::RAM_LIMIT_MIN, Self::RAM_LIMIT_MAX);
        drop(inner);
        self.room.notify_waiters();
    }

    /// The generation that frames are taken for, if any.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.inner().open
    }

    pub(crate) fn has_room(&self, class: Class) -> bool {
        let inner = self.inner();
        inner.open.is_some() && inner.has_room(class)
    }

    /// Bytes that wait in all queues.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.inner().queued_bytes.iter().sum()
    }

    /// Takes a frame, for `generation` if one is named.
    pub(crate) fn push(&self, generation: Option<u64>, frame: Frame) -> Result<(), SendError> {
        let class = frame.class;
        {
            let inner = self.inner();
            if inner.open.is_none() || generation.is_some_and(|g| inner.open != Some(g)) {
                return Err(SendError::Down);
            }
            if !inner.has_room(class) {
                return Err(SendError::Full(Box::new(frame)));
            }
        }
        // Outside of the lock. Several senders may exceed the limit by one frame each.
        let encoded = encode(&Body::Frame(frame));
        {
            let mut inner = self.inner();
            if inner.open.is_none() || generation.is_some_and(|g| inner.open != Some(g)) {
                return Err(SendError::Down);
            }
            inner.queued_bytes[slot(class)] += encoded.len();
            inner.queues[slot(class)].push_back(encoded);
        }
        self.wake(class);
        Ok(())
    }

    fn wake(&self, class: Class) {
        for (index, work) in (0..).zip(&self.work) {
            if lane::classes(index).contains(&class) {
                work.notify_one();
            }
        }
    }

    /// Makes a lane look again whether there is something to send.
    pub(crate) fn wake_lane(&self, index: u8) {
        self.work[usize::from(index)].notify_one();
    }

    /// Sends a message of the link's own on the control lane, whether or not the queues are open.
    pub(crate) fn push_link(&self, message: LinkMessage) {
        let mut inner = self.inner();
        if inner.link.len() < LINK_MESSAGES_MAX {
            inner.link.push_back(message);
        }
        drop(inner);
        self.wake_lane(CONTROL);
    }

    /// The next message of the link's own.
    pub(crate) fn pop_link(&self) -> Option<Encoded> {
        let message = self.inner().link.pop_front()?;
        Some(encode(&Body::Link(message)))
    }

    /// The most urgent class that lane `index` has something of, and the length of its first frame, as
    /// long as the queues are those of `generation`.
    pub(crate) fn peek(&self, generation: u64, index: u8) -> Option<(Class, usize)> {
        let inner = self.inner();
        if inner.open != Some(generation) {
            return None;
        }
        let mut classes = lane::classes(index).iter();
        classes.find_map(|&class| {
            let first = inner.queues[slot(class)].front()?;
            Some((class, first.len()))
        })
    }

    /// The first frame of a class, as long as the queues are those of `generation`.
    pub(crate) fn pop(&self, generation: u64, class: Class) -> Option<Encoded> {
        self.pop_within(generation, class, usize::MAX)
    }

    /// The first frame of a class if it has at most `bytes_max` bytes, as long as the queues are those of `generation`.
    pub(crate) fn pop_within(
        &self,
        generation: u64,
        class: Class,
        bytes_max: usize,
    ) -> Option<Encoded> {
        let mut inner = self.inner();
        if inner.open != Some(generation) {
            return None;
        }
        let was_full = !inner.has_room(class);
        let frame = inner.queues[slot(class)].pop_front_if(|frame| frame.len() <= bytes_max)?;
        inner.queued_bytes[slot(class)] -= frame.len();
        let has_room = was_full && inner.has_room(class);
        drop(inner);
        if has_room {
            self.room.notify_waiters();
        }
        Some(frame)
    }

    /// Waits until lane `index` may have something to send.
    pub(crate) async fn work(&self, index: u8) {
        self.work[usize::from(index)].notified().await;
    }

    /// Waits until a frame of `class` would be taken.
    pub(crate) async fn room(&self, class: Class) {
        loop {
            let mut changed = std::pin::pin!(self.room.notified());
            changed.as_mut().enable();
            if self.has_room(class) {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::MigrationId;
    use flimcd_wire::{Blocks, Content, Entry, Message};

    fn frame(class: Class, len: u32) -> Frame {
        let payload = vec![7; len as usize].into();
        let range = flimcd_core::BlockRange::new(0, u64::from(len.div_ceil(4096)));
        let content = Content::Raw { len };
        Frame {
            migration: MigrationId(1),
            class,
            message: Message::Blocks(Blocks {
                seq: flimcd_core::Seq(1),
                entries: vec![Entry { range, content }],
                payload,
            }),
        }
    }

    #[test]
    fn each_class_goes_to_its_lanes_most_urgent_first() {
        let outbox = Outbox::new();
        outbox.open(1);
        for class in [
            Class::Bulk,
            Class::Prefetch,
            Class::Ram,
            Class::Control,
            Class::Fault,
        ] {
            outbox.push(None, frame(class, 10)).unwrap();
        }
        let peek = |index| outbox.peek(1, index).map(|(class, _)| class);
        assert_eq!(peek(0), Some(Class::Control));
        assert_eq!(peek(1), Some(Class::Fault));
        assert_eq!(peek(2), Some(Class::Ram));
        assert_eq!(peek(3), Some(Class::Prefetch));
        outbox.pop(1, Class::Ram).unwrap();
        assert_eq!(peek(2), Some(Class::Prefetch));
        outbox.pop(1, Class::Prefetch).unwrap();
        assert_eq!(peek(9), Some(Class::Bulk));
    }

    #[test]
    fn bulk_is_bounded_and_faults_are_not_held_up_by_it() {
        let outbox = Outbox::new();
        assert_eq!(
            outbox.push(None, frame(Class::Bulk, 1)),
            Err(SendError::Down)
        );
        outbox.open(1);
        let mut taken = 0;
        while outbox.push(None, frame(Class::Bulk, 65536)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, 4);
        assert!(!outbox.has_room(Class::Bulk) && outbox.has_room(Class::Fault));
        outbox.push(None, frame(Class::Fault, 4096)).unwrap();
        outbox.pop(1, Class::Bulk).unwrap();
        assert!(outbox.has_room(Class::Bulk));
    }

    #[test]
    fn only_a_frame_that_fits_is_taken_with_others() {
        let outbox = Outbox::new();
        outbox.open(1);
        outbox.push(None, frame(Class::Bulk, 2000)).unwrap();
        let (_, len) = outbox.peek(1, 2).unwrap();
        assert!(outbox.pop_within(1, Class::Bulk, len - 1).is_none());
        assert!(outbox.pop_within(2, Class::Bulk, len).is_none());
        assert_eq!(outbox.queued_bytes(), len);
        assert!(outbox.pop_within(1, Class::Bulk, len).is_some());
        assert_eq!(outbox.queued_bytes(), 0);
    }

    #[test]
    fn nothing_of_an_old_generation_is_sent() {
        let outbox = Outbox::new();
        outbox.open(1);
        outbox.push(Some(1), frame(Class::Bulk, 1)).unwrap();
        outbox.close();
        outbox.open(2);
        assert!(outbox.pop(1, Class::Bulk).is_none());
        assert!(outbox.pop(2, Class::Bulk).is_none());
        assert_eq!(
            outbox.push(Some(1), frame(Class::Bulk, 1)),
            Err(SendError::Down)
        );
        outbox.push(Some(2), frame(Class::Bulk, 1)).unwrap();
        assert!(outbox.peek(1, 2).is_none());
        assert!(outbox.peek(2, 2).is_some());
    }
}
