//! The user's bandwidth ceiling: a token bucket that all connections of a link share.
//!
//! Pure arithmetic over the times it is given. Whether a frame may go is decided before it is chosen,
//! so its length is not known yet: any positive credit lets one frame pass, and what it takes beyond
//! the credit is a debt that the next one waits for. Over any time the bytes sent are therefore at
//! most `rate × time + burst + one frame per connection`.

use std::time::{Duration, Instant};

use flimcd_wire::Class;

/// Credit gathered while nothing is sent, in time: enough to bridge the runtime's 1 ms ticks.
const BURST: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate_bytes_per_sec: Option<u64>,
    includes_faults: bool,
    /// Bytes that may be sent; negative after a frame that was longer than the credit.
    credit_bytes: f64,
    filled_at: Instant,
}

impl Bucket {
    pub(crate) fn new(rate: Option<u64>, includes_faults: bool, now: Instant) -> Self {
        Self {
            rate_bytes_per_sec: rate,
            includes_faults,
            credit_bytes: 0.0,
            filled_at: now,
        }
    }

    pub(crate) fn rate(&self) -> Option<u64> {
        self.rate_bytes_per_sec
    }

    /// Changes the ceiling; a debt from the old one is forgotten.
    pub(crate) fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        self.rate_bytes_per_sec = rate;
        self.credit_bytes = 0.0;
        self.filled_at = now;
    }

    /// How long a frame of `class` has to wait; zero when it may go now.
    pub(crate) fn wait(&mut self, class: Class, now: Instant) -> Duration {
        let Some(rate) = self.rate_bytes_per_sec else {
            return Duration::ZERO;
        };
        self.fill(rate, now);
        let floor = match class {
            Class::Fault if !self.includes_faults => return Duration::ZERO,
            // These go into debt, so that bulk waits for them and not they for bulk.
            Class::Fault | Class::Control => -burst_bytes(rate),
            Class::Ram | Class::Prefetch | Class::Bulk => 0.0,
        };
        let lacking = floor - self.credit_bytes;
        if lacking < 0.0 {
            return Duration::ZERO;
        }
        // A little more than nothing, or the wait would end exactly where it must not yet go.
        Duration::from_secs_f64(((lacking + 1.0) / to_f64(rate)).min(3600.0))
    }

    /// Counts `bytes` of a frame that is sent.
    pub(crate) fn spend(&mut self, class: Class, bytes: usize) {
        if self.rate_bytes_per_sec.is_some() && (class != Class::Fault || self.includes_faults) {
            self.credit_bytes -= to_f64(bytes as u64);
        }
    }

    fn fill(&mut self, rate: u64, now: Instant) {
        let passed = now.saturating_duration_since(self.filled_at);
        self.filled_at = now;
        self.credit_bytes =
            (self.credit_bytes + to_f64(rate) * passed.as_secs_f64()).min(burst_bytes(rate));
    }
}

fn burst_bytes(rate: u64) -> f64 {
    to_f64(rate) * BURST.as_secs_f64()
}

/// Rates and lengths are far below 2^53.
fn to_f64(value: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a rate need not be exact to the byte"
    )]
    let value = value as f64;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 64 * 1024;

    #[test]
    fn over_ten_seconds_no_more_goes_than_the_ceiling() {
        let start = Instant::now();
        let (mut now, end) = (start, start + Duration::from_secs(10));
        let mut bucket = Bucket::new(Some(1_000_000), false, start);
        let mut sent = 0;
        while now < end {
            let wait = bucket.wait(Class::Bulk, now);
            if wait.is_zero() {
                bucket.spend(Class::Bulk, FRAME);
                sent += FRAME;
            }
            now += wait;
        }
        assert!(sent <= 10_000_000 + 20_000 + FRAME, "{sent}");
        assert!(sent >= 10_000_000 - FRAME, "{sent}");
    }

    #[test]
    fn faults_pass_and_are_not_counted_unless_asked() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(20_000), false, start);
        bucket.spend(Class::Bulk, FRAME);
        assert!(!bucket.wait(Class::Bulk, start).is_zero());
        assert!(bucket.wait(Class::Fault, start).is_zero());
        let mut strict = Bucket::new(Some(20_000), true, start);
        strict.spend(Class::Fault, FRAME);
        assert!(!strict.wait(Class::Fault, start).is_zero());
        assert!(!strict.wait(Class::Bulk, start).is_zero());
    }

    #[test]
    fn control_goes_into_debt_that_bulk_pays() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(1_000_000), false, start);
        bucket.spend(Class::Control, 10_000);
        assert!(bucket.wait(Class::Control, start).is_zero());
        let wait = bucket.wait(Class::Bulk, start);
        assert!(wait >= Duration::from_millis(10), "{wait:?}");
        assert!(bucket.wait(Class::Bulk, start + wait).is_zero());
        bucket.set_rate(None, start);
        assert!(bucket.wait(Class::Bulk, start).is_zero());
    }
}
