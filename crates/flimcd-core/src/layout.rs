//! Several volumes as one range of blocks.

use crate::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockRange, InvalidSize, VolumeSize};

/// Where the volumes of one migration lie in its range of blocks.
///
/// Each begins at a chunk's first block, with at least one block between two of them that belongs to none.
/// So a run of blocks that are all of some volume never crosses from one into the next, and the last block of
/// a volume, which may be short, is the last of its run. One volume alone begins at 0 and is laid out as if
/// there were no layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeLayout {
    /// First block and size of each.
    places: Vec<(u64, VolumeSize)>,
    size: VolumeSize,
}

impl VolumeLayout {
    /// Lays volumes out in this order.
    ///
    /// # Errors
    /// When there is none, or all together are larger than a volume may be.
    pub fn new(sizes: impl IntoIterator<Item = VolumeSize>) -> Result<Self, InvalidSize> {
        let mut places: Vec<(u64, VolumeSize)> = Vec::new();
        let mut end_bytes = 0u64;
        for size in sizes {
            let start = match places.last() {
                None => 0,
                Some(&(start, before)) => {
                    (start + before.blocks() + 1).next_multiple_of(BLOCKS_PER_CHUNK)
                }
            };
            end_bytes = (start * BLOCK_SIZE).saturating_add(size.bytes());
            // Checked on the way, so that no sum overflows.
            VolumeSize::new(end_bytes)?;
            places.push((start, size));
        }
        Ok(Self {
            size: VolumeSize::new(end_bytes)?,
            places,
        })
    }

    /// From the first block of the first volume to the last byte of the last.
    #[must_use]
    pub const fn size(&self) -> VolumeSize {
        self.size
    }

    /// Blocks of a volume.
    ///
    /// # Panics
    /// When there is no such volume.
    #[must_use]
    pub fn blocks_of(&self, volume: usize) -> BlockRange {
        let (start, size) = self.places[volume];
        BlockRange::new(start, start + size.blocks())
    }

    /// Size of a volume.
    ///
    /// # Panics
    /// When there is no such volume.
    #[must_use]
    pub fn size_of(&self, volume: usize) -> VolumeSize {
        self.places[volume].1
    }

    /// Blocks of each volume, ascending.
    pub fn all_blocks(&self) -> impl Iterator<Item = BlockRange> + '_ {
        (0..self.places.len()).map(|volume| self.blocks_of(volume))
    }

    /// Which volume a run lies in, and where in it. `None` if it does not lie in one as a whole.
    #[must_use]
    pub fn locate(&self, run: BlockRange) -> Option<(usize, BlockRange)> {
        let volume = self
            .places
            .partition_point(|&(start, _)| start <= run.start)
            .checked_sub(1)?;
        let blocks = self.blocks_of(volume);
        (run.start < run.end && run.end <= blocks.end).then(|| {
            let within = BlockRange::new(run.start - blocks.start, run.end - blocks.start);
            (volume, within)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(bytes: &[u64]) -> Vec<VolumeSize> {
        bytes
            .iter()
            .map(|&bytes| VolumeSize::new(bytes).unwrap())
            .collect()
    }

    #[test]
    fn one_volume_is_laid_out_as_itself() {
        let [size] = sizes(&[10_000 * 512])[..] else {
            unreachable!()
        };
        let layout = VolumeLayout::new([size]).unwrap();
        assert_eq!(layout.size(), size);
        let run = BlockRange::new(3, 9);
        assert_eq!(layout.locate(run), Some((0, run)));
    }

    #[test]
    fn no_run_of_blocks_crosses_volumes() {
        // The first two end exactly at a chunk.
        let layout = VolumeLayout::new(sizes(&[64 << 10, 128 << 10, 4096 + 512])).unwrap();
        let all: Vec<_> = layout.all_blocks().collect();
        assert_eq!(
            all,
            [
                BlockRange::new(0, 16),
                BlockRange::new(32, 64),
                BlockRange::new(80, 82)
            ]
        );
        assert_eq!(layout.size().bytes(), 80 * 4096 + 4096 + 512);
        for (index, blocks) in all.into_iter().enumerate() {
            let len = blocks.end - blocks.start;
            assert_eq!(
                layout.locate(blocks),
                Some((index, BlockRange::new(0, len)))
            );
            assert_eq!(
                layout.locate(BlockRange::new(blocks.start, blocks.end + 1)),
                None
            );
        }
        assert_eq!(layout.locate(BlockRange::new(16, 17)), None);
        assert_eq!(layout.locate(BlockRange::new(5, 5)), None);
    }

    #[test]
    fn too_much_is_refused() {
        let most = VolumeSize::new(crate::limits::MAX_VOLUME_BYTES).unwrap();
        assert!(VolumeLayout::new([most, most]).is_err());
        assert!(VolumeLayout::new([]).is_err());
    }
}
