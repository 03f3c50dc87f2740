//! What can go wrong between us and a monitor.

use std::{io, path::PathBuf};

use super::decode::DecodeError;

/// A failed conversation with QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection to the socket.
    #[error(
        "cannot connect to the QMP socket {}: {source}; check that the VM runs and was started with \
         `-qmp unix:{},server=on,wait=off`", path.display(), path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Connected, but nobody greets: a monitor serves one client at a time.
    #[error(
        "the monitor at {} does not answer: another program (libvirt, a management tool, a second \
         agent) holds it; give the VM a second monitor (`-qmp unix:OTHER,server=on,wait=off`) and use that one, \
         or end the other program", path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// Somebody else answers at the socket.
    #[error("what listens at {} is not a QMP monitor: {reason}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {text}")]
    Command {
        /// The command's name.
        command: &'static str,
        /// "GenericError", "CommandNotFound", "DeviceNotFound", …
        class: String,
        /// QEMU's words.
        text: String,
    },
    /// The connection ended: QEMU ended, or closed the monitor.
    #[error(
        "the connection to QEMU's monitor ended before {command} was answered: the VM may have ended"
    )]
    Closed {
        /// What was asked.
        command: &'static str,
    },
    /// No answer in time. What was asked may still happen.
    #[error(
        "QEMU did not answer {command} within {seconds} s; it may be waiting for its storage, and \
         the command may still take effect: look at the VM before trying again"
    )]
    Timeout {
        /// What was asked.
        command: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// An answer of an unexpected shape.
    #[error("cannot read QEMU's answer to {command}: {source}")]
    Reply {
        /// What was asked.
        command: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Something that is no QMP.
    #[error("the monitor sent what is no message: {0}")]
    Decode(#[from] DecodeError),
}

impl QmpError {
    /// Whether QEMU does not know the command, so that an older way may be tried.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Command { class, .. } if class == "CommandNotFound")
    }

    /// Whether the conversation is over, as opposed to one command having failed.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::Command { .. } | Self::Reply { .. })
    }
}
