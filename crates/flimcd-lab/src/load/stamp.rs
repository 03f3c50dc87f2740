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

use crate::{
    content::{fill_noise, fill_text},
    rng::{mix3, unit},
};

const MAGIC: &[u8; 8] = b"FLIMLOAD";
const MARK_BYTES: usize = 24;

/// Makes the content of granules.
#[derive(Clone, Debug)]
pub(super) struct Stamp {
    seed: u64,
    compressible_share: f64,
}

impl Stamp {
    pub(super) const fn new(seed: u64, compressible_share: f64) -> Self {
        Self {
            seed,
            compressible_share,
        }
    }

    /// Fills `out` with version `version` of the granule at `offset`.
    pub(super) fn fill(&self, offset: u64, version: u32, out: &mut [u8]) {
        let content = mix3(self.seed, offset, u64::from(version));
        let mark = self.mark(offset, version);
        let (head, body) = out.split_at_mut(out.len().min(MARK_BYTES));
        head.copy_from_slice(&mark[..head.len()]);
        if unit(content.rotate_left(17)) < self.compressible_share {
            fill_text(content, body);
        } else {
            fill_noise(content, body);
        }
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
