//! Unpacks the entries of messages.

use flimcd_core::{BlockRange, VolumeSize, limits};
use flimcd_wire::{Content, Entry};

use crate::Fingerprint;

/// Why a payload is not the content of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The blocks do not lie in the volume.
    #[error("the blocks {0:?} are beyond the volume's end")]
    Range(BlockRange),
    /// The payload does not unpack to the run's size.
    #[error("the payload for {0:?} does not unpack to its size")]
    Payload(BlockRange),
}

/// The content of a run of blocks.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// All zero.
    Zeroes,
    /// These bytes, as many as the run has in the volume.
    Bytes(&'a [u8]),
    /// What the seed has there, if the run has this fingerprint.
    Same(Fingerprint),
    /// What stands at the places that were found for the message's probe, if the run has this fingerprint.
    Copy(Fingerprint),
}

/// Unpacks entries. Keeps its buffer between calls; one per thread.
pub struct Decoder {
    decompressor: zstd::bulk::Decompressor<'static>,
    scratch: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder.
    ///
    /// # Panics
    /// When there is no memory for zstd's state.
    #[must_use]
    pub fn new() -> Self {
        let decompressor = zstd::bulk::Decompressor::new().expect("memory for zstd's state");
        Self {
            decompressor,
            scratch: Vec::new(),
        }
    }

    /// Unpacks the content of one entry of a message for a volume of `size`. Takes no more memory
    /// than the entry's blocks have bytes, whatever the payload says.
    ///
    /// # Errors
    /// [`DecodeError`] when the entry does not fit the volume or its payload is not what it says.
    pub fn decode<'a>(
        &'a mut self,
        entry: &Entry,
        payload: &'a [u8],
        size: VolumeSize,
    ) -> Result<Decoded<'a>, DecodeError> {
        let range = entry.range;
        if range.is_empty() || range.end > size.blocks() {
            return Err(DecodeError::Range(range));
        }
        let wrong = DecodeError::Payload(range);
        // A run of zeroes may be as long as the volume; the others are bounded by the wire codec too.
        let bounded = range.len() <= limits::MAX_BLOCKS_PER_MESSAGE;
        let len = range.bytes(size).len();
        match entry.content {
            Content::Zero if payload.is_empty() => Ok(Decoded::Zeroes),
            Content::Raw { .. } if payload.len() as u64 == len => Ok(Decoded::Bytes(payload)),
            Content::Same if bounded && entry.is_whole_chunks() => {
                fingerprint(payload).map(Decoded::Same).ok_or(wrong)
            }
            Content::Copy if bounded => fingerprint(payload).map(Decoded::Copy).ok_or(wrong),
            Content::Zstd { .. } if bounded => {
                let len = usize::try_from(len).map_err(|_| wrong)?;
                self.scratch.resize(len, 0);
                let got = self
                    .decompressor
                    .decompress_to_buffer(payload, &mut self.scratch[..]);
                match got {
                    Ok(got) if got == len => Ok(Decoded::Bytes(&self.scratch)),
                    _ => Err(wrong),
                }
            }
            _ => Err(wrong),
        }
    }
}

/// The one fingerprint that is the whole payload.
fn fingerprint(payload: &[u8]) -> Option<Fingerprint> {
    payload.try_into().ok().map(Fingerprint::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::BLOCK_SIZE;

    #[test]
    fn lies_about_payloads_are_refused() {
        let size = VolumeSize::new(40 * BLOCK_SIZE).unwrap();
        let packed = zstd::bulk::compress(&[7; 8192], 1).unwrap();
        let check = |range: (u64, u64), content, payload: &[u8]| {
            let range = BlockRange::new(range.0, range.1);
            let mut decoder = Decoder::new();
            let got = decoder
                .decode(&Entry { range, content }, payload, size)
                .map(|_| ());
            let limit = usize::try_from(BLOCK_SIZE * 40).unwrap();
            assert!(
                decoder.scratch.capacity() <= limit,
                "memory is bounded by the blocks"
            );
            got.unwrap_err()
        };
        check((39, 41), Content::Zero, b"");
        check((0, 1), Content::Zero, b"x");
        check((5, 5), Content::Zero, b"");
        check((0, 1), Content::Raw { len: 5 }, b"abcde");
        check((0, 1), Content::Zstd { len: 0 }, &packed);
        check((0, 3), Content::Zstd { len: 0 }, &packed);
        check((0, 2), Content::Zstd { len: 0 }, b"not zstd");
        check((0, 2), Content::Invalid, &packed);
        check((0, 2), Content::Same, &[1; 32]);
        check((1, 16), Content::Same, &[1; 32]);
        check((0, 16), Content::Same, &[1; 31]);
        check((0, 32), Content::Same, &[1; 64]);
        check((32, 48), Content::Same, &[1; 32]);
        check((0, 2), Content::Copy, &[1; 33]);
        check((0, 2), Content::Copy, b"");
        check((39, 41), Content::Copy, &[1; 32]);
    }

    #[test]
    fn runs_longer_than_a_message_carries_are_refused() {
        let size = VolumeSize::new(1 << 40).unwrap();
        for content in [Content::Same, Content::Copy, Content::Zstd { len: 32 }] {
            let range = BlockRange::new(0, limits::MAX_BLOCKS_PER_MESSAGE + 16);
            let entry = Entry { range, content };
            let mut decoder = Decoder::new();
            let got = decoder.decode(&entry, &[1; 32], size);
            assert_eq!(got, Err(DecodeError::Payload(range)));
        }
        let entry = Entry {
            range: size.all_blocks(),
            content: Content::Zero,
        };
        assert_eq!(
            Decoder::new().decode(&entry, b"", size),
            Ok(Decoded::Zeroes)
        );
    }
}
