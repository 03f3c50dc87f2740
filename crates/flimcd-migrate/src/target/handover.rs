//! Taking the volume over, or durably refusing to.

use flimcd_core::{BlockSet, Epoch, SeqSet};
use flimcd_wire::{ErrorCode, Message, SetPart, WireError};

use super::{TargetAction, TargetEvent, TargetMachine, TargetPhase};
use crate::DiskError;

/// An offer of ownership that is being received.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) epoch: Epoch,
    pub(super) parts: u32,
    pub(super) missing: BlockSet,
    /// `Switch` has come, all parts are there.
    pub(super) whole: bool,
}

impl TargetMachine {
    pub(super) fn offer_of(&mut self, epoch: Epoch) -> &mut Offer {
        let blocks = self.config.size.blocks();
        let fresh = || Offer {
            epoch,
            parts: 0,
            missing: BlockSet::new(blocks),
            whole: false,
        };
        let offer = self.offer.get_or_insert_with(fresh);
        if offer.epoch != epoch {
            *offer = fresh();
        }
        offer
    }

    pub(super) fn handle_part(&mut self, epoch: Epoch, part: u32, set: &SetPart) {
        if self.phase != TargetPhase::Incoming {
            return;
        }
        let offer = self.offer_of(epoch);
        let fits = offer.parts == part && set.add_to(&mut offer.missing);
        offer.parts += 1;
        if !fits {
            self.offer = None;
            self.protocol_error("parts of the missing set out of order or beyond the volume");
        }
    }

    pub(super) fn handle_switch(
        &mut self,
        epoch: Epoch,
        parts: u32,
        missing_blocks: u64,
        in_flight: &SeqSet,
    ) {
        if self.phase.owns() {
            if self.epoch == Some(epoch) {
                self.tell_source(Message::SwitchDone { epoch });
            }
            return;
        }
        if self.refused >= Some(epoch) {
            return self.tell_source(Message::SwitchRefused { epoch });
        }
        match self.phase {
            TargetPhase::Incoming => {}
            TargetPhase::Cancelled | TargetPhase::Failed => {
                self.actions.push_back(TargetAction::Refuse { epoch });
                return;
            }
            // Never offered in an increment.
            TargetPhase::Sealed => return self.protocol_error("an offer after an increment"),
            // Taking over already; the answer comes when it is done.
            _ => return,
        }
        let offer = self.offer_of(epoch);
        if offer.parts != parts || offer.missing.count() != missing_blocks {
            self.offer = None;
            self.protocol_error("an incomplete set of missing blocks");
            return;
        }
        offer.whole = true;
        if let Some(offer) = &mut self.offer {
            self.arrivals.arrived_of(in_flight, |run| {
                offer.missing.remove_range(run);
            });
        }
        self.set_phase(TargetPhase::Switching);
    }

    pub(super) fn handle_cancel_switch(&mut self, epoch: Epoch) {
        match self.phase {
            TargetPhase::PostCopy | TargetPhase::Completing | TargetPhase::Complete => {
                self.tell_source(Message::SwitchDone { epoch });
            }
            TargetPhase::Switching if self.offer.is_none() => {
                // The driver is making it durable; whichever way that ends is the answer.
            }
            TargetPhase::Incoming | TargetPhase::Switching => self.refuse(epoch),
            // It ended here while the source was offering; the source must hear that it may go on.
            TargetPhase::Cancelled | TargetPhase::Failed => {
                self.actions.push_back(TargetAction::Refuse { epoch });
            }
            TargetPhase::Refusing | TargetPhase::Sealed => {}
        }
    }

    pub(super) fn refuse(&mut self, epoch: Epoch) {
        self.offer = None;
        self.set_phase(TargetPhase::Refusing);
        self.actions.push_back(TargetAction::Refuse { epoch });
    }

    // ---- ending before the switch -------------------------------------------------------------

    pub(super) fn handle_cancelled(&mut self) {
        match self.phase {
            // Being made durable: it is a whole copy in a moment.
            TargetPhase::Incoming if self.sealing.is_busy => {}
            TargetPhase::Sealed => {}
            TargetPhase::Incoming => {
                self.set_phase(TargetPhase::Cancelled);
                self.events.push_back(TargetEvent::Cancelled);
                self.actions.push_back(TargetAction::Discard);
            }
            TargetPhase::Cancelled | TargetPhase::Failed => {}
            // A source that offered ownership has to ask with CancelSwitch first.
            _ => self.protocol_error("a cancellation after the offer of ownership"),
        }
    }

    pub(super) fn fail_disk(&mut self, what: &str, error: &DiskError) {
        let code = if error.no_space {
            ErrorCode::NO_SPACE
        } else {
            ErrorCode::DISK
        };
        self.fail(WireError::new(
            code,
            format!("the target cannot {what} the image: {error}"),
        ));
    }

    /// Ends the migration, which must not own the volume.
    pub(super) fn fail(&mut self, error: WireError) {
        match self.phase {
            TargetPhase::Incoming => {
                self.tell_source(Message::Failed(error.clone()));
                self.set_phase(TargetPhase::Failed);
                self.events.push_back(TargetEvent::Failed(error));
                self.actions.push_back(TargetAction::Discard);
            }
            TargetPhase::Switching => {
                self.note(format!("refusing to take the volume over: {error}"));
                if let Some(offer) = self.offer.take() {
                    self.refuse(offer.epoch);
                }
            }
            _ => self.note(format!("{error}")),
        }
    }
}
