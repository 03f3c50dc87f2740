//! What both sides of a move share.

use flimcd_core::MigrationId;
use flimcd_wire::{Class, Frame, Message, VmMessage};
use std::future;

use super::record::Description;
use crate::{
    api::VmMoveStatus,
    links::{LinkInput, PeerLink},
    vm::ram::{PumpEvent, PumpStats, RamPump},
};

/// Notes that are kept.
const NOTES_MAX: usize = 32;

/// How the link of a move stands, and the stream of running state that goes over it.
#[derive(Default)]
pub(super) struct Stream {
    /// The link's, while it is up.
    generation: Option<u64>,
    pump: Option<RamPump>,
}

/// What the link has for a machine.
pub(super) enum FromLink {
    Up,
    Down,
    Message(VmMessage),
}

impl Stream {
    /// Takes what the link brings: what is of the stream goes to its pump, the rest is answered.
    pub(super) fn handle(&mut self, input: LinkInput) -> Option<FromLink> {
        match input {
            LinkInput::Up(generation) => {
                self.generation = Some(generation);
                if let Some(pump) = &self.pump {
                    pump.handle_link_up(generation);
                }
                Some(FromLink::Up)
            }
            LinkInput::Down => {
                self.generation = None;
                if let Some(pump) = &self.pump {
                    pump.handle_link_down();
                }
                Some(FromLink::Down)
            }
            LinkInput::Message(Message::Vm(message), credit) if is_of_stream(&message) => {
                if let Some(pump) = &self.pump {
                    pump.handle_message(message, credit);
                }
                None
            }
            LinkInput::Message(Message::Vm(message), _) => Some(FromLink::Message(message)),
            LinkInput::Message(..) => None,
        }
    }

    /// The link's generation, while it is up.
    pub(super) const fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// The stream of a new attempt begins, in the place of an older one.
    pub(super) fn begin(&mut self, pump: RamPump) {
        if let Some(generation) = self.generation {
            pump.handle_link_up(generation);
        }
        self.pump = Some(pump);
    }

    /// The stream is over, if there is one: its hypervisor finds its connection closed. Answers what has gone through.
    pub(super) fn end(&mut self) -> Option<PumpStats> {
        self.pump.take().map(|pump| pump.stats())
    }

    /// What has gone through so far, if there is a stream.
    pub(super) fn stats(&self) -> Option<PumpStats> {
        self.pump.as_ref().map(RamPump::stats)
    }

    /// What happens next in the stream; for ever pending without one. Cancel-safe.
    pub(super) async fn next_event(&mut self) -> PumpEvent {
        match &mut self.pump {
            Some(pump) => pump.next_event().await,
            None => future::pending().await,
        }
    }
}

/// Whether a message is of the stream of running state, not of the machines.
const fn is_of_stream(message: &VmMessage) -> bool {
    matches!(
        message,
        VmMessage::Part { .. } | VmMessage::PartAck { .. } | VmMessage::End { .. }
    )
}

/// Sends a machine's message. There are few of them, so that there is always room; what is lost with the link is said
/// again after it is back.
pub(super) fn send(link: &PeerLink, session: MigrationId, generation: u64, message: VmMessage) {
    let frame = Frame {
        migration: session,
        class: Class::Control,
        message: Message::Vm(message),
    };
    if let Err(error) = link.handle().try_send_in(generation, frame) {
        tracing::warn!(%session, "a message of a move was not sent: {error}");
    }
}

/// Adds a note; the oldest goes when there are too many.
pub(super) fn add_note(status: &mut VmMoveStatus, note: String) {
    if status.notes.len() >= NOTES_MAX {
        status.notes.remove(0);
    }
    status.notes.push(note);
}

/// A description as it travels.
pub(super) fn describe(description: &Description) -> String {
    serde_json::to_string(description).unwrap_or_default()
}
