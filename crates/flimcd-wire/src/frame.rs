//! Frames: how messages lie in a stream of bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flimcd_core::{MigrationId, limits::MAX_FRAME_BYTES};
use serde::{Deserialize, Serialize};

use crate::{Class, Message};

const HEADER_BYTES: usize = 16;
const KIND_LINK: u8 = 1;
const KIND_MIGRATION: u8 = 2;

/// One message with its address and its priority.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// The migration it belongs to.
    pub migration: MigrationId,
    /// How urgent it is.
    pub class: Class,
    /// What it says.
    pub message: Message,
}

/// What the two link layers say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkMessage {
    /// Never sent.
    Invalid,
    /// Asks for a `Pong` with the same number.
    Ping(u64),
    /// Answer to a `Ping`.
    Pong(u64),
}

/// A decoded frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// For the link itself.
    Link(LinkMessage),
    /// For a migration.
    Frame(Frame),
}

/// Why bytes are not a frame. The connection they came on cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The length field asks for more than a frame may have.
    #[error("the peer announced a frame of {0} bytes; at most {MAX_FRAME_BYTES} are allowed")]
    TooLong(u32),
    /// A header field has no valid value.
    #[error("the peer sent a frame header with an invalid {0}")]
    Header(&'static str),
    /// The body is not a message.
    #[error("the peer sent a malformed message: {0}")]
    Malformed(&'static str),
}

/// A frame as bytes. The payload is not copied: write `head`, then `payload`.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Header and message.
    pub head: Bytes,
    /// Content of blocks or of streams, often empty.
    pub payload: Bytes,
}

impl Encoded {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// Never true: a frame has a header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Turns a frame or a link message into bytes.
///
/// # Panics
/// When the message is larger than a frame may be: whoever builds messages bounds them.
#[must_use]
pub fn encode(body: &Body) -> Encoded {
    let mut head = Vec::with_capacity(64);
    head.resize(HEADER_BYTES, 0);
    let (kind, class, migration, head, payload) = match body {
        Body::Link(message) => (
            KIND_LINK,
            Class::Control,
            0,
            postcard::to_extend(message, head),
            Bytes::new(),
        ),
        Body::Frame(frame) => {
            let payload = frame.message.payload();
            let head = postcard::to_extend(&frame.message, head);
            (
                KIND_MIGRATION,
                frame.class,
                frame.migration.0,
                head,
                payload,
            )
        }
    };
    let mut head = head.expect("serialising to memory cannot fail");
    let len = head.len() - HEADER_BYTES + payload.len();
    assert!(len <= MAX_FRAME_BYTES, "a message of {len} bytes was built");
    let mut header = &mut head[..HEADER_BYTES];
    header.put_u32_le(u32::try_from(len).expect("checked above"));
    header.put_u8(kind);
    header.put_u8(class as u8);
    header.put_u16_le(0);
    header.put_u64_le(migration);
    Encoded {
        head: head.into(),
        payload,
    }
}

/// Cuts a stream of bytes into frames.
///
/// Contract: append what arrived to [`FrameDecoder::buffer`], then call [`FrameDecoder::poll`] until it
/// says `None`. After an error nothing more may be decoded.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: BytesMut,
}

impl FrameDecoder {
    /// A decoder at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to append bytes that arrived.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`DecodeError`] when the bytes are no frame of this protocol.
    pub fn poll(&mut self) -> Result<Option<Body>, DecodeError> {
        let Some(mut header) = self.buffer.get(..HEADER_BYTES) else {
            return Ok(None);
        };
        let announced = header.get_u32_le();
        let len = announced as usize;
        if len > MAX_FRAME_BYTES {
            return Err(DecodeError::TooLong(announced));
        }
        let kind = header.get_u8();
        let class = Class::from_byte(header.get_u8()).ok_or(DecodeError::Header("class"))?;
        if header.get_u16_le() != 0 {
            return Err(DecodeError::Header("reserved field"));
        }
        let migration = MigrationId(header.get_u64_le());
        if !matches!(kind, KIND_LINK | KIND_MIGRATION) {
            return Err(DecodeError::Header("kind"));
        }
        if self.buffer.len() < HEADER_BYTES + len {
            // The sender writes at most one frame at a time, so this is all the room it takes.
            self.buffer.reserve(HEADER_BYTES + len - self.buffer.len());
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(HEADER_BYTES + len).freeze();
        frame.advance(HEADER_BYTES);
        if kind == KIND_LINK {
            return decode_link(&frame).map(|message| Some(Body::Link(message)));
        }
        let message = decode_message(&frame)?;
        Ok(Some(Body::Frame(Frame {
            migration,
            class,
            message,
        })))
    }
}

fn decode_link(body: &[u8]) -> Result<LinkMessage, DecodeError> {
    match postcard::from_bytes(body) {
        Ok(LinkMessage::Invalid) | Err(_) => Err(DecodeError::Malformed("not a link message")),
        Ok(message) => Ok(message),
    }
}

fn decode_message(body: &Bytes) -> Result<Message, DecodeError> {
    let (mut message, rest) = postcard::take_from_bytes::<Message>(body)
        .map_err(|_| DecodeError::Malformed("not a message of this version"))?;
    let rest = body.slice(body.len() - rest.len()..);
    if !message.set_payload(rest) {
        return Err(DecodeError::Malformed("bytes after the message"));
    }
    message.validate()?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Blocks, Content, Entry, ErrorCode, Runs, VmMessage, WireError};
    use flimcd_core::{BlockRange, Seq};

    fn frame(message: Message) -> Body {
        Body::Frame(Frame {
            migration: MigrationId(7),
            class: Class::Bulk,
            message,
        })
    }

    fn blocks(entries: Vec<Entry>, payload: &'static [u8]) -> Message {
        Message::Blocks(Blocks {
            seq: Seq(9),
            entries,
            payload: Bytes::from_static(payload),
        })
    }

    fn entry(start: u64, end: u64, content: Content) -> Entry {
        Entry {
            range: BlockRange::new(start, end),
            content,
        }
    }

    fn part(payload: &'static [u8]) -> Message {
        Message::Vm(VmMessage::Part {
            attempt: 1,
            stream: 0,
            seq: 5,
            payload: Bytes::from_static(payload),
        })
    }

    fn decode_all(bytes: &[u8]) -> Result<Vec<Body>, DecodeError> {
        let mut decoder = FrameDecoder::new();
        let mut out = Vec::new();
        for byte in bytes {
            decoder.buffer().put_u8(*byte);
            while let Some(body) = decoder.poll()? {
                out.push(body);
            }
        }
        Ok(out)
    }

    #[test]
    fn frames_survive_being_cut_anywhere() {
        let sent = [
            frame(Message::Complete),
            Body::Link(LinkMessage::Ping(3)),
            frame(blocks(
                vec![
                    entry(0, 2, Content::Zero),
                    entry(5, 6, Content::Zstd { len: 3 }),
                ],
                b"abc",
            )),
            frame(Message::Demand {
                runs: Runs::new([BlockRange::new(4, 8)]),
            }),
            frame(Message::Failed(WireError::new(
                ErrorCode::DISK,
                "ä".repeat(600),
            ))),
            frame(Message::Peeked {
                number: 3,
                payload: Bytes::from_static(b"boot"),
            }),
            frame(part(b"pages")),
        ];
        let mut bytes = Vec::new();
        for body in &sent {
            let encoded = encode(body);
            bytes.extend_from_slice(&encoded.head);
            bytes.extend_from_slice(&encoded.payload);
        }
        assert_eq!(decode_all(&bytes).unwrap(), sent);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let check = |message| {
            let encoded = encode(&frame(message));
            let bytes = [&encoded.head[..], &encoded.payload[..]].concat();
            assert!(matches!(decode_all(&bytes), Err(DecodeError::Malformed(_))));
        };
        check(Message::Invalid);
        check(Message::Vm(VmMessage::Invalid));
        check(part(b""));
        check(Message::Peek {
            number: 1,
            range: BlockRange::new(0, 257),
        });
        check(blocks(vec![entry(0, 1, Content::Invalid)], b""));
        check(blocks(vec![entry(3, 3, Content::Zero)], b""));
        check(blocks(
            vec![entry(3, 5, Content::Zero), entry(4, 6, Content::Zero)],
            b"",
        ));
        check(blocks(vec![entry(0, 1, Content::Raw { len: 4 })], b"abc"));
        check(blocks(
            vec![entry(0, 1000, Content::Zstd { len: 3 })],
            b"abc",
        ));

        let mut long = encode(&frame(Message::Complete)).head.to_vec();
        long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode_all(&long), Err(DecodeError::TooLong(u32::MAX)));
        assert_eq!(decode_all(&[0; 16]), Err(DecodeError::Header("class")));
    }
}
