//! The end of an increment: what has arrived becomes a copy of one moment. The source has had everything acknowledged before it asks.
//!
//! The driver makes data and the volume's record durable, in this order, after which the copy is ready to be used, or to be the base of
//! the next increment. From then on nothing of this migration is written any more.

use flimcd_core::Time;
use flimcd_wire::{Message, Seal};

use super::{TargetEvent, TargetMachine, TargetPhase};
use crate::DiskError;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Sealing {
    asked: Option<Seal>,
    wanted: Option<Seal>,
    /// The driver makes it durable.
    pub(super) is_busy: bool,
}

impl TargetMachine {
    /// Make what is here durable as a copy of this moment, and the record that says so; answer with
    /// [`handle_sealed`](Self::handle_sealed).
    pub fn poll_seal(&mut self) -> Option<Seal> {
        self.sealing.wanted.take()
    }

    /// Answer to [`poll_seal`](Self::poll_seal).
    pub fn handle_sealed(&mut self, now: Time, seal: Seal, result: Result<(), DiskError>) {
        self.sealing.is_busy = false;
        match result {
            Ok(()) => {
                self.set_phase(TargetPhase::Sealed);
                self.events.push_back(TargetEvent::Completed);
                self.tell_source(Message::Sealed(seal));
            }
            Err(error) => self.fail_disk("make a copy of", &error),
        }
        self.advance(now);
    }

    pub(super) fn handle_seal(&mut self, seal: Seal) {
        match self.phase {
            TargetPhase::Incoming => self.sealing.asked = Some(seal),
            TargetPhase::Sealed => self.tell_source(Message::Sealed(seal)),
            _ => self.protocol_error("an increment is to end that does not arrive"),
        }
    }

    pub(super) fn consider_seal(&mut self) {
        if self.phase == TargetPhase::Incoming
            && !self.sealing.is_busy
            && self.arrivals.is_idle()
            && let Some(seal) = self.sealing.asked.take()
        {
            self.sealing.is_busy = true;
            self.sealing.wanted = Some(seal);
        }
    }
}
