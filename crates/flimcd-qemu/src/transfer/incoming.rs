//! The target's side, and what both sides have to agree on.

use serde::{Deserialize, Serialize};

use super::status::{TransferError, TransferState, doing, run_state, status};
use crate::{
    commands::{
        Capability, MigrateIncoming, MigrateSetCapabilities, QueryMigrateCapabilities, RunState,
    },
    qmp::Qmp,
};

/// What the target is told before it listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingSettings {
    /// Whether memory may follow on demand; as at the source.
    pub postcopy: bool,
}

/// Lets a QEMU that was started with `-incoming defer` listen at `uri` ("unix:PATH"). When this has
/// returned, the source may connect.
///
/// # Errors
/// [`TransferError::Guest`] when the VM was not started that way, or has taken one in already.
pub async fn listen_incoming(
    qmp: &Qmp,
    uri: &str,
    settings: IncomingSettings,
) -> Result<(), TransferError> {
    let state = run_state(qmp).await?;
    let before = status(qmp).await?;
    if state != RunState::Inmigrate || before.status != TransferState::None {
        return Err(TransferError::Guest {
            what: "receive a VM here",
            status: state,
            way_out: "start the target QEMU anew with `-incoming defer -S`; it can take in one migration",
        });
    }
    set_capabilities(qmp, settings.postcopy, false).await?;
    let exit_on_error = qmp.version().is_at_least(9, 1).then_some(false);
    let listen = MigrateIncoming {
        uri: uri.to_owned(),
        exit_on_error,
    };
    let done = qmp.execute(listen).await;
    done.map(|_| ()).map_err(doing("listening for the VM"))
}

/// Switches what we need on and everything that would change the stream's form off. What a QEMU does
/// not have is left out when it can be done without.
///
/// `stopped_by_us`: the guest is not stopped for the switch by QEMU. It then waits for the target's leave, which a
/// target that was not told of it never gives, as long as the guest runs. From 8.1.
pub(super) async fn set_capabilities(
    qmp: &Qmp,
    postcopy: bool,
    stopped_by_us: bool,
) -> Result<(), TransferError> {
    let known = qmp.execute(QueryMigrateCapabilities {}).await;
    let known = known.map_err(doing("asking what its migration can do"))?;
    let wanted = [
        ("events", true),
        ("pause-before-switchover", true),
        ("return-path", true),
        ("late-block-activate", true),
        ("postcopy-ram", postcopy),
        ("switchover-ack", stopped_by_us),
        // One stream, compressed by the agent.
        ("multifd", false),
        ("xbzrle", false),
        ("compress", false),
        ("auto-converge", false),
        ("postcopy-preempt", false),
        ("mapped-ram", false),
        // The disks are the agent's.
        ("block", false),
        ("dirty-bitmaps", false),
    ];
    let needed = ["events", "pause-before-switchover", "return-path"];
    let has = |name: &str| known.iter().any(|c| c.capability == name);
    let missing =
        |name: &str| !has(name) && (needed.contains(&name) || name == "postcopy-ram" && postcopy);
    if wanted.iter().any(|(name, _)| missing(name)) {
        return Err(TransferError::Unsupported {
            version: qmp.version().to_string(),
            what: "pause a migration before the switch, or let memory follow on demand",
            way_out: "use QEMU 7.2 or later, or migrate with `--ram precopy`",
        });
    }
    let changes = wanted.iter().filter(|(name, state)| {
        let mut known = known.iter();
        known.any(|c| c.capability == *name && c.state != *state)
    });
    let capabilities: Vec<_> = changes
        .map(|(name, state)| Capability {
            capability: (*name).to_owned(),
            state: *state,
        })
        .collect();
    if capabilities.is_empty() {
        return Ok(());
    }
    let done = qmp.execute(MigrateSetCapabilities { capabilities }).await;
    done.map(|_| ())
        .map_err(doing("setting the migration's capabilities"))
}
