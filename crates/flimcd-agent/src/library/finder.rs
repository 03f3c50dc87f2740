//! Finding blocks that a source is about to send: at the same place, among what has come, anywhere in the library.
//!
//! An answer is given after the candidate was read and its prefix compared, and content is taken after it was read again and its
//! whole fingerprint compared. So an index that is wrong or old, a file that is written meanwhile and two blocks with one prefix cost
//! time and nothing else.

use flimcd_content::{Fingerprint, Recent};
use flimcd_core::{BLOCK_SIZE, BlockIndex, BlockRange, Seq, VolumeLayout};
use flimcd_wire::{BlockPrefix, Probe, Probed, Runs};
use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{Library, Seeds, index::ContentIndex};
use crate::migration::volumes::VolumeSet;

/// Probes whose places are remembered: more than a source has under way.
const PROBES_MAX: usize = 8192;

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At the same place of the seed.
    Seed,
    /// In the volumes that arrive.
    Own(BlockIndex),
    /// In a file of the library: which, and where in it.
    File(usize, BlockIndex),
}

/// The places of one probe's blocks.
type Places = BTreeMap<u64, Place>;

/// A file of the library with the places of its blocks.
pub(super) struct Indexed {
    /// Whose volumes may share content with it; `None`: everybody's.
    pub(super) tenant: Option<String>,
    pub(super) file: File,
    pub(super) index: ContentIndex,
}

/// What the volumes of one migration may find content in; see the module.
pub(crate) struct Finder {
    /// Whose each volume is.
    tenants: Vec<String>,
    files: Vec<Indexed>,
    recent: Mutex<Recent>,
    /// By the number of the probe; those of an earlier run of the source are written over.
    places: Mutex<BTreeMap<Seq, Places>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Library {
    /// For volumes of which each belongs to one of these tenants, in their order. Blocks.
    pub(crate) fn finder(&self, tenants: &[String]) -> Finder {
        Finder::over(tenants, self.indexed(tenants))
    }
}

impl Finder {
    pub(super) fn over(tenants: &[String], files: Vec<Indexed>) -> Self {
        Self {
            tenants: tenants.to_vec(),
            files,
            recent: Mutex::default(),
            places: Mutex::default(),
        }
    }

    /// Which of these blocks are here. Remembers where for [`copy`](Self::copy). Blocks for the disk.
    pub(crate) fn probe(
        &self,
        seeds: Option<&Seeds>,
        volumes: &VolumeSet,
        probe: &Probe,
    ) -> Probed {
        let mut places = Places::new();
        let mut wanted = probe.prefixes();
        let (mut same_place, mut repeated) = (0, 0);
        let mut buffer = Vec::new();
        for run in probe.blocks.iter() {
            let in_seed = seeds.and_then(|seeds| seeds.peek(run));
            let in_seed = prefixes(in_seed.as_deref());
            let here = volumes.peek(run).ok();
            let here = prefixes(here.as_deref());
            for (at, (block, wanted)) in run.iter().zip(&mut wanted).enumerate() {
                let place = if in_seed.get(at) == Some(&wanted) {
                    same_place += 1;
                    Place::Seed
                } else if here.get(at) == Some(&wanted) {
                    same_place += 1;
                    Place::Own(block)
                } else if let Some(place) = self.recent(volumes, block, wanted, &mut buffer) {
                    repeated += 1;
                    place
                } else if let Some(place) = self.in_files(volumes, block, wanted, &mut buffer) {
                    place
                } else {
                    continue;
                };
                places.insert(block.0, place);
            }
        }
        let had = runs(places.keys().copied());
        let mut remembered = lock(&self.places);
        if places.is_empty() {
            remembered.remove(&probe.seq);
        } else {
            remembered.insert(probe.seq, places);
        }
        while remembered.len() > PROBES_MAX {
            remembered.pop_first();
        }
        Probed {
            seq: probe.seq,
            had,
            same_place,
            repeated,
        }
    }

    /// Something that has come in this migration, to a volume of the same tenant.
    fn recent(
        &self,
        volumes: &VolumeSet,
        block: BlockIndex,
        wanted: BlockPrefix,
        buffer: &mut Vec<u8>,
    ) -> Option<Place> {
        let place = lock(&self.recent).get(wanted)?;
        let tenant = self.tenant_of(volumes, place)?;
        if tenant != self.tenant_of(volumes, block)? {
            return None;
        }
        *buffer = volumes.peek(BlockRange::single(place)).ok()?;
        (Fingerprint::of_block(buffer).block_prefix() == wanted).then_some(Place::Own(place))
    }

    /// Something in a file of the library that the block's volume may see, as long as the block is.
    fn in_files(
        &self,
        volumes: &VolumeSet,
        block: BlockIndex,
        wanted: BlockPrefix,
        buffer: &mut Vec<u8>,
    ) -> Option<Place> {
        let length = length_of(volumes.layout(), block)?;
        let tenant = self.tenant_of(volumes, block)?;
        let may_see = |(_, file): &(usize, &Indexed)| {
            file.tenant.as_deref().is_none_or(|owner| owner == tenant)
        };
        let mut files = self.files.iter().enumerate().filter(may_see);
        files.find_map(|(number, file)| {
            let place = file.index.lookup(wanted)?;
            buffer.resize(length, 0);
            file.read(place, buffer)?;
            let is_it = Fingerprint::of_block(buffer).block_prefix() == wanted;
            is_it.then_some(Place::File(number, place))
        })
    }

    fn tenant_of(&self, volumes: &VolumeSet, block: BlockIndex) -> Option<&str> {
        let (volume, _) = volumes.layout().locate(BlockRange::single(block))?;
        self.tenants.get(volume).map(String::as_str)
    }

    /// The content of `run`, from the places that were found for it, in `buffer`; `None` when it is not what is `expected`, or not
    /// known any more. Blocks for the disk.
    pub(crate) fn copy(
        &self,
        seq: Seq,
        seeds: Option<&Seeds>,
        volumes: &VolumeSet,
        run: BlockRange,
        expected: Fingerprint,
        buffer: &mut Vec<u8>,
    ) -> Option<()> {
        let places: Option<Vec<Place>> = {
            let remembered = lock(&self.places);
            let places = remembered.get(&seq)?;
            run.iter()
                .map(|block| places.get(&block.0).copied())
                .collect()
        };
        buffer.clear();
        for (block, place) in run.iter().zip(places?) {
            let at = buffer.len();
            let length = length_of(volumes.layout(), block)?;
            match place {
                Place::Seed => buffer.extend(seeds?.peek(BlockRange::single(block))?),
                Place::Own(place) => {
                    buffer.extend(volumes.peek(BlockRange::single(place)).ok()?);
                }
                Place::File(number, place) => {
                    buffer.resize(at + length, 0);
                    self.files.get(number)?.read(place, &mut buffer[at..])?;
                }
            }
            if buffer.len() != at + length {
                return None;
            }
        }
        (Fingerprint::of_run(buffer) == expected).then_some(())
    }

    /// The message of this number has been written, or never will be.
    pub(crate) fn forget(&self, seq: Seq) {
        lock(&self.places).remove(&seq);
    }

    /// Content that has been written, for later probes.
    pub(crate) fn arrived(&self, range: BlockRange, bytes: &[u8]) {
        let found = prefixes(Some(bytes));
        let mut recent = lock(&self.recent);
        for (block, prefix) in range.iter().zip(found) {
            recent.insert(prefix, block);
        }
    }
}

impl Indexed {
    fn read(&self, place: BlockIndex, buffer: &mut [u8]) -> Option<()> {
        let start = place.0.checked_mul(BLOCK_SIZE)?;
        // A file that became shorter, or cannot be read, has nothing.
        self.file.read_exact_at(buffer, start).ok()
    }
}

/// Bytes of a block of the layout: a volume's last one may be short.
fn length_of(layout: &VolumeLayout, block: BlockIndex) -> Option<usize> {
    let (volume, within) = layout.locate(BlockRange::single(block))?;
    usize::try_from(within.bytes(layout.size_of(volume)).len()).ok()
}

fn prefixes(content: Option<&[u8]>) -> Vec<BlockPrefix> {
    let length = usize::try_from(BLOCK_SIZE).expect("4096");
    let blocks = content.unwrap_or_default().chunks(length);
    blocks
        .map(|block| Fingerprint::of_block(block).block_prefix())
        .collect()
}

/// Ascending blocks as runs.
fn runs(blocks: impl Iterator<Item = u64>) -> Runs {
    let mut runs: Vec<BlockRange> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(BlockRange::new(block, block + 1)),
        }
    }
    Runs::new(runs)
}
