//! Content without bytes: each block has an id, and equal ids are equal content.
//!
//! An id says by itself where it comes from, so that an image of a TiB needs no memory: what stood there at the beginning is a
//! function of the seed, and only what was written since is remembered.

use std::collections::HashMap;

use flimcd_core::BlockSet;

/// Content of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(u64);

const TAG_SHIFT: u32 = 60;
const NUMBER: u64 = (1 << TAG_SHIFT) - 1;
/// What stood in a block of the source's image at the beginning; the number is the block's.
const BASE: u64 = 1;
/// What stands there in a replica that is older.
const OLD: u64 = 2;
/// Written by the guest, and nobody had it before.
const NEW: u64 = 3;
/// One of the contents that come again and again.
const REPEATED: u64 = 4;

/// Blocks of the stretches that have data or not: 1 MiB.
const EXTENT_BLOCKS: u64 = 256;

impl Id {
    /// Zeroes.
    pub(super) const ZERO: Self = Self(0);

    const fn tagged(tag: u64, number: u64) -> Self {
        Self((tag << TAG_SHIFT) | (number & NUMBER))
    }

    /// Content that nobody had before.
    pub(super) const fn fresh(number: u64) -> Self {
        Self::tagged(NEW, number)
    }

    /// One of those that come again.
    pub(super) const fn repeated(number: u64) -> Self {
        Self::tagged(REPEATED, number)
    }

    /// Eight bytes that stand for it in probes.
    pub(super) const fn prefix(self) -> u64 {
        self.0
    }

    /// The id that a probe is about.
    pub(super) const fn of_prefix(prefix: u64) -> Self {
        Self(prefix)
    }

    /// Where it stood at the beginning, if it did.
    const fn home(self) -> Option<u64> {
        match self.0 >> TAG_SHIFT {
            BASE | OLD => Some(self.0 & NUMBER),
            _ => None,
        }
    }
}

/// What the images are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Profile {
    pub(super) seed: u64,
    /// Share of the stretches that hold data.
    pub(super) data_share: f64,
    /// Share of the contents that compress.
    pub(super) compressible_share: f64,
    /// Share of the data blocks in which the target's replica differs, if there is one.
    pub(super) replica_differs: Option<f64>,
}

/// Packed size of a block that compresses, as the loads' writes do (about 2.5 times), and of one that does not.
const PACKED: u32 = 1640;
const WHOLE: u32 = 4096;

impl Profile {
    /// Whether the image has data there at the beginning.
    pub(super) fn has_data(&self, block: u64) -> bool {
        share_of(self.seed, block / EXTENT_BLOCKS) < self.data_share
    }

    /// Whether the replica differs there.
    pub(super) fn differs(&self, block: u64) -> bool {
        self.replica_differs
            .is_some_and(|share| share_of(self.seed ^ 0x5eed, block) < share)
            && self.has_data(block)
    }

    fn source(&self, block: u64) -> Id {
        if self.has_data(block) {
            Id::tagged(BASE, block)
        } else {
            Id::ZERO
        }
    }

    fn replica(&self, block: u64) -> Id {
        if self.replica_differs.is_none() {
            Id::ZERO
        } else if self.differs(block) {
            Id::tagged(OLD, block)
        } else {
            self.source(block)
        }
    }

    /// Bytes that the content packs to.
    pub(super) fn packed_len(&self, id: Id) -> u32 {
        if share_of(self.seed ^ 0xc0, id.0) < self.compressible_share {
            PACKED
        } else {
            WHOLE
        }
    }

    /// The blocks with data at the beginning.
    pub(super) fn data(&self, blocks: u64) -> BlockSet {
        let mut data = BlockSet::new(blocks);
        for start in (0..blocks).step_by(256) {
            if self.has_data(start) {
                let end = (start + EXTENT_BLOCKS).min(blocks);
                data.insert_range(flimcd_core::BlockRange::new(start, end));
            }
        }
        data
    }

    /// The blocks in which the replica differs.
    pub(super) fn differing(&self, blocks: u64) -> BlockSet {
        let mut set = BlockSet::new(blocks);
        for run in self.data(blocks).runs() {
            for block in run.iter().filter(|block| self.differs(block.0)) {
                set.insert(block);
            }
        }
        set
    }
}

/// A number between 0 and 1 that depends on both.
fn share_of(seed: u64, number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "53 bits")]
    let share = (mix(seed ^ mix(number)) >> 11) as f64 / (1u64 << 53) as f64;
    share
}

/// SplitMix64.
pub(super) const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What an image holds.
#[derive(Debug)]
pub(super) struct Image {
    profile: Profile,
    is_source: bool,
    /// Blocks that are as the source's were at the beginning, at the target.
    as_source: BlockSet,
    written: HashMap<u64, Id>,
    /// Where content was put that has no home.
    places: HashMap<Id, u64>,
}

impl Image {
    pub(super) fn source(profile: Profile, blocks: u64) -> Self {
        Self::new(profile, true, blocks)
    }

    pub(super) fn target(profile: Profile, blocks: u64) -> Self {
        Self::new(profile, false, blocks)
    }

    fn new(profile: Profile, is_source: bool, blocks: u64) -> Self {
        Self {
            profile,
            is_source,
            as_source: BlockSet::new(if is_source { 0 } else { blocks }),
            written: HashMap::new(),
            places: HashMap::new(),
        }
    }

    /// What stands in a block.
    pub(super) fn get(&self, block: u64) -> Id {
        if let Some(&id) = self.written.get(&block) {
            id
        } else if self.is_source || self.as_source.contains(flimcd_core::BlockIndex(block)) {
            self.profile.source(block)
        } else {
            self.profile.replica(block)
        }
    }

    /// Puts content there.
    pub(super) fn put(&mut self, block: u64, id: Id) {
        if !self.is_source && id == self.profile.source(block) {
            self.as_source.insert(flimcd_core::BlockIndex(block));
            self.written.remove(&block);
            return;
        }
        self.written.insert(block, id);
        if !self.is_source && id.home().is_none() && id != Id::ZERO {
            self.places.insert(id, block);
        }
    }

    /// Where the target has this content, if it knows.
    pub(super) fn find(&self, id: Id) -> Option<u64> {
        let place = match id.home() {
            Some(home) => home,
            None => *self.places.get(&id)?,
        };
        (self.get(place) == id).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_found_until_it_is_overwritten() {
        let profile = Profile {
            seed: 3,
            data_share: 0.5,
            compressible_share: 0.5,
            replica_differs: None,
        };
        let blocks = 10_000;
        let source = Image::source(profile, blocks);
        let mut target = Image::target(profile, blocks);
        let data = profile.data(blocks);
        assert!((3000..7000).contains(&data.count()), "{}", data.count());
        let block = data.runs().next().unwrap().start;
        let id = source.get(block);
        assert_eq!((target.get(block), target.find(id)), (Id::ZERO, None));
        target.put(block, id);
        assert_eq!((target.get(block), target.find(id)), (id, Some(block)));
        let fresh = Id::fresh(7);
        target.put(block, fresh);
        assert_eq!((target.find(id), target.find(fresh)), (None, Some(block)));
    }

    #[test]
    fn a_replica_differs_in_about_what_was_asked_for() {
        let profile = Profile {
            seed: 3,
            data_share: 1.0,
            compressible_share: 0.5,
            replica_differs: Some(0.1),
        };
        let differing = profile.differing(100_000);
        assert!((9_000..11_000).contains(&differing.count()));
        let (source, target) = (
            Image::source(profile, 100_000),
            Image::target(profile, 100_000),
        );
        for block in 0..1000 {
            let differs = differing.contains(flimcd_core::BlockIndex(block));
            assert_eq!(source.get(block) != target.get(block), differs);
        }
    }
}
