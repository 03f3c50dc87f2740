//! Events: what QEMU says unasked.

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::broadcast;

use crate::transfer::TransferState;

/// Events kept for a slow listener.
pub(super) const EVENTS_MAX: usize = 1024;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// QEMU's clock (UTC), microseconds since 1970; 0 when it has none.
    pub time_us: u64,
    /// What happened.
    pub kind: EventKind,
}

/// What happened. Events that this crate does not use are [`EventKind::Other`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The guest stopped.
    Stop,
    /// The guest runs again.
    Resume,
    /// The guest or a person shut the machine down.
    Shutdown,
    /// The machine was reset.
    Reset,
    /// A migration changed its state (needs the `events` capability, which [`crate::transfer`] sets).
    Migration(TransferState),
    /// Migration began its nth pass over RAM.
    MigrationPass(u64),
    /// A guest request met an I/O error.
    BlockIoError {
        /// The block backend's name, may be empty.
        device: String,
        /// The node, if any.
        node: Option<String>,
        /// "report", "ignore" or "stop".
        action: String,
        /// "read" or "write".
        operation: String,
        /// For people.
        reason: String,
    },
    /// A job changed its state.
    JobStatus {
        /// The job.
        id: String,
        /// "created", "running", "ready", "concluded", "null", …
        status: String,
    },
    /// A job ended; `error` says why if it failed.
    JobEnded {
        /// The job.
        id: String,
        /// Why it failed.
        error: Option<String>,
        /// Whether it was cancelled.
        cancelled: bool,
    },
    /// This listener was too slow and missed so many events: ask for the state instead.
    Missed(u64),
    /// Something else.
    Other {
        /// Its name.
        name: String,
        /// Its details.
        data: Value,
    },
}

impl EventKind {
    pub(super) fn new(name: String, data: Value) -> Self {
        match Self::known(&name, &data) {
            Some(kind) => kind,
            None => Self::Other { name, data },
        }
    }

    fn known(name: &str, data: &Value) -> Option<Self> {
        let text = |key: &str| Some(data.get(key)?.as_str()?.to_owned());
        Some(match name {
            "STOP" => Self::Stop,
            "RESUME" => Self::Resume,
            "SHUTDOWN" => Self::Shutdown,
            "RESET" => Self::Reset,
            "MIGRATION" => Self::Migration(TransferState::deserialize(data.get("status")?).ok()?),
            "MIGRATION_PASS" => Self::MigrationPass(data.get("pass")?.as_u64()?),
            "BLOCK_IO_ERROR" => Self::BlockIoError {
                device: text("device").unwrap_or_default(),
                node: text("node-name"),
                action: text("action")?,
                operation: text("operation")?,
                reason: text("reason").unwrap_or_default(),
            },
            "JOB_STATUS_CHANGE" => Self::JobStatus {
                id: text("id")?,
                status: text("status")?,
            },
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => Self::JobEnded {
                id: text("device")?,
                error: text("error"),
                cancelled: name == "BLOCK_JOB_CANCELLED",
            },
            _ => return None,
        })
    }
}

/// A listener, from [`Qmp::events`](super::Qmp::events).
#[derive(Debug)]
pub struct Events {
    pub(super) receiver: broadcast::Receiver<Event>,
}

impl Events {
    /// The next event; `None` when the connection has ended and all events were taken. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(error) => Self::missed(&error),
        }
    }

    /// The next event if one is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        use broadcast::error::{RecvError, TryRecvError};
        match self.receiver.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Lagged(count)) => Self::missed(&RecvError::Lagged(count)),
            Err(_) => None,
        }
    }

    fn missed(error: &broadcast::error::RecvError) -> Option<Event> {
        match error {
            broadcast::error::RecvError::Lagged(count) => Some(Event {
                time_us: 0,
                kind: EventKind::Missed(*count),
            }),
            broadcast::error::RecvError::Closed => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn known_events_get_types_and_the_rest_is_kept() {
        let check = |name: &str, data: Value, expected: EventKind| {
            assert_eq!(EventKind::new(name.to_owned(), data), expected);
        };
        check("STOP", Value::Null, EventKind::Stop);
        check(
            "MIGRATION",
            json!({"status": "pre-switchover"}),
            EventKind::Migration(TransferState::PreSwitchover),
        );
        check(
            "MIGRATION",
            json!({"status": "a-new-one"}),
            EventKind::Migration(TransferState::Unknown),
        );
        check(
            "BLOCK_JOB_COMPLETED",
            json!({"device": "j", "error": "no space"}),
            EventKind::JobEnded {
                id: "j".into(),
                error: Some("no space".into()),
                cancelled: false,
            },
        );
        let odd = json!({"unexpected": true});
        check(
            "JOB_STATUS_CHANGE",
            odd.clone(),
            EventKind::Other {
                name: "JOB_STATUS_CHANGE".into(),
                data: odd,
            },
        );
    }
}
