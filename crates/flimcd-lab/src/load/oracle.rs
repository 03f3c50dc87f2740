//! What each granule of the disk must hold.

use std::{collections::HashMap, fmt, ops::Range};

use serde::Serialize;

use super::{Baseline, baseline::is_zero, options::LoadOptions, stamp::Stamp};

/// State of a granule that nobody wrote.
const ORIGINAL: u32 = 0;
/// State of a granule that was zeroed.
const ZEROED: u32 = u32::MAX;

/// What a granule holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// What was there before the load.
    Original,
    /// Zeroes.
    Zeroes,
    /// A version that the load wrote for this place.
    Version(u32),
    /// A version that the load wrote for the granule at this offset, somewhere else.
    Misplaced {
        /// Where it belongs.
        offset: u64,
        /// Its version.
        version: u32,
    },
    /// A granule that starts with the right mark but goes on differently.
    Damaged(u32),
    /// Something that neither the image nor the load ever had here; its first bytes.
    Unknown([u8; 8]),
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Original => f.write_str("the original content"),
            Self::Zeroes => f.write_str("zeroes"),
            Self::Version(version) => write!(f, "version {version}"),
            Self::Misplaced { offset, version } => {
                write!(f, "version {version} of the granule at byte {offset}")
            }
            Self::Damaged(version) => write!(f, "a damaged version {version}"),
            Self::Unknown(bytes) => write!(f, "unknown content that starts with {bytes:02x?}"),
        }
    }
}

/// A granule that a read returned wrongly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WrongRead {
    /// Byte offset of the granule.
    pub offset: u64,
    /// What it should have held.
    pub expected: Content,
    /// What the read returned.
    pub found: Content,
    /// Milliseconds since the load started.
    pub at_ms: u64,
}

impl fmt::Display for WrongRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            offset,
            expected,
            found,
            at_ms,
        } = self;
        write!(
            f,
            "byte {offset} at {at_ms} ms: expected {expected}, found {found}"
        )
    }
}

/// Knows what every granule must hold.
#[derive(Debug)]
pub(super) struct Oracle {
    baseline: Baseline,
    stamp: Stamp,
    /// [`ORIGINAL`], [`ZEROED`] or the version, by granule.
    states: Vec<u32>,
    /// Granules of which a write was never answered: all states that are possible.
    unsettled: HashMap<usize, Vec<u32>>,
    last_version: u32,
    scratch: Vec<u8>,
}

impl Oracle {
    pub(super) fn new(baseline: Baseline, options: &LoadOptions) -> Self {
        let granules = usize::try_from(baseline.size().div_ceil(u64::from(baseline.granule())));
        Self {
            stamp: Stamp::new(options.seed, options.compressible_share, options.duplicates),
            states: vec![ORIGINAL; granules.unwrap_or(usize::MAX)],
            unsettled: HashMap::new(),
            last_version: ORIGINAL,
            scratch: vec![0; baseline.granule() as usize],
            baseline,
        }
    }

    pub(super) const fn size(&self) -> u64 {
        self.baseline.size()
    }

    pub(super) const fn granule(&self) -> u32 {
        self.baseline.granule()
    }

    /// Numbers of the granules of a range, which starts and ends with granules.
    pub(super) fn granules(&self, offset: u64, length: u32) -> Range<usize> {
        let granule = u64::from(self.granule());
        let end = offset + u64::from(length);
        debug_assert!(offset.is_multiple_of(granule));
        debug_assert!(end.is_multiple_of(granule) || end == self.size());
        let index = |at| usize::try_from(at).unwrap_or(usize::MAX);
        index(offset / granule)..index(end.div_ceil(granule))
    }

    /// Makes content for a new write; its version is to be given to `wrote` or `unanswered`.
    pub(super) fn make(&mut self, offset: u64, data: &mut [u8]) -> u32 {
        // 4 thousand million versions are 16 TiB of writes; then the oldest come again.
        self.last_version = if self.last_version + 1 == ZEROED {
            1
        } else {
            self.last_version + 1
        };
        let granule = self.granule() as usize;
        let mut at = offset;
        for part in data.chunks_mut(granule) {
            self.stamp.fill(at, self.last_version, part);
            at += part.len() as u64;
        }
        self.last_version
    }

    /// The state that zeroing gives.
    pub(super) const fn zeroed() -> u32 {
        ZEROED
    }

    /// A write was acknowledged.
    pub(super) fn wrote(&mut self, granules: Range<usize>, state: u32) {
        for index in granules {
            self.states[index] = state;
            if !self.unsettled.is_empty() {
                self.unsettled.remove(&index);
            }
        }
    }

    /// A write failed or was never answered: old and new are possible.
    pub(super) fn unanswered(&mut self, granules: Range<usize>, state: u32) {
        for index in granules {
            let old = self.states[index];
            self.unsettled
                .entry(index)
                .or_insert_with(|| vec![old])
                .push(state);
        }
    }

    /// Granules of which it is not known yet which of several contents they have.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// Compares what a read returned with what must be there; calls `wrong` for each granule
    /// that differs.
    pub(super) fn check(
        &mut self,
        offset: u64,
        data: &[u8],
        mut wrong: impl FnMut(u64, Content, Content),
    ) {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let granules = self.granules(offset, length);
        let step = self.granule() as usize;
        let mut at = offset;
        for (index, part) in granules.zip(data.chunks(step)) {
            if !self.settle_and_match(index, at, part) {
                wrong(
                    at,
                    content_of(self.states[index]),
                    self.identify(index, at, part),
                );
            }
            at += part.len() as u64;
        }
    }

    fn settle_and_match(&mut self, index: usize, offset: u64, data: &[u8]) -> bool {
        if self.unsettled.is_empty() {
            return self.has_state(index, offset, data, self.states[index]);
        }
        let Some(candidates) = self.unsettled.remove(&index) else {
            return self.has_state(index, offset, data, self.states[index]);
        };
        for &state in &candidates {
            if self.has_state(index, offset, data, state) {
                self.states[index] = state;
                return true;
            }
        }
        self.unsettled.insert(index, candidates);
        false
    }

    fn has_state(&mut self, index: usize, offset: u64, data: &[u8], state: u32) -> bool {
        match state {
            ORIGINAL => self.baseline.matches(index, data),
            ZEROED => is_zero(data),
            version => {
                let scratch = &mut self.scratch[..data.len()];
                self.stamp.fill(offset, version, scratch);
                scratch == data
            }
        }
    }

    /// What wrong content is, as far as it can be told.
    fn identify(&mut self, index: usize, offset: u64, data: &[u8]) -> Content {
        if is_zero(data) {
            return Content::Zeroes;
        }
        if self.baseline.matches(index, data) {
            return Content::Original;
        }
        match self.stamp.read_mark(data) {
            Some((place, version)) if place != offset => Content::Misplaced {
                offset: place,
                version,
            },
            Some((_, version)) if self.has_state(index, offset, data, version) => {
                Content::Version(version)
            }
            Some((_, version)) => Content::Damaged(version),
            None => {
                let mut first = [0; 8];
                let len = data.len().min(8);
                first[..len].copy_from_slice(&data[..len]);
                Content::Unknown(first)
            }
        }
    }
}

const fn content_of(state: u32) -> Content {
    match state {
        ORIGINAL => Content::Original,
        ZEROED => Content::Zeroes,
        version => Content::Version(version),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::MemoryDisk;

    fn oracle(original: &[u8]) -> Oracle {
        let baseline = Baseline::of_disk(&mut MemoryDisk::new(original.to_vec()), 4096).unwrap();
        Oracle::new(baseline, &LoadOptions::default())
    }

    fn check(oracle: &mut Oracle, offset: u64, data: &[u8]) -> Option<(u64, Content, Content)> {
        let mut first = None;
        oracle.check(offset, data, |at, expected, found| {
            first.get_or_insert((at, expected, found));
        });
        first
    }

    #[test]
    fn each_kind_of_wrong_content_is_named() {
        let original = [7; 3 * 4096 + 100];
        let mut oracle = oracle(&original);
        assert_eq!(check(&mut oracle, 0, &original), None);

        let mut first = vec![0; 4096];
        let one = oracle.make(4096, &mut first);
        oracle.wrote(1..2, one);
        let mut second = vec![0; 4096];
        let two = oracle.make(4096, &mut second);
        oracle.wrote(1..2, two);
        assert_eq!(check(&mut oracle, 4096, &second), None);

        let found = |oracle: &mut Oracle, data: &[u8]| check(oracle, 4096, data).unwrap().2;
        assert_eq!(found(&mut oracle, &first), Content::Version(one));
        assert_eq!(found(&mut oracle, &original[..4096]), Content::Original);
        assert_eq!(found(&mut oracle, &[0; 4096]), Content::Zeroes);
        assert_eq!(found(&mut oracle, &[9; 4096]), Content::Unknown([9; 8]));
        let mut torn = second.clone();
        torn[4000] ^= 1;
        assert_eq!(found(&mut oracle, &torn), Content::Damaged(two));
        let misplaced = check(&mut oracle, 8192, &second).unwrap();
        assert_eq!(
            misplaced.2,
            Content::Misplaced {
                offset: 4096,
                version: two
            }
        );
    }

    #[test]
    fn an_unanswered_write_is_old_or_new_until_it_is_seen() {
        let original = [7; 2 * 4096];
        let mut oracle = oracle(&original);
        let mut new = vec![0; 4096];
        let version = oracle.make(0, &mut new);
        oracle.unanswered(0..1, version);
        assert_eq!(oracle.unsettled(), 1);
        // Neither old nor new.
        assert!(check(&mut oracle, 0, &[1; 4096]).is_some());
        assert_eq!(check(&mut oracle, 0, &new), None);
        assert_eq!(oracle.unsettled(), 0);
        // It was seen to be new, so the old content is wrong from now on.
        assert!(check(&mut oracle, 0, &original[..4096]).is_some());
    }

    #[test]
    fn zeroes_and_short_last_granules_are_checked() {
        let original = vec![3; 4096 + 10];
        let mut oracle = oracle(&original);
        oracle.wrote(0..1, Oracle::zeroed());
        assert_eq!(check(&mut oracle, 0, &[0; 4096]), None);
        let mut tail = [0; 10];
        let version = oracle.make(4096, &mut tail);
        oracle.wrote(1..2, version);
        assert_eq!(check(&mut oracle, 4096, &tail), None);
        tail[9] ^= 1;
        assert!(check(&mut oracle, 4096, &tail).is_some());
    }
}
