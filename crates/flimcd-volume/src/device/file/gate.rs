//! Many aligned writes at a time, or one unaligned write alone.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A readers-writer lock whose "readers" are aligned writes and whose "writers" are unaligned ones. Unaligned ones go
/// first, so that a busy guest cannot keep one waiting for ever.
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
}

/// Right to write aligned.
pub(super) struct SharedPass<'a>(&'a Gate);

/// Right to write unaligned.
pub(super) struct ExclusivePass<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The numbers are changed in one step each, so a panic elsewhere leaves them right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to write aligned.
    pub(super) fn shared(&self) -> SharedPass<'_> {
        let mut state = self.lock();
        while state.exclusive || state.exclusive_waiting > 0 {
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
}

impl Drop for SharedPass<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.shared -= 1;
        if state.shared == 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for ExclusivePass<'_> {
    fn drop(&mut self) {
        self.0.lock().exclusive = false;
        self.0.changed.notify_all();
    }
}
