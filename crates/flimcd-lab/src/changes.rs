//! Changes to an image, from a seed: which blocks get new content, and which content.
//!
//! The same options always name the same blocks and bytes, so they can be written to a file, or to a
//! running volume as a guest would.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use flimcd_core::BLOCK_SIZE;
use serde::{Deserialize, Serialize};

use crate::{
    content::{fill_noise, fill_text},
    rng::{Rng, mix3, unit},
};

/// Longest run of changed blocks when they are clustered: 1 MiB. Lengths are powers of two from 64 KiB on.
const CLUSTER_BLOCKS_MIN: u64 = 16;
const CLUSTER_SIZES: u64 = 5;
/// Distinguishes these draws from those of images with the same seed.
const SALT: u64 = 0x6368_616e_6765_7321;

/// Where changed blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Single blocks of 4 KiB, evenly spread.
    Random,
    /// Runs of 64 KiB to 1 MiB.
    Clustered,
}

/// Which changes to make.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeOptions {
    /// Decides blocks and contents.
    pub seed: u64,
    /// Share of all blocks that change, 0.0 to 1.0. Holes are filled like anything else.
    pub share: f64,
    /// Where they lie.
    pub pattern: Pattern,
    /// Share of the changed blocks that compress about 1.8 times on their own; the others not at all.
    pub text_share: f64,
}

/// Changes to an image of some size.
#[derive(Clone, Debug)]
pub struct Changes {
    options: ChangeOptions,
    size_bytes: u64,
    /// Blocks that change, ascending.
    blocks: Vec<u64>,
}

impl Changes {
    /// The changes to an image of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64, options: ChangeOptions) -> Self {
        let count = size_bytes.div_ceil(BLOCK_SIZE);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count, clamped to it"
        )]
        let wanted = ((count as f64 * options.share).round() as u64).min(count);
        let mut rng = Rng::new(options.seed ^ SALT);
        let mut is_changed = vec![false; usize::try_from(count).unwrap_or(usize::MAX)];
        let mut left = wanted;
        while left > 0 {
            let length = match options.pattern {
                Pattern::Random => 1,
                Pattern::Clustered => CLUSTER_BLOCKS_MIN << rng.below(CLUSTER_SIZES),
            };
            // Clusters begin where an aligned piece of their length does.
            let start = rng.below(count.div_ceil(length)) * length;
            for block in start..(start + length).min(count) {
                let index = usize::try_from(block).unwrap_or(usize::MAX);
                if left > 0 && !std::mem::replace(&mut is_changed[index], true) {
                    left -= 1;
                }
            }
        }
        let blocks = (0..count)
            .zip(is_changed)
            .filter_map(|(block, is)| is.then_some(block));
        Self {
            options,
            size_bytes,
            blocks: blocks.collect(),
        }
    }

    /// Blocks that change.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Calls `write` with the offset and the new content of each changed block, ascending.
    ///
    /// # Errors
    /// The first of `write`.
    pub fn for_each<E>(&self, mut write: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut buffer = Vec::new();
        for block in &self.blocks {
            let offset = block * BLOCK_SIZE;
            let length = BLOCK_SIZE.min(self.size_bytes - offset);
            buffer.resize(usize::try_from(length).unwrap_or(0), 0);
            let seed = mix3(self.options.seed, offset, SALT);
            if unit(seed.rotate_left(17)) < self.options.text_share {
                fill_text(seed, &mut buffer);
            } else {
                fill_noise(seed, &mut buffer);
            }
            write(offset, &buffer)?;
        }
        Ok(())
    }

    /// Writes them to a file.
    ///
    /// # Errors
    /// Those of opening and writing it.
    pub fn apply(&self, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(path)?;
        self.for_each(|offset, bytes| file.write_all_at(bytes, offset))?;
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(size: u64, share: f64, pattern: Pattern) -> Changes {
        let options = ChangeOptions {
            seed: 3,
            share,
            pattern,
            text_share: 0.6,
        };
        Changes::new(size, options)
    }

    #[test]
    fn as_many_blocks_change_as_asked_for_and_clusters_are_runs() {
        for (size, share) in [(64 << 20, 0.05), (5000, 0.5), (1 << 20, 1.0), (4096, 0.0)] {
            for pattern in [Pattern::Random, Pattern::Clustered] {
                let changes = changes(size, share, pattern);
                let wanted = (size.div_ceil(4096) as f64 * share).round();
                assert_eq!(
                    changes.blocks() as f64,
                    wanted,
                    "{size} {share} {pattern:?}"
                );
                assert!(changes.blocks.is_sorted());
            }
        }
        let runs = |pattern| {
            let blocks = changes(64 << 20, 0.05, pattern).blocks;
            blocks
                .windows(2)
                .filter(|pair| pair[0] + 1 < pair[1])
                .count()
        };
        assert!(runs(Pattern::Random) > 10 * runs(Pattern::Clustered));
    }

    #[test]
    fn a_file_gets_exactly_these_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let size = (1 << 20) + 100;
        let before = vec![7; size];
        std::fs::write(&path, &before).unwrap();
        let changes = changes(size as u64, 0.2, Pattern::Random);
        changes.apply(&path).unwrap();
        let mut expected = before;
        changes
            .for_each(|offset, bytes| {
                let at = usize::try_from(offset).unwrap();
                expected[at..at + bytes.len()].copy_from_slice(bytes);
                Ok::<(), ()>(())
            })
            .unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
        let differing = expected
            .chunks(4096)
            .filter(|block| block.iter().any(|b| *b != 7));
        assert_eq!(differing.count() as u64, changes.blocks());
    }
}
