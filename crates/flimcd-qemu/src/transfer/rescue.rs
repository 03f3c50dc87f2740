//! The way back for a guest that QEMU has forgotten.

use std::{path::Path, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    time::{Instant, timeout},
};

use super::{
    outgoing::resume_guest,
    status::{TransferError, TransferState, doing, run_state, wait_for},
};
use crate::{
    commands::{HumanMonitor, RunState},
    qmp::Qmp,
};

/// How long a migration may take to settle by itself.
const SETTLE_PATIENCE: Duration = Duration::from_secs(5);
/// How long the guest may take to run.
const RUN_PATIENCE: Duration = Duration::from_secs(5);

/// Lets the source's guest run again after a switchover that failed half way, at the last resort by QEMU's
/// debugger interface, whose socket is made at `socket` meanwhile. A guest that runs is left alone. Only for
/// the one site that owns the disks.
///
/// QEMU 10.0 needs this: when the stream breaks between `migrate-continue` and `postcopy-active`, the migration
/// stays `device` and the guest `finish-migrate` for ever ("Unknown ending state 13"). `cont` says "Migration is
/// not finalized yet", `migrate_cancel` changes nothing. A debugger's "continue" does. The guest loses nothing;
/// this QEMU can be released, but not migrated again before it is restarted.
///
/// # Errors
/// [`TransferError::Guest`] when even that does not help.
pub async fn rescue_guest(qmp: &Qmp, socket: &Path) -> Result<(), TransferError> {
    let settled = |s: TransferState| s == TransferState::None || s.is_final();
    let settles = wait_for(qmp, "ending the migration", SETTLE_PATIENCE, settled).await;
    let state = run_state(qmp).await?;
    match settles {
        _ if state == RunState::Running => return Ok(()),
        Ok(_) => return resume_guest(qmp).await,
        Err(TransferError::Slow { .. }) if state == RunState::FinishMigrate => {}
        Err(TransferError::Slow { .. }) => return resume_guest(qmp).await,
        Err(error) => return Err(error),
    }
    tracing::warn!(
        "QEMU has forgotten its guest after a failed migration; continuing it as a debugger"
    );
    let path = socket.display();
    say(qmp, format!("gdbserver unix:{path},server=on,wait=off")).await?;
    let continued = debugger_continue(qmp, socket).await;
    // Without it, nobody is left who could stop the guest by connecting.
    say(qmp, "gdbserver none".to_owned()).await?;
    // Both ends of the debugger's connection stop the guest, which now is stopped as any other.
    if run_state(qmp).await? != RunState::Running {
        resume_guest(qmp).await?;
    }
    let state = run_state(qmp).await?;
    if state == RunState::Running {
        return Ok(());
    }
    let reason = continued.err().map(|e| e.to_string());
    tracing::warn!(?reason, "the debugger's interface did not help");
    Err(TransferError::Guest {
        what: "bring the guest back",
        status: state,
        way_out: "QEMU does not let it run any more: its disks are complete, so start the VM anew",
    })
}

async fn say(qmp: &Qmp, command_line: String) -> Result<(), TransferError> {
    let said = qmp.execute(HumanMonitor { command_line }).await;
    said.map(|_| ())
        .map_err(doing("asking for the debugger's interface"))
}

/// Says "continue" in the debugger's protocol and waits until the guest runs.
async fn debugger_continue(qmp: &Qmp, socket: &Path) -> std::io::Result<()> {
    let mut events = qmp.events();
    let mut debugger = UnixStream::connect(socket).await?;
    // An acknowledgement, and the packet "c" with its checksum.
    debugger.write_all(b"+$c#63").await?;
    let end = Instant::now() + RUN_PATIENCE;
    while Instant::now() < end {
        match run_state(qmp).await {
            Ok(RunState::Running) => break,
            Ok(_) => {}
            Err(error) => return Err(std::io::Error::other(error)),
        }
        let _ = timeout(Duration::from_millis(50), events.next()).await;
    }
    debugger.write_all(b"+").await
}
