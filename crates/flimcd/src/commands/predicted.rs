//! What was expected of a switch, beside what came of it.

use flimcd_agent::api::MigrationStatus;

use crate::format;

/// One line for a person; nothing where nobody said what to expect.
pub(crate) fn line(status: &MigrationStatus) -> Option<String> {
    let predicted = status.predicted?;
    let bytes = status
        .bytes_sent
        .saturating_sub(predicted.bytes_sent_before);
    let took = match (status.switched_unix_ms, status.ended_unix_ms) {
        (Some(switched), Some(ended)) => {
            format::seconds(ended.saturating_sub(switched) as f64 / 1e3)
        }
        _ => "–".to_owned(),
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates"
    )]
    let misses = predicted.misses.round() as u64;
    Some(format!(
        "after the switch: {}, {} misses, {took}; expected were {}, {}, {}",
        format::bytes(bytes),
        format::count(status.guest_reads_missed),
        format::bytes(predicted.bytes),
        format::count(misses),
        format::seconds(predicted.duration_s),
    ))
}
