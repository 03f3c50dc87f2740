//! What each granule of the disk must hold.

use std::{collections::HashMap, fmt, ops::Range};

use serde::Serialize;

use super::{
    Baseline,
    baseline::is_zero,
    options::LoadOptions,
    stamp::{RECORDED_BYTES, Stamp},
};

/// State of a granule that nobody wrote.
const ORIGINAL: u32 = 0;
/// State of a granule that was zeroed.
const ZEROED: u32 = u32::MAX;
/// Set in the state of a granule with recorded content; the rest is the content's number.
const RECORDED: u32 = 1 << 31;

/// What the granules of a write hold once it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum States {
    /// The same version, or zeroes, in all of them.
    Same(u32),
    /// Recorded content, granule by granule.
    Each(Vec<u32>),
}

impl States {
    pub(super) const ZEROED: Self = Self::Same(ZEROED);

    fn of(&self, number: usize) -> u32 {
        match self {
            Self::Same(state) => *state,
            Self::Each(states) => states[number],
        }
    }
}

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
    /// The recorded content with this number.
    Recorded(u32),
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
            Self::Recorded(number) => write!(f, "recorded content {number}"),
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
    /// [`ORIGINAL`], [`ZEROED`], the version, or [`RECORDED`] and a content's number, by granule.
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
            stamp: Stamp::of(options),
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

    /// Makes content for a new write, the recorded one if there is one that fits; what it is has to be
    /// given to `wrote` or `unanswered`.
    pub(super) fn make(
        &mut self,
        offset: u64,
        data: &mut [u8],
        recorded: Option<&[u32]>,
    ) -> States {
        if let Some(states) =
            recorded.and_then(|recorded| self.make_recorded(offset, data, recorded))
        {
            return states;
        }
        // 2 thousand million versions are 8 TiB of writes; then the oldest come again.
        self.last_version = if self.last_version + 1 == RECORDED {
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
        States::Same(self.last_version)
    }

    fn make_recorded(&self, offset: u64, data: &mut [u8], recorded: &[u32]) -> Option<States> {
        let granule = self.granule() as usize;
        let fits = granule <= RECORDED_BYTES
            && offset.is_multiple_of(RECORDED_BYTES as u64)
            && data.len() == recorded.len() * RECORDED_BYTES
            && recorded.iter().all(|number| *number < RECORDED - 1);
        if !fits {
            return None;
        }
        let mut states = Vec::with_capacity(data.len() / granule);
        for (block, number) in data.chunks_mut(RECORDED_BYTES).zip(recorded) {
            self.stamp.fill_recorded(*number, block);
            states.resize(states.len() + RECORDED_BYTES / granule, RECORDED | number);
        }
        Some(States::Each(states))
    }

    /// A write was acknowledged.
    pub(super) fn wrote(&mut self, granules: Range<usize>, states: &States) {
        for (number, index) in granules.enumerate() {
            self.states[index] = states.of(number);
            if !self.unsettled.is_empty() {
                self.unsettled.remove(&index);
            }
        }
    }

    /// A write failed or was never answered: old and new are possible.
    pub(super) fn unanswered(&mut self, granules: Range<usize>, states: &States) {
        for (number, index) in granules.enumerate() {
            let old = self.states[index];
            self.unsettled
                .entry(index)
                .or_insert_with(|| vec![old])
                .push(states.of(number));
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
            recorded if recorded & RECORDED != 0 => {
                let mut block = [0; RECORDED_BYTES];
                self.stamp.fill_recorded(recorded & !RECORDED, &mut block);
                // Below a block's length.
                let at = usize::try_from(offset % RECORDED_BYTES as u64).unwrap_or(0);
                block.get(at..at + data.len()) == Some(data)
            }
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
        recorded if recorded & RECORDED != 0 => Content::Recorded(recorded & !RECORDED),
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

    /// Makes content and says its version.
    fn made(oracle: &mut Oracle, offset: u64, data: &mut [u8]) -> u32 {
        match oracle.make(offset, data, None) {
            States::Same(version) => version,
            States::Each(_) => unreachable!("nothing was recorded"),
        }
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
        let one = made(&mut oracle, 4096, &mut first);
        oracle.wrote(1..2, &States::Same(one));
        let mut second = vec![0; 4096];
        let two = made(&mut oracle, 4096, &mut second);
        oracle.wrote(1..2, &States::Same(two));
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
        let version = made(&mut oracle, 0, &mut new);
        oracle.unanswered(0..1, &States::Same(version));
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
        oracle.wrote(0..1, &States::ZEROED);
        assert_eq!(check(&mut oracle, 0, &[0; 4096]), None);
        let mut tail = [0; 10];
        let version = made(&mut oracle, 4096, &mut tail);
        oracle.wrote(1..2, &States::Same(version));
        assert_eq!(check(&mut oracle, 4096, &tail), None);
        tail[9] ^= 1;
        assert!(check(&mut oracle, 4096, &tail).is_some());
    }

    #[test]
    fn recorded_content_is_the_same_anywhere_and_checked_in_any_granule() {
        for granule in [512, 4096] {
            let mut disk = MemoryDisk::new(vec![7; 5 * 4096]);
            let baseline = Baseline::of_disk(&mut disk, granule).unwrap();
            let mut oracle = Oracle::new(baseline, &LoadOptions::default());
            let per_block = 4096 / granule as usize;
            let mut data = vec![1; 3 * 4096];
            let states = oracle.make(4096, &mut data, Some(&[5, 0, 5]));
            oracle.wrote(per_block..4 * per_block, &states);
            assert_eq!(data[..4096], data[8192..]);
            assert!(is_zero(&data[4096..8192]) && !is_zero(&data[..512]));
            assert_eq!(check(&mut oracle, 4096, &data), None);
            data[4096 + 700] = 1;
            let wrong = check(&mut oracle, 4096, &data).unwrap();
            assert_eq!(wrong.1, Content::Recorded(0));
            // What does not fit is made as if nothing had been recorded.
            let mut short = vec![0; 512.max(granule as usize)];
            let number: &[u32] = if granule == 512 { &[5] } else { &[5, 6] };
            let states = oracle.make(0, &mut short, Some(number));
            assert!(matches!(states, States::Same(_)));
        }
    }
}
