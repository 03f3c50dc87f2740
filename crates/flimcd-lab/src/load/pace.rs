//! Keeps the rate of freshly dirtied bytes at what was asked for.

use std::{ops::Range, time::Duration};

/// Rate that can be made up for after a delay, as time.
const CREDIT: Duration = Duration::from_millis(20);

/// A token bucket in which a write costs the bytes of the granules that nobody wrote within the
/// window.
#[derive(Debug)]
pub(super) struct Pacer {
    rate_bytes_per_sec: Option<u64>,
    window_ms: u32,
    granule: u32,
    /// Time of the last write of each granule in ms, plus 1 + the window; 0 for never.
    last_write_ms: Vec<u32>,
    /// Bytes that may be dirtied; below 0 after a large write.
    tokens: f64,
    filled_at: Duration,
    fresh_bytes: u64,
}

impl Pacer {
    pub(super) fn new(
        rate_bytes_per_sec: Option<u64>,
        window: Duration,
        granule: u32,
        granules: usize,
    ) -> Self {
        Self {
            rate_bytes_per_sec,
            window_ms: u32::try_from(window.as_millis()).unwrap_or(u32::MAX / 4),
            granule,
            last_write_ms: vec![0; granules],
            tokens: 0.0,
            filled_at: Duration::ZERO,
            fresh_bytes: 0,
        }
    }

    /// How long a write has to wait at `now`; zero if it may go.
    pub(super) fn wait(&mut self, now: Duration) -> Duration {
        let Some(rate) = self.rate_bytes_per_sec else {
            return Duration::ZERO;
        };
        #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
        let rate = rate as f64;
        let passed = now.saturating_sub(self.filled_at);
        self.filled_at = now;
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min(CREDIT.as_secs_f64() * rate);
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((-self.tokens / rate).min(3600.0))
    }

    /// A write of these granules goes out at `now`.
    pub(super) fn charge(&mut self, granules: Range<usize>, now: Duration) {
        let now_ms = u32::try_from(now.as_millis()).unwrap_or(u32::MAX / 2) + 1 + self.window_ms;
        let oldest = now_ms - self.window_ms;
        let mut fresh = 0;
        for last in &mut self.last_write_ms[granules] {
            fresh += u64::from(*last < oldest);
            *last = now_ms;
        }
        let bytes = fresh * u64::from(self.granule);
        self.fresh_bytes += bytes;
        #[expect(clippy::cast_precision_loss, reason = "a request's bytes")]
        let cost = bytes as f64;
        self.tokens -= cost;
    }

    /// Freshly dirtied bytes so far.
    pub(super) const fn fresh_bytes(&self) -> u64 {
        self.fresh_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_writes_keep_the_rate_and_rewrites_are_free() {
        let mut pacer = Pacer::new(Some(4096 * 100), Duration::from_secs(1), 4096, 1000);
        let mut now = Duration::from_secs(5);
        for granule in 0..200 {
            now += pacer.wait(now);
            pacer.charge(granule..granule + 1, now);
        }
        // 200 blocks at 100 a second, less the credit.
        assert!((now.as_secs_f64() - 7.0).abs() < 0.1, "{now:?}");
        now += pacer.wait(now);
        let before = pacer.fresh_bytes();
        for _ in 0..1000 {
            pacer.charge(199..200, now);
            assert_eq!(pacer.wait(now), Duration::ZERO);
        }
        assert_eq!(pacer.fresh_bytes(), before);
        pacer.charge(0..1, now);
        assert_eq!(pacer.fresh_bytes(), before + 4096);
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut pacer = Pacer::new(None, Duration::from_secs(1), 512, 10);
        pacer.charge(0..10, Duration::ZERO);
        assert_eq!(pacer.wait(Duration::ZERO), Duration::ZERO);
        assert_eq!(pacer.fresh_bytes(), 5120);
    }
}
