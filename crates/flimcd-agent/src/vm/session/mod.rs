//! Moves of machines: one task on each side, which drives a machine of `flimcd_migrate::vm` over a real hypervisor,
//! the stream of its running state, and the migration of its disks.
//!
//! ```text
//!        link inbox ─┐                        ┌─► VmSource / VmTarget .handle_*
//!   disks' migration ─┤                        │
//!        the stream ──┼─► one thing at a time ─┤
//!   results of steps ─┤                        └─► steps (one after the other, in a task of their own)
//!  looks at transfer ─┤                             stream, link, status
//!           commands ─┘
//! ```
//! Steps talk to the hypervisor and may take long; the loop never waits for one, so that the link and the stream are
//! served meanwhile. When the agent stops or dies, the hypervisors find their stream closed. Before the switch the guest
//! goes on at the source through that, or waits for the agent's return; the records say what is to be done then.

mod base;
mod begin;
mod launch;
mod record;
mod source;
mod steps;
mod target;

use flimcd_core::{MigrationId, SiteName, VolumeName};
use flimcd_migrate::vm::DisksCommand;
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    agent::Agent,
    api::{ApiCode, ErrorBody, Role, VmMoveStatus},
    error::refuse,
    migration::{Command, CommandError},
};
pub(crate) use record::{SessionRecord, SessionStore};

/// How often the transfer is looked at while memory goes over.
const LOOK: std::time::Duration = std::time::Duration::from_millis(5);
/// How often the status is published while nothing special happens.
const PUBLISH: std::time::Duration = std::time::Duration::from_millis(100);
/// Moves that are remembered after their end.
const KEPT: usize = 20;

/// Asks a move to end. The answer says whether it was not too late.
pub(crate) type CancelRequest = oneshot::Sender<bool>;

/// A move that is known.
struct Known {
    peer: SiteName,
    status: watch::Receiver<VmMoveStatus>,
    /// Of one that runs.
    cancel: Option<mpsc::Sender<CancelRequest>>,
}

/// All moves that this agent knows of.
#[derive(Default)]
pub(crate) struct Moves {
    known: Mutex<BTreeMap<MigrationId, Known>>,
}

impl std::fmt::Debug for Moves {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Moves").finish_non_exhaustive()
    }
}

/// The ends of a move that belong to its task.
struct Ends {
    cancel: mpsc::Receiver<CancelRequest>,
    status: watch::Sender<VmMoveStatus>,
}

impl Moves {
    fn known(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A move begins, or goes on after a restart.
    fn begin(&self, record: &SessionRecord) -> Ends {
        let (cancel_in, cancel) = mpsc::channel(4);
        let (status, status_out) = watch::channel(record.status.clone());
        let known = Known {
            peer: record.peer.clone(),
            status: status_out,
            cancel: Some(cancel_in),
        };
        self.known().insert(record.id, known);
        Ends { cancel, status }
    }

    /// A move that has ended is remembered. Returns those that need not be any more.
    fn end(&self, record: &SessionRecord) -> Vec<MigrationId> {
        let mut known = self.known();
        let status = watch::channel(record.status.clone()).1;
        let ended = Known {
            peer: record.peer.clone(),
            status,
            cancel: None,
        };
        known.insert(record.id, ended);
        let mut over: Vec<_> = known
            .iter()
            .filter(|(_, known)| known.cancel.is_none())
            .map(|(&id, known)| (known.status.borrow().started_unix_ms, id))
            .collect();
        over.sort_unstable();
        let surplus = over.len().saturating_sub(KEPT);
        let surplus: Vec<_> = over.into_iter().take(surplus).map(|(_, id)| id).collect();
        for id in &surplus {
            known.remove(id);
        }
        surplus
    }

    fn is_known(&self, id: MigrationId, peer: &SiteName) -> bool {
        let known = self.known();
        known.get(&id).is_some_and(|known| known.peer == *peer)
    }

    /// The last move of a machine.
    fn last_of(
        &self,
        vm: &VolumeName,
    ) -> Option<(VmMoveStatus, Option<mpsc::Sender<CancelRequest>>)> {
        let known = self.known();
        let moves = known
            .values()
            .filter(|known| known.status.borrow().vm == *vm);
        let last = moves.max_by_key(|known| known.status.borrow().started_unix_ms)?;
        Some((last.status.borrow().clone(), last.cancel.clone()))
    }
}

impl Agent {
    /// The last move of a machine.
    pub(crate) fn vm_move(&self, vm: &VolumeName) -> Result<VmMoveStatus, ErrorBody> {
        let last = self.moves.last_of(vm).map(|(status, _)| status);
        let mut status = last.ok_or_else(|| not_moving(vm))?;
        self.add_disks(&mut status);
        Ok(status)
    }

    /// Puts the disks' migration as it is now into a move's status.
    fn add_disks(&self, status: &mut VmMoveStatus) {
        let mut migrations = self.migrations().into_iter();
        let disks = migrations.find(|disks| disks.session == Some(status.id));
        if disks.is_some() {
            status.disks = disks;
        }
    }

    /// Ends the move of a machine before its switch.
    pub(crate) async fn cancel_vm_move(&self, vm: &VolumeName) -> Result<VmMoveStatus, ErrorBody> {
        let (status, cancel) = self.moves.last_of(vm).ok_or_else(|| not_moving(vm))?;
        if status.role == Role::Target {
            let message = format!("the move of {vm} is decided about at its source");
            let hint = format!("ask the agent at site {}", status.peer);
            return Err(refuse(ApiCode::BadRequest, message, hint));
        }
        let cancel = cancel.ok_or_else(|| not_moving(vm))?;
        let (answer, answered) = oneshot::channel();
        if cancel.send(answer).await.is_err() {
            return Err(not_moving(vm));
        }
        match answered.await {
            Ok(true) => self.vm_move(vm),
            Ok(false) => Err(refuse(
                ApiCode::TooLate,
                format!(
                    "{vm} runs at the target already, or is about to, so its move cannot be ended"
                ),
                "let it complete, and migrate it back if it should not be there",
            )),
            Err(_) => Err(not_moving(vm)),
        }
    }

    /// Tells the migration of a session's disks something.
    async fn tell_disks(&self, session: MigrationId, command: DisksCommand) -> Result<(), String> {
        let mut migrations = self.registry.statuses().into_iter();
        let disks = migrations
            .find(|status| status.session == Some(session) && !status.phase.has_ended())
            .ok_or("the migration of the disks has ended")?;
        let running = disks
            .volumes
            .first()
            .and_then(|volume| self.registry.running_on(volume));
        let (_, running) = running.ok_or("the migration of the disks has ended")?;
        let (answer, answered) = oneshot::channel();
        let command = match command {
            DisksCommand::Switch => Command::SwitchNow(answer),
            DisksCommand::Cancel => Command::Cancel(answer),
            DisksCommand::VmReady(is_ready) => Command::VmReady(is_ready, answer),
        };
        let sent = running.commands.send(command).await.is_ok();
        match answered.await {
            // Too late means that the target owns them, which the migration tells by itself.
            Ok(Ok(()) | Err(CommandError::TooLate)) if sent => Ok(()),
            Ok(Err(error)) => Err(format!("the migration of the disks refuses: {error:?}")),
            _ => Err("the migration of the disks has ended".to_owned()),
        }
    }
}

fn not_moving(vm: &VolumeName) -> ErrorBody {
    let message = format!("{vm} is not migrating, and has not been");
    refuse(
        ApiCode::UnknownMigration,
        message,
        "`flimcd vm list` shows the machines here",
    )
}
