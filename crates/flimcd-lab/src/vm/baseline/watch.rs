//! What a QEMU's events have said so far.

use std::collections::BTreeMap;

use flimcd_qemu::{
    qmp::{EventKind, Events, Qmp, QmpError},
    transfer::TransferState,
};
use tokio::time::{Instant, timeout_at};

use super::BaselineError;

/// The state of one QEMU as its events tell it.
pub(super) struct Watch {
    side: &'static str,
    events: Events,
    /// When the guest last stopped, in µs of the host's clock.
    pub(super) stopped_us: Option<u64>,
    /// When it last went on.
    pub(super) resumed_us: Option<u64>,
    /// Jobs that are ready or have ended.
    pub(super) jobs: BTreeMap<String, Job>,
    /// The migration's state.
    pub(super) migration: TransferState,
    /// Passes over memory.
    pub(super) passes: u64,
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Job {
    /// Everything is copied, new writes follow.
    Ready,
    /// It ended.
    Ended,
}

impl Watch {
    /// Knows everything that happens from now on.
    pub(super) fn new(side: &'static str, qmp: &Qmp) -> Self {
        Self {
            side,
            events: qmp.events(),
            stopped_us: None,
            resumed_us: None,
            jobs: BTreeMap::new(),
            migration: TransferState::None,
            passes: 0,
        }
    }

    /// Takes events until `done`; false when `deadline` comes first.
    pub(super) async fn until(
        &mut self,
        deadline: Instant,
        done: impl Fn(&Self) -> bool,
    ) -> Result<bool, BaselineError> {
        while !done(self) {
            let Ok(event) = timeout_at(deadline, self.events.next()).await else {
                return Ok(false);
            };
            let Some(event) = event else {
                return Err(BaselineError::Qmp {
                    side: self.side,
                    source: QmpError::Closed { command: "nothing" },
                });
            };
            self.take(event.time_us, event.kind)?;
        }
        Ok(true)
    }

    fn take(&mut self, time_us: u64, event: EventKind) -> Result<(), BaselineError> {
        let failed = |what, text: String| Err(BaselineError::Failed { what, text });
        match event {
            EventKind::Stop => self.stopped_us = Some(time_us),
            EventKind::Resume => self.resumed_us = Some(time_us),
            EventKind::Migration(state) => self.migration = state,
            EventKind::MigrationPass(pass) => self.passes = pass,
            EventKind::JobStatus { id, status } if status == "ready" => {
                self.jobs.insert(id, Job::Ready);
            }
            EventKind::JobEnded {
                error: Some(error), ..
            } => return failed("the mirror", error),
            EventKind::JobEnded { id, .. } => {
                self.jobs.insert(id, Job::Ended);
            }
            EventKind::BlockIoError {
                operation, reason, ..
            } => {
                return failed("the guest's I/O", format!("{operation}: {reason}"));
            }
            EventKind::Missed(count) => {
                return failed("listening to QEMU", format!("{count} events were missed"));
            }
            _ => {}
        }
        Ok(())
    }
}
