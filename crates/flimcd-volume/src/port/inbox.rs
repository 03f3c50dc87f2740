//! What other threads have to tell a port: requests that waited and are decided now, flushes that ended.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};

use crate::rules::{Admission, Ticket};

/// What the source has at some place of the volume.
#[derive(Debug)]
pub(crate) struct PeekedPart {
    /// First byte in the volume.
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A message to a port.
#[derive(Debug)]
pub(crate) enum InboxItem {
    /// A parked request was decided.
    Decided {
        ticket: Ticket,
        admission: Admission,
        /// Whether a trim has to be run as zeroing.
        in_postcopy: bool,
    },
    /// A read before the switch has its answers.
    Peeked {
        ticket: Ticket,
        parts: Vec<PeekedPart>,
    },
    /// A write that ended, and that its guest may hear of now.
    Released { ticket: Ticket },
    /// The flush in a slot ended elsewhere.
    Flushed { slot: usize, result: io::Result<()> },
}

/// The messages of one port, and the descriptor that wakes its thread.
#[derive(Debug)]
pub(crate) struct Inbox {
    items: Mutex<Vec<InboxItem>>,
    /// Whether the descriptor was written to and not read since.
    signalled: AtomicBool,
    event: OwnedFd,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            items: Mutex::default(),
            signalled: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// Adds a message. [`signal`](Self::signal) has to follow.
    pub(crate) fn put(&self, item: InboxItem) {
        self.items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(item);
    }

    /// Wakes the port.
    pub(crate) fn signal(&self) {
        if !self.signalled.swap(true, Ordering::AcqRel) {
            // It can only fail when the counter is at its end, and then it is readable already.
            let _ = rustix::io::write(&self.event, &1u64.to_le_bytes());
        }
    }

    /// Takes all messages. A message put later is signalled again: the flag goes down before the messages are
    /// taken, so whoever finds it up has put his message before.
    pub(crate) fn take(&self, out: &mut Vec<InboxItem>) {
        if !self.signalled.load(Ordering::Acquire) {
            return;
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
        self.signalled.store(false, Ordering::Release);
        out.append(&mut self.items.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes all messages, signalled or not, for a port that ends.
    pub(crate) fn take_last(&self, out: &mut Vec<InboxItem>) {
        out.append(&mut self.items.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
