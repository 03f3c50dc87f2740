//! Seeds: images at the target that resemble what moves, so that chunks that are equal at the same place
//! need not cross the link.
//!
//! ```text
//!  source                                          target
//!    Open                  ──────────────────────►
//!    SeedAsk (sample)      ──────────────────────►   which images of the library have these chunks there?
//!                          ◄──────────────────────   SeedOffer (id, number of parts)
//!                          ◄──────────────────────   SeedPart … (a prefix of each chunk's fingerprint)
//!    Blocks: Same          ──────────────────────►   reads the seed, checks the whole fingerprint, writes
//!                          ◄──────────────────────   Lacking, where the seed is not what it was: sent in full then
//! ```
//! Chunks are numbered in the migration's layout, so several volumes with a seed each need nothing more.
//!
//! The table has 4 bytes of each fingerprint. That is enough to *propose*: of two chunks that differ, one in four
//! thousand million is proposed wrongly, and costs a round trip. Content is *taken* only after the whole
//! fingerprint of what the source read, which travels with [`Content::Same`](crate::Content::Same), has matched what
//! the target read. So neither a collision of prefixes nor a table that is wrong can ever do harm.

use std::{fmt, num::NonZeroU32};

use bytes::{BufMut, Bytes, BytesMut};
use flimcd_core::{BlockRange, ChunkIndex, limits};
use serde::{Deserialize, Serialize};

use crate::Runs;

/// Chunks in one part of a table: 512 MiB of volume, 32 KiB of prefixes.
const PART_CHUNKS: u64 = 8192;
/// [`PART_CHUNKS`] as a length in memory.
const PART_LEN: usize = 8192;
/// Bytes of a prefix.
const PREFIX_BYTES: usize = 4;

/// The first bytes of a chunk's fingerprint; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkPrefix(pub NonZeroU32);

impl ChunkPrefix {
    /// The prefix of a whole fingerprint. The one that would be zero is made one.
    #[must_use]
    pub const fn of(fingerprint: &[u8; 32]) -> Self {
        let [a, b, c, d, ..] = *fingerprint;
        match NonZeroU32::new(u32::from_le_bytes([a, b, c, d])) {
            Some(prefix) => Self(prefix),
            None => Self(NonZeroU32::MIN),
        }
    }
}

/// Names the content of a set of seeds: another content has another name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeedId(pub [u8; 16]);

impl fmt::Debug for SeedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A chunk of the source's, for the target to recognise a seed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleChunk {
    /// Where it lies.
    pub chunk: ChunkIndex,
    /// What it holds.
    pub prefix: ChunkPrefix,
}

/// What the target has; see [`Message::SeedOffer`](crate::Message::SeedOffer).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedOffer {
    /// Names the content.
    pub id: SeedId,
    /// How people call it, at most [`limits::MAX_TEXT_BYTES`].
    pub name: String,
    /// It is what the content is written over: a chunk that was sent is no longer in it.
    pub in_place: bool,
    /// Parts that the table has. They are sent unless the source has a seed of this id already.
    pub parts: u32,
}

/// A part of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedPart {
    /// Which seed.
    pub id: SeedId,
    /// Number of the part, counted over the volume; those without a chunk in them are not sent.
    pub part: u32,
    /// Runs of chunks that the seed has and that are not zero, counted from the first of the part.
    pub chunks: Runs,
    /// The prefix of each of them, four bytes little-endian, the first of the fingerprint.
    #[serde(skip)]
    pub payload: Bytes,
}

impl SeedPart {
    /// Whether it could be a part of a table.
    pub(crate) fn is_sound(&self) -> bool {
        let end = self.chunks.iter().last().map_or(0, |run| run.end);
        (1..=PART_CHUNKS).contains(&end)
            && u64::from(self.part)
                <= limits::MAX_VOLUME_BYTES / flimcd_core::CHUNK_SIZE / PART_CHUNKS
            && self.payload.len() as u64 == self.chunks.blocks() * PREFIX_BYTES as u64
            && self
                .payload
                .chunks_exact(PREFIX_BYTES)
                .all(|prefix| prefix != [0; PREFIX_BYTES])
    }
}

/// For every chunk of a volume the prefix of its fingerprint in the seed, or nothing. Takes four bytes per chunk, in
/// pieces of 512 MiB of volume of which those without any chunk take nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct SeedTable {
    chunks: u64,
    /// Zero: nothing there.
    parts: Vec<Option<Box<[u32; PART_LEN]>>>,
}

impl SeedTable {
    /// A table for so many chunks, with nothing in it.
    #[must_use]
    pub fn new(chunks: u64) -> Self {
        let parts = usize::try_from(chunks.div_ceil(PART_CHUNKS)).expect("of a volume's size");
        Self {
            chunks,
            parts: vec![None; parts],
        }
    }

    fn place(&self, chunk: ChunkIndex) -> Option<(usize, usize)> {
        let part = usize::try_from(chunk.0 / PART_CHUNKS).ok()?;
        let at = usize::try_from(chunk.0 % PART_CHUNKS).ok()?;
        (chunk.0 < self.chunks).then_some((part, at))
    }

    /// What the seed has there.
    #[must_use]
    pub fn get(&self, chunk: ChunkIndex) -> Option<ChunkPrefix> {
        let (part, at) = self.place(chunk)?;
        let prefix = self.parts[part].as_ref()?[at];
        NonZeroU32::new(prefix).map(ChunkPrefix)
    }

    /// Says what the seed has there. A chunk beyond the table is left alone.
    pub fn set(&mut self, chunk: ChunkIndex, prefix: Option<ChunkPrefix>) {
        let Some((part, at)) = self.place(chunk) else {
            return;
        };
        let part = &mut self.parts[part];
        match (part.as_mut(), prefix) {
            (None, None) => {}
            (Some(part), _) => part[at] = prefix.map_or(0, |prefix| prefix.0.get()),
            (None, Some(prefix)) => part.insert(Box::new([0; PART_LEN]))[at] = prefix.0.get(),
        }
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.part_numbers().next().is_none()
    }

    /// Numbers of the parts that have to be sent, ascending.
    pub fn part_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let has_any = |part: &Option<Box<[u32; PART_LEN]>>| {
            part.as_ref()
                .is_some_and(|part| part.iter().any(|&prefix| prefix != 0))
        };
        (0..)
            .zip(&self.parts)
            .filter(move |(_, part)| has_any(part))
            .map(|(number, _)| number)
    }

    /// A part as it travels; `None` when there is nothing in it.
    #[must_use]
    pub fn part(&self, id: SeedId, number: u32) -> Option<SeedPart> {
        let part = self.parts.get(usize::try_from(number).ok()?)?.as_ref()?;
        let mut payload = BytesMut::new();
        let mut runs: Vec<BlockRange> = Vec::new();
        for (at, &prefix) in (0..).zip(part.iter()).filter(|(_, prefix)| **prefix != 0) {
            payload.put_u32_le(prefix);
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(BlockRange::new(at, at + 1)),
            }
        }
        (!runs.is_empty()).then(|| SeedPart {
            id,
            part: number,
            chunks: Runs::new(runs),
            payload: payload.freeze(),
        })
    }

    /// Takes a part that came. False, and nothing changed, when it does not fit the table.
    #[must_use]
    pub fn add(&mut self, part: &SeedPart) -> bool {
        let first = u64::from(part.part) * PART_CHUNKS;
        let end = part.chunks.iter().last().map_or(0, |run| run.end);
        if !part.is_sound() || first + end > self.chunks {
            return false;
        }
        let chunks = part.chunks.iter().flat_map(BlockRange::iter);
        let (prefixes, _) = part.payload.as_chunks::<PREFIX_BYTES>();
        for (at, &prefix) in chunks.zip(prefixes) {
            let prefix = NonZeroU32::new(u32::from_le_bytes(prefix)).map(ChunkPrefix);
            self.set(ChunkIndex(first + at.0), prefix);
        }
        true
    }

    /// Bytes of memory.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let parts = self.parts.iter().flatten().count();
        parts * PART_LEN * PREFIX_BYTES + self.parts.len() * size_of::<usize>()
    }
}

impl fmt::Debug for SeedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeedTable")
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Body, Class, Frame, FrameDecoder, Message, encode};
    use flimcd_core::MigrationId;
    use proptest::prelude::*;

    const ID: SeedId = SeedId([7; 16]);

    fn prefix(value: u32) -> Option<ChunkPrefix> {
        NonZeroU32::new(value).map(ChunkPrefix)
    }

    /// Sends a message through the frame codec.
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

    proptest! {
        #[test]
        fn a_table_survives_the_link_in_any_order(
            chunks in 1u64..40_000,
            runs in prop::collection::vec((0u64..40_000, 1u64..3_000, 0u32..9), 0..20),
            reverse in any::<bool>(),
        ) {
            let mut table = SeedTable::new(chunks);
            for (start, len, value) in runs {
                for chunk in start..start + len {
                    let value = value.wrapping_mul(u32::try_from(chunk).unwrap());
                    table.set(ChunkIndex(chunk), prefix(value));
                }
            }
            let mut numbers: Vec<_> = table.part_numbers().collect();
            if reverse {
                numbers.reverse();
            }
            let mut back = SeedTable::new(chunks);
            for number in &numbers {
                let part = table.part(ID, *number).unwrap();
                let Some(Message::SeedPart(part)) = sent(Message::SeedPart(part)) else {
                    return Err(TestCaseError::fail("a part does not survive"));
                };
                prop_assert!(back.add(&part));
                prop_assert!(back.add(&part), "twice is as once");
            }
            for chunk in 0..chunks + 5 {
                prop_assert_eq!(back.get(ChunkIndex(chunk)), table.get(ChunkIndex(chunk)));
            }
            prop_assert_eq!(numbers.is_empty(), table.is_empty());
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let mut table = SeedTable::new(PART_CHUNKS + 10);
        let part = |number, chunks: (u64, u64), payload: &[u8]| SeedPart {
            id: ID,
            part: number,
            chunks: Runs::new([BlockRange::new(chunks.0, chunks.1)]),
            payload: Bytes::copy_from_slice(payload),
        };
        assert!(table.add(&part(1, (9, 10), &[1; 4])));
        for wrong in [
            part(1, (9, 11), &[1; 8]),
            part(2, (0, 1), &[1; 4]),
            part(u32::MAX, (0, 1), &[1; 4]),
            part(0, (0, 2), &[1; 4]),
            part(0, (0, 1), &[0; 4]),
            part(0, (PART_CHUNKS, PART_CHUNKS + 1), &[1; 4]),
            SeedPart {
                chunks: Runs::default(),
                ..part(0, (0, 1), b"")
            },
        ] {
            let before = table.clone();
            assert!(!table.add(&wrong), "{wrong:?}");
            assert!(table == before);
        }
        assert_eq!(sent(Message::SeedPart(part(0, (0, 2), &[1; 4]))), None);
    }

    #[test]
    fn memory_is_four_bytes_per_chunk_that_there_is() {
        let mut table = SeedTable::new(16 << 20);
        let empty = table.memory_bytes();
        assert!(empty < 64 << 10, "{empty}");
        for chunk in 0..(16u64 << 20) {
            table.set(ChunkIndex(chunk), prefix(1));
        }
        assert!(
            table.memory_bytes() < (64 << 20) + (64 << 10),
            "1 TiB: 64 MiB"
        );
    }
}
