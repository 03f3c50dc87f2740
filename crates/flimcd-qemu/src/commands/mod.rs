//! The monitor's commands that this crate uses, as types. Names and members are QEMU's; see its QMP
//! reference for what they do.

mod block;
mod migration;

pub use block::*;
pub use migration::*;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::qmp::Command;

/// What most commands return: nothing. Members that a later QEMU adds are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Nothing {}

macro_rules! command {
    ($(#[$doc:meta])* $name:ident = $qmp:literal -> $reply:ty { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, serde::Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type),*
        }

        impl $crate::qmp::Command for $name {
            const NAME: &'static str = $qmp;
            type Reply = $reply;
        }
    };
}
use command;

command! {
    /// Ends the negotiation.
    QmpCapabilities = "qmp_capabilities" -> Nothing {}
}
command! {
    /// The machine's name.
    QueryName = "query-name" -> NameInfo {}
}
command! {
    /// Whether the guest runs.
    QueryStatus = "query-status" -> StatusInfo {}
}
command! {
    /// The guest's memory.
    QueryMemory = "query-memory-size-summary" -> MemoryInfo {}
}
command! {
    /// Lets the guest run.
    Cont = "cont" -> Nothing {}
}
command! {
    /// Stops the guest.
    Stop = "stop" -> Nothing {}
}
command! {
    /// Ends QEMU.
    Quit = "quit" -> Nothing {}
}
command! {
    /// A property of an object.
    QomGet = "qom-get" -> Value {
        /// The object.
        path: String,
        /// The property.
        property: String,
    }
}

/// A line of the human monitor; the answer is what it prints.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HumanMonitor {
    /// The line.
    pub command_line: String,
}

impl Command for HumanMonitor {
    const NAME: &'static str = "human-monitor-command";
    type Reply = String;
}

/// The answer to [`QueryName`].
#[derive(Clone, Debug, Deserialize)]
pub struct NameInfo {
    /// What `-name` says, if anything.
    #[serde(default)]
    pub name: Option<String>,
}

/// The answer to [`QueryStatus`].
#[derive(Clone, Debug, Deserialize)]
pub struct StatusInfo {
    /// The state.
    pub status: RunState,
    /// Whether virtual processors run.
    pub running: bool,
}

/// The answer to [`QueryMemory`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryInfo {
    /// What the machine was started with, in bytes.
    pub base_memory: u64,
    /// What was plugged in since, in bytes.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// State of the machine as QEMU calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RunState {
    /// Stopped by a person or program.
    Paused,
    /// The guest runs.
    Running,
    /// Started with `-S`, never ran.
    Prelaunch,
    /// Waits for, or takes in, a migration.
    Inmigrate,
    /// Stopped to finish an outgoing migration.
    FinishMigrate,
    /// Its migration completed: the guest is elsewhere.
    Postmigrate,
    /// Stopped by an I/O error, see the disk's `werror` and `rerror`.
    IoError,
    /// Restoring a snapshot.
    RestoreVm,
    /// Saving a snapshot.
    SaveVm,
    /// The guest has shut down, QEMU was started with `-no-shutdown`.
    Shutdown,
    /// Suspended to RAM by the guest.
    Suspended,
    /// The watchdog stopped it.
    Watchdog,
    /// The guest panicked.
    GuestPanicked,
    /// Halted by an internal error.
    InternalError,
    /// In a debugger.
    Debug,
    /// Pre-configuration.
    Preconfig,
    /// A fault-tolerant pair.
    Colo,
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}
