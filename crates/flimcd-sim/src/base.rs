//! What stands at the target before anything arrives: nothing, or a copy of some time, written over in place.
//!
//! The source may know what has changed since that copy was made, and the target whether anybody has touched it. Only when both
//! do, the source sends no more than the changes. Drawn apart from everything else, as the image in the library is.

use flimcd_core::{BlockRange, BlockSet, ByteRange, MigrationId, VolumeSize};
use flimcd_wire::{Base, Open};

use crate::{
    content::{COMMON, INITIAL},
    dice::Dice,
    disk::Disk,
    world::{Site, World},
};

/// The migration that left the copy.
const EARLIER: MigrationId = MigrationId(77);
/// Stamp of what only the copy holds.
const OLD: u64 = 0x01d;

/// See the module.
pub(crate) struct Standing {
    /// Whether there is a copy.
    pub(crate) is_copy: bool,
    /// Somebody else wrote to the copy, and the target can tell.
    is_touched: bool,
    /// What the source has written since the copy was made; `None` when it has lost count.
    changed: Option<BlockSet>,
    /// What the target said, once it did. On its disk.
    pub(crate) said: Option<Base>,
}

impl Standing {
    /// Draws it, and puts it on the target's disk.
    pub(crate) fn draw(seed: u64, size: VolumeSize, source: &Disk, target: &mut Disk) -> Self {
        let mut dice = Dice::new(seed ^ 0x0ba5_e00d);
        let mut standing = Self {
            is_copy: false,
            is_touched: false,
            changed: None,
            said: None,
        };
        if dice.coin() {
            return standing;
        }
        standing.is_copy = true;
        standing.is_touched = dice.permille(300);
        let is_tracked = dice.permille(700);
        let differs_permille = dice.pick(&[0, 30, 300, 1000]);
        let mut changed = BlockSet::new(size.blocks());
        target.copy_from(source);
        for block in size.all_blocks().iter() {
            let range = BlockRange::single(block);
            let bytes = range.bytes(size);
            if dice.permille(differs_permille) {
                target.format(bytes, dice.pick(&[OLD, OLD, INITIAL, COMMON + 1, 0]));
                changed.insert(block);
            } else if dice.permille(20) {
                // Written, and the same as before.
                changed.insert(block);
            }
            if standing.is_touched && dice.permille(100) {
                target.format(bytes, dice.pick(&[OLD + 1, 0]));
            }
        }
        standing.changed = is_tracked.then_some(changed);
        standing
    }

    /// The source's guest writes before the migration begins.
    pub(crate) fn source_writes(&mut self, range: ByteRange) {
        if let Some(changed) = &mut self.changed {
            changed.insert_range(range.blocks_touched());
        }
    }

    /// A power loss at the source: it does not know any more what has changed.
    pub(crate) fn source_forgets(&mut self) {
        self.changed = None;
    }

    /// What the source says of the copy, and what it counts as changed, when the migration begins.
    pub(crate) fn begin(&self) -> Option<(MigrationId, BlockSet)> {
        self.changed.clone().map(|changed| (EARLIER, changed))
    }
}

impl World {
    /// The target decides what to say of what stands there, when it hears of the migration first.
    pub(crate) fn look_at_base(&mut self, open: &Open) {
        let offered = open.volumes.first().and_then(|volume| volume.base);
        let is_known = offered == Some(EARLIER) && !self.standing.is_touched;
        let base = match (self.standing.is_copy, is_known) {
            (false, _) => Base::Zeroes,
            (true, true) => Base::Known,
            (true, false) if offered.is_some() && self.breaks_touched_base() => Base::Known,
            (true, false) => Base::Unknown,
        };
        self.cover(match base {
            Base::Known => "onto a copy that is known",
            Base::Unknown => "onto a copy of some time",
            _ => "onto zeroes",
        });
        self.standing.said = Some(base);
    }

    /// What the target's machine says.
    pub(crate) fn bases(&self) -> Vec<Base> {
        self.standing.said.into_iter().collect()
    }

    /// What the source has written since, with the writes that are under way.
    pub(crate) fn changed_at_source(&mut self) -> Option<BlockSet> {
        let (_, mut changed) = self.standing.begin()?;
        let host = self.host(Site::Source);
        for block in host.size.all_blocks().iter() {
            if host.rules.is_dirty(BlockRange::single(block)) {
                changed.insert(block);
            }
        }
        Some(changed)
    }
}
