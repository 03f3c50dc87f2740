//! The source's side of a running machine's move.
//!
//! ```text
//!  Disks ─► Ram ─► Switching ─► Moved ─► Following ─► Completed
//!    │       │         │          └ the running state once more, if the target's machine died ┘
//!    └───────┴─────────┴── cancel or failure ─► Returning ─► Cancelled / Failed
//! ```
//! An *attempt* is one machine at the target with one transfer to it. In `Disks` and `Ram` an attempt that was
//! lost with an agent is followed by the next; one that a hypervisor failed in ends the move, since it would fail again.

mod attempt;

use std::collections::VecDeque;

use flimcd_core::Time;
use flimcd_wire::{ErrorCode, VmMessage, VmStage, WireError};

use attempt::Attempt;

use super::types::{
    DisksCommand, DisksEnd, Transfer, TransferState, VmSourceAction, VmSourceConfig, VmSourceEvent,
    VmSourcePhase, VmSourceStart,
};

/// The source's machine; see the module and [the module above](super).
///
/// The driver starts the actions in the order given, one after the other, tells the result of each, and looks at the
/// hypervisor's transfer every few ten milliseconds while [`VmSource::wants_transfer`].
#[derive(Debug)]
pub struct VmSource {
    config: VmSourceConfig,
    phase: VmSourcePhase,
    accepted: bool,
    /// The highest attempt that the target knows, and where it stands.
    attempt_at_target: u32,
    stage_at_target: VmStage,
    attempt: Attempt,
    disks_ready: bool,
    disks_end: Option<DisksEnd>,
    /// Why the move ends; `None` for a cancellation.
    error: Option<WireError>,
    transfer: Transfer,
    /// The guest did not write to its memory during a whole pass.
    is_idle: bool,
    quit_asked: bool,
    messages: VecDeque<VmMessage>,
    actions: VecDeque<VmSourceAction>,
    events: VecDeque<VmSourceEvent>,
}

impl VmSource {
    /// A machine at its beginning, with the link down.
    #[must_use]
    pub fn new(config: VmSourceConfig, start: VmSourceStart) -> Self {
        let mut machine = Self {
            config,
            phase: VmSourcePhase::Disks,
            accepted: false,
            attempt_at_target: 0,
            stage_at_target: VmStage::Invalid,
            attempt: Attempt::default(),
            disks_ready: false,
            disks_end: None,
            error: None,
            transfer: Transfer::default(),
            is_idle: false,
            quit_asked: false,
            messages: VecDeque::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
        };
        match start {
            VmSourceStart::Fresh => {}
            VmSourceStart::Resume { offered: false } => {
                machine.actions.push_back(VmSourceAction::EndTransfer);
                machine.resume_guest();
            }
            VmSourceStart::Resume { offered: true } => {
                machine.end(Some(WireError::new(
                    ErrorCode::OTHER,
                    "the agent was restarted in the middle of the switch; migrate again",
                )));
            }
        }
        machine
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> &VmSourcePhase {
        &self.phase
    }

    /// The attempt that messages of the stream belong to.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt.number
    }

    /// Whether `handle_transfer` should be called now and then.
    #[must_use]
    pub fn wants_transfer(&self) -> bool {
        !self.phase.is_final() && (self.attempt.started || self.phase == VmSourcePhase::Following)
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// The link is there.
    pub fn handle_link_up(&mut self) {
        self.messages.clear();
        self.accepted = false;
        let first = match self.phase {
            VmSourcePhase::Cancelled | VmSourcePhase::Failed(_) => VmMessage::Cancel,
            _ => VmMessage::Open(self.config.open.clone()),
        };
        self.messages.push_back(first);
    }

    /// The link is gone.
    pub fn handle_link_down(&mut self) {
        self.accepted = false;
        self.messages.clear();
    }

    /// A message of the target, other than those of the stream.
    pub fn handle_message(&mut self, now: Time, message: VmMessage) {
        match message {
            VmMessage::Accept { attempt, stage } => self.handle_accept(attempt, stage),
            VmMessage::Listening { attempt, postcopy } if attempt == self.attempt.number => {
                self.attempt.listening = true;
                self.attempt.takes_postcopy = postcopy;
            }
            VmMessage::Running => self.handle_running(),
            VmMessage::Broken { attempt, error } => {
                if attempt == self.attempt_at_target {
                    self.stage_at_target = VmStage::Idle;
                }
                if attempt == self.attempt.number {
                    self.handle_broken(error);
                }
            }
            VmMessage::Failed(error) => self.fail(error),
            // Of an earlier attempt, or of no consequence here.
            _ => {}
        }
        self.advance(now);
    }

    /// Whether the disks' migration would switch now.
    pub fn handle_disks_ready(&mut self, now: Time, is_ready: bool) {
        self.disks_ready = is_ready;
        self.advance(now);
    }

    /// The target owns the disks.
    pub fn handle_disks_moved(&mut self, now: Time) {
        if self.phase.is_before_move() {
            self.error = None;
            self.set_phase(VmSourcePhase::Moved);
            if self.attempt.broken {
                self.lose_attempt();
            } else {
                self.consider_transfer();
            }
        }
        self.advance(now);
    }

    /// The disks' migration has ended here: the target has never owned them and never will.
    pub fn handle_disks_ended(&mut self, now: Time, end: DisksEnd) {
        if self.phase.is_before_move() {
            if self.error.is_none()
                && let DisksEnd::Failed(text) = &end
            {
                self.error = Some(WireError::new(ErrorCode::OTHER, text.clone()));
            }
            self.disks_end = Some(end);
            if self.phase != VmSourcePhase::Returning {
                self.set_phase(VmSourcePhase::Returning);
            }
        }
        self.advance(now);
    }

    /// What the hypervisor says of the transfer.
    pub fn handle_transfer(&mut self, now: Time, transfer: Transfer) {
        if self.phase == VmSourcePhase::Following {
            self.transfer = transfer;
            self.consider_quit();
        } else if self.attempt.started {
            self.attempt.seen_active |= transfer.state.is_under_way();
            self.transfer = transfer;
            self.consider_transfer();
        }
        self.advance(now);
    }

    /// The stream of the current attempt cannot go on.
    pub fn handle_stream_broken(&mut self, now: Time, text: String) {
        if self.attempt.started {
            self.handle_broken(WireError::new(ErrorCode::OTHER, text));
        }
        self.advance(now);
    }

    /// An action is done.
    pub fn handle_done(&mut self, now: Time, action: &VmSourceAction) {
        match action {
            VmSourceAction::Start { attempt, .. } if *attempt == self.attempt.number => {
                self.attempt.seen_active = true;
            }
            VmSourceAction::Stop => self.stopped(),
            VmSourceAction::Quit => {
                self.set_phase(VmSourcePhase::Completed);
                self.say(VmMessage::Finished);
            }
            _ => {}
        }
        self.advance(now);
    }

    /// An action did not work.
    pub fn handle_refused(&mut self, now: Time, action: &VmSourceAction, text: String) {
        let error = WireError::new(ErrorCode::OTHER, text);
        match action {
            VmSourceAction::Start { .. } | VmSourceAction::Finish | VmSourceAction::Continue => {
                self.handle_broken(error);
            }
            // Because it is nearly done, or cannot: either way all of it goes before the switch.
            VmSourceAction::StartPostcopy => {
                self.attempt.postcopy = false;
                self.actions.push_back(VmSourceAction::Finish);
            }
            VmSourceAction::Stop if self.phase == VmSourcePhase::Switching => {
                self.stopped_by_itself();
            }
            VmSourceAction::Stop => {}
            // A machine that cannot be asked is gone, and with it the guest.
            VmSourceAction::Resume => {
                self.note(format!("the guest could not be let run again: {error}"));
            }
            VmSourceAction::EndTransfer => self.note(format!("ending the transfer: {error}")),
            VmSourceAction::Quit => {
                self.note(format!("ending the machine at the source: {error}"));
                self.set_phase(VmSourcePhase::Completed);
                self.say(VmMessage::Finished);
            }
            VmSourceAction::Disks(_) => {}
        }
        self.advance(now);
    }

    /// The operator ends the move. False if it is too late.
    pub fn handle_cancel(&mut self, now: Time) -> bool {
        if !self.phase.is_before_move() {
            return self.phase == VmSourcePhase::Cancelled;
        }
        if self.phase != VmSourcePhase::Returning {
            self.end(None);
        }
        self.advance(now);
        true
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next action.
    pub fn poll_action(&mut self) -> Option<VmSourceAction> {
        self.actions.pop_front()
    }

    /// The next message for the target; only while the link is up.
    pub fn poll_transmit(&mut self) -> Option<VmMessage> {
        self.messages.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<VmSourceEvent> {
        self.events.pop_front()
    }

    // ---- what follows from the inputs ---------------------------------------------------------

    fn advance(&mut self, now: Time) {
        // Time is the driver's business so far: it says when it looks at the transfer.
        let _ = now;
        match self.phase {
            VmSourcePhase::Disks | VmSourcePhase::Moved => self.consider_start(),
            VmSourcePhase::Returning if self.disks_end.is_some() => self.finish_return(),
            _ => {}
        }
    }

    fn handle_accept(&mut self, attempt: u32, stage: VmStage) {
        self.accepted = true;
        self.attempt_at_target = self.attempt_at_target.max(attempt);
        self.stage_at_target = stage;
        if stage == VmStage::Running {
            return self.handle_running();
        }
        if self.attempt.number == 0 {
            return;
        }
        let is_current = attempt == self.attempt.number && stage != VmStage::Idle;
        if is_current {
            // `Listening` comes once more.
        } else if self.attempt.number > self.attempt_at_target {
            // `Prepare` was lost with the link, or is answered next.
            self.say(VmMessage::Prepare {
                attempt: self.attempt.number,
            });
        } else {
            self.attempt_was_lost();
        }
    }

    fn handle_running(&mut self) {
        if matches!(self.phase, VmSourcePhase::Following) {
            return;
        }
        if self.phase == VmSourcePhase::Completed {
            return self.say(VmMessage::Finished);
        }
        if self.phase.is_final() {
            return;
        }
        self.set_phase(VmSourcePhase::Following);
        self.events.push_back(VmSourceEvent::Running);
    }

    /// Ends the machine here when no page is needed any more.
    fn consider_quit(&mut self) {
        let follows = match &self.transfer.state {
            TransferState::PostcopyBroken => return self.lose_pages(),
            TransferState::Postcopy => true,
            TransferState::Completed | TransferState::None => false,
            // All of it has arrived, whatever became of the stream since.
            _ => self.attempt.postcopy,
        };
        if !follows && !std::mem::replace(&mut self.quit_asked, true) {
            self.actions.push_back(VmSourceAction::Quit);
        }
    }

    // ---- ending before the switch -------------------------------------------------------------

    fn fail(&mut self, error: WireError) {
        if self.phase.is_before_move() {
            if self.phase != VmSourcePhase::Returning {
                self.end(Some(error));
            }
        } else if self.phase == VmSourcePhase::Moved {
            self.note(format!("the target reports: {error}"));
        }
    }

    fn end(&mut self, error: Option<WireError>) {
        self.error = error;
        // Nothing is offered yet, so the transfer ends without anybody waiting for it.
        if self.phase == VmSourcePhase::Ram {
            self.actions.push_back(VmSourceAction::EndTransfer);
            self.attempt.started = false;
        }
        self.set_phase(VmSourcePhase::Returning);
        self.actions
            .push_back(VmSourceAction::Disks(DisksCommand::Cancel));
    }

    /// The disks are surely ours.
    fn finish_return(&mut self) {
        self.attempt.started = false;
        self.actions.push_back(VmSourceAction::EndTransfer);
        self.resume_guest();
        self.say(VmMessage::Cancel);
        let end = match self.error.take() {
            Some(error) => VmSourcePhase::Failed(error),
            None => VmSourcePhase::Cancelled,
        };
        self.set_phase(end);
    }

    fn resume_guest(&mut self) {
        if self.config.was_running {
            self.actions.push_back(VmSourceAction::Resume);
        }
    }

    fn set_phase(&mut self, phase: VmSourcePhase) {
        if self.phase != phase {
            self.phase = phase.clone();
            self.events.push_back(VmSourceEvent::Phase(phase));
        }
    }

    fn say(&mut self, message: VmMessage) {
        // Before the target has answered, everything follows from its answer.
        if self.accepted {
            self.messages.push_back(message);
        }
    }

    fn note(&mut self, text: impl Into<String>) {
        self.events.push_back(VmSourceEvent::Note(text.into()));
    }
}
