//! What the load writes: content that tells who wrote it, where, and when.
//!
//! Each granule starts with a mark (as far as it is long enough) and goes on with text or noise:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–7 | `FLIMLOAD` |
//! | 8–15 | byte offset of the granule, little-endian |
//! | 16–19 | version, little-endian |
//! | 20–23 | low half of the seed, little-endian |
//!
//! With [`Duplicates`] some granules have one of a few contents instead, without a mark: the same bytes
//! wherever they are written.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use flimcd_core::BLOCK_SIZE;

use super::{
    options::{Duplicates, LoadOptions},
    source::ZERO_CONTENT,
};
use crate::{
    content::{fill_noise, fill_text},
    rng::{Rng, mix, mix3, unit},
};

const MAGIC: &[u8; 8] = b"FLIMLOAD";
const MARK_BYTES: usize = 24;
/// Places on the disk at the start that hold one of the contents that are there already.
const PLACES_PER_CONTENT: u64 = 4;
/// Unit of recorded content.
pub(super) const RECORDED_BYTES: usize = 4096;
/// Distinguishes recorded contents from others.
const RECORDED_SALT: u64 = 0x7265_636f_7264_6564;
/// Distinguishes the draws that decide about duplicates from those of content.
const DUPLICATE_SALT: u64 = 0x6475_706c_6963_6174;

impl Duplicates {
    /// Fills `out` with content number `number` of a load of this seed.
    pub fn fill(&self, load_seed: u64, number: u64, compressible_share: f64, out: &mut [u8]) {
        fill_by_share(repeated_seed(load_seed, number), compressible_share, out);
    }

    /// Puts every second of the contents of a load onto an image, at several places each: what had been written
    /// before it.
    ///
    /// # Errors
    /// Those of writing the file.
    pub fn plant(&self, options: &LoadOptions, image: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(image)?;
        let blocks = file.metadata()?.len() / BLOCK_SIZE;
        let mut rng = Rng::new(options.seed);
        let mut buffer = vec![0; RECORDED_BYTES];
        for number in (0..self.contents).step_by(2) {
            self.fill(
                options.seed,
                number,
                options.compressible_share,
                &mut buffer,
            );
            for _ in 0..PLACES_PER_CONTENT.min(blocks) {
                file.write_all_at(&buffer, rng.below(blocks) * BLOCK_SIZE)?;
            }
        }
        Ok(())
    }

    /// Which content a granule gets: none, if it is to be new. Content `n` is drawn with a probability
    /// that falls as the 2/3rd power of `n`.
    #[must_use]
    pub fn draw(&self, granule: u64) -> Option<u64> {
        let draw = mix(granule ^ DUPLICATE_SALT);
        if unit(draw) >= self.share {
            return None;
        }
        let place = unit(mix(draw)).powi(3);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "below a count"
        )]
        let number = (place * self.contents as f64) as u64;
        Some(number)
    }
}

const fn repeated_seed(load_seed: u64, number: u64) -> u64 {
    mix3(load_seed, number, DUPLICATE_SALT)
}

fn is_text(content: u64, compressible_share: f64) -> bool {
    unit(content.rotate_left(17)) < compressible_share
}

fn fill_by_share(content: u64, compressible_share: f64, out: &mut [u8]) {
    if is_text(content, compressible_share) {
        fill_text(content, out);
    } else {
        fill_noise(content, out);
    }
}

/// What a load writes into one granule, without its bytes: equal values have equal bytes if they are of
/// loads with the same seed and options, others hardly ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockContent {
    /// Zeroes.
    Zero,
    /// This version of this place, and nothing else.
    New {
        /// Byte offset of the granule.
        offset: u64,
        /// Number of the write.
        version: u32,
    },
    /// One of the contents of [`Duplicates`].
    Repeated(u64),
    /// A recorded content.
    Recorded(u32),
}

/// Makes the content of granules. The content of a write is a function of seed, place and version
/// (the number of the write among all of the load, from 1), or of the recorded content's number.
#[derive(Clone, Debug)]
pub struct Stamp {
    seed: u64,
    compressible_share: f64,
    duplicates: Option<Duplicates>,
}

impl Stamp {
    /// That of a load with these options.
    #[must_use]
    pub const fn of(options: &LoadOptions) -> Self {
        Self {
            seed: options.seed,
            compressible_share: options.compressible_share,
            duplicates: options.duplicates,
        }
    }

    /// What version `version` of the granule at `offset` is. A simulation that has no bytes can keep this
    /// for each block instead.
    #[must_use]
    pub fn content(&self, offset: u64, version: u32) -> BlockContent {
        let content = self.mixed(offset, version);
        let repeated = self.duplicates.and_then(|some| some.draw(content));
        repeated.map_or(
            BlockContent::New { offset, version },
            BlockContent::Repeated,
        )
    }

    /// What the recorded content of this number is.
    #[must_use]
    pub const fn recorded(number: u32) -> BlockContent {
        match number {
            ZERO_CONTENT => BlockContent::Zero,
            number => BlockContent::Recorded(number),
        }
    }

    /// Whether the bytes of this content compress (about 2.5 times in runs).
    #[must_use]
    pub fn is_compressible(&self, content: BlockContent) -> bool {
        let seed = match content {
            BlockContent::Zero => return true,
            BlockContent::New { offset, version } => self.mixed(offset, version),
            BlockContent::Repeated(number) => repeated_seed(self.seed, number),
            BlockContent::Recorded(number) => self.recorded_seed(number),
        };
        is_text(seed, self.compressible_share)
    }

    fn mixed(&self, offset: u64, version: u32) -> u64 {
        mix3(self.seed, offset, u64::from(version))
    }

    fn recorded_seed(&self, number: u32) -> u64 {
        mix3(self.seed, u64::from(number), RECORDED_SALT)
    }

    /// Fills a block of [`RECORDED_BYTES`] with a recorded content.
    pub(super) fn fill_recorded(&self, number: u32, out: &mut [u8]) {
        if number == ZERO_CONTENT {
            out.fill(0);
        } else {
            fill_by_share(self.recorded_seed(number), self.compressible_share, out);
        }
    }

    /// Fills `out` with version `version` of the granule at `offset`.
    pub(super) fn fill(&self, offset: u64, version: u32, out: &mut [u8]) {
        let content = self.mixed(offset, version);
        if let Some(duplicates) = &self.duplicates
            && let Some(number) = duplicates.draw(content)
        {
            duplicates.fill(self.seed, number, self.compressible_share, out);
            return;
        }
        let mark = self.mark(offset, version);
        let (head, body) = out.split_at_mut(out.len().min(MARK_BYTES));
        head.copy_from_slice(&mark[..head.len()]);
        fill_by_share(content, self.compressible_share, body);
    }

    fn mark(&self, offset: u64, version: u32) -> [u8; MARK_BYTES] {
        let mut mark = [0; MARK_BYTES];
        mark[..8].copy_from_slice(MAGIC);
        mark[8..16].copy_from_slice(&offset.to_le_bytes());
        mark[16..20].copy_from_slice(&version.to_le_bytes());
        mark[20..24].copy_from_slice(&self.seed.to_le_bytes()[..4]);
        mark
    }

    /// Offset and version in the mark of some content, if it has one of this load.
    pub(super) fn read_mark(&self, data: &[u8]) -> Option<(u64, u32)> {
        let mark = data.first_chunk::<MARK_BYTES>()?;
        let (magic, rest) = mark.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (version, seed) = rest.split_first_chunk::<4>()?;
        (magic == MAGIC && seed == &self.seed.to_le_bytes()[..4])
            .then(|| (u64::from_le_bytes(*offset), u32::from_le_bytes(*version)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn duplicates_are_the_same_bytes_at_any_place_and_the_rest_is_new() {
        let duplicates = Duplicates {
            share: 0.88,
            contents: 500,
        };
        let stamp = Stamp::of(&LoadOptions {
            seed: 9,
            duplicates: Some(duplicates),
            ..LoadOptions::default()
        });
        let mut seen = HashMap::new();
        let count: u32 = 10_000;
        for i in 0..count {
            let mut block = vec![0; 512];
            stamp.fill(u64::from(i % 777) * 512, i + 1, &mut block);
            *seen.entry(block).or_insert(0_u32) += 1;
        }
        let unique = f64::from(u32::try_from(seen.len()).unwrap()) / f64::from(count);
        assert!((0.13..0.18).contains(&unique), "{unique}");
        let hottest = seen.values().max().unwrap();
        assert!(*hottest > count / 50, "{hottest}");
    }
}
