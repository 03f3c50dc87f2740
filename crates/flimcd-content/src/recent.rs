//! Where content that came in this migration stands now.

use flimcd_core::{BLOCK_SIZE, BlockIndex, limits};
use flimcd_wire::BlockPrefix;

/// Slots, as a power of two: content of 8 GiB.
const SLOT_BITS: u32 = 21;
/// Bits of a slot that hold a block's number, increased by one.
const BLOCK_BITS: u32 = 40;
const _: () = assert!(limits::MAX_VOLUME_BYTES / BLOCK_SIZE < (1 << BLOCK_BITS) - 1);

/// From a block's prefix to a place where such a block was written in this migration. A hint: the place may hold something else
/// by now, and one look-up in 2²⁴ finds a wrong place even without that.
///
/// A fixed table of 16 MiB in which the prefix says the slot, and newer content takes the place of older. Memory that
/// has not been used is not taken.
///
/// ```text
/// prefix  = …… | tag, 24 bits | slot, 21 bits
/// slot[i] = tag, 24 bits | number of the block + 1, 40 bits         0: nothing there
/// ```
pub struct Recent {
    slots: Box<[u64]>,
}

impl Default for Recent {
    fn default() -> Self {
        Self::new()
    }
}

impl Recent {
    /// A table with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            slots: vec![0; 1 << SLOT_BITS].into_boxed_slice(),
        }
    }

    /// The slot of a prefix, and what has to stand above the block's number there.
    fn place(prefix: BlockPrefix) -> (usize, u64) {
        let slot = prefix.0 & ((1 << SLOT_BITS) - 1);
        let slot = usize::try_from(slot).expect("21 bits");
        (slot, (prefix.0 >> SLOT_BITS) << BLOCK_BITS)
    }

    /// Such a block was written there. A block beyond any volume is ignored.
    pub fn insert(&mut self, prefix: BlockPrefix, block: BlockIndex) {
        if block.0 < limits::MAX_VOLUME_BYTES / BLOCK_SIZE {
            let (slot, tag) = Self::place(prefix);
            self.slots[slot] = tag | (block.0 + 1);
        }
    }

    /// Where such a block was written last, if nothing else has taken its slot.
    #[must_use]
    pub fn get(&self, prefix: BlockPrefix) -> Option<BlockIndex> {
        const BLOCK: u64 = (1 << BLOCK_BITS) - 1;
        let (slot, tag) = Self::place(prefix);
        let slot = self.slots[slot];
        (slot & !BLOCK == tag)
            .then(|| (slot & BLOCK).checked_sub(1))
            .flatten()
            .map(BlockIndex)
    }

    /// Forgets everything and gives the memory back.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// Bytes of memory, when it is full.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fingerprint;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn finds_the_last_place_unless_the_slot_is_taken(
            ops in prop::collection::vec((0u64..4, 0u64..4, 0u64..5, 0u64..limits::MAX_VOLUME_BYTES / BLOCK_SIZE), 1..60),
        ) {
            let mut recent = Recent::new();
            let mut slots: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            for (slot, tag, beyond, block) in ops {
                // What lies above slot and tag is not kept.
                let prefix = BlockPrefix(slot | tag << SLOT_BITS | beyond << 60);
                let found = recent.get(prefix).map(|block| block.0);
                let expected = slots.get(&slot).filter(|(has, _)| *has == tag).map(|(_, block)| *block);
                prop_assert_eq!(found, expected);
                recent.insert(prefix, BlockIndex(block));
                prop_assert_eq!(recent.get(prefix), Some(BlockIndex(block)));
                slots.insert(slot, (tag, block));
            }
        }
    }

    #[test]
    fn is_small_and_keeps_most_of_a_gigabyte() {
        let mut recent = Recent::new();
        assert_eq!(recent.memory_bytes(), 16 << 20);
        let prefix = |block: u64| Fingerprint::of(&block.to_le_bytes()).block_prefix();
        let blocks = (1u64 << 30) / BLOCK_SIZE;
        for block in 0..blocks {
            recent.insert(prefix(block), BlockIndex(block));
        }
        let kept =
            (0..blocks).filter(|&block| recent.get(prefix(block)) == Some(BlockIndex(block)));
        let kept = kept.count() as u64;
        assert!(kept * 100 > blocks * 90, "{kept} of {blocks}");
        assert_eq!(recent.get(prefix(blocks)), None);
        recent.insert(prefix(blocks), BlockIndex(u64::MAX));
        assert_eq!(recent.get(prefix(blocks)), None, "beyond any volume");
        recent.clear();
        assert_eq!(recent.get(prefix(1)), None);
    }
}
