//! Sizes and rates as people type them: `1GiB`, `512M`, `50mbit`, `6MB/s`.

/// A size in bytes: a number with an optional unit (`k`, `M`, `G`, `T`, `KiB`… are powers of 1024, as
/// qemu-img has them; `kB`, `MB`, `GB`, `TB` are powers of 1000).
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; write it like 1GiB, 512M or 4097");
    let (number, unit) = split(text);
    let factor = match unit.as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1_u64 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    scale(number, factor, 1)
        .filter(|&bytes| bytes > 0)
        .ok_or_else(wrong)
}

/// A rate in bytes per second, from bits (`50mbit`, `1.5 Gbit/s`) or bytes (`6MB/s`, `512KiB/s`).
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "'{text}' is not a rate; write it like 50mbit, 1gbit or 6MB/s (bits or bytes per second)"
        )
    };
    let (number, unit) = split(text);
    let per_second = unit.strip_suffix("/s");
    let plain = per_second.unwrap_or(&unit);
    let (factor, divisor) = match plain {
        "bit" => (1, 8),
        "kbit" => (1_000, 8),
        "mbit" => (1_000_000, 8),
        "gbit" => (1_000_000_000, 8),
        // "6MB" and "6Mbps" may be meant as bits or as bytes: one has to say.
        _ if per_second.is_none() => return Err(wrong()),
        "b" => (1, 1),
        "kb" => (1_000, 1),
        "mb" => (1_000_000, 1),
        "gb" => (1_000_000_000, 1),
        "kib" => (1 << 10, 1),
        "mib" => (1 << 20, 1),
        "gib" => (1 << 30, 1),
        _ => return Err(wrong()),
    };
    scale(number, factor, divisor)
        .filter(|&rate| rate > 0)
        .ok_or_else(wrong)
}

/// The number, and the unit in lower case.
fn split(text: &str) -> (&str, String) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim().to_ascii_lowercase())
}

/// `number × factor ÷ divisor` without the rounding of floating point.
fn scale(number: &str, factor: u64, divisor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let ten_to = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = digits.checked_mul(u128::from(factor))? / (ten_to * u128::from(divisor));
    u64::try_from(scaled).ok()
}

/// A range of seeds: `0..100` (100 is not in it) or a single one.
pub(crate) fn parse_seeds(text: &str) -> Result<std::ops::Range<u64>, String> {
    let wrong =
        || format!("'{text}' is not a range of seeds; write it like 0..1000, or 42 for one");
    let number = |part: &str| part.trim().parse::<u64>().map_err(|_| wrong());
    let range = match text.split_once("..") {
        Some((start, end)) => number(start)?..number(end)?,
        None => {
            let seed = number(text)?;
            seed..seed.checked_add(1).ok_or_else(wrong)?
        }
    };
    if range.is_empty() {
        Err(wrong())
    } else {
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |text, bytes| assert_eq!(parse_size(text).ok(), bytes, "{text:?}");
        check("4097", Some(4097));
        check("1GiB", Some(1 << 30));
        check("1.5 G", Some(3 << 29));
        check("10MB", Some(10_000_000));
        for bad in ["", "0", "G", "-1", "1.", "1x", "99999999T", "1.2.3"] {
            check(bad, None);
        }
    }

    #[test]
    fn rates() {
        let check = |text, rate| assert_eq!(parse_rate(text).ok(), rate, "{text:?}");
        check("50mbit", Some(6_250_000));
        check("200 Mbit/s", Some(25_000_000));
        check("1.5Gbps", None);
        check("1.5gbit/s", Some(187_500_000));
        check("6MB/s", Some(6_000_000));
        check("512 KiB/s", Some(512 << 10));
        for bad in ["", "50", "50m", "6MB", "fast", "0mbit", "1bit"] {
            check(bad, None);
        }
    }

    #[test]
    fn seeds() {
        assert_eq!(parse_seeds("3..9"), Ok(3..9));
        assert_eq!(parse_seeds("7"), Ok(7..8));
        for bad in ["", "9..3", "3..3", "a..b", "..", "1..=2"] {
            assert!(parse_seeds(bad).is_err(), "{bad:?}");
        }
    }
}
