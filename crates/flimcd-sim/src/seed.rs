//! An image in the target's library, which resembles the volume: what its table says, and what is really there. Or the copy that stands
//! where the volume is to arrive, which is written over while it is read.
//!
//! It is drawn apart from everything else, so that what a seed of the simulator meant before there were images it still means.

use flimcd_content::Fingerprint;
use flimcd_core::{BlockRange, ByteRange, ChunkIndex, VolumeSize};
use flimcd_migrate::SeedChoice;
use flimcd_wire::{SampleChunk, SeedId, SeedTable};

use crate::{
    content::{self, SECTOR},
    dice::Dice,
    disk::{Disk, index},
    world::{Event, Site, World},
};

/// Stamp of what only the image holds.
const OTHER: u64 = 0x5eed;

/// See the module.
pub(crate) struct SeedImage {
    size: VolumeSize,
    table: SeedTable,
    /// It is the copy at the target; `bytes` is not used then.
    pub(crate) in_place: bool,
    bytes: Vec<u8>,
    /// How long the target looks for it.
    search_us: u64,
    dice: Dice,
}

impl SeedImage {
    /// Perhaps an image like this disk.
    pub(crate) fn draw(seed: u64, size: VolumeSize, disk: &Disk) -> Option<Self> {
        let mut dice = Dice::new(seed ^ 0x1b_a5e0);
        if dice.permille(300) {
            return None;
        }
        let differs_permille = dice.pick(&[0, 100, 500]);
        let rots_permille = dice.pick(&[0, 0, 100, 1000]);
        let search_us = dice.pick(&[0, 1_000, 30_000, 5_000_000]);
        let mut bytes = disk.bytes(ByteRange::new(0, size.bytes())).to_vec();
        let mut table = SeedTable::new(size.chunks());
        for chunk in (0..size.chunks()).map(ChunkIndex) {
            let range = chunk.blocks().bytes(size);
            let place = index(range.start)..index(range.end);
            let here = &mut bytes[place];
            if dice.permille(differs_permille) {
                content::fill(here, range.start / SECTOR, OTHER);
            }
            if !flimcd_content::is_zero(here) {
                table.set(chunk, Some(Fingerprint::of_run(here).prefix()));
            }
            // What happened since the table was made.
            if dice.permille(rots_permille) {
                let at = index(dice.below(range.len()));
                here[at] ^= 0x10;
            }
        }
        Some(Self {
            size,
            table,
            in_place: false,
            bytes,
            search_us,
            dice,
        })
    }

    /// The copy that stands at the target, as a table of it says, in some places wrongly.
    pub(crate) fn in_place(seed: u64, size: VolumeSize, source: &Disk, copy: &Disk) -> Self {
        let mut dice = Dice::new(seed ^ 0x1b_1ace);
        let lies_permille = dice.pick(&[0, 0, 100, 1000]);
        let search_us = dice.pick(&[0, 1_000, 30_000]);
        let mut table = SeedTable::new(size.chunks());
        for chunk in (0..size.chunks()).map(ChunkIndex) {
            let range = chunk.blocks().bytes(size);
            let lies = dice.permille(lies_permille);
            let here = if lies { source } else { copy }.bytes(range);
            if !flimcd_content::is_zero(here) {
                table.set(chunk, Some(Fingerprint::of_run(here).prefix()));
            }
        }
        Self {
            size,
            table,
            in_place: true,
            bytes: Vec::new(),
            search_us,
            dice,
        }
    }

    /// What the image holds; `None` when it is the volume's own copy.
    pub(crate) fn bytes(&self, range: BlockRange) -> Option<&[u8]> {
        let bytes = range.bytes(self.size);
        self.bytes.get(index(bytes.start)..index(bytes.end))
    }
}

impl World {
    /// What the source's agent shows of its volume.
    pub(crate) fn sample(&mut self) -> Vec<SampleChunk> {
        let size = self.plan.size;
        let disk = &self.host(Site::Source).disk;
        let chunks = (0..size.chunks()).map(ChunkIndex);
        let one = |chunk: ChunkIndex| {
            let bytes = disk.bytes(chunk.blocks().bytes(size));
            let prefix = Fingerprint::of_run(bytes).prefix();
            (!flimcd_content::is_zero(bytes)).then_some(SampleChunk { chunk, prefix })
        };
        chunks.filter_map(one).collect()
    }

    /// The target's agent looks for an image, for a while.
    pub(crate) fn choose_seed(&mut self) {
        let life = self.host(Site::Target).life;
        let wait = self
            .seed
            .as_mut()
            .map_or(0, |seed| seed.dice.below(seed.search_us + 1));
        self.at(
            self.now + std::time::Duration::from_micros(wait),
            Event::SeedFound { life },
        );
    }

    /// It has looked.
    pub(crate) fn seed_found(&mut self) {
        let choice = self.seed.as_ref().map(|seed| SeedChoice {
            id: SeedId([1; 16]),
            name: "base".to_owned(),
            in_place: seed.in_place,
            table: seed.table.clone().into(),
        });
        self.target_input(move |machine, now| machine.handle_seed(now, choice));
    }
}
