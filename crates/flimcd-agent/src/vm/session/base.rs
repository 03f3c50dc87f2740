//! What both sides of a move share.

use flimcd_core::MigrationId;
use flimcd_wire::{Class, Frame, Message, VmMessage};

use super::record::Description;
use crate::{api::VmMoveStatus, links::PeerLink};

/// Notes that are kept.
const NOTES_MAX: usize = 32;

/// Whether a message is of the stream of running state, not of the machines.
pub(super) const fn is_of_stream(message: &VmMessage) -> bool {
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
