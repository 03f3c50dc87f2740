//! Dirty marks at the source.

use flimcd_core::{BlockRange, BlockSet, VolumeSize};

/// The blocks that changed since they were last handed over or read to be sent.
#[derive(Debug)]
pub(super) struct Tracking {
    dirty: BlockSet,
}

impl Tracking {
    pub(super) fn new(size: VolumeSize) -> Self {
        Self {
            dirty: BlockSet::new(size.blocks()),
        }
    }

    /// Marks `blocks`; whether one was not marked.
    pub(super) fn mark(&mut self, blocks: BlockRange) -> bool {
        self.dirty.insert_range(blocks) > 0
    }

    pub(super) fn is_dirty(&self, blocks: BlockRange) -> bool {
        self.dirty.intersects(blocks)
    }

    pub(super) fn dirty(&self) -> &BlockSet {
        &self.dirty
    }

    /// Clears all marks and returns them.
    pub(super) fn take(&mut self) -> BlockSet {
        let empty = BlockSet::new(self.dirty.capacity());
        std::mem::replace(&mut self.dirty, empty)
    }

    /// Clears the marks in `blocks`.
    pub(super) fn clear(&mut self, blocks: BlockRange) {
        self.dirty.remove_range(blocks);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.dirty.memory_bytes()
    }
}
