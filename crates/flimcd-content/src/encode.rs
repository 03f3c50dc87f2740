//! Packs the content of a run of blocks as entries of a message.
//!
//! ```text
//!  content ─ Examined::of ─┬─ zero                                       an entry, no payload
//!                          ├─ chunks as the seed's table has them        Same: one fingerprint for neighbouring chunks
//!                          └─ the rest ─ probe ─┬─ the target has it     Copy: one fingerprint for neighbouring blocks
//!                                               └─ it does not           zstd, or raw where that saves less than a sixteenth
//! ```
//! With small savings or none to expect, [`Encoder::encode`] packs without fingerprints.

use bytes::Bytes;
use flimcd_core::BlockRange;
use flimcd_wire::{Content, Entry, Runs};

use crate::{
    Examined, Fingerprint,
    examine::Kind,
    fingerprint::BLOCK_BYTES,
    zero::{bytes_of, zero_runs},
};

/// How content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd of this level.
    Zstd(i32),
}

impl Compression {
    /// zstd level 1: at 430 MB/s a core it is faster than most WANs.
    pub const DEFAULT: Self = Self::Zstd(1);
    /// zstd level 3: a twentieth less than level 1, at 260 MB/s a core.
    pub const THOROUGH: Self = Self::Zstd(3);
}

/// The content of a run of blocks, ready for a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// What the payload holds; covers the run without gaps.
    pub entries: Vec<Entry>,
    /// The payloads of the entries, one after the other.
    pub payload: Bytes,
}

/// Packs blocks. Keeps the compressor's state between calls; one per thread.
pub struct Encoder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl Encoder {
    /// An encoder that compresses as told.
    ///
    /// # Panics
    /// When zstd does not have the level.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        let compressor = match compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                Some(zstd::bulk::Compressor::new(level).expect("a level that zstd has"))
            }
        };
        Self {
            compressor,
            scratch: Vec::new(),
        }
    }

    /// Packs `content`, the bytes of `range`, by itself: zeroes, and the rest compressed. The last block may be short.
    pub fn encode(&mut self, range: BlockRange, content: &[u8]) -> Encoded {
        let mut packed = Packed::of(content);
        for (range, bytes) in zero_runs(range, content) {
            let content = match bytes {
                None => Content::Zero,
                Some(bytes) => self.compress(bytes, &mut packed.payload),
            };
            packed.entries.push(Entry { range, content });
        }
        packed.finish()
    }

    /// Packs `content`, which was [`Examined`]. What the seed seems to have goes as [`Content::Same`], and blocks that are in
    /// `had`, the target's answer to [`Examined::probe`], as [`Content::Copy`]. Blocks in `had` that were not asked about are
    /// ignored.
    ///
    /// # Panics
    /// When the content is not as long as what was examined.
    pub fn pack(&mut self, content: &[u8], examined: &Examined, had: &Runs) -> Encoded {
        let range = examined.range();
        assert_eq!(
            content.len().div_ceil(BLOCK_BYTES) as u64,
            range.len(),
            "the content is not what was examined"
        );
        let mut had = had.iter().peekable();
        let runs = examined.runs(|block, kind| match kind {
            Kind::Zero => Goes::Zero,
            Kind::Same => Goes::Same,
            Kind::Rest => {
                while had.next_if(|run| run.end <= block).is_some() {}
                match had.peek() {
                    Some(run) if run.start <= block => Goes::Copy,
                    _ => Goes::InFull,
                }
            }
        });
        let mut packed = Packed::of(content);
        for (run, goes) in runs {
            let content = match goes {
                Goes::Zero => Content::Zero,
                Goes::Same => Content::Same,
                Goes::Copy => Content::Copy,
                Goes::InFull => self.compress(bytes_of(range, content, run), &mut packed.payload),
            };
            if matches!(goes, Goes::Same | Goes::Copy) {
                let fingerprint = Fingerprint::over(examined.of_run(run));
                packed.payload.extend_from_slice(fingerprint.as_bytes());
            }
            packed.entries.push(Entry {
                range: run,
                content,
            });
        }
        packed.finish()
    }

    fn compress(&mut self, run: &[u8], payload: &mut Vec<u8>) -> Content {
        let to_len = |len: usize| u32::try_from(len).expect("messages are at most a MiB");
        if let Some(compressor) = &mut self.compressor {
            self.scratch
                .resize(zstd::zstd_safe::compress_bound(run.len()), 0);
            // An error here can only mean that the bound is wrong; raw is right all the same.
            if let Ok(len) = compressor.compress_to_buffer(run, &mut self.scratch)
                && len < run.len() - run.len() / 16
            {
                payload.extend_from_slice(&self.scratch[..len]);
                return Content::Zstd { len: to_len(len) };
            }
        }
        payload.extend_from_slice(run);
        Content::Raw {
            len: to_len(run.len()),
        }
    }
}

/// How a block goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Goes {
    Zero,
    Same,
    Copy,
    InFull,
}

/// A message's content while it is packed.
struct Packed {
    entries: Vec<Entry>,
    payload: Vec<u8>,
}

impl Packed {
    fn of(content: &[u8]) -> Self {
        Self {
            entries: Vec::new(),
            payload: Vec::with_capacity(content.len() / 2),
        }
    }

    fn finish(self) -> Encoded {
        Encoded {
            entries: self.entries,
            payload: self.payload.into(),
        }
    }
}

#[cfg(test)]
mod tests;
