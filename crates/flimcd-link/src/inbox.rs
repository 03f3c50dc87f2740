//! Frames and news that wait for the consumer: one bounded queue per class.
//!
//! A lane's reader waits while its class's queue is full, and the wait travels back to the sender
//! through TCP. Each class has its own bound, and control, faults and bulk have readers of their own,
//! so a full bulk queue never holds up a fault. A frame counts against its bound until its [`Credit`]
//! is dropped: a consumer that passes frames on keeps the credit with the frame until it is worked off.
//!
//! Order: `Up{g}` before every frame of generation g; after `Up{g+1}` none of generation g; frames
//! that arrived before a `Down` are handed out before it, unless the next `Up` comes first. Among
//! waiting frames the more urgent class goes first.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flimcd_wire::{Class, Frame};
use tokio::sync::Notify;

use crate::{LinkError, outbox::slot};

/// What happens on a link, for its consumer.
#[derive(Debug)]
pub enum LinkEvent {
    /// All connections stand. Generations count up by one or more.
    Up {
        /// Number of this bundle of connections.
        generation: u64,
    },
    /// The link is down; what was not acknowledged may be lost. It is being set up again.
    Down {
        /// The generation that ended.
        generation: u64,
        /// Why.
        reason: LinkError,
    },
    /// A frame arrived.
    Frame {
        /// The frame.
        frame: Frame,
        /// Room it takes in the receive queue until this is dropped.
        credit: Credit,
    },
}

/// A received frame's share of its class's receive bound, given back when dropped.
#[derive(Debug)]
pub struct Credit {
    inbox: Arc<Inbox>,
    class: Class,
    bytes: usize,
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.inbox.give_back(self.class, self.bytes);
    }
}

/// The generation is over: the frame was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stale;

/// See the module.
#[derive(Debug)]
pub(crate) struct Inbox {
    inner: Mutex<Inner>,
    arrived: Notify,
    room: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    generation: u64,
    is_up: bool,
    is_stopped: bool,
    /// The generation that began and was not handed out yet.
    up: Option<u64>,
    /// The end of a generation whose beginning was handed out.
    down: Option<(u64, LinkError)>,
    frames: [VecDeque<(Frame, usize)>; Class::ALL.len()],
    /// Bytes in the queue or covered by a credit.
    held_bytes: [usize; Class::ALL.len()],
}

/// Bytes that may wait in each class. One frame may go beyond it.
const fn limit(class: Class) -> usize {
    match class {
        // Acknowledgements and hand-over: while their reader waits, pings go unanswered.
        // Faults may come on the same connection.
        Class::Control | Class::Fault => 16 << 20,
        Class::Ram | Class::Bulk => 4 << 20,
        Class::Prefetch => 2 << 20,
    }
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::default(),
            arrived: Notify::new(),
            room: Notify::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A generation begins; undelivered frames of the last one are gone.
    pub(crate) fn up(&self, generation: u64) {
        let mut inner = self.inner();
        debug_assert!(generation > inner.generation && !inner.is_up);
        inner.drop_frames();
        inner.generation = generation;
        inner.is_up = true;
        inner.up = Some(generation);
        drop(inner);
        self.notify();
    }

    /// A generation ends. If its beginning was not handed out yet, neither is its end.
    pub(crate) fn down(&self, generation: u64, reason: LinkError) {
        let mut inner = self.inner();
        if inner.generation != generation || !inner.is_up {
            return;
        }
        inner.is_up = false;
        if inner.up.take().is_some() {
            inner.drop_frames();
        } else {
            inner.down = Some((generation, reason));
        }
        drop(inner);
        self.notify();
    }

    /// No more events will come.
    pub(crate) fn stop(&self) {
        self.inner().is_stopped = true;
        self.notify();
    }

    fn notify(&self) {
        self.room.notify_waiters();
        self.arrived.notify_waiters();
    }

    /// Queues a frame of `bytes` on the wire, waiting for room.
    pub(crate) async fn push(
        &self,
        generation: u64,
        frame: Frame,
        bytes: usize,
    ) -> Result<(), Stale> {
        let class = frame.class;
        loop {
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut inner = self.inner();
                if inner.generation != generation || !inner.is_up {
                    return Err(Stale);
                }
                if inner.held_bytes[slot(class)] < limit(class) {
                    inner.held_bytes[slot(class)] += bytes;
                    inner.frames[slot(class)].push_back((frame, bytes));
                    break;
                }
            }
            room.await;
        }
        self.arrived.notify_waiters();
        Ok(())
    }

    /// The next event; `None` after the endpoint was stopped. Cancel-safe.
    pub(crate) async fn next(self: &Arc<Self>) -> Option<LinkEvent> {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            match self.take() {
                Taken::Event(event) => return Some(event),
                Taken::Stopped => return None,
                Taken::Nothing => arrived.await,
            }
        }
    }

    fn take(self: &Arc<Self>) -> Taken {
        let mut inner = self.inner();
        let next = inner.next();
        match next {
            Some(Next::News(event)) => Taken::Event(event),
            Some(Next::Frame(frame, bytes)) => {
                let credit = Credit {
                    inbox: self.clone(),
                    class: frame.class,
                    bytes,
                };
                Taken::Event(LinkEvent::Frame { frame, credit })
            }
            None if inner.is_stopped => Taken::Stopped,
            None => Taken::Nothing,
        }
    }

    fn give_back(&self, class: Class, bytes: usize) {
        let mut inner = self.inner();
        let held = &mut inner.held_bytes[slot(class)];
        let was_full = *held >= limit(class);
        *held -= bytes;
        if was_full && *held < limit(class) {
            drop(inner);
            self.room.notify_waiters();
        }
    }
}

enum Taken {
    Event(LinkEvent),
    Stopped,
    Nothing,
}

enum Next {
    News(LinkEvent),
    Frame(Frame, usize),
}

impl Inner {
    fn drop_frames(&mut self) {
        for (queue, held) in self.frames.iter_mut().zip(&mut self.held_bytes) {
            *held -= queue.drain(..).map(|(_, bytes)| bytes).sum::<usize>();
        }
    }

    fn next(&mut self) -> Option<Next> {
        if self.up.is_none()
            && let Some((frame, bytes)) = self.frames.iter_mut().find_map(VecDeque::pop_front)
        {
            return Some(Next::Frame(frame, bytes));
        }
        if let Some((generation, reason)) = self.down.take() {
            return Some(Next::News(LinkEvent::Down { generation, reason }));
        }
        let generation = self.up.take()?;
        Some(Next::News(LinkEvent::Up { generation }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::MigrationId;
    use flimcd_wire::Message;

    fn frame(class: Class, id: u64) -> Frame {
        Frame {
            migration: MigrationId(id),
            class,
            message: Message::Complete,
        }
    }

    fn drain(inbox: &Arc<Inbox>) -> Vec<String> {
        let mut out = Vec::new();
        while let Taken::Event(event) = inbox.take() {
            out.push(match event {
                LinkEvent::Up { generation } => format!("up {generation}"),
                LinkEvent::Down { generation, .. } => format!("down {generation}"),
                LinkEvent::Frame { frame, .. } => {
                    format!("{:?} {}", frame.class, frame.migration.0)
                }
            });
        }
        out
    }

    #[tokio::test]
    async fn urgent_frames_overtake_and_a_full_class_holds_up_only_itself() {
        let inbox = Arc::new(Inbox::new());
        inbox.up(1);
        inbox.push(1, frame(Class::Bulk, 1), 8 << 20).await.unwrap();
        let mut second = std::pin::pin!(inbox.push(1, frame(Class::Bulk, 2), 1));
        let waker = std::task::Waker::noop();
        let mut cx = std::task::Context::from_waker(waker);
        assert!(second.as_mut().poll(&mut cx).is_pending());
        inbox.push(1, frame(Class::Fault, 3), 1).await.unwrap();
        inbox.push(1, frame(Class::Control, 4), 1).await.unwrap();
        let Taken::Event(LinkEvent::Up { generation: 1 }) = inbox.take() else {
            panic!("Up comes first")
        };
        let mut held = Vec::new();
        while let Taken::Event(LinkEvent::Frame { frame, credit }) = inbox.take() {
            held.push((frame.migration.0, credit));
        }
        assert_eq!(
            held.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [3, 4, 1]
        );
        assert!(
            second.as_mut().poll(&mut cx).is_pending(),
            "the credit is still held"
        );
        held.clear();
        assert!(second.as_mut().poll(&mut cx).is_ready());
        assert_eq!(drain(&inbox), ["Bulk 2"]);
    }

    #[tokio::test]
    async fn frames_of_an_old_generation_never_follow_the_next_up() {
        let inbox = Arc::new(Inbox::new());
        inbox.up(1);
        assert_eq!(drain(&inbox), ["up 1"]);
        inbox.push(1, frame(Class::Bulk, 1), 1).await.unwrap();
        inbox.down(1, LinkError::Closed);
        assert_eq!(inbox.push(1, frame(Class::Bulk, 2), 1).await, Err(Stale));
        assert_eq!(drain(&inbox), ["Bulk 1", "down 1"]);

        inbox.up(2);
        assert_eq!(drain(&inbox), ["up 2"]);
        inbox.push(2, frame(Class::Bulk, 3), 1).await.unwrap();
        inbox.down(2, LinkError::Closed);
        inbox.up(3);
        assert_eq!(inbox.push(2, frame(Class::Bulk, 4), 1).await, Err(Stale));
        inbox.push(3, frame(Class::Bulk, 5), 1).await.unwrap();
        assert_eq!(drain(&inbox), ["down 2", "up 3", "Bulk 5"]);

        // A generation that nobody heard of leaves no trace.
        inbox.down(3, LinkError::Closed);
        inbox.up(4);
        inbox.down(4, LinkError::Closed);
        inbox.up(5);
        inbox.stop();
        assert_eq!(drain(&inbox), ["down 3", "up 5"]);
        assert!(inbox.next().await.is_none());
    }
}
