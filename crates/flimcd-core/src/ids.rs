//! Names and numbers of things.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

use crate::limits::MAX_NAME_BYTES;

/// Generation number of a volume's ownership. It only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch a new volume starts with.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $digits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{:0", $digits, "x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                <$int>::from_str_radix(text, 16)
                    .map(Self)
                    .map_err(|_| InvalidName::new(text, "not a hexadecimal id"))
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() {
                    s.collect_str(self)
                } else {
                    self.0.serialize(s)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <$int>::deserialize(d).map(Self)
                }
            }
        }
    };
}

hex_id! {
    /// Identity of a volume, random, kept when it moves. Written as 32 hexadecimal digits.
    VolumeId, u128, "32"
}
hex_id! {
    /// Identity of one migration, random. Written as 16 hexadecimal digits.
    MigrationId, u64, "16"
}

/// A name that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} cannot be used as a name: {reason}")]
pub struct InvalidName {
    name: String,
    reason: &'static str,
}

impl InvalidName {
    fn new(name: &str, reason: &'static str) -> Self {
        Self {
            name: name.chars().take(MAX_NAME_BYTES).collect(),
            reason,
        }
    }
}

fn check_name(name: &str) -> Result<(), InvalidName> {
    if name.is_empty() {
        return Err(InvalidName::new(name, "it is empty"));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(InvalidName::new(name, "it is longer than 64 characters"));
    }
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        return Err(InvalidName::new(
            name,
            "use letters, digits, '-', '_' and '.' only",
        ));
    }
    if !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(InvalidName::new(
            name,
            "it must begin with a letter or a digit",
        ));
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text; safe as a file name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                check_name(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name! {
    /// Name of a volume: 1 to 64 of `A-Za-z0-9._-`, first a letter or digit.
    VolumeName
}
name! {
    /// Name of a site: 1 to 64 of `A-Za-z0-9._-`, first a letter or digit.
    SiteName
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            ".hidden",
            "-x",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        for good in ["a", "vm-1.raw", "0", &"x".repeat(64)] {
            assert_eq!(good.parse::<SiteName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn ids_round_trip_as_text() {
        let id = VolumeId(0x0123_4567_89ab_cdef);
        assert_eq!(id.to_string(), "00000000000000000123456789abcdef");
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        assert!("zz".parse::<MigrationId>().is_err());
    }
}
