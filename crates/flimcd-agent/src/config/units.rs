//! Sizes and rates as people write them: `1073741824`, `"256 MiB"`, `"200 Mbit/s"`.

use serde::{Deserialize, Deserializer, de};
use std::{fmt, str::FromStr};

/// Units of a size: name, bytes.
const SIZES: [(&str, u64); 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Units of a rate beside sizes per second: name, bits per second.
const BIT_RATES: [(&str, u64); 4] = [
    ("bit/s", 1),
    ("kbit/s", 1_000),
    ("Mbit/s", 1_000_000),
    ("Gbit/s", 1_000_000_000),
];

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(pub u64);

/// A number of bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteRate(pub u64);

/// Text that is no size or no rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error(
        "{0:?} is not a size; write bytes as a number, or for example \"256 MiB\" or \"10 GB\""
    )]
    Size(String),
    /// Not a rate.
    #[error(
        "{0:?} is not a rate; write bytes per second as a number, or for example \"200 Mbit/s\" \
         or \"25 MB/s\""
    )]
    Rate(String),
}

/// `number × unit ÷ divisor`, where the number may have a fraction.
fn scaled(number: &str, unit: u64, divisor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || (number.contains('.') && !digits(fraction)) || fraction.len() > 9 {
        return None;
    }
    let ten_to = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let value: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = value.checked_mul(u128::from(unit))? / (ten_to * u128::from(divisor));
    u64::try_from(scaled).ok()
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

fn find(units: &[(&str, u64)], name: &str) -> Option<u64> {
    let found = units.iter().find(|(unit, _)| *unit == name);
    found.map(|&(_, factor)| factor)
}

impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text);
        let unit = if unit.is_empty() { "B" } else { unit };
        find(&SIZES, unit)
            .and_then(|unit| scaled(number, unit, 1))
            .map(Self)
            .ok_or_else(|| UnitError::Size(text.to_owned()))
    }
}

impl FromStr for ByteRate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text);
        let unit = if unit.is_empty() { "B/s" } else { unit };
        let bytes = unit
            .strip_suffix("/s")
            .and_then(|size| find(&SIZES, size))
            .and_then(|unit| scaled(number, unit, 1));
        bytes
            .or_else(|| find(&BIT_RATES, unit).and_then(|unit| scaled(number, unit, 8)))
            .map(Self)
            .ok_or_else(|| UnitError::Rate(text.to_owned()))
    }
}

struct NumberOrText<T>(std::marker::PhantomData<T>);

impl<T: FromStr<Err = UnitError> + From<u64>> de::Visitor<'_> for NumberOrText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or text with a unit")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<T, E> {
        Ok(T::from(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<T, E> {
        u64::try_from(value)
            .map(T::from)
            .map_err(|_| E::custom("it must not be negative"))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! number_or_text {
    ($name:ident) => {
        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(NumberOrText(std::marker::PhantomData))
            }
        }
    };
}

number_or_text!(ByteCount);
number_or_text!(ByteRate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates() {
        let size = |text: &str| text.parse::<ByteCount>().ok().map(|count| count.0);
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("1.5 GiB"), Some(3 << 29));
        assert_eq!(size("10GB"), Some(10_000_000_000));
        for bad in [
            "",
            "1 gib",
            "-1",
            "1.",
            ".5",
            "1e3",
            "99999999 TiB",
            "1 B/s",
            "1.1.1",
        ] {
            assert_eq!(size(bad), None, "{bad:?}");
        }
        let rate = |text: &str| text.parse::<ByteRate>().ok().map(|rate| rate.0);
        assert_eq!(rate("200 Mbit/s"), Some(25_000_000));
        assert_eq!(rate("0.5 Gbit/s"), Some(62_500_000));
        assert_eq!(rate("25 MB/s"), Some(25_000_000));
        assert_eq!(rate("1 KiB/s"), Some(1024));
        assert_eq!(rate("9"), Some(9));
        for bad in ["200 Mbit", "fast", "1 m/s"] {
            assert_eq!(rate(bad), None, "{bad:?}");
        }
    }
}
