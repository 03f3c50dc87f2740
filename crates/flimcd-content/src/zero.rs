//! Finding zeroes.

use flimcd_core::BlockRange;

use crate::fingerprint::BLOCK_BYTES;

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Lanes wide enough for the compiler to use vector registers, left early where data begins.
    let (lanes, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|&byte| byte == 0)
        && lanes
            .iter()
            .all(|lane| lane.iter().fold(0, |all, &byte| all | byte) == 0)
}

/// Cuts the bytes of `range` into runs of blocks that are zero (`None`) and others. The last block may be short.
pub fn zero_runs(
    range: BlockRange,
    content: &[u8],
) -> impl Iterator<Item = (BlockRange, Option<&[u8]>)> {
    debug_assert_eq!(content.len().div_ceil(BLOCK_BYTES) as u64, range.len());
    let mut blocks = content.chunks(BLOCK_BYTES).zip(range.start..).peekable();
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
        let run = BlockRange::new(start, end);
        Some((run, (!zero).then(|| bytes_of(range, content, run))))
    })
}

/// The bytes of `run`, which lies in `range`, of which these are all.
pub(crate) fn bytes_of(range: BlockRange, content: &[u8], run: BlockRange) -> &[u8] {
    let at = |block: u64| usize::try_from(block - range.start).expect("in memory") * BLOCK_BYTES;
    &content[at(run.start)..at(run.end).min(content.len())]
}
