//! One line of QMP to a message. Pure, so that it can be fuzzed.

use serde_json::{Map, Value};

use super::Version;

/// Longest line that is taken. The longest real one is the answer to `query-qmp-schema`, below 1 MiB.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// What QEMU says on its monitor.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// The first line of a connection.
    Greeting(Version),
    /// A command's answer.
    Return {
        /// The command's id; `None` for an answer to something we never sent.
        id: Option<u64>,
        /// What the command returns.
        value: Value,
    },
    /// A command's refusal.
    Error {
        /// The command's id; QEMU leaves it out when it could not read the command.
        id: Option<u64>,
        /// "GenericError", "CommandNotFound", …
        class: String,
        /// For people.
        text: String,
    },
    /// Something that happened.
    Event {
        /// QEMU's clock (UTC) in microseconds since 1970; 0 when it has none.
        time_us: u64,
        /// "STOP", "MIGRATION", …
        name: String,
        /// Details, `Null` when there are none.
        data: Value,
    },
}

/// Why a line is no message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`MAX_LINE_BYTES`].
    #[error("a line of {0} bytes, more than a monitor ever sends")]
    TooLong(usize),
    /// Not JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON, but none of the four kinds of message.
    #[error("no greeting, answer or event: it has {keys}")]
    Unknown {
        /// The keys it has.
        keys: String,
    },
}

/// Decodes one line, with or without its line end.
///
/// # Errors
/// [`DecodeError`]. Unknown keys beside the known ones are ignored, as the protocol asks.
pub fn decode_line(line: &[u8]) -> Result<Incoming, DecodeError> {
    if line.len() > MAX_LINE_BYTES {
        return Err(DecodeError::TooLong(line.len()));
    }
    let mut object: Map<String, Value> = serde_json::from_slice(line)?;
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(greeting) = object.get("QMP") {
        return Ok(Incoming::Greeting(version(greeting)));
    }
    if let Some(value) = object.remove("return") {
        return Ok(Incoming::Return { id, value });
    }
    if let Some(error) = object.get("error") {
        return Ok(Incoming::Error {
            id,
            class: text(error, "class"),
            text: text(error, "desc"),
        });
    }
    if let Some(Value::String(name)) = object.remove("event") {
        return Ok(Incoming::Event {
            time_us: object.get("timestamp").map_or(0, time_us),
            name,
            data: object.remove("data").unwrap_or(Value::Null),
        });
    }
    let keys: Vec<_> = object
        .keys()
        .map(|k| k.chars().take(40).collect())
        .collect();
    let keys: Vec<String> = keys.into_iter().take(8).collect();
    Err(DecodeError::Unknown {
        keys: keys.join(", "),
    })
}

fn text(value: &Value, key: &str) -> String {
    let text = value.get(key).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn version(greeting: &Value) -> Version {
    let version = greeting.get("version").unwrap_or(&Value::Null);
    let number = |key| {
        let number = version.get("qemu").and_then(|q| q.get(key));
        number
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0)
    };
    Version {
        major: number("major"),
        minor: number("minor"),
        micro: number("micro"),
        package: text(version, "package"),
    }
}

/// QEMU says -1 for both when its clock failed.
fn time_us(stamp: &Value) -> u64 {
    let number = |key| stamp.get(key).and_then(Value::as_u64);
    match (number("seconds"), number("microseconds")) {
        (Some(s), Some(us)) => s.saturating_mul(1_000_000).saturating_add(us),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_of_a_real_monitor() {
        let check = |line: &str, expected: Incoming| {
            assert_eq!(decode_line(line.as_bytes()).unwrap(), expected, "{line}");
        };
        check(
            r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
            Incoming::Greeting(Version {
                major: 10,
                minor: 0,
                micro: 2,
                package: "Debian".into(),
            }),
        );
        check(
            "{\"return\": {}, \"id\": 7}\r\n",
            Incoming::Return {
                id: Some(7),
                value: json!({}),
            },
        );
        check(
            r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 1}"#,
            Incoming::Error {
                id: Some(1),
                class: "GenericError".into(),
                text: "no".into(),
            },
        );
        check(
            r#"{"timestamp": {"seconds": 2, "microseconds": 5}, "event": "STOP"}"#,
            Incoming::Event {
                time_us: 2_000_005,
                name: "STOP".into(),
                data: Value::Null,
            },
        );
        check(
            r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "NEW", "data": {"a": 1}}"#,
            Incoming::Event {
                time_us: 0,
                name: "NEW".into(),
                data: json!({"a": 1}),
            },
        );
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for line in [
            "",
            "{",
            "[]",
            "7",
            "{}",
            r#"{"hello": 1}"#,
            "\u{0}",
            r#"{"event": 3}"#,
        ] {
            assert!(decode_line(line.as_bytes()).is_err(), "{line:?}");
        }
        assert!(decode_line(b"\xff\xfe").is_err());
        let deep = "[".repeat(100_000);
        assert!(decode_line(format!("{{\"return\": {deep}").as_bytes()).is_err());
    }

    #[test]
    fn odd_members_do_not_hurt() {
        for line in [
            r#"{"QMP": 3}"#,
            r#"{"error": 3}"#,
            r#"{"return": 3, "id": "x"}"#,
            r#"{"event": "E", "timestamp": 3}"#,
        ] {
            decode_line(line.as_bytes()).unwrap();
        }
    }
}
