//! Blocks, chunks, byte ranges and volume sizes.

use serde::{Deserialize, Serialize};
use std::fmt;

use crate::limits::MAX_VOLUME_BYTES;

/// Bytes in a block, the unit of dirty tracking, presence and dedup.
pub const BLOCK_SIZE: u64 = 4096;
/// Blocks in a chunk.
pub const BLOCKS_PER_CHUNK: u64 = 16;
/// Bytes in a chunk, the unit of the fingerprint tree and of bulk transfer.
pub const CHUNK_SIZE: u64 = BLOCK_SIZE * BLOCKS_PER_CHUNK;

/// Position of a block in a volume: byte offset divided by [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// The chunk this block lies in.
    #[must_use]
    pub const fn chunk(self) -> ChunkIndex {
        ChunkIndex(self.0 / BLOCKS_PER_CHUNK)
    }

    /// Offset of the block's first byte.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 * BLOCK_SIZE
    }
}

/// Position of a chunk in a volume: byte offset divided by [`CHUNK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkIndex(pub u64);

impl ChunkIndex {
    /// The chunk's blocks, not clipped to any volume.
    #[must_use]
    pub const fn blocks(self) -> BlockRange {
        BlockRange::new(self.0 * BLOCKS_PER_CHUNK, (self.0 + 1) * BLOCKS_PER_CHUNK)
    }
}

/// Half-open run of blocks `start..end`; empty when `start >= end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub start: u64,
    /// One past the last block.
    pub end: u64,
}

impl BlockRange {
    /// Blocks `start..end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// The single block `block`.
    #[must_use]
    pub const fn single(block: BlockIndex) -> Self {
        Self {
            start: block.0,
            end: block.0 + 1,
        }
    }

    /// Number of blocks.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no block in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// The blocks that both runs have.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        }
    }

    /// Whether the runs share a block.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// Whether `block` is one of these.
    #[must_use]
    pub const fn contains(self, block: BlockIndex) -> bool {
        self.start <= block.0 && block.0 < self.end
    }

    /// The indices in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = BlockIndex> {
        (self.start..self.end).map(BlockIndex)
    }

    /// The bytes of these blocks, clipped to the volume: the last block of a volume may be short.
    #[must_use]
    pub fn bytes(self, size: VolumeSize) -> ByteRange {
        let start = (self.start * BLOCK_SIZE).min(size.bytes());
        ByteRange::new(start, (self.end * BLOCK_SIZE).min(size.bytes()).max(start))
    }
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}..{}", self.start, self.end)
    }
}

/// Half-open run of bytes `start..end` of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// Bytes `start..end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// `length` bytes from `offset`.
    #[must_use]
    pub const fn at(offset: u64, length: u64) -> Self {
        Self {
            start: offset,
            end: offset + length,
        }
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Every block that has a byte in this range.
    #[must_use]
    pub const fn blocks_touched(self) -> BlockRange {
        if self.is_empty() {
            return BlockRange::new(0, 0);
        }
        BlockRange::new(self.start / BLOCK_SIZE, self.end.div_ceil(BLOCK_SIZE))
    }

    /// The blocks of which this range has every byte. The short last block of a volume counts as
    /// covered when the range reaches the volume's end.
    #[must_use]
    pub const fn blocks_covered(self, size: VolumeSize) -> BlockRange {
        let end = if self.end >= size.bytes() {
            size.blocks()
        } else {
            self.end / BLOCK_SIZE
        };
        let start = self.start.div_ceil(BLOCK_SIZE);
        BlockRange::new(start, if end < start { start } else { end })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// Size of a volume in bytes: at least 1, at most [`MAX_VOLUME_BYTES`], any value between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

impl VolumeSize {
    /// A size of `bytes` bytes.
    ///
    /// # Errors
    /// [`InvalidSize`] for zero and for more than [`MAX_VOLUME_BYTES`].
    pub const fn new(bytes: u64) -> Result<Self, InvalidSize> {
        if bytes == 0 || bytes > MAX_VOLUME_BYTES {
            return Err(InvalidSize(bytes));
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Number of blocks; the last one may be short.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        self.0.div_ceil(BLOCK_SIZE)
    }

    /// Number of chunks; the last one may be short.
    #[must_use]
    pub const fn chunks(self) -> u64 {
        self.0.div_ceil(CHUNK_SIZE)
    }

    /// All blocks of the volume.
    #[must_use]
    pub const fn all_blocks(self) -> BlockRange {
        BlockRange::new(0, self.blocks())
    }

    /// Bytes in `block`: [`BLOCK_SIZE`], less for a short last block, 0 beyond the end.
    #[must_use]
    pub fn block_len(self, block: BlockIndex) -> u64 {
        BlockRange::single(block).bytes(self).len()
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = InvalidSize;

    fn try_from(bytes: u64) -> Result<Self, InvalidSize> {
        Self::new(bytes)
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> Self {
        size.0
    }
}

/// A number of bytes that no volume can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a volume of {0} bytes is not possible: it must have 1 byte to 64 TiB")]
pub struct InvalidSize(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covered_and_touched_blocks() {
        let size = VolumeSize::new(3 * BLOCK_SIZE + 100).unwrap();
        let check = |start, end, touched: (u64, u64), covered: (u64, u64)| {
            let range = ByteRange::new(start, end);
            assert_eq!(
                range.blocks_touched(),
                BlockRange::new(touched.0, touched.1)
            );
            let got = range.blocks_covered(size);
            assert_eq!((got.start, got.end), covered, "{range:?}");
        };
        check(0, BLOCK_SIZE, (0, 1), (0, 1));
        check(1, BLOCK_SIZE, (0, 1), (1, 1));
        check(1, 2 * BLOCK_SIZE + 5, (0, 3), (1, 2));
        check(BLOCK_SIZE, 3 * BLOCK_SIZE + 100, (1, 4), (1, 4));
        check(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 99, (3, 4), (3, 3));
        check(5, 9, (0, 1), (1, 1));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert_eq!(VolumeSize::new(0), Err(InvalidSize(0)));
        assert!(VolumeSize::new(MAX_VOLUME_BYTES + 1).is_err());
        assert_eq!(VolumeSize::new(4097).unwrap().block_len(BlockIndex(1)), 1);
        assert_eq!(VolumeSize::new(4097).unwrap().block_len(BlockIndex(2)), 0);
    }
}
