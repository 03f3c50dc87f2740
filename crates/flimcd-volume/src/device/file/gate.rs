//! Many aligned writes at a time, or one unaligned write alone.
//!
//! A readers-writer lock whose "readers" are aligned writes and whose "writers" are unaligned ones.
//! It can be waited for in two ways: by blocking, for plain calls, and by asking again after a
//! wake-up, for rings, which must go on reaping what is in flight. Unaligned writes go first, so
//! that a busy guest cannot keep one waiting for ever.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use rustix::event::{EventfdFlags, eventfd};

#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    shared: u64,
    exclusive: bool,
    exclusive_waiting: u64,
    /// Rings that found the gate shut and want to ask again.
    rings: Vec<Arc<Waker>>,
}

/// Wakes one ring: an eventfd that the ring reads.
#[derive(Debug)]
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::CLOEXEC)?)))
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Makes the eventfd readable.
    #[expect(
        clippy::host_endian_bytes,
        reason = "an eventfd takes a number as it lies in memory"
    )]
    pub(super) fn wake(&self) {
        // It only fails when the counter would overflow, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Right to write aligned, until dropped.
pub(super) struct SharedPass<'a>(&'a Gate);

/// Right to write unaligned, until dropped.
pub(super) struct ExclusivePass<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The numbers are changed in one step each, so a panic elsewhere leaves them right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to write aligned. It may jump the line of the unaligned ones: the thread
    /// that asks can have writes in flight on a ring, for which that line would wait for ever.
    pub(super) fn shared(&self) -> SharedPass<'_> {
        let mut state = self.lock();
        while state.exclusive {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.shared += 1;
        SharedPass(self)
    }

    /// Waits for the right to write unaligned.
    pub(super) fn exclusive(&self) -> ExclusivePass<'_> {
        let mut state = self.lock();
        state.exclusive_waiting += 1;
        while state.exclusive || state.shared > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.exclusive_waiting -= 1;
        state.exclusive = true;
        ExclusivePass(self)
    }

    /// Takes the right to write aligned, to be given back by [`leave_shared`](Self::leave_shared);
    /// or false, and `ring` is woken when it is worth asking again.
    pub(super) fn try_enter_shared(&self, ring: &Arc<Waker>) -> bool {
        let mut state = self.lock();
        if state.is_shut() {
            state.wait_as(ring);
            return false;
        }
        state.shared += 1;
        true
    }

    /// Gives back what [`try_enter_shared`](Self::try_enter_shared) gave.
    pub(super) fn leave_shared(&self) {
        let mut state = self.lock();
        state.shared -= 1;
        if state.shared == 0 {
            self.wake_all(state);
        }
    }

    /// Stands in line for the right to write unaligned: from now on no aligned write begins before
    /// it.
    pub(super) fn queue_exclusive(&self) {
        self.lock().exclusive_waiting += 1;
    }

    /// Leaves the line without having had the right.
    pub(super) fn abandon_exclusive(&self) {
        let mut state = self.lock();
        state.exclusive_waiting -= 1;
        self.wake_all(state);
    }

    /// Takes the right for one who stands in line; or `None`, and `ring` is woken when it is worth
    /// asking again.
    pub(super) fn try_exclusive(&self, ring: &Arc<Waker>) -> Option<ExclusivePass<'_>> {
        let mut state = self.lock();
        if state.exclusive || state.shared > 0 {
            state.wait_as(ring);
            return None;
        }
        state.exclusive_waiting -= 1;
        state.exclusive = true;
        Some(ExclusivePass(self))
    }

    fn wake_all(&self, mut state: MutexGuard<'_, State>) {
        let rings = std::mem::take(&mut state.rings);
        drop(state);
        self.changed.notify_all();
        for ring in rings {
            ring.wake();
        }
    }
}

impl State {
    fn is_shut(&self) -> bool {
        self.exclusive || self.exclusive_waiting > 0
    }

    fn wait_as(&mut self, ring: &Arc<Waker>) {
        if !self.rings.iter().any(|known| Arc::ptr_eq(known, ring)) {
            self.rings.push(Arc::clone(ring));
        }
    }
}

impl Drop for SharedPass<'_> {
    fn drop(&mut self) {
        self.0.leave_shared();
    }
}

impl Drop for ExclusivePass<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.exclusive = false;
        self.0.wake_all(state);
    }
}
