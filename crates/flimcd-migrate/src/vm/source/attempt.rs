//! The attempts to get the running state over: when one begins, when the guest is stopped for it, and what becomes of
//! the move when it is lost.

use std::time::Duration;

use flimcd_wire::{ErrorCode, VmMessage, VmStage, WireError};

use super::{
    super::types::{DisksCommand, RamMode, Transfer, TransferState, VmSourceAction, VmSourcePhase},
    VmSource,
};

/// Part of the downtime that the rest of the memory may take; the hand-over of the disks and the devices need theirs.
const RAM_SHARE: f64 = 0.5;
/// A pass over memory that leaves more than this part of what the one before left does not converge.
const CONVERGING: f64 = 0.75;
/// Passes that do not converge before it is said, or post-copy begins.
const PASSES: u32 = 2;
/// Attempts that may be lost with an agent.
const ATTEMPTS_MAX: u32 = 8;

/// The transfer of one attempt.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    pub(super) number: u32,
    /// The target's machine waits for its running state.
    pub(super) listening: bool,
    /// Pages may follow the switch there.
    pub(super) takes_postcopy: bool,
    /// The transfer was begun.
    pub(super) started: bool,
    /// It has been seen under way; what is seen before may be what an earlier one left.
    pub(super) seen_active: bool,
    /// `Continue` was asked for.
    pub(super) continued: bool,
    /// What follows when the guest has been stopped.
    pub(super) how: Option<VmSourceAction>,
    /// Post-copy was asked for.
    pub(super) postcopy: bool,
    /// It cannot go on, and whether the disks have moved is not known yet.
    pub(super) broken: bool,
    pub(super) syncs: u64,
    /// What the last pass had left, and how many in a row did not converge.
    pub(super) left_bytes: Option<u64>,
    pub(super) stubborn: u32,
}

impl VmSource {
    /// Has the target start a machine, and starts the transfer when it waits and the disks are ready.
    pub(super) fn consider_start(&mut self) {
        if self.attempt.started || !self.accepted {
            return;
        }
        let moved = self.phase == VmSourcePhase::Moved;
        if self.attempt.number == 0 {
            // After a restart the machine there may have all that it needs, or run.
            let is_needed =
                !moved || matches!(self.stage_at_target, VmStage::Idle | VmStage::Listening);
            if is_needed {
                self.begin_attempt();
            }
            return;
        }
        if self.attempt.listening && (self.disks_ready || moved) {
            self.attempt.started = true;
            self.transfer = Transfer::default();
            self.actions.push_back(VmSourceAction::Start {
                attempt: self.attempt.number,
                postcopy: self.attempt.takes_postcopy
                    && self.config.ram != RamMode::Precopy
                    && !moved,
            });
            if moved {
                self.actions.push_back(VmSourceAction::Finish);
            } else {
                self.set_phase(VmSourcePhase::Ram);
            }
        }
    }

    fn begin_attempt(&mut self) {
        let number = self.attempt.number.max(self.attempt_at_target) + 1;
        self.attempt = Attempt {
            number,
            ..Attempt::default()
        };
        self.actions.push_back(VmSourceAction::EndTransfer);
        self.say(VmMessage::Prepare { attempt: number });
    }

    /// What the transfer's state means in this phase.
    pub(super) fn consider_transfer(&mut self) {
        let moved = self.phase == VmSourcePhase::Moved;
        match (&self.transfer.state, &self.phase) {
            (TransferState::Failed(text), _) if self.attempt.seen_active => {
                let error = WireError::new(ErrorCode::OTHER, text.clone());
                self.handle_broken(error);
            }
            (TransferState::PostcopyBroken, VmSourcePhase::Moved) => self.lose_pages(),
            (TransferState::Active, VmSourcePhase::Ram) => self.consider_stop(),
            (TransferState::PreSwitchover, VmSourcePhase::Ram) => self.stopped_by_itself(),
            (TransferState::PreSwitchover, _)
                if self.attempt.how.is_none()
                    && (moved || self.phase == VmSourcePhase::Switching)
                    && !self.attempt.continued =>
            {
                self.attempt.continued = true;
                self.actions.push_back(VmSourceAction::Continue);
            }
            _ => {}
        }
    }

    /// While memory goes over: whether what is left fits the downtime, or will never.
    fn consider_stop(&mut self) {
        let Transfer {
            remaining_bytes: left,
            syncs,
            rate_bytes_per_sec: rate,
            ..
        } = self.transfer;
        // The first look comes before the first pass; each further one begins with what was written in the last.
        let budget_s = self.config.downtime_max.as_secs_f64() * RAM_SHARE;
        // A guest that writes nothing at all: what the first pass has not sent yet is all there is. Before that pass has begun
        // nothing seems to be left either.
        if self.is_idle && syncs > 0 && seconds(left, rate) <= budget_s {
            return self.switch(VmSourceAction::Finish);
        }
        if syncs <= self.attempt.syncs || syncs < 2 {
            return;
        }
        self.attempt.syncs = syncs;
        let before = self.attempt.left_bytes.replace(left);
        if seconds(left, rate) <= budget_s {
            return self.switch(VmSourceAction::Finish);
        }
        let is_stubborn = before.is_some_and(|before| left_of(left, before) > CONVERGING);
        self.attempt.stubborn = if is_stubborn {
            self.attempt.stubborn + 1
        } else {
            0
        };
        match self.config.ram {
            RamMode::Postcopy => self.switch(VmSourceAction::StartPostcopy),
            RamMode::Auto if self.attempt.stubborn >= PASSES => {
                self.note(
                    "memory is written faster than it can be sent; the rest follows the switch",
                );
                self.switch(VmSourceAction::StartPostcopy);
            }
            RamMode::Precopy if self.attempt.stubborn == PASSES => {
                let stand = Duration::from_secs_f64(seconds(left, rate).min(3600.0));
                self.note(format!(
                    "memory is written faster than it can be sent: stopping now would make the guest stand for {stand:.1?}; \
                     a longer --downtime, or --ram auto, would end this"
                ));
            }
            RamMode::Precopy | RamMode::Auto => {}
        }
    }

    /// Stops the guest and hands over.
    fn switch(&mut self, how: VmSourceAction) {
        self.set_phase(VmSourcePhase::Switching);
        self.attempt.how = Some(how);
        if self.config.was_running {
            self.actions.push_back(VmSourceAction::Stop);
        } else {
            self.stopped();
        }
    }

    /// The guest stands, and only we can start it.
    pub(super) fn stopped(&mut self) {
        if self.phase == VmSourcePhase::Switching
            && let Some(how) = self.attempt.how.take()
        {
            self.attempt.postcopy = how == VmSourceAction::StartPostcopy;
            self.actions
                .extend([VmSourceAction::Disks(DisksCommand::Switch), how]);
        }
    }

    /// The hypervisor stopped the guest, because memory was not written to at all. It would start it by itself if the
    /// stream broke now: undo that, and stop it ourselves after the first pass.
    pub(super) fn stopped_by_itself(&mut self) {
        self.note("the hypervisor stopped the guest by itself; sending memory again");
        self.is_idle = true;
        self.set_phase(VmSourcePhase::Ram);
        self.lose_attempt();
    }

    /// The target's agent was restarted, and its machine is gone or cannot go on.
    pub(super) fn attempt_was_lost(&mut self) {
        match self.phase {
            VmSourcePhase::Disks | VmSourcePhase::Ram if self.attempt.number < ATTEMPTS_MAX => {
                self.note("the target's agent was restarted; sending memory again");
                self.lose_attempt();
            }
            VmSourcePhase::Moved => self.lose_attempt(),
            _ => self.break_switch(WireError::new(
                ErrorCode::OTHER,
                "the target's agent was restarted in the middle of the switch; migrate again",
            )),
        }
    }

    /// Begins again with the next attempt.
    pub(super) fn lose_attempt(&mut self) {
        if self.attempt.postcopy {
            return self.lose_pages();
        }
        if self.phase == VmSourcePhase::Ram {
            self.set_phase(VmSourcePhase::Disks);
        }
        self.attempt.started = false;
        self.attempt.listening = false;
        if self.accepted {
            self.begin_attempt();
        } else {
            // After the next Accept; the guest may stand until then, and its pages go nowhere.
            self.actions.push_back(VmSourceAction::EndTransfer);
            self.attempt_at_target = self.attempt_at_target.max(self.attempt.number);
            self.attempt.number = 0;
        }
    }

    /// The current attempt cannot go on.
    pub(super) fn handle_broken(&mut self, error: WireError) {
        match self.phase {
            VmSourcePhase::Disks
            | VmSourcePhase::Ram
            | VmSourcePhase::Switching
            | VmSourcePhase::Returning => self.break_switch(error),
            VmSourcePhase::Moved if self.attempt.number < ATTEMPTS_MAX => {
                self.note(format!(
                    "the target's machine failed before its guest ran; sending memory again: {error}"
                ));
                self.lose_attempt();
            }
            VmSourcePhase::Moved => self.lose_pages(),
            _ => {}
        }
    }

    /// The attempt cannot go on; the move ends, unless the disks turn out to have moved.
    pub(super) fn break_switch(&mut self, error: WireError) {
        self.attempt.broken = true;
        self.fail(error);
    }

    /// Running state is lost that was in one place only.
    pub(super) fn lose_pages(&mut self) {
        let text = "the guest's memory is lost: the target owns its disks, so start the machine there anew";
        self.set_phase(VmSourcePhase::Failed(WireError::new(
            ErrorCode::OTHER,
            text,
        )));
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn seconds(bytes: u64, rate: u64) -> f64 {
    if bytes == 0 {
        0.0
    } else {
        bytes as f64 / (rate as f64).max(1.0)
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn left_of(left: u64, before: u64) -> f64 {
    left as f64 / (before as f64).max(1.0)
}
