//! Handing the volume over, and ending before that.
//!
//! ```text
//!  source                                         target
//!    Freeze, drained
//!    Persist(Prepared e+1)   durable
//!    MissingPart* Switch(e+1) ──────────────────►   data, missing set, Owner(e+1) durable
//!    Persist(Released e+1)   ◄──────── SwitchDone(e+1)   guest runs
//! ```
//! Between `Prepared` and `SwitchDone` nobody but the target decides: a source that wants the volume back
//! sends `CancelSwitch` and thaws only when the target has durably refused. No timeout does it.

use flimcd_core::{BlockSet, Epoch, Time};
use flimcd_wire::{
    ErrorCode, HeatKind, HeatPart, Message, SeqRuns, TargetStage, WireError, split_set,
};

use super::{
    Cancel, LinkState, RETRY, SourceAction, SourceEvent, SourceMachine, SourcePhase, SourceRecord,
    Switchover,
};
use crate::{DiskError, policy::Writes};

impl SourceMachine {
    /// Where the target stands, after every link-up.
    pub(super) fn handle_target_stage(&mut self, now: Time, stage: TargetStage) {
        let offered = self.offered_epoch();
        match (self.phase, stage) {
            (SourcePhase::Connecting, TargetStage::Incoming) => {
                self.set_phase(SourcePhase::PreCopy);
                if self.policy.writes() == Writes::Mirrored {
                    self.actions.push_back(SourceAction::Mirror(true));
                }
                self.consider_cancel();
            }
            (SourcePhase::Switching, TargetStage::Incoming) if self.cancel == Cancel::No => {
                self.send_switch();
            }
            (SourcePhase::Switching, TargetStage::Incoming) => {
                self.control_message(Message::CancelSwitch { epoch: offered });
            }
            (SourcePhase::Switching | SourcePhase::PostCopy, TargetStage::Owner(epoch))
                if epoch == offered =>
            {
                self.handle_switch_done(now, epoch);
            }
            (
                SourcePhase::Switching | SourcePhase::PostCopy | SourcePhase::Retiring,
                TargetStage::Complete(epoch),
            ) if epoch == offered => {
                self.handle_switch_done(now, epoch);
                self.handle_complete(now);
            }
            (SourcePhase::Completed, _) => self.control_message(Message::Finished),
            (SourcePhase::Returning, _) => {}
            (phase, TargetStage::Incoming) if phase < SourcePhase::Switching => {}
            (_, stage) => self.protocol_error(&format!(
                "it stands at {stage:?} although the source offered epoch {offered}"
            )),
        }
    }

    /// In pre-copy: switch if the policy would and it is granted.
    pub(super) fn consider_switch(&mut self, now: Time) {
        if self.link != LinkState::Accepted {
            return;
        }
        let ready = self.with_policy(now, |policy, view| policy.is_ready(view));
        if ready && !self.progress.ready {
            // So that the hand-over finds no queue of bulk on its way. A policy that sends bulk while the guest stands
            // gains nothing by it.
            if self.policy.allows_postcopy() {
                self.actions.push_back(SourceAction::SetPacing(true));
            }
            self.events.push_back(SourceEvent::ReadyForSwitchover);
        }
        self.progress.ready = ready;
        if self.switchover == Switchover::Now || (ready && self.switchover == Switchover::WhenReady)
        {
            self.set_phase(SourcePhase::Stopping);
            self.actions.push_back(SourceAction::Freeze);
            self.free_writes();
        }
    }

    /// The guest is stopped and nothing of it is in flight.
    pub(super) fn handle_stopped(&mut self) {
        if self.phase != SourcePhase::Stopping {
            return;
        }
        if self.sealing.is_some() {
            self.capture();
        } else if self.policy.allows_postcopy() {
            self.prepare();
        } else {
            self.set_phase(SourcePhase::Draining);
        }
    }

    pub(super) fn prepare(&mut self) {
        self.set_phase(SourcePhase::Preparing);
        self.persist(SourceRecord::Prepared(self.offered_epoch()));
    }

    pub(super) fn persist(&mut self, record: SourceRecord) {
        self.actions.push_back(SourceAction::Persist(record));
    }

    pub(super) fn handle_record(
        &mut self,
        now: Time,
        record: SourceRecord,
        result: Result<(), DiskError>,
    ) {
        match (record, result) {
            (SourceRecord::Prepared(_), Ok(())) if self.phase == SourcePhase::Preparing => {
                self.set_phase(SourcePhase::Switching);
                if self.cancel == Cancel::No {
                    self.send_switch();
                } else {
                    // Nothing was offered yet, so nothing has to be refused.
                    self.back_to_owner();
                }
            }
            (SourceRecord::Prepared(_), Err(error)) if self.phase == SourcePhase::Preparing => {
                let text = format!("cannot record the hand-over at the source: {error}");
                self.cancel = Cancel::Error(WireError::new(ErrorCode::DISK, text));
                self.back_to_owner();
            }
            (SourceRecord::Retired(epoch), Ok(())) if self.phase == SourcePhase::Retiring => {
                tracing::debug!(%epoch, "retired");
                self.set_phase(SourcePhase::Completed);
                self.events.push_back(SourceEvent::Completed);
                self.control_message(Message::Finished);
            }
            (SourceRecord::Owner, Ok(())) if self.phase == SourcePhase::Returning => self.end(),
            (SourceRecord::Owner, Err(error)) if self.phase == SourcePhase::Returning => {
                self.note(format!(
                    "cannot record that the migration has ended, trying again: {error}"
                ));
                self.persist_retry = Some((now + RETRY, record));
            }
            (_, Ok(())) => {}
            (record, Err(error)) => {
                // The target owns the volume whatever this record says; a restart asks it.
                self.note(format!("cannot record {record:?} at the source: {error}"));
                if matches!(record, SourceRecord::Retired(_)) {
                    self.persist_retry = Some((now + RETRY, record));
                }
            }
        }
        self.schedule(now);
    }

    /// Offers the volume to the target, with what it will miss.
    fn send_switch(&mut self) {
        // Without a link nothing is known yet of what is outdated and what is just lost: after the next Accept.
        if self.link != LinkState::Accepted {
            return;
        }
        let epoch = self.offered_epoch();
        let stale = self.flights.retire_outdated(&mut self.pending);
        let missing = self.missing();
        let parts = split_set(&missing);
        let count = u32::try_from(parts.len()).expect("a part covers many blocks");
        for (set, part) in parts.into_iter().zip(0..) {
            self.control_message(Message::MissingPart { epoch, part, set });
        }
        self.control_message(Message::Switch {
            epoch,
            parts: count,
            missing_blocks: missing.count(),
            stale: SeqRuns(stale),
            // Also what the link does not have yet: on its own lane it may overtake this message.
            in_flight: SeqRuns(self.flights.numbers()),
        });
    }

    /// All that the target may lack.
    fn missing(&self) -> BlockSet {
        let mut missing = self.pending.clone();
        missing.union_with(self.flights.blocks());
        missing
    }

    pub(super) fn handle_switch_done(&mut self, now: Time, epoch: Epoch) {
        if self.phase != SourcePhase::Switching || epoch != self.offered_epoch() {
            return;
        }
        if self.cancel != Cancel::No {
            self.note("too late to cancel: the target owns the volume");
            self.cancel = Cancel::No;
        }
        self.actions.push_back(SourceAction::Release);
        self.persist(SourceRecord::Released(epoch));
        self.events.push_back(SourceEvent::SwitchedOver);
        let prediction = self.with_policy(now, |policy, view| policy.predict(view));
        self.events.extend(prediction.map(SourceEvent::Predicted));
        self.heat_parts = [
            HeatPart::of(self.heat.reads(), HeatKind::Read),
            HeatPart::of(self.heat.writes(), HeatKind::Write),
        ]
        .into_iter()
        .flatten()
        .collect();
        self.enter_post_copy(now);
    }

    pub(super) fn enter_post_copy(&mut self, now: Time) {
        self.set_phase(SourcePhase::PostCopy);
        self.actions.push_back(SourceAction::SetPacing(true));
        self.with_policy(now, |policy, view| policy.begin_push(view));
    }

    pub(super) fn handle_switch_refused(&mut self, epoch: Epoch) {
        if self.phase != SourcePhase::Switching || epoch != self.offered_epoch() {
            return;
        }
        if self.cancel == Cancel::No {
            let text = "the target refused to take the volume over; its log says why";
            self.cancel = Cancel::Error(WireError::new(ErrorCode::OTHER, text));
        }
        self.back_to_owner();
    }

    /// The target has everything.
    pub(super) fn handle_complete(&mut self, now: Time) {
        match self.phase {
            SourcePhase::Switching => {
                self.handle_switch_done(now, self.offered_epoch());
                self.retire();
            }
            SourcePhase::PostCopy => self.retire(),
            SourcePhase::Completed => self.control_message(Message::Finished),
            SourcePhase::Retiring => {}
            _ => self.protocol_error("it has everything, but owns nothing"),
        }
    }

    fn retire(&mut self) {
        self.pending.clear();
        self.set_phase(SourcePhase::Retiring);
        self.actions.push_back(SourceAction::SetPacing(false));
        self.persist(SourceRecord::Retired(self.offered_epoch()));
    }

    // ---- ending before the switch -------------------------------------------------------------

    /// The target cannot go on.
    pub(super) fn handle_failed(&mut self, error: WireError) {
        match self.phase {
            SourcePhase::PostCopy | SourcePhase::Retiring | SourcePhase::Completed => {
                self.note(format!("the target reports: {error}"));
            }
            _ => self.end_early(Cancel::Error(error)),
        }
    }

    /// Ends the migration, at once where the source can decide it alone.
    pub(super) fn end_early(&mut self, why: Cancel) {
        match self.phase {
            SourcePhase::Connecting
            | SourcePhase::PreCopy
            | SourcePhase::Stopping
            | SourcePhase::Draining => {
                self.cancel = why;
                self.back_to_owner();
            }
            SourcePhase::Preparing => self.cancel = why,
            SourcePhase::Switching => {
                if self.cancel == Cancel::No {
                    self.cancel = why;
                    let epoch = self.offered_epoch();
                    self.control_message(Message::CancelSwitch { epoch });
                }
            }
            SourcePhase::PostCopy | SourcePhase::Retiring => {
                self.note("the target owns the volume already; the migration cannot be cancelled");
            }
            SourcePhase::Returning
            | SourcePhase::Completed
            | SourcePhase::Cancelled
            | SourcePhase::Failed => {}
        }
    }

    fn consider_cancel(&mut self) {
        if self.cancel != Cancel::No {
            self.back_to_owner();
        }
    }

    /// The migration is over, and the guest stays: at once where it was not stopped for good, else when the
    /// record says so.
    fn back_to_owner(&mut self) {
        match self.phase {
            SourcePhase::Stopping | SourcePhase::Draining => {
                self.actions.push_back(SourceAction::Thaw);
            }
            SourcePhase::Preparing | SourcePhase::Switching => self.thaw_due = true,
            _ => {}
        }
        self.free_writes();
        self.urgent.clear();
        self.prefetched.clear();
        self.bulk.clear();
        self.set_phase(SourcePhase::Returning);
        self.persist(SourceRecord::Owner);
    }

    /// The record says that the migration is over.
    fn end(&mut self) {
        if std::mem::take(&mut self.thaw_due) {
            self.actions.push_back(SourceAction::Thaw);
        }
        if self.is_sealed() {
            return self.end_sealed();
        }
        // Not before: the target may forget it now.
        if self.link != LinkState::Down {
            self.control.push_back(Message::Cancel);
        }
        match std::mem::replace(&mut self.cancel, Cancel::No) {
            Cancel::Error(error) => {
                self.set_phase(SourcePhase::Failed);
                self.events.push_back(SourceEvent::Failed(error));
            }
            Cancel::No | Cancel::Asked => {
                self.set_phase(SourcePhase::Cancelled);
                self.events.push_back(SourceEvent::Cancelled);
            }
        }
    }
}
