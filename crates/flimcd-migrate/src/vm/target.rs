//! The target's side of a running machine's move.
//!
//! ```text
//!  Idle ─► Starting ─► Receiving ─► Loaded ─► Going ─► Running ─► Completed
//!    ▲        └───────────┴───────────┴─ broken ─┘        (the disks are owned from Going on)
//!    └── the next attempt                        before the switch: ─► Ended
//! ```
//! `Loaded` opens the gate of the disks' migration ([`DisksCommand::VmReady`]); whatever breaks the machine
//! before they are owned closes it again.

use std::collections::VecDeque;

use flimcd_wire::{ErrorCode, VmMessage, VmStage, WireError};

use super::types::{DisksCommand, VmTargetAction, VmTargetEvent, VmTargetPhase, VmTargetStart};

/// The target's machine; see the module and [the module above](super).
#[derive(Debug)]
pub struct VmTarget {
    phase: VmTargetPhase,
    attempt: u32,
    /// The disks are owned here.
    owned: bool,
    takes_postcopy: bool,
    accepted: bool,
    messages: VecDeque<VmMessage>,
    actions: VecDeque<VmTargetAction>,
    events: VecDeque<VmTargetEvent>,
}

impl VmTarget {
    /// A machine at its beginning, with the link down.
    #[must_use]
    pub fn new(start: VmTargetStart) -> Self {
        let mut machine = Self {
            phase: VmTargetPhase::Idle,
            attempt: 0,
            owned: false,
            takes_postcopy: false,
            accepted: false,
            messages: VecDeque::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
        };
        if let VmTargetStart::Resume {
            attempt,
            owned,
            loaded,
            running,
        } = start
        {
            machine.attempt = attempt;
            machine.owned = owned;
            if running && owned {
                machine.phase = VmTargetPhase::Running;
            } else if loaded {
                machine.loaded();
            } else {
                machine.actions.push_back(VmTargetAction::Kill);
            }
        }
        machine
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> VmTargetPhase {
        self.phase
    }

    /// The attempt that messages of the stream belong to.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// The link is there.
    pub fn handle_link_up(&mut self) {
        self.messages.clear();
        self.accepted = false;
    }

    /// The link is gone.
    pub fn handle_link_down(&mut self) {
        self.accepted = false;
        self.messages.clear();
    }

    /// A message of the source, other than those of the stream.
    pub fn handle_message(&mut self, message: &VmMessage) {
        match message {
            VmMessage::Open(_) => self.handle_open(),
            VmMessage::Prepare { attempt } => self.handle_prepare(*attempt),
            VmMessage::Cancel => self.handle_ended(),
            VmMessage::Finished if self.phase == VmTargetPhase::Running => {
                self.set_phase(VmTargetPhase::Completed);
            }
            _ => {}
        }
    }

    /// The machine of this attempt waits for its running state, and says whether pages may follow the switch.
    pub fn handle_listening(&mut self, attempt: u32, takes_postcopy: bool) {
        if attempt == self.attempt && self.phase == VmTargetPhase::Starting {
            self.takes_postcopy = takes_postcopy;
            self.set_phase(VmTargetPhase::Receiving);
            self.say_listening();
        }
    }

    fn say_listening(&mut self) {
        self.say(VmMessage::Listening {
            attempt: self.attempt,
            postcopy: self.takes_postcopy,
        });
    }

    /// It has its running state.
    pub fn handle_loaded(&mut self, attempt: u32) {
        if attempt == self.attempt && self.phase == VmTargetPhase::Receiving {
            self.loaded();
        }
    }

    /// It is gone, cannot be started, or cannot go on.
    pub fn handle_broken(&mut self, attempt: u32, text: impl Into<String>) {
        let alive = matches!(
            self.phase,
            VmTargetPhase::Starting
                | VmTargetPhase::Receiving
                | VmTargetPhase::Loaded
                | VmTargetPhase::Going
        );
        if attempt != self.attempt || !alive {
            return;
        }
        if self.phase == VmTargetPhase::Loaded {
            self.actions
                .push_back(VmTargetAction::Disks(DisksCommand::VmReady(false)));
        }
        self.actions.push_back(VmTargetAction::Kill);
        self.set_phase(VmTargetPhase::Idle);
        let error = WireError::new(ErrorCode::OTHER, format!("at the target: {}", text.into()));
        self.say(VmMessage::Broken { attempt, error });
    }

    /// The guest runs.
    pub fn handle_running(&mut self) {
        if self.phase == VmTargetPhase::Going {
            self.set_phase(VmTargetPhase::Running);
            self.say(VmMessage::Running);
        }
    }

    /// The disks are owned here, durably.
    pub fn handle_disks_owned(&mut self) {
        self.owned = true;
        if self.phase == VmTargetPhase::Loaded {
            self.go();
        }
    }

    /// The disks' migration has ended without it.
    pub fn handle_ended(&mut self) {
        if self.owned || self.phase.is_final() {
            return;
        }
        if self.phase != VmTargetPhase::Idle {
            self.actions
                .push_back(VmTargetAction::Disks(DisksCommand::VmReady(false)));
        }
        self.actions.push_back(VmTargetAction::Kill);
        self.set_phase(VmTargetPhase::Ended);
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next action.
    pub fn poll_action(&mut self) -> Option<VmTargetAction> {
        self.actions.pop_front()
    }

    /// The next message for the source; only while the link is up.
    pub fn poll_transmit(&mut self) -> Option<VmMessage> {
        self.messages.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<VmTargetEvent> {
        self.events.pop_front()
    }

    // ---- what follows from the inputs ---------------------------------------------------------

    fn handle_open(&mut self) {
        self.accepted = true;
        let stage = match self.phase {
            VmTargetPhase::Idle | VmTargetPhase::Ended => VmStage::Idle,
            // Not listening yet: it says so when it does.
            VmTargetPhase::Starting | VmTargetPhase::Receiving => VmStage::Listening,
            VmTargetPhase::Loaded | VmTargetPhase::Going => VmStage::Loaded,
            VmTargetPhase::Running | VmTargetPhase::Completed => VmStage::Running,
        };
        self.messages.push_back(VmMessage::Accept {
            attempt: self.attempt,
            stage,
        });
        if self.phase == VmTargetPhase::Receiving {
            self.say_listening();
        }
        if self.phase == VmTargetPhase::Ended {
            let text = "this move has ended at the target; start a new one";
            let error = WireError::new(ErrorCode::CANCELLED, text);
            self.messages.push_back(VmMessage::Failed(error));
        }
    }

    fn handle_prepare(&mut self, attempt: u32) {
        let takes_it = matches!(
            self.phase,
            VmTargetPhase::Idle
                | VmTargetPhase::Starting
                | VmTargetPhase::Receiving
                | VmTargetPhase::Loaded
        );
        if attempt <= self.attempt || !takes_it {
            return;
        }
        if self.phase == VmTargetPhase::Loaded {
            self.actions
                .push_back(VmTargetAction::Disks(DisksCommand::VmReady(false)));
        }
        self.attempt = attempt;
        self.set_phase(VmTargetPhase::Starting);
        self.actions.push_back(VmTargetAction::Start { attempt });
    }

    fn loaded(&mut self) {
        self.set_phase(VmTargetPhase::Loaded);
        self.say(VmMessage::Loaded {
            attempt: self.attempt,
        });
        if self.owned {
            self.go();
        } else {
            self.actions
                .push_back(VmTargetAction::Disks(DisksCommand::VmReady(true)));
        }
    }

    fn go(&mut self) {
        self.set_phase(VmTargetPhase::Going);
        self.actions.push_back(VmTargetAction::Run);
    }

    fn set_phase(&mut self, phase: VmTargetPhase) {
        self.phase = phase;
        self.events.push_back(VmTargetEvent::Phase(phase));
    }

    fn say(&mut self, message: VmMessage) {
        if self.accepted {
            self.messages.push_back(message);
        }
    }
}
