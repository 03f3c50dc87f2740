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

use super::options::Duplicates;
use crate::{
    content::{fill_noise, fill_text},
    rng::{mix, mix3, unit},
};

const MAGIC: &[u8; 8] = b"FLIMLOAD";
const MARK_BYTES: usize = 24;
/// Distinguishes the draws that decide about duplicates from those of content.
const DUPLICATE_SALT: u64 = 0x6475_706c_6963_6174;

impl Duplicates {
    /// Fills `out` with content number `number` of a load of this seed.
    pub fn fill(&self, load_seed: u64, number: u64, compressible_share: f64, out: &mut [u8]) {
        let content = mix3(load_seed, number, DUPLICATE_SALT);
        fill_by_share(content, compressible_share, out);
    }

    /// Which content a granule gets: none, if it is to be new. Content `n` is drawn with a probability
    /// that falls as the 2/3rd power of `n`.
    fn draw(&self, granule: u64) -> Option<u64> {
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

fn fill_by_share(content: u64, compressible_share: f64, out: &mut [u8]) {
    if unit(content.rotate_left(17)) < compressible_share {
        fill_text(content, out);
    } else {
        fill_noise(content, out);
    }
}

/// Makes the content of granules.
#[derive(Clone, Debug)]
pub(super) struct Stamp {
    seed: u64,
    compressible_share: f64,
    duplicates: Option<Duplicates>,
}

impl Stamp {
    pub(super) const fn new(
        seed: u64,
        compressible_share: f64,
        duplicates: Option<Duplicates>,
    ) -> Self {
        Self {
            seed,
            compressible_share,
            duplicates,
        }
    }

    /// Fills `out` with version `version` of the granule at `offset`.
    pub(super) fn fill(&self, offset: u64, version: u32, out: &mut [u8]) {
        let content = mix3(self.seed, offset, u64::from(version));
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
        let stamp = Stamp::new(9, 0.5, Some(duplicates));
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
