//! What identifies the content of a block or of a run of blocks.

use std::fmt;

use flimcd_core::BLOCK_SIZE;
use flimcd_wire::{BlockPrefix, ChunkPrefix};

use crate::is_zero;

/// 256 bits that name content, made with BLAKE3.
///
/// - Of a block: BLAKE3 of its bytes; a volume's last block may be short.
/// - Of a run of blocks: BLAKE3 of its blocks' fingerprints, one after the other; also when the run is one block.
///
/// A chunk's is that of its run of up to sixteen blocks. So one look at each block gives what the tree, the index
/// of blocks and the wire need.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

/// [`BLOCK_SIZE`] as a length in memory.
pub(crate) const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK_SIZE);

impl Fingerprint {
    /// Bytes of a fingerprint.
    pub const BYTES: usize = 32;

    /// That of a whole block of zeroes.
    pub const ZERO_BLOCK: Self = Self([
        0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82,
        0xad, 0xcf, 0xc8, 0x98, 0x54, 0xd0, 0x1b, 0xfe, 0x39, 0x72, 0xfd, 0xc4, 0x78, 0x5b, 0x41,
        0xb2, 0xc7,
    ]);

    /// The fingerprint of `content` as one piece: a block, if it is at most that long.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// The fingerprint of a block. As [`of`](Self::of), but faster where it is zero.
    #[must_use]
    pub fn of_block(block: &[u8]) -> Self {
        if block.len() == BLOCK_BYTES && is_zero(block) {
            Self::ZERO_BLOCK
        } else {
            Self::of(block)
        }
    }

    /// The fingerprint of a run of blocks; the last one may be short.
    #[must_use]
    pub fn of_run(content: &[u8]) -> Self {
        let mut over = blake3::Hasher::new();
        for block in content.chunks(BLOCK_BYTES) {
            over.update(&Self::of_block(block).0);
        }
        Self(*over.finalize().as_bytes())
    }

    /// The fingerprint of a run whose blocks have these.
    #[must_use]
    pub fn over(blocks: &[Self]) -> Self {
        let mut over = blake3::Hasher::new();
        for block in blocks {
            over.update(&block.0);
        }
        Self(*over.finalize().as_bytes())
    }

    /// A fingerprint that was stored or sent.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What of a chunk's stands in the table of a seed.
    #[must_use]
    pub const fn prefix(&self) -> ChunkPrefix {
        ChunkPrefix::of(&self.0)
    }

    /// What of a block's stands in a probe and in indexes.
    #[must_use]
    pub const fn block_prefix(&self) -> BlockPrefix {
        BlockPrefix::of(&self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.16}", blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Display for Fingerprint {
    /// All of it, in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_named_by_its_blocks() {
        let mut content = vec![0; 5 * BLOCK_BYTES + 100];
        content[2 * BLOCK_BYTES..3 * BLOCK_BYTES].fill(7);
        content[5 * BLOCK_BYTES..].fill(9);
        let blocks: Vec<_> = content.chunks(BLOCK_BYTES).map(Fingerprint::of).collect();
        assert_eq!(Fingerprint::of_run(&content), Fingerprint::over(&blocks));
        assert_eq!(blocks[0], Fingerprint::ZERO_BLOCK);
        assert_eq!(Fingerprint::of_block(&content[..BLOCK_BYTES]), blocks[0]);
        let short = Fingerprint::of_block(&[0; 100]);
        assert_eq!(short, Fingerprint::of(&[0; 100]), "of its own length");
        assert_ne!(short, Fingerprint::ZERO_BLOCK);
        let one = &content[2 * BLOCK_BYTES..3 * BLOCK_BYTES];
        assert_ne!(Fingerprint::of_run(one), Fingerprint::of(one));
        let joined: Vec<u8> = blocks.iter().flat_map(|b| *b.as_bytes()).collect();
        assert_eq!(Fingerprint::of_run(&content), Fingerprint::of(&joined));
    }
}
