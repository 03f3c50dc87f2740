//! What there is to say about content before it is packed.

use flimcd_core::{BLOCKS_PER_CHUNK, BlockRange, Seq};
use flimcd_wire::{ChunkPrefix, Probe, Runs};

use crate::{Fingerprint, fingerprint::BLOCK_BYTES, is_zero};

/// [`BLOCKS_PER_CHUNK`] as a length in memory.
const CHUNK_LEN: usize = 16;
const _: () = assert!(CHUNK_LEN as u64 == BLOCKS_PER_CHUNK);

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is all zero.
    Zero,
    /// Its chunk seems to be what the seed has there.
    Same,
    /// Neither.
    Rest,
}

/// Content that was looked at but not packed: which parts are zero, which the target's seed seems to have, and the
/// fingerprints of the blocks.
#[derive(Clone, Debug)]
pub struct Examined {
    range: BlockRange,
    kinds: Vec<Kind>,
    fingerprints: Vec<Fingerprint>,
}

impl Examined {
    /// Looks at `content`, the bytes of `range`; the last block may be short. `same` says for each chunk what the target's seed
    /// has there, when `range` is whole chunks (a volume's last one may be short); otherwise it is empty.
    ///
    /// A chunk with fewer than sixteen blocks is never the same, and neither is one that is all zero: that is shorter still.
    ///
    /// # Panics
    /// When there are not as many bytes as `range` has, or `same` is for a range that does not begin with a chunk.
    #[must_use]
    pub fn of(range: BlockRange, content: &[u8], same: &[Option<ChunkPrefix>]) -> Self {
        assert_eq!(
            content.len().div_ceil(BLOCK_BYTES) as u64,
            range.len(),
            "the content is not of {range:?}"
        );
        assert!(
            same.is_empty() || range.start.is_multiple_of(BLOCKS_PER_CHUNK),
            "{range:?} does not begin with a chunk"
        );
        let blocks = content.len().div_ceil(BLOCK_BYTES);
        let mut kinds = Vec::with_capacity(blocks);
        let mut fingerprints = Vec::with_capacity(blocks);
        for block in content.chunks(BLOCK_BYTES) {
            // To look for zeroes is faster than to hash, and most often ends with the first bytes.
            let zero = is_zero(block);
            kinds.push(if zero { Kind::Zero } else { Kind::Rest });
            fingerprints.push(if zero && block.len() == BLOCK_BYTES {
                Fingerprint::ZERO_BLOCK
            } else {
                Fingerprint::of(block)
            });
        }
        let chunks = kinds.chunks_exact_mut(CHUNK_LEN);
        for ((kinds, blocks), same) in chunks.zip(fingerprints.chunks_exact(CHUNK_LEN)).zip(same) {
            if let Some(same) = *same
                && kinds.contains(&Kind::Rest)
                && Fingerprint::over(blocks).prefix() == same
            {
                kinds.fill(Kind::Same);
            }
        }
        Self {
            range,
            kinds,
            fingerprints,
        }
    }

    /// The blocks that were looked at.
    #[must_use]
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// Whether something is neither zero nor what the seed has.
    #[must_use]
    pub fn needs_probe(&self) -> bool {
        self.kinds.contains(&Kind::Rest)
    }

    /// Asks the target which of the rest it has.
    #[must_use]
    pub fn probe(&self, seq: Seq) -> Probe {
        let rest = self
            .runs(|_, kind| kind)
            .filter(|(_, kind)| *kind == Kind::Rest);
        let runs: Vec<_> = rest.map(|(run, _)| run).collect();
        let prefixes = runs.iter().flat_map(|run| self.of_run(*run));
        let payload: Vec<u8> = prefixes
            .flat_map(|block| block.block_prefix().0.to_le_bytes())
            .collect();
        Probe {
            seq,
            blocks: Runs::new(runs),
            payload: payload.into(),
        }
    }

    /// The fingerprints of the blocks of `run`, which lies in the range.
    pub(crate) fn of_run(&self, run: BlockRange) -> &[Fingerprint] {
        let at = |block: u64| usize::try_from(block - self.range.start).expect("in memory");
        &self.fingerprints[at(run.start)..at(run.end)]
    }

    /// Cuts the range where what `sort` says of a block changes; it is asked in ascending order, once for each.
    pub(crate) fn runs<K: Copy + PartialEq>(
        &self,
        mut sort: impl FnMut(u64, Kind) -> K,
    ) -> impl Iterator<Item = (BlockRange, K)> {
        let mut blocks = (self.range.start..)
            .zip(&self.kinds)
            .map(move |(block, kind)| (block, sort(block, *kind)))
            .peekable();
        std::iter::from_fn(move || {
            let (start, sorted) = blocks.next()?;
            let mut end = start + 1;
            while blocks.next_if(|(_, next)| *next == sorted).is_some() {
                end += 1;
            }
            Some((BlockRange::new(start, end), sorted))
        })
    }
}
