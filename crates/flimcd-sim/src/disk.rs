//! A disk with a page cache: what a process sees, and what is left after a power loss.
//!
//! Writes reach the cache and are seen by every reader at once; they reach the medium when they are synced, or at any time
//! before, sector by sector. A process that is killed loses nothing of it.

use flimcd_core::ByteRange;

use crate::{
    content::{self, SECTOR, SECTOR_LEN},
    dice::Dice,
};

pub(crate) struct Disk {
    cache: Vec<u8>,
    medium: Vec<u8>,
    /// Sectors that differ, or may.
    unsynced: Sectors,
}

/// A set of sectors.
#[derive(Clone)]
pub(crate) struct Sectors {
    words: Vec<u64>,
}

impl Sectors {
    fn new(sectors: usize) -> Self {
        Self {
            words: vec![0; sectors.div_ceil(64)],
        }
    }

    fn insert(&mut self, sector: usize) {
        self.words[sector / 64] |= 1 << (sector % 64);
    }

    fn remove(&mut self, sector: usize) {
        self.words[sector / 64] &= !(1 << (sector % 64));
    }

    fn for_each(&self, mut visit: impl FnMut(usize)) {
        for (&word, at) in self.words.iter().zip(0..) {
            let mut bits = word;
            while bits != 0 {
                visit(at * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

/// An offset as an index into memory.
pub(crate) fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("volumes are small here")
}

impl Disk {
    /// A disk of zeroes.
    pub(crate) fn new(bytes: u64) -> Self {
        let len = index(bytes);
        Self {
            cache: vec![0; len],
            medium: vec![0; len],
            unsynced: Sectors::new(len.div_ceil(SECTOR_LEN)),
        }
    }

    /// Puts content there for good, before the simulation begins.
    pub(crate) fn format(&mut self, range: ByteRange, stamp: u64) {
        let (start, end) = (index(range.start), index(range.end));
        content::fill(&mut self.cache[start..end], range.start / SECTOR, stamp);
        self.medium[start..end].copy_from_slice(&self.cache[start..end]);
    }

    /// Holds what the other one does, for good, before the simulation begins.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.cache.clone_from(&other.cache);
        self.medium.clone_from(&other.cache);
    }

    /// What a process sees.
    pub(crate) fn bytes(&self, range: ByteRange) -> &[u8] {
        &self.cache[index(range.start)..index(range.end)]
    }

    /// Whether there is anything but zeroes.
    pub(crate) fn has_data(&self, range: ByteRange) -> bool {
        !flimcd_content::is_zero(self.bytes(range))
    }

    /// Writes; `offset` is where a sector begins, and the end is where one ends, or the volume does.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let start = index(offset);
        self.cache[start..start + data.len()].copy_from_slice(data);
        let first = start / SECTOR_LEN;
        for sector in first..first + data.len().div_ceil(SECTOR_LEN) {
            self.unsynced.insert(sector);
        }
    }

    /// What a sync that begins now has to make durable.
    pub(crate) fn unsynced(&self) -> Sectors {
        self.unsynced.clone()
    }

    /// These reach the medium.
    pub(crate) fn write_back(&mut self, sectors: &Sectors) {
        sectors.for_each(|sector| {
            copy_sector(&self.cache, &mut self.medium, sector);
            self.unsynced.remove(sector);
        });
    }

    /// The system writes back some of what is in the cache by itself.
    pub(crate) fn write_back_some(&mut self, dice: &mut Dice, permille: u64) {
        let mut some = Sectors::new(self.cache.len().div_ceil(SECTOR_LEN));
        self.unsynced.for_each(|sector| {
            if dice.permille(permille) {
                some.insert(sector);
            }
        });
        self.write_back(&some);
    }

    /// The power goes: of every write that was not synced so many of a thousand sectors are there.
    pub(crate) fn lose_power(&mut self, dice: &mut Dice, kept_permille: u64) {
        self.write_back_some(dice, kept_permille);
        let lost = std::mem::replace(
            &mut self.unsynced,
            Sectors::new(self.medium.len().div_ceil(SECTOR_LEN)),
        );
        lost.for_each(|sector| copy_sector(&self.medium, &mut self.cache, sector));
    }
}

fn copy_sector(from: &[u8], to: &mut [u8], sector: usize) {
    let start = sector * SECTOR_LEN;
    let end = (start + SECTOR_LEN).min(from.len());
    to[start..end].copy_from_slice(&from[start..end]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_synced_survives_for_sure() {
        let mut disk = Disk::new(4 * SECTOR);
        let sector = |at: u64, stamp| {
            let mut bytes = vec![0; SECTOR_LEN];
            content::fill(&mut bytes, at, stamp);
            bytes
        };
        disk.write(0, &sector(0, 5));
        let sync = disk.unsynced();
        disk.write(SECTOR, &sector(1, 6));
        disk.write_back(&sync);
        disk.write(0, &sector(0, 7));
        let seen = |disk: &Disk, at: u64| {
            content::stamp_of(disk.bytes(ByteRange::at(at * SECTOR, SECTOR)), at)
        };
        assert_eq!((seen(&disk, 0), seen(&disk, 1)), (Some(7), Some(6)));
        disk.lose_power(&mut Dice::new(1), 0);
        assert_eq!((seen(&disk, 0), seen(&disk, 1)), (Some(5), Some(0)));
    }
}
