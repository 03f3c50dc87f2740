//! What the guest's reads and the source's heat say to the other side.
//!
//! Both are advice: they change the order in which content travels, never what is there.

use bytes::Bytes;
use flimcd_core::{CHUNK_SIZE, ChunkIndex, Heat, Time, VolumeSize};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Most reads in one message.
pub const MAX_TOUCHED: usize = 512;
/// Chunks that a part is about: 16 GiB.
pub const HEAT_PART_CHUNKS: u64 = 1 << 18;

/// Which heat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HeatKind {
    /// Never sent.
    Invalid,
    /// Of reads.
    Read,
    /// Of writes.
    Write,
}

/// How hot a part of the migration's layout was at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatPart {
    /// Which heat.
    pub kind: HeatKind,
    /// Its first chunk, a multiple of [`HEAT_PART_CHUNKS`].
    pub first: u64,
    /// [`Heat::encode`] of so many chunks.
    #[serde(skip)]
    pub payload: Bytes,
}

impl HeatPart {
    /// Parts of `heat` that are not cold everywhere.
    pub fn of(heat: &Heat, kind: HeatKind) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        let mut chunks = heat.chunks().peekable();
        while let Some(&(chunk, _)) = chunks.peek() {
            let first = chunk.0 - chunk.0 % HEAT_PART_CHUNKS;
            let mut part = Heat::new(size(), heat.half_life(), Time::ZERO);
            while let Some((chunk, count)) =
                chunks.next_if(|(chunk, _)| chunk.0 < first + HEAT_PART_CHUNKS)
            {
                part.add_count(ChunkIndex(chunk.0 - first), count);
            }
            parts.push(Self {
                kind,
                first,
                payload: part.encode().into(),
            });
        }
        parts
    }

    /// What it says, with its first chunk at 0; `None` if it says nothing that makes sense.
    #[must_use]
    pub fn heat(&self, half_life: Duration) -> Option<Heat> {
        Heat::decode(size(), half_life, Time::ZERO, &self.payload)
    }

    /// Whether it could be one.
    pub(crate) const fn is_sound(&self) -> bool {
        !matches!(self.kind, HeatKind::Invalid) && self.first.is_multiple_of(HEAT_PART_CHUNKS)
    }
}

fn size() -> VolumeSize {
    VolumeSize::new(HEAT_PART_CHUNKS * CHUNK_SIZE).expect("a size that volumes have")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Body, Class, Frame, FrameDecoder, Message, encode};
    use flimcd_core::{BlockRange, MigrationId};

    fn sent(message: Message) -> Option<Message> {
        let frame = Frame {
            migration: MigrationId(1),
            class: Class::Bulk,
            message,
        };
        let encoded = encode(&Body::Frame(frame));
        let mut decoder = FrameDecoder::new();
        decoder.buffer().extend_from_slice(&encoded.head);
        decoder.buffer().extend_from_slice(&encoded.payload);
        match decoder.poll() {
            Ok(Some(Body::Frame(frame))) => Some(frame.message),
            _ => None,
        }
    }

    #[test]
    fn parts_come_back_as_they_were() {
        let size = VolumeSize::new(1 << 40).unwrap();
        let half_life = Duration::from_secs(60);
        let mut heat = Heat::new(size, half_life, Time::ZERO);
        let hot = [3, HEAT_PART_CHUNKS - 1, HEAT_PART_CHUNKS, 9_000_000];
        for (chunk, events) in hot.into_iter().zip([1, 4000, 7, 9]) {
            heat.add(ChunkIndex(chunk), events, Time::ZERO);
        }
        let parts = HeatPart::of(&heat, HeatKind::Read);
        assert_eq!(parts.len(), 3);
        let mut back = Heat::new(size, half_life, Time::ZERO);
        for part in parts {
            let Some(Message::Heat(part)) = sent(Message::Heat(part)) else {
                panic!("it was not sent");
            };
            back.merge(&part.heat(half_life).unwrap(), ChunkIndex(part.first));
        }
        assert!(back.chunks().eq(heat.chunks()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let part = |kind, first| {
            sent(Message::Heat(HeatPart {
                kind,
                first,
                payload: Bytes::from_static(&[1]),
            }))
        };
        assert!(part(HeatKind::Write, 0).is_some());
        assert!(part(HeatKind::Invalid, 0).is_none());
        assert!(part(HeatKind::Write, 1).is_none());
        let reads = |count| {
            let reads = vec![BlockRange::new(7, 9); count];
            sent(Message::Touched { reads })
        };
        assert!(reads(MAX_TOUCHED).is_some());
        assert!(reads(MAX_TOUCHED + 1).is_none());
        let reads = vec![BlockRange { start: 9, end: 9 }];
        assert!(sent(Message::Touched { reads }).is_none());
    }
}
