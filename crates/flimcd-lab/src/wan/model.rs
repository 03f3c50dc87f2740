//! What a link is: rate, delay, jitter, loss, reordering and queue, and the text that says it.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// Smallest queue a link gets when the text names none: a few packets, whatever the delay.
const QUEUE_BYTES_MIN: u64 = 64 * 1024;

/// One link, the same in both directions unless a front end is given two.
///
/// As text: `200mbit,40ms,loss=0.1%,jitter=1ms,reorder=0.01%,queue=1MB`. The plain time is the
/// **round trip**; `delay=` names one way. The queue is a size (`queue=500KB`) or the time it
/// takes to drain (`queue=20ms`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkModel {
    /// Bits per second that leave the queue. Never 0.
    pub rate_bits_per_sec: u64,
    /// Propagation delay one way.
    pub delay: Duration,
    /// Each packet takes up to this much longer or shorter, evenly spread. Order is kept.
    pub jitter: Duration,
    /// Probability that a packet is lost on the way, 0.0 to 1.0.
    pub loss: f64,
    /// Probability that a packet is held back so that later ones overtake it, 0.0 to 1.0.
    pub reorder: f64,
    /// Bytes that wait at most before the link; what comes on top is dropped (or held back at
    /// the sender, where the front end cannot drop). `None` is one bandwidth-delay product.
    pub queue_bytes: Option<u64>,
}

impl LinkModel {
    /// A clean link of this rate and round trip, with a queue of one bandwidth-delay product.
    #[must_use]
    pub fn new(rate_bits_per_sec: u64, rtt: Duration) -> Self {
        Self {
            rate_bits_per_sec: rate_bits_per_sec.max(1),
            delay: rtt / 2,
            jitter: Duration::ZERO,
            loss: 0.0,
            reorder: 0.0,
            queue_bytes: None,
        }
    }

    /// Round trip over an empty link, without the time that packets take to be sent.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.delay * 2
    }

    /// Bytes per second.
    #[must_use]
    pub const fn rate_bytes_per_sec(&self) -> u64 {
        self.rate_bits_per_sec / 8
    }

    /// Rate times round trip: what must be on its way to use the link fully.
    #[must_use]
    pub fn bdp_bytes(&self) -> u64 {
        bytes_in(self.rate_bits_per_sec, self.rtt())
    }

    /// The queue's size: as stated, or one bandwidth-delay product.
    #[must_use]
    pub fn queue_limit_bytes(&self) -> u64 {
        self.queue_bytes
            .unwrap_or_else(|| self.bdp_bytes().max(QUEUE_BYTES_MIN))
    }

    /// Time that `bytes` occupy the link.
    #[must_use]
    pub fn transmission(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 8_000_000_000 / u128::from(self.rate_bits_per_sec.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Bytes that a rate carries in a time.
fn bytes_in(rate_bits_per_sec: u64, time: Duration) -> u64 {
    let bytes = u128::from(rate_bits_per_sec) * time.as_nanos() / 8_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Why a text names no link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot read the link '{text}': {problem}. Write it like 200mbit,40ms,loss=0.1% \
     (rate, round trip, then any of loss=, jitter=, reorder=, queue=, delay=)"
)]
pub struct ParseLinkError {
    text: String,
    problem: Problem,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("no rate is given")]
    NoRate,
    #[error("no round-trip time is given")]
    NoDelay,
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    #[error("'{0}' is not a setting of a link")]
    UnknownKey(String),
    #[error("'{0}' is neither a rate (like 200mbit) nor a time (like 40ms)")]
    Unclear(String),
    #[error("'{value}' is not a {kind}")]
    Value { value: String, kind: &'static str },
    #[error("'{0}' is out of range")]
    Range(String),
}

impl FromStr for LinkModel {
    type Err = ParseLinkError;

    fn from_str(text: &str) -> Result<Self, ParseLinkError> {
        parse(text).map_err(|problem| ParseLinkError {
            text: text.to_owned(),
            problem,
        })
    }
}

fn parse(text: &str) -> Result<LinkModel, Problem> {
    let (mut rate, mut delay, mut jitter, mut loss, mut reorder) = (None, None, None, None, None);
    let mut queue: Option<&str> = None;
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (key, value) = part
            .split_once('=')
            .map_or((None, part), |(k, v)| (Some(k.trim()), v));
        let value = value.trim();
        match key {
            None => match (parse_rate(value), parse_time(value)) {
                (Some(bits), _) => set(&mut rate, "rate", checked_rate(bits, value)?)?,
                (None, Some(rtt)) => set(&mut delay, "round trip", rtt / 2)?,
                (None, None) => return Err(Problem::Unclear(value.to_owned())),
            },
            Some("rate") => {
                let bits = parse_rate(value).ok_or_else(|| bad(value, "rate like 200mbit"))?;
                set(&mut rate, "rate", checked_rate(bits, value)?)?;
            }
            Some("rtt") => set(&mut delay, "round trip", time(value)? / 2)?,
            Some("delay") => set(&mut delay, "delay", time(value)?)?,
            Some("jitter") => set(&mut jitter, "jitter", time(value)?)?,
            Some("loss") => set(&mut loss, "loss", share(value)?)?,
            Some("reorder") => set(&mut reorder, "reorder", share(value)?)?,
            Some("queue") => set(&mut queue, "queue", value)?,
            Some(other) => return Err(Problem::UnknownKey(other.to_owned())),
        }
    }
    let rate_bits_per_sec = rate.ok_or(Problem::NoRate)?;
    let queue_bytes = match queue {
        None => None,
        Some(value) => Some(match (parse_time(value), parse_bytes(value)) {
            (Some(time), _) => bytes_in(rate_bits_per_sec, time),
            (None, Some(bytes)) => bytes,
            (None, None) => return Err(bad(value, "queue size like 1MB or 20ms")),
        }),
    };
    Ok(LinkModel {
        rate_bits_per_sec,
        delay: delay.ok_or(Problem::NoDelay)?,
        jitter: jitter.unwrap_or_default(),
        loss: loss.unwrap_or_default(),
        reorder: reorder.unwrap_or_default(),
        queue_bytes,
    })
}

fn set<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), Problem> {
    if slot.replace(value).is_some() {
        return Err(Problem::Twice(name));
    }
    Ok(())
}

fn bad(value: &str, kind: &'static str) -> Problem {
    Problem::Value {
        value: value.to_owned(),
        kind,
    }
}

fn time(value: &str) -> Result<Duration, Problem> {
    parse_time(value).ok_or_else(|| bad(value, "time like 40ms"))
}

/// Rates from 1 kbit/s to 1 Tbit/s: less makes no progress, more is a slip of the unit.
fn checked_rate(bits: u64, value: &str) -> Result<u64, Problem> {
    if !(1_000..=1_000_000_000_000).contains(&bits) {
        return Err(Problem::Range(value.to_owned()));
    }
    Ok(bits)
}

fn share(value: &str) -> Result<f64, Problem> {
    let (number, scale) = value.strip_suffix('%').map_or((value, 1.0), |n| (n, 0.01));
    let share = number
        .trim()
        .parse::<f64>()
        .map_err(|_| bad(value, "share like 0.1%"))?
        * scale;
    if !(0.0..=1.0).contains(&share) {
        return Err(Problem::Range(value.to_owned()));
    }
    Ok(share)
}

/// Splits `12.5ms` into 12.5 and the lower-case unit `ms`.
fn number_and_unit(text: &str) -> Option<(f64, String)> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let number = text[..at].parse::<f64>().ok().filter(|n| n.is_finite())?;
    Some((number, text[at..].trim().to_ascii_lowercase()))
}

fn parse_rate(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let scale = match unit.strip_suffix("/s").unwrap_or(&unit) {
        "bit" | "bps" => 1.0,
        "kbit" | "kbps" => 1e3,
        "mbit" | "mbps" => 1e6,
        "gbit" | "gbps" => 1e9,
        _ => return None,
    };
    rounded(number * scale)
}

/// A time like `40ms`; at most an hour.
fn parse_time(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let nanos = match unit.as_str() {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return None,
    };
    rounded(number * nanos)
        .map(Duration::from_nanos)
        .filter(|t| *t <= Duration::from_hours(1))
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let scale = match unit.as_str() {
        "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        _ => return None,
    };
    rounded(number * scale)
}

fn rounded(value: f64) -> Option<u64> {
    // 2^53: beyond it a double has gaps, and no setting needs it.
    if !(0.0..=9_007_199_254_740_992.0).contains(&value) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked above"
    )]
    let whole = value.round() as u64;
    Some(whole)
}

impl fmt::Display for LinkModel {
    /// Text that parses to the same link.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.rate_bits_per_sec;
        match bits {
            _ if bits.is_multiple_of(1_000_000_000) => write!(f, "{}gbit", bits / 1_000_000_000)?,
            _ if bits.is_multiple_of(1_000_000) => write!(f, "{}mbit", bits / 1_000_000)?,
            _ if bits.is_multiple_of(1_000) => write!(f, "{}kbit", bits / 1_000)?,
            _ => write!(f, "{bits}bit")?,
        }
        write!(f, ",{}", Millis(self.rtt()))?;
        if self.loss > 0.0 {
            write!(f, ",loss={}%", Short(self.loss * 100.0))?;
        }
        if !self.jitter.is_zero() {
            write!(f, ",jitter={}", Millis(self.jitter))?;
        }
        if self.reorder > 0.0 {
            write!(f, ",reorder={}%", Short(self.reorder * 100.0))?;
        }
        if let Some(bytes) = self.queue_bytes {
            write!(f, ",queue={bytes}B")?;
        }
        Ok(())
    }
}

/// A time in milliseconds, without needless digits.
struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", Short(self.0.as_secs_f64() * 1e3))
    }
}

/// A number with at most six digits after the point and no trailing zeros.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.6}", self.0);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(text: &str) -> LinkModel {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn texts_name_links() {
        let plain = link("200mbit,40ms");
        assert_eq!(
            plain,
            LinkModel::new(200_000_000, Duration::from_millis(40))
        );
        assert_eq!(plain.delay, Duration::from_millis(20));
        assert_eq!(plain.bdp_bytes(), 1_000_000);
        assert_eq!(plain.queue_limit_bytes(), 1_000_000);

        let full = link(" 1gbit/s, rtt=20ms, loss=0.1%, jitter=500us, reorder=0.5%, queue=2MB");
        assert_eq!(full.rate_bits_per_sec, 1_000_000_000);
        assert!((full.loss - 0.001).abs() < 1e-12 && (full.reorder - 0.005).abs() < 1e-12);
        assert_eq!(full.jitter, Duration::from_micros(500));
        assert_eq!(full.queue_limit_bytes(), 2_000_000);
        assert_eq!(link("100mbit,10ms,queue=20ms").queue_bytes, Some(250_000));
        assert_eq!(link("100Mbps,delay=10ms").rtt(), Duration::from_millis(20));
    }

    #[test]
    fn display_parses_back() {
        for text in [
            "200mbit,40ms",
            "1gbit,20ms,loss=0.1%,jitter=0.5ms,reorder=0.01%,queue=123456B",
            "1500kbit,0.2ms",
        ] {
            let model = link(text);
            assert_eq!(model.to_string(), text);
            assert_eq!(link(&model.to_string()), model);
        }
    }

    #[test]
    fn wrong_texts_say_what_is_wrong() {
        let check = |text: &str, part: &str| {
            let error = text.parse::<LinkModel>().unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains("200mbit,40ms"),
                "{text}: {error}"
            );
        };
        check("", "no rate");
        check("40ms", "no rate");
        check("200mbit", "no round-trip time");
        check("200mbit,40ms,50ms", "given twice");
        check("200mbit,40ms,colour=red", "'colour' is not a setting");
        check("200mbit,40ms,loss=120%", "out of range");
        check("0mbit,40ms", "out of range");
        check("200mbit,40ms,queue=big", "queue size");
        check("200furlong,40ms", "neither a rate");
        check("nanmbit,40ms", "neither a rate");
    }
}
