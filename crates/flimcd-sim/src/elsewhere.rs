//! Content that the target has at other places: an image with an index of its blocks, somebody's volume that changes under the
//! index, and what has come in this migration.
//!
//! The agent looks for the blocks of a probe and remembers where it found them. The index is a hint: places change after it was made and
//! after the answer was given, prefixes collide, and of the places only so many are remembered.

use std::collections::BTreeMap;

use flimcd_content::{Fingerprint, Recent};
use flimcd_core::{BLOCK_SIZE, BlockIndex, BlockRange, Seq, VolumeSize};
use flimcd_wire::{BlockPrefix, Probe, Probed, Runs};

use crate::{
    content::{self, COMMON, SECTOR},
    dice::Dice,
    disk::{Disk, index},
    host::after,
    world::{Event, Site, World},
};

/// [`BLOCK_SIZE`] as a length in memory.
const BLOCK_BYTES: usize = 4096;
/// Stamp of what is only there.
const OTHER: u64 = 0xe15e;
/// Contents that are at many places.
const COMMONS: u64 = 6;

/// See the module.
pub(crate) struct Elsewhere {
    bytes: Vec<u8>,
    hints: BTreeMap<BlockPrefix, usize>,
    /// How many of a thousand answers to a probe are followed by a change of some of the places.
    changes_permille: u64,
    /// How many of a thousand blocks that are nowhere seem to be somewhere.
    collides_permille: u64,
    /// How many of a thousand writes of the guest have a content that is at many places.
    common_permille: u64,
    /// Probes whose places are remembered.
    memory: usize,
    look_us: u64,
    pub(crate) dice: Dice,
}

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the image in the library, at the same place.
    Seed,
    /// In the volume itself.
    Own(BlockIndex),
    /// Elsewhere.
    Other(usize),
}

/// What the agent keeps of probes in its memory.
#[derive(Default)]
pub(crate) struct Finder {
    /// Probes that are being looked at.
    asked: BTreeMap<u64, Probe>,
    next: u64,
    places: BTreeMap<Seq, BTreeMap<BlockIndex, Place>>,
    recent: Option<Recent>,
}

impl Finder {
    /// Where a block of a message was found.
    pub(crate) fn place(&self, seq: Seq, block: BlockIndex) -> Option<Place> {
        self.places.get(&seq)?.get(&block).copied()
    }

    /// Content was written.
    pub(crate) fn arrived(&mut self, range: BlockRange, bytes: &[u8]) {
        let recent = self.recent.get_or_insert_default();
        for (block, bytes) in range.iter().zip(bytes.chunks(BLOCK_BYTES)) {
            recent.insert(Fingerprint::of_block(bytes).block_prefix(), block);
        }
    }
}

impl Elsewhere {
    /// Draws what becomes of the volume's first content, and gives some blocks of it contents that are at many places.
    pub(crate) fn draw(
        seed: u64,
        size: VolumeSize,
        mut format: impl FnMut(BlockRange, u64),
    ) -> Self {
        let mut dice = Dice::new(seed ^ 0xe15e_3e4e);
        let common_permille = dice.pick(&[0, 50, 400]);
        for block in size.all_blocks().iter() {
            if dice.permille(common_permille / 2) {
                format(BlockRange::single(block), COMMON + dice.below(COMMONS));
            }
        }
        Self {
            bytes: Vec::new(),
            hints: BTreeMap::new(),
            changes_permille: dice.pick(&[0, 0, 50, 500]),
            collides_permille: dice.pick(&[0, 0, 0, 30]),
            common_permille,
            memory: index(dice.pick(&[4096, 4096, 20, 2])),
            look_us: dice.pick(&[0, 2_000, 50_000]),
            dice,
        }
    }

    /// Fills it with blocks of this disk and others, in any order, and makes the index.
    pub(crate) fn fill(&mut self, size: VolumeSize, disk: &Disk) {
        let dice = &mut self.dice;
        if dice.permille(200) {
            return;
        }
        let of_disk_permille = dice.pick(&[50, 500, 900]);
        let rots_permille = dice.pick(&[0, 0, 100, 1000]);
        let blocks = dice.between(8, 300);
        for block in 0..blocks {
            let start = index(block * BLOCK_SIZE);
            let from = BlockIndex(dice.below(size.blocks()));
            let from = disk.bytes(BlockRange::single(from).bytes(size));
            if dice.permille(of_disk_permille) && from.len() == BLOCK_BYTES {
                self.bytes.extend_from_slice(from);
            } else {
                let stamp = dice.pick(&[OTHER, COMMON, COMMON + 1, COMMON + 2]);
                self.bytes.resize(start + BLOCK_BYTES, 0);
                content::fill(&mut self.bytes[start..], block * 8, stamp);
            }
            let here = &mut self.bytes[start..];
            let prefix = Fingerprint::of_block(here).block_prefix();
            self.hints.insert(prefix, start);
            if dice.permille(rots_permille) {
                here[index(dice.below(BLOCK_SIZE))] ^= 0x20;
            }
        }
    }

    /// The stamp of a guest's write, if it is to be one of those that are at many places.
    pub(crate) fn common(&mut self) -> Option<u64> {
        self.dice
            .permille(self.common_permille)
            .then(|| COMMON + self.dice.below(COMMONS))
    }

    /// A block.
    pub(crate) fn block(&self, at: usize) -> &[u8] {
        &self.bytes[at..at + BLOCK_BYTES]
    }

    fn any_place(&mut self, size: VolumeSize) -> Place {
        let blocks = self.bytes.len() as u64 / BLOCK_SIZE;
        match self.dice.below(3) {
            0 => Place::Seed,
            1 if blocks > 0 => Place::Other(index(self.dice.below(blocks) * BLOCK_SIZE)),
            _ => Place::Own(BlockIndex(self.dice.below(size.blocks()))),
        }
    }

    /// Somebody writes there.
    fn changes(&mut self) -> bool {
        let blocks = self.bytes.len() as u64 / BLOCK_SIZE;
        if blocks == 0 || !self.dice.permille(self.changes_permille) {
            return false;
        }
        for _ in 0..1 + blocks / 8 {
            let block = self.dice.below(blocks);
            let start = index(block * BLOCK_SIZE);
            let stamp = self.dice.pick(&[OTHER + 1, COMMON, 0]);
            let sectors = index(self.dice.between(1, 8) * SECTOR);
            content::fill(&mut self.bytes[start..start + sectors], block * 8, stamp);
        }
        true
    }
}

impl World {
    /// The target's agent is asked which blocks it has: it will look.
    pub(crate) fn probe(&mut self, probe: Probe) {
        self.cover("asked what the target has");
        let finder = &mut self.target.finder;
        finder.next += 1;
        let number = finder.next;
        finder.asked.insert(number, probe);
        let life = self.host(Site::Target).life;
        let elsewhere = &mut self.elsewhere;
        let at = after(self.now, &mut elsewhere.dice, 0, elsewhere.look_us);
        let strikes = elsewhere.dice.permille(20);
        self.at(at, Event::Looked { life, number });
        if strikes {
            self.aim();
        }
    }

    /// It has looked.
    pub(crate) fn looked(&mut self, number: u64) {
        let Some(probe) = self.target.finder.asked.remove(&number) else {
            return;
        };
        let blocks: Vec<_> = probe.blocks.iter().flat_map(BlockRange::iter).collect();
        let mut places = BTreeMap::new();
        let (mut same_place, mut repeated) = (0, 0);
        for (block, prefix) in blocks.into_iter().zip(probe.prefixes()) {
            let Some((place, is_repeated)) = self.find(block, prefix) else {
                continue;
            };
            match place {
                _ if is_repeated => repeated += 1,
                Place::Seed => same_place += 1,
                Place::Own(own) if own == block => same_place += 1,
                Place::Own(_) | Place::Other(_) => {}
            }
            places.insert(block, place);
        }
        let had = Runs::new(places.keys().map(|&block| BlockRange::single(block)));
        if !places.is_empty() {
            self.cover("the target has something of it");
        }
        self.target.finder.places.insert(probe.seq, places);
        while self.target.finder.places.len() > self.elsewhere.memory {
            self.cover("places forgotten");
            self.target.finder.places.pop_first();
        }
        if self.elsewhere.changes() {
            self.cover("changed under the index");
        }
        let probed = Probed {
            seq: probe.seq,
            had,
            same_place,
            repeated,
        };
        self.target_input(move |machine, now| machine.handle_probed(now, probed));
    }

    /// Where a block is, if the first bytes of its fingerprint are this, and whether it is there because it has come before.
    fn find(&mut self, block: BlockIndex, prefix: BlockPrefix) -> Option<(Place, bool)> {
        if self
            .elsewhere
            .dice
            .permille(self.elsewhere.collides_permille)
        {
            self.cover("prefixes collided");
            return Some((self.elsewhere.any_place(self.plan.size), false));
        }
        let recent = self.target.finder.recent.as_ref();
        let recent = recent.and_then(|recent| recent.get(prefix)).map(Place::Own);
        let hinted = self.elsewhere.hints.get(&prefix).copied();
        let candidates = [
            (Some(Place::Seed), false),
            (Some(Place::Own(block)), false),
            (recent, true),
            (hinted.map(Place::Other), false),
        ];
        for (place, is_repeated) in candidates {
            let Some(place) = place else { continue };
            let found = self.at_place(place, block);
            if found.is_some_and(|bytes| Fingerprint::of_block(bytes).block_prefix() == prefix) {
                return Some((place, is_repeated));
            }
        }
        None
    }

    /// What stands at a place where `block` was found.
    fn at_place(&self, place: Place, block: BlockIndex) -> Option<&[u8]> {
        let size = self.plan.size;
        match place {
            Place::Seed => self.seed.as_ref()?.bytes(BlockRange::single(block)),
            Place::Own(own) => {
                let disk = &self.hosts[Site::Target.index()].disk;
                Some(disk.bytes(BlockRange::single(own).bytes(size)))
            }
            Place::Other(at) => Some(self.elsewhere.block(at)),
        }
    }
}
