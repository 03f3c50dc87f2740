//! What a block of the guest's load holds: a header that names it, and content that follows from
//! the header, so that any block can be checked by whoever knows what was written last.
//!
//! The host writes version 0 of every block when it makes the image; the guest's program, which is
//! built from this same file, writes the versions after that.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | magic |
//! | 8 | 8 | file |
//! | 16 | 8 | block in the file |
//! | 24 | 8 | sequence number of the write, 0 as made |
//! | 32 | 4064 | text (three of five blocks) or noise, seeded by the three |

use crate::{
    content::{fill_noise, fill_text},
    rng::mix3,
};

/// Bytes of a block.
pub(crate) const BLOCK_BYTES: usize = 4096;
const HEADER_BYTES: usize = 32;
const MAGIC: u64 = 0x666c_696d_6364_4231;

/// Which version of which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Index of the file among those of the load.
    pub(crate) file: u64,
    /// Block in the file.
    pub(crate) block: u64,
    /// The write that made it; 0 as the image was made.
    pub(crate) seq: u64,
}

/// Fills `out`, one block, with what `stamp` says.
pub(crate) fn fill(stamp: Stamp, out: &mut [u8]) {
    let fields = [MAGIC, stamp.file, stamp.block, stamp.seq];
    for (slot, field) in out[..HEADER_BYTES].chunks_exact_mut(8).zip(fields) {
        slot.copy_from_slice(&field.to_le_bytes());
    }
    let seed = mix3(stamp.file, stamp.block, stamp.seq);
    let rest = &mut out[HEADER_BYTES..];
    if seed % 5 < 3 {
        fill_text(seed, rest);
    } else {
        fill_noise(seed, rest);
    }
}

/// The stamp in a block's header; `None` when there is none.
#[allow(dead_code, reason = "the guest's program uses it")]
pub(crate) fn read(block: &[u8]) -> Option<Stamp> {
    let (fields, _) = block.get(..HEADER_BYTES)?.as_chunks::<8>();
    let field = |i: usize| u64::from_le_bytes(fields[i]);
    (field(0) == MAGIC).then(|| Stamp {
        file: field(1),
        block: field(2),
        seq: field(3),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_names_itself_and_every_version_differs() {
        let stamp = |file, block, seq| Stamp { file, block, seq };
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for s in [
            stamp(0, 0, 0),
            stamp(1, 0, 0),
            stamp(0, 1, 0),
            stamp(0, 0, 1),
        ] {
            let mut block = vec![0; BLOCK_BYTES];
            fill(s, &mut block);
            assert_eq!(read(&block), Some(s));
            assert!(
                seen.iter()
                    .all(|old| old[HEADER_BYTES..] != block[HEADER_BYTES..])
            );
            seen.push(block);
        }
        assert_eq!(read(&[0; BLOCK_BYTES]), None);
        assert_eq!(read(&[]), None);
    }
}
