//! Checks that no block which arrived is sent again because of a mere link break.
//!
//! Every block has a version that grows when a guest's write to it starts and when it ends; in between it has none. A message
//! carries the versions that were current when it was read. When a version has been delivered, it need not be sent again, unless somebody lost
//! it: whoever crashes or has a disk error makes the check start over.

use std::collections::BTreeMap;

use flimcd_core::{BlockIndex, BlockRange, ByteRange, Seq, VolumeSize};
use flimcd_wire::Blocks;

pub(crate) struct Resend {
    versions: Vec<u32>,
    /// Writes under way.
    writing: Vec<u32>,
    delivered: Vec<Option<u32>>,
    /// Asked for by the target before they arrived: the source may hear of that after it has heard that they arrived.
    asked_for: Vec<bool>,
    read: BTreeMap<Seq, Vec<(BlockIndex, u32)>>,
}

impl Resend {
    pub(crate) fn new(size: VolumeSize) -> Self {
        let blocks = crate::disk::index(size.blocks());
        Self {
            versions: vec![0; blocks],
            writing: vec![0; blocks],
            delivered: vec![None; blocks],
            asked_for: vec![false; blocks],
            read: BTreeMap::new(),
        }
    }

    /// A guest's write to these bytes starts.
    pub(crate) fn write_starts(&mut self, range: ByteRange) {
        for block in range
            .blocks_touched()
            .iter()
            .map(|b| crate::disk::index(b.0))
        {
            self.versions[block] += 1;
            self.writing[block] += 1;
        }
    }

    /// A guest's write to these bytes ends.
    pub(crate) fn write_ends(&mut self, range: ByteRange) {
        for block in range
            .blocks_touched()
            .iter()
            .map(|b| crate::disk::index(b.0))
        {
            self.versions[block] += 1;
            self.writing[block] -= 1;
        }
    }

    /// The source reads blocks for a message. What is being written has no version that would do for good.
    pub(crate) fn read(&mut self, seq: Seq, range: BlockRange) {
        let at = |block: BlockIndex| crate::disk::index(block.0);
        let versions = range
            .iter()
            .filter(|&block| self.writing[at(block)] == 0)
            .map(|block| (block, self.versions[at(block)]))
            .collect();
        self.read.insert(seq, versions);
    }

    /// The target asks for blocks.
    pub(crate) fn asked_for(&mut self, run: BlockRange) {
        for block in run.iter().map(|b| crate::disk::index(b.0)) {
            self.asked_for[block] |= self.delivered[block] != Some(self.versions[block]);
        }
    }

    /// The target asks for a block of a message that has arrived, before it has begun to write it.
    pub(crate) fn asked_for_late(&mut self, block: BlockIndex) {
        self.asked_for[crate::disk::index(block.0)] = true;
    }

    /// A message goes on the link. The first block that has arrived as it is, if any, unless it was asked for too late.
    pub(crate) fn sent(&mut self, blocks: &Blocks) -> Option<BlockIndex> {
        let mut again = None;
        for &(block, version) in self.read.get(&blocks.seq)? {
            let at = crate::disk::index(block.0);
            if self.delivered[at] == Some(version) && !std::mem::take(&mut self.asked_for[at]) {
                again = again.or(Some(block));
            }
        }
        again
    }

    /// A message arrived.
    pub(crate) fn delivered(&mut self, seq: Seq) {
        for &(block, version) in self.read.get(&seq).into_iter().flatten() {
            self.delivered[crate::disk::index(block.0)] = Some(version);
        }
    }

    /// The source has told the target to drop this message, if it has not arrived yet.
    pub(crate) fn given_up(&mut self, seq: Seq) {
        for &(block, _) in self.read.get(&seq).into_iter().flatten() {
            self.delivered[crate::disk::index(block.0)] = None;
        }
        self.read.remove(&seq);
    }

    /// A message arrived, and what it says could not be made of it.
    pub(crate) fn lacking(&mut self, seq: Seq) {
        for &(block, _) in self.read.get(&seq).into_iter().flatten() {
            self.delivered[crate::disk::index(block.0)] = None;
        }
    }

    /// Something was lost that a link break alone does not lose.
    pub(crate) fn forget(&mut self) {
        self.delivered.fill(None);
    }

    /// The source begins to number its messages anew.
    pub(crate) fn restart(&mut self) {
        self.forget();
        self.writing.fill(0);
        self.read.clear();
    }
}
