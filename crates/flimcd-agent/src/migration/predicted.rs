//! What was expected of a switch, and what came of it: in the log side by side, and in the migration's status.

use flimcd_migrate::policy::Prediction;

use super::{base::Base, progress::unix_ms};
use crate::api::Predicted;

impl<D> Base<D> {
    /// The switch was made, with this expected of the time after it.
    pub(super) fn note_prediction(&mut self, prediction: Prediction) {
        let predicted = Predicted {
            bytes: prediction.bytes,
            misses: prediction.misses,
            duration_s: prediction.duration.as_secs_f64(),
            bytes_sent_before: self.status.bytes_sent,
        };
        tracing::info!(
            migration = %self.record.id, volumes = %self.record.names(), bytes = predicted.bytes,
            misses = predicted.misses, duration_s = predicted.duration_s,
            "switches; this is expected of the time after it"
        );
        self.status.predicted = Some(predicted);
    }

    /// Everything is at the target.
    pub(super) fn log_outcome(&self) {
        let Some(predicted) = self.status.predicted else {
            return;
        };
        let bytes = self
            .status
            .bytes_sent
            .saturating_sub(predicted.bytes_sent_before);
        let since = self.status.switched_unix_ms;
        let millis = since.map(|since| unix_ms().saturating_sub(since));
        tracing::info!(
            migration = %self.record.id, volumes = %self.record.names(), bytes,
            bytes_predicted = predicted.bytes, misses = self.status.guest_reads_missed,
            misses_predicted = predicted.misses, duration_ms = millis,
            duration_s_predicted = predicted.duration_s, "what came after the switch, beside what was expected"
        );
    }
}
