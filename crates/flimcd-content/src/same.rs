//! Content that both sides have: what has to match, and how the runs of zeroes in it are found again.

use flimcd_core::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockIndex, BlockRange};

use crate::{Fingerprint, is_zero};

/// The fingerprints of a run of whole chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprints<'a> {
    range: BlockRange,
    bytes: &'a [[u8; Fingerprint::BYTES]],
}

impl<'a> Fingerprints<'a> {
    /// Those of `range`'s chunks; `None` when there are not as many.
    pub(crate) fn new(range: BlockRange, payload: &'a [u8]) -> Option<Self> {
        let (bytes, rest) = payload.as_chunks::<{ Fingerprint::BYTES }>();
        let fits = rest.is_empty() && bytes.len() as u64 * BLOCKS_PER_CHUNK == range.len();
        fits.then_some(Self { range, bytes })
    }

    /// Each chunk and what its content must have.
    pub fn chunks(self) -> impl Iterator<Item = (BlockRange, Fingerprint)> + 'a {
        let first = BlockIndex(self.range.start).chunk().0;
        (first..).zip(self.bytes).map(|(chunk, bytes)| {
            let range = flimcd_core::ChunkIndex(chunk).blocks();
            (range, Fingerprint::from_bytes(*bytes))
        })
    }
}

/// Cuts the bytes of `range` into runs of blocks that are zero (`None`) and others. The last block may be short.
pub fn zero_runs(
    range: BlockRange,
    content: &[u8],
) -> impl Iterator<Item = (BlockRange, Option<&[u8]>)> {
    let block_bytes = usize::try_from(BLOCK_SIZE).expect("4096");
    debug_assert_eq!(content.len().div_ceil(block_bytes) as u64, range.len());
    let mut blocks = content.chunks(block_bytes).zip(range.start..).peekable();
    std::iter::from_fn(move || {
        let (bytes, start) = blocks.next()?;
        let zero = is_zero(bytes);
        let mut end = start + 1;
        while blocks
            .next_if(|(bytes, _)| is_zero(bytes) == zero)
            .is_some()
        {
            end += 1;
        }
        let from = usize::try_from(start - range.start).expect("small") * block_bytes;
        let to = usize::try_from(end - range.start).expect("small") * block_bytes;
        let bytes = (!zero).then(|| &content[from..to.min(content.len())]);
        Some((BlockRange::new(start, end), bytes))
    })
}
