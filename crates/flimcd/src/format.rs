//! Figures for people.

/// `812 MiB`: three significant digits, powers of 1024.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `187 Mbit/s`, powers of 1000.
pub(crate) fn rate(bytes_per_sec: u64) -> String {
    const UNITS: [&str; 4] = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"];
    let mut value = bytes_per_sec as f64 * 8.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `41 ms`, `12.3 s`, `4m 05s`, `2h 10m`.
pub(crate) fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "–".into();
    }
    if seconds > 0.0 && seconds < 0.95 {
        return format!("{:.0} ms", seconds * 1e3);
    }
    if seconds < 99.95 {
        return format!("{seconds:.1} s");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates"
    )]
    let whole = seconds.max(0.0).round() as u64;
    if whole < 3600 {
        format!("{}m {:02}s", whole / 60, whole % 60)
    } else {
        format!("{}h {:02}m", whole / 3600, whole % 3600 / 60)
    }
}

/// `41.3 ms`.
pub(crate) fn milliseconds(ms: f64) -> String {
    format!("{} ms", three_digits(ms))
}

/// `1 234 567`.
pub(crate) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 30), "1.00 GiB");
        assert_eq!(bytes(1023 << 20), "1.00 GiB");
        assert_eq!(rate(25_000_000), "200 Mbit/s");
        assert_eq!(rate(0), "0.00 bit/s");
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(0.0412), "41 ms");
        assert_eq!(seconds(245.0), "4m 05s");
        assert_eq!(seconds(7800.0), "2h 10m");
        assert_eq!(seconds(f64::INFINITY), "–");
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(count(12), "12");
    }
}
