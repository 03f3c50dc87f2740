//! The first bytes of every connection, understood by every version.
//!
//! ```text
//! Hello   0  8  magic "flimcd\r\n"          Reply   0  8  magic "flimcd\r\n"
//!         8  2  lowest version spoken               8  2  version chosen, 0 = refused
//!        10  2  highest version spoken             10  2  length of the body
//!        12  2  length of the body                 12  n  postcard Welcome or Refusal
//!        14  n  postcard Hello
//! ```
//! Bodies may grow at their end: a decoder ignores what it does not know there.

use flimcd_core::SiteName;
use serde::{Deserialize, Serialize};

/// Lowest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;
/// Highest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MAX: u16 = 1;

const MAGIC: &[u8; 8] = b"flimcd\r\n";
const BODY_MAX: usize = 1024;
const HELLO_PREFIX: usize = 14;
const REPLY_PREFIX: usize = 12;

/// What the dialler says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Who dials. Must be the name in its certificate.
    pub site: SiteName,
    /// Random number of this bundle of connections; a new one replaces the old one.
    pub bundle: u64,
    /// Which connection of the bundle this is: 0 control, 1 faults, from 2 on bulk.
    pub lane: u8,
    /// How many connections the bundle has.
    pub lanes: u8,
}

/// The listener takes the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Who answers.
    pub site: SiteName,
}

/// The listener refuses the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Why, for programs.
    pub code: RefusalCode,
    /// Why, for people.
    pub text: String,
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// Never sent.
    Invalid,
    /// No version that both speak.
    Version,
    /// The name is not the certificate's, or not known here.
    Site,
    /// Too many connections, or a lane that makes no sense.
    Bundle,
}

/// Why the first bytes of a connection are not those of a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not this protocol.
    #[error("the other end does not speak flimcd's protocol; check the address and port")]
    Magic,
    /// The body is too long or does not decode.
    #[error("the other end sent a malformed greeting")]
    Malformed,
    /// Versions do not overlap.
    #[error(
        "the other end speaks protocol versions {theirs_min} to {theirs_max}, this one \
         {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}; upgrade the older of the two"
    )]
    Version {
        /// Lowest version of the peer.
        theirs_min: u16,
        /// Highest version of the peer.
        theirs_max: u16,
    },
    /// The listener refused, and says why.
    #[error("refused by the other end: {0}")]
    Refused(#[from] Refusal),
}

/// The dialler's first bytes.
#[must_use]
pub fn encode_hello(hello: &Hello) -> Vec<u8> {
    let body = to_body(hello);
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&PROTOCOL_VERSION_MIN.to_le_bytes());
    out.extend_from_slice(&PROTOCOL_VERSION_MAX.to_le_bytes());
    push_body(&mut out, &body);
    out
}

/// Reads a [`Hello`] from the beginning of `bytes`: the greeting, the version chosen, and how many
/// bytes it took; `None` when more bytes are needed.
///
/// # Errors
/// [`HelloError`] when this is no greeting or no version is common.
pub fn decode_hello(bytes: &[u8]) -> Result<Option<(Hello, u16, usize)>, HelloError> {
    check_magic(bytes)?;
    let Some(prefix) = bytes.get(..HELLO_PREFIX) else {
        return Ok(None);
    };
    let (theirs_min, theirs_max) = (u16_at(prefix, 8), u16_at(prefix, 10));
    let version = theirs_max.min(PROTOCOL_VERSION_MAX);
    if version < PROTOCOL_VERSION_MIN || version < theirs_min || theirs_min == 0 {
        return Err(HelloError::Version {
            theirs_min,
            theirs_max,
        });
    }
    let Some((hello, end)) = from_body(bytes, HELLO_PREFIX)? else {
        return Ok(None);
    };
    Ok(Some((hello, version, end)))
}

/// The listener's first bytes.
#[must_use]
pub fn encode_reply(reply: &Result<(Welcome, u16), Refusal>) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    let (version, body) = match reply {
        Ok((welcome, version)) => (*version, to_body(welcome)),
        Err(refusal) => (0, to_body(refusal)),
    };
    out.extend_from_slice(&version.to_le_bytes());
    push_body(&mut out, &body);
    out
}

/// Reads the listener's answer: the welcome, the version chosen, and how many bytes it took;
/// `None` when more bytes are needed.
///
/// # Errors
/// [`HelloError`], among them the listener's refusal.
pub fn decode_reply(bytes: &[u8]) -> Result<Option<(Welcome, u16, usize)>, HelloError> {
    check_magic(bytes)?;
    let Some(prefix) = bytes.get(..REPLY_PREFIX) else {
        return Ok(None);
    };
    let version = u16_at(prefix, 8);
    if version == 0 {
        let Some((refusal, _)) = from_body::<Refusal>(bytes, REPLY_PREFIX)? else {
            return Ok(None);
        };
        return Err(refusal.into());
    }
    if !(PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION_MAX).contains(&version) {
        return Err(HelloError::Version {
            theirs_min: version,
            theirs_max: version,
        });
    }
    let Some((welcome, end)) = from_body(bytes, REPLY_PREFIX)? else {
        return Ok(None);
    };
    Ok(Some((welcome, version, end)))
}

fn to_body(value: &impl Serialize) -> Vec<u8> {
    let body = postcard::to_allocvec(value).expect("serialising to memory cannot fail");
    assert!(body.len() <= BODY_MAX, "greetings are short");
    body
}

fn push_body(out: &mut Vec<u8>, body: &[u8]) {
    let len = u16::try_from(body.len()).expect("at most BODY_MAX");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(body);
}

fn check_magic(bytes: &[u8]) -> Result<(), HelloError> {
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] == MAGIC[..known] {
        Ok(())
    } else {
        Err(HelloError::Magic)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Decodes the body that follows a prefix whose last two bytes are its length.
fn from_body<T: for<'de> Deserialize<'de>>(
    bytes: &[u8],
    prefix: usize,
) -> Result<Option<(T, usize)>, HelloError> {
    let len = usize::from(u16_at(bytes, prefix - 2));
    if len > BODY_MAX {
        return Err(HelloError::Malformed);
    }
    let Some(body) = bytes.get(prefix..prefix + len) else {
        return Ok(None);
    };
    let (value, _grown) = postcard::take_from_bytes(body).map_err(|_| HelloError::Malformed)?;
    Ok(Some((value, prefix + len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            site: "berlin".parse().unwrap(),
            bundle: 5,
            lane: 1,
            lanes: 4,
        }
    }

    #[test]
    fn greetings_round_trip_and_wait_for_all_bytes() {
        let bytes = encode_hello(&hello());
        for cut in 0..bytes.len() {
            assert_eq!(decode_hello(&bytes[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(decode_hello(&bytes), Ok(Some((hello(), 1, bytes.len()))));

        let welcome = Welcome {
            site: "paris".parse().unwrap(),
        };
        let bytes = encode_reply(&Ok((welcome.clone(), 1)));
        assert_eq!(decode_reply(&bytes), Ok(Some((welcome, 1, bytes.len()))));
        let refusal = Refusal {
            code: RefusalCode::Site,
            text: "who are you".into(),
        };
        let bytes = encode_reply(&Err(refusal.clone()));
        assert_eq!(decode_reply(&bytes), Err(HelloError::Refused(refusal)));
    }

    #[test]
    fn a_newer_peer_is_met_at_our_version_and_a_future_one_is_refused() {
        let mut bytes = encode_hello(&hello());
        bytes[10..12].copy_from_slice(&9u16.to_le_bytes());
        assert!(matches!(
            decode_hello(&bytes),
            Ok(Some((_, PROTOCOL_VERSION_MAX, _)))
        ));
        bytes[8..10].copy_from_slice(&7u16.to_le_bytes());
        let want = HelloError::Version {
            theirs_min: 7,
            theirs_max: 9,
        };
        assert_eq!(decode_hello(&bytes), Err(want));
        assert_eq!(decode_hello(b"GET / HTTP/1.1"), Err(HelloError::Magic));
    }
}
