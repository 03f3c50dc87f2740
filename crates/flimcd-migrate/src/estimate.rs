//! What is known of the link.

use std::time::Duration;

/// Delivery rate and round-trip time as the link measures them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkEstimate {
    /// Bytes per second that the link delivers to this peer, if known.
    pub rate_bytes_per_sec: Option<u64>,
    /// Shortest round-trip time seen lately, if known.
    pub rtt: Option<Duration>,
}

impl LinkEstimate {
    /// The rate, or 100 Mbit/s while it is not known.
    #[must_use]
    pub fn rate_or_default(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = self.rate_bytes_per_sec.unwrap_or(12_500_000) as f64;
        rate.max(1.0)
    }
}
