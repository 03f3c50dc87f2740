//! What a move does to the hypervisors, step by step: each task here takes one action after the other.

use flimcd_core::{MigrationId, VolumeName};
use flimcd_migrate::vm::{DisksCommand, Transfer, TransferState, VmSourceAction};
use flimcd_qemu::{
    Qmp, QmpError,
    commands::{Quit, RunState, Stop},
    transfer::{self, OutgoingSettings},
};
use std::sync::Arc;
use tokio::sync::mpsc;

use crate::{agent::Agent, vm::ram::socket_path};

/// What the steps of a source need.
pub(super) struct SourceSteps {
    pub(super) agent: Arc<Agent>,
    pub(super) session: MigrationId,
    pub(super) vm: VolumeName,
}

impl SourceSteps {
    /// Takes actions until there are no more, and tells what came of each.
    pub(super) async fn run(
        self,
        mut actions: mpsc::UnboundedReceiver<VmSourceAction>,
        results: mpsc::UnboundedSender<(VmSourceAction, Result<(), String>)>,
    ) {
        while let Some(action) = actions.recv().await {
            let result = self.take(&action).await;
            if matches!(action, VmSourceAction::Quit) {
                self.forget().await;
            }
            match &result {
                Ok(()) => tracing::debug!(session = %self.session, ?action, "done"),
                Err(why) => tracing::warn!(session = %self.session, ?action, "refused: {why}"),
            }
            if results.send((action, result)).is_err() {
                return;
            }
        }
    }

    async fn take(&self, action: &VmSourceAction) -> Result<(), String> {
        if let VmSourceAction::Disks(command) = action {
            return self.agent.tell_disks(self.session, *command).await;
        }
        let qmp = self.agent.vms.qmp(&self.vm).await;
        let qmp = match (qmp, action) {
            (Ok(qmp), _) => qmp,
            // Nothing is left to be ended.
            (Err(_), VmSourceAction::EndTransfer | VmSourceAction::Quit) => return Ok(()),
            (Err(error), _) => return Err(error.to_string()),
        };
        match action {
            VmSourceAction::Start { attempt, postcopy } => {
                let socket = socket_path(&self.agent.config.runtime_dir, self.session, *attempt);
                let settings = OutgoingSettings {
                    uri: format!("unix:{}", socket.display()),
                    // Never by itself: the guest is stopped by us.
                    downtime_limit_ms: None,
                    max_bandwidth_bytes_per_sec: None,
                    postcopy: *postcopy,
                };
                text(transfer::start_outgoing(&qmp, &settings).await)
            }
            VmSourceAction::Stop => stop(&qmp).await,
            VmSourceAction::Finish => text(transfer::finish(&qmp).await),
            VmSourceAction::Continue => text(transfer::continue_switchover(&qmp).await),
            VmSourceAction::StartPostcopy => text(transfer::start_postcopy(&qmp).await),
            VmSourceAction::EndTransfer => end_transfer(&qmp).await,
            VmSourceAction::Resume => resume(&qmp).await,
            VmSourceAction::Quit => match qmp.execute(Quit {}).await {
                Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
            VmSourceAction::Disks(
                DisksCommand::Switch | DisksCommand::Cancel | DisksCommand::VmReady(_),
            ) => Ok(()),
        }
    }

    /// Forgets the machine, which has moved.
    async fn forget(&self) {
        let (agent, vm) = (self.agent.clone(), self.vm.clone());
        let removed = tokio::task::spawn_blocking(move || agent.vms.remove(&vm)).await;
        if let Ok(Err(error)) = removed {
            tracing::error!(vm = %self.vm, "forgetting a machine that has moved failed: {error}");
        }
    }
}

fn text<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

/// Stops a guest that runs. One that the hypervisor has stopped to finish its migration would be started by it again.
async fn stop(qmp: &Qmp) -> Result<(), String> {
    text(qmp.execute(Stop {}).await)?;
    match text(transfer::run_state(qmp).await)? {
        RunState::FinishMigrate => Err("the hypervisor has stopped the guest by itself".to_owned()),
        _ => Ok(()),
    }
}

async fn end_transfer(qmp: &Qmp) -> Result<(), String> {
    use flimcd_qemu::transfer::TransferState as S;
    match transfer::cancel(qmp).await {
        Ok(_) => Ok(()),
        Err(error) => match text(transfer::status(qmp).await)?.status {
            S::None | S::Completed | S::Failed | S::Cancelled => Ok(()),
            _ => Err(error.to_string()),
        },
    }
}

async fn resume(qmp: &Qmp) -> Result<(), String> {
    match text(transfer::run_state(qmp).await)? {
        RunState::Running => Ok(()),
        _ => text(transfer::resume_guest(qmp).await),
    }
}

/// One look at the transfer.
pub(super) async fn look(qmp: &Qmp) -> Result<Transfer, String> {
    use flimcd_qemu::transfer::TransferState as S;
    let status = text(transfer::status(qmp).await)?;
    let state = match status.status {
        S::Setup | S::Active => TransferState::Active,
        S::PreSwitchover => TransferState::PreSwitchover,
        S::Device => TransferState::Device,
        S::PostcopyActive | S::PostcopyDevice | S::PostcopyRecover | S::PostcopyRecoverSetup => {
            TransferState::Postcopy
        }
        S::PostcopyPaused => TransferState::PostcopyBroken,
        S::Completed => TransferState::Completed,
        S::Failed => TransferState::Failed(
            status
                .error
                .unwrap_or_else(|| "the hypervisor does not say why".to_owned()),
        ),
        // `Cancelled`, `Cancelling`, and what a later QEMU may invent.
        _ => TransferState::None,
    };
    let ram = status.ram;
    Ok(Transfer {
        state,
        remaining_bytes: ram.remaining_bytes,
        syncs: ram.dirty_sync_count,
        rate_bytes_per_sec: 0,
    })
}
