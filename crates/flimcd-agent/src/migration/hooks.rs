//! What the move of a machine hears of the migration of its disks.
//!
//! A machine's move is a *session* with a number of its own; the migration of its disks names it. The driver of
//! such a migration tells what happens through a [`DisksHook`], and whoever moves the machine asks for it with
//! [`Sessions::listen`] and steers with [`Command::SwitchNow`](super::Command::SwitchNow) at the source and
//! [`Command::VmReady`](super::Command::VmReady) at the target.
//!
//! # Contract
//! - It does not matter who is there first: a listener first gets what the driver has told so far. A later
//!   listener takes the place of an earlier one.
//! - After a restart the driver begins with where it stands: `Prepared`, `Moved` or `Owned` come again. At
//!   the source nothing is remembered of an earlier `SwitchNow`: where the records do not say that the switch
//!   was offered, it does not happen before it is asked for again.
//! - The channel ends after `Completed` or `Ended`, and when the agent stops.
//! - The machine's side decides when to switch: guests that disconnect change nothing, and
//!   `flimcd switchover` is refused. `flimcd cancel` works, and so does the peer's: then `Ended` comes unasked.

use flimcd_core::MigrationId;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::store::MigrationRecord;
use crate::api::Phase;

/// What happened to the disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DisksEvent {
    /// Source: whether the switch would be a good idea now. False until said otherwise.
    Ready(bool),
    /// Source: guests wait, all records say so durably, and the target is asked to take over. From here on the
    /// target decides; a cancellation is answered with `Ended` or `Moved`.
    Prepared,
    /// Source: the target owns the disks.
    Moved,
    /// Target: the disks are owned here durably, and guests are let in.
    Owned,
    /// The target has every block.
    Completed,
    /// It ended before the switch: guests are served at the source again. Cancelled, or failed with this.
    Ended(Result<(), String>),
}

impl DisksEvent {
    const fn is_last(&self) -> bool {
        matches!(self, Self::Completed | Self::Ended(_))
    }
}

/// What the drivers of all sessions have told, and who listens.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    known: Mutex<BTreeMap<MigrationId, Told>>,
}

#[derive(Debug, Default)]
struct Told {
    events: Vec<DisksEvent>,
    listener: Option<UnboundedSender<DisksEvent>>,
}

impl Sessions {
    fn known(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Told>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A migration of this session begins, or goes on after a restart.
    pub(crate) fn begin(self: &Arc<Self>, session: MigrationId) -> DisksHook {
        self.known().entry(session).or_default().events.clear();
        DisksHook {
            sessions: self.clone(),
            session,
        }
    }

    /// What is told of a session's disks, from the first event on.
    pub(crate) fn listen(&self, session: MigrationId) -> UnboundedReceiver<DisksEvent> {
        let (sender, receiver) = unbounded_channel();
        let mut known = self.known();
        let told = known.entry(session).or_default();
        for event in &told.events {
            // The receiver is in our hands.
            let _ = sender.send(event.clone());
        }
        if told.events.last().is_some_and(DisksEvent::is_last) {
            known.remove(&session);
        } else {
            told.listener = Some(sender);
        }
        receiver
    }

    /// Ends all channels.
    pub(crate) fn stop(&self) {
        self.known().clear();
    }
}

/// A driver's way to tell. See the module.
#[derive(Clone, Debug)]
pub(crate) struct DisksHook {
    sessions: Arc<Sessions>,
    session: MigrationId,
}

impl DisksHook {
    /// Tells of something. What was told last is not told again, and nothing comes after the end.
    pub(crate) fn tell(&self, event: DisksEvent) {
        let mut known = self.sessions.known();
        let told = known.entry(self.session).or_default();
        let last = told.events.last();
        if last == Some(&event) || last.is_some_and(DisksEvent::is_last) {
            return;
        }
        if matches!(
            (last, &event),
            (Some(DisksEvent::Ready(_)), DisksEvent::Ready(_))
        ) {
            told.events.pop();
        }
        let is_last = event.is_last();
        let listens = told
            .listener
            .as_ref()
            .is_some_and(|listener| listener.send(event.clone()).is_ok());
        told.events.push(event);
        if is_last && listens {
            known.remove(&self.session);
        }
    }

    /// Tells how a migration has ended, if its driver has not.
    pub(crate) fn tell_end(&self, record: &MigrationRecord) {
        if !self.sessions.known().contains_key(&self.session) {
            return;
        }
        let status = &record.status;
        match status.phase {
            Phase::Completed => self.tell(DisksEvent::Completed),
            Phase::Cancelled => self.tell(DisksEvent::Ended(Ok(()))),
            Phase::Failed => {
                let why = status.error.clone().unwrap_or_default();
                self.tell(DisksEvent::Ended(Err(why)));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: MigrationId = MigrationId(5);

    fn all(receiver: &mut UnboundedReceiver<DisksEvent>) -> Vec<DisksEvent> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[test]
    fn a_late_listener_hears_all_and_the_end_ends_it() {
        let sessions = Arc::<Sessions>::default();
        let hook = sessions.begin(SESSION);
        hook.tell(DisksEvent::Ready(true));
        hook.tell(DisksEvent::Ready(false));
        hook.tell(DisksEvent::Ready(false));
        let mut early = sessions.listen(SESSION);
        assert_eq!(all(&mut early), [DisksEvent::Ready(false)]);
        hook.tell(DisksEvent::Ready(true));
        hook.tell(DisksEvent::Prepared);
        let mut late = sessions.listen(SESSION);
        hook.tell(DisksEvent::Ended(Ok(())));
        assert_eq!(
            all(&mut early),
            [DisksEvent::Ready(true), DisksEvent::Prepared]
        );
        let told = [
            DisksEvent::Ready(true),
            DisksEvent::Prepared,
            DisksEvent::Ended(Ok(())),
        ];
        assert_eq!(all(&mut late), told);
        assert!(late.is_closed() && early.is_closed());
        assert!(sessions.known().is_empty());
    }

    #[test]
    fn an_end_that_nobody_heard_waits_for_a_listener() {
        let sessions = Arc::<Sessions>::default();
        let hook = sessions.begin(SESSION);
        hook.tell(DisksEvent::Owned);
        hook.tell(DisksEvent::Completed);
        hook.tell(DisksEvent::Ended(Ok(())));
        let mut listener = sessions.listen(SESSION);
        let told = [DisksEvent::Owned, DisksEvent::Completed];
        assert_eq!(all(&mut listener), told);
        assert!(listener.is_closed());
    }
}
