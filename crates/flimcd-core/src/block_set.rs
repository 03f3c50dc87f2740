//! A set of the blocks of one volume.
//!
//! The volume is cut into pages of 32,768 blocks (128 MiB). A page where no block, or every block, is in
//! the set costs 16 bytes; a mixed one a 4 KiB bitmap. So a 1 TiB volume costs 128 KiB while a set is
//! empty or full, and 32 MiB at the worst.

use std::fmt;

use crate::{BlockIndex, BlockRange};

/// Blocks on one page.
const PAGE_BLOCKS: u64 = 32_768;
const WORDS: usize = 512;

#[derive(Clone)]
enum Page {
    Empty,
    Full,
    /// Some blocks but not all: their bits and how many they are.
    Mixed(Box<[u64; WORDS]>, u32),
}

/// A set of blocks, all below the number of blocks that it was made for.
///
/// Blocks at or beyond that number are never in the set: inserting one is a caller's bug and panics,
/// asking for one answers no.
#[derive(Clone)]
pub struct BlockSet {
    pages: Vec<Page>,
    blocks: u64,
    count: u64,
}

impl BlockSet {
    /// The empty set over a volume of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        let pages = vec![Page::Empty; to_index(blocks.div_ceil(PAGE_BLOCKS))];
        Self {
            pages,
            blocks,
            count: 0,
        }
    }

    /// Every block of a volume of `blocks` blocks.
    #[must_use]
    pub fn full(blocks: u64) -> Self {
        let pages = vec![Page::Full; to_index(blocks.div_ceil(PAGE_BLOCKS))];
        Self {
            pages,
            blocks,
            count: blocks,
        }
    }

    /// Number of blocks of the volume, in the set or not.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.blocks
    }

    /// Number of blocks in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether no block is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `block` is in the set.
    #[must_use]
    pub fn contains(&self, block: BlockIndex) -> bool {
        if block.0 >= self.blocks {
            return false;
        }
        match &self.pages[to_index(block.0 / PAGE_BLOCKS)] {
            Page::Empty => false,
            Page::Full => true,
            Page::Mixed(words, _) => {
                let bit = block.0 % PAGE_BLOCKS;
                words[to_index(bit / 64)] >> (bit % 64) & 1 == 1
            }
        }
    }

    /// Whether a block of `range` is in the set.
    #[must_use]
    pub fn intersects(&self, range: BlockRange) -> bool {
        self.next_run(range.start, range.end).is_some()
    }

    /// Whether every block of `range` is in the set; true for an empty range.
    #[must_use]
    pub fn contains_all(&self, range: BlockRange) -> bool {
        range.is_empty() || self.next_run(range.start, range.end) == Some(range)
    }

    /// Puts one block in; false when it was there.
    pub fn insert(&mut self, block: BlockIndex) -> bool {
        self.insert_range(BlockRange::single(block)) == 1
    }

    /// Takes one block out; false when it was not there.
    pub fn remove(&mut self, block: BlockIndex) -> bool {
        self.remove_range(BlockRange::single(block)) == 1
    }

    /// Puts a run in and says how many blocks are new.
    ///
    /// # Panics
    /// When the range reaches beyond the volume.
    pub fn insert_range(&mut self, range: BlockRange) -> u64 {
        assert!(
            range.is_empty() || range.end <= self.blocks,
            "{range:?} is beyond the volume"
        );
        let added = self.change(range, true);
        self.count += added;
        added
    }

    /// Takes a run out and says how many blocks went.
    pub fn remove_range(&mut self, range: BlockRange) -> u64 {
        let range = range.intersect(BlockRange::new(0, self.blocks));
        let removed = self.change(range, false);
        self.count -= removed;
        removed
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.pages.fill(Page::Empty);
        self.count = 0;
    }

    /// Sets or clears the bits of `range` and says how many changed.
    fn change(&mut self, range: BlockRange, value: bool) -> u64 {
        let mut changed = 0;
        let mut at = range.start;
        while at < range.end {
            let number = at / PAGE_BLOCKS;
            let page_start = number * PAGE_BLOCKS;
            let page_end = (page_start + PAGE_BLOCKS).min(self.blocks);
            let end = range.end.min(page_end);
            let page = &mut self.pages[to_index(number)];
            let uniform = if value { Page::Full } else { Page::Empty };
            match (&*page, value) {
                (Page::Full, true) | (Page::Empty, false) => {}
                (Page::Full | Page::Empty, _) if at == page_start && end == page_end => {
                    *page = uniform;
                    changed += end - at;
                }
                _ => {
                    let full = page_end - page_start;
                    let (words, ones) = mixed(page, full);
                    let bits = change_bits(words, at - page_start, end - page_start, value);
                    *ones = if value { *ones + bits } else { *ones - bits };
                    changed += u64::from(bits);
                    if u64::from(*ones) == if value { full } else { 0 } {
                        *page = uniform;
                    }
                }
            }
            at = end;
        }
        changed
    }

    /// The first run of the set that begins at or after `from`, cut at `limit`. Its blocks are all in
    /// the set and the block before its end is the last one that is, unless `limit` cut it.
    #[must_use]
    pub fn next_run(&self, from: u64, limit: u64) -> Option<BlockRange> {
        let limit = limit.min(self.blocks);
        let start = self.find(from, limit, true)?;
        let end = self.find(start, limit, false).unwrap_or(limit);
        Some(BlockRange::new(start, end))
    }

    /// The first block at or after `from` and below `limit` whose membership is `value`.
    fn find(&self, from: u64, limit: u64, value: bool) -> Option<u64> {
        let mut at = from;
        while at < limit {
            let number = at / PAGE_BLOCKS;
            let next_page = (number + 1) * PAGE_BLOCKS;
            match (&self.pages[to_index(number)], value) {
                (Page::Full, true) | (Page::Empty, false) => return Some(at),
                (Page::Full, false) | (Page::Empty, true) => at = next_page,
                (Page::Mixed(words, _), _) => {
                    let bit = at % PAGE_BLOCKS;
                    let word = words[to_index(bit / 64)];
                    let word = (if value { word } else { !word }) >> (bit % 64);
                    if word == 0 {
                        at += 64 - bit % 64;
                    } else {
                        at += u64::from(word.trailing_zeros());
                        return (at < limit).then_some(at);
                    }
                }
            }
        }
        None
    }

    /// All runs in ascending order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.runs_in(BlockRange::new(0, self.blocks))
    }

    /// The runs inside `range`, in ascending order.
    pub fn runs_in(&self, range: BlockRange) -> impl Iterator<Item = BlockRange> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let run = self.next_run(at, range.end)?;
            at = run.end;
            Some(run)
        })
    }

    /// Number of blocks of `range` in the set.
    #[must_use]
    pub fn count_in(&self, range: BlockRange) -> u64 {
        self.runs_in(range).map(BlockRange::len).sum()
    }

    /// Puts all blocks of `other` in.
    ///
    /// # Panics
    /// When the sets are of volumes of different size.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.blocks, other.blocks, "sets of different volumes");
        for run in other.runs() {
            self.insert_range(run);
        }
    }

    /// Takes all blocks of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for run in other.runs() {
            self.remove_range(run);
        }
    }

    /// Bytes of memory that the set holds.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let mixed = self
            .pages
            .iter()
            .filter(|p| matches!(p, Page::Mixed(..)))
            .count();
        self.pages.capacity() * size_of::<Page>() + mixed * WORDS * 8
    }
}

impl PartialEq for BlockSet {
    fn eq(&self, other: &Self) -> bool {
        self.blocks == other.blocks && self.count == other.count && self.runs().eq(other.runs())
    }
}

impl Eq for BlockSet {}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} ", self.count, self.blocks)?;
        f.debug_list().entries(self.runs().take(16)).finish()
    }
}

fn to_index(n: u64) -> usize {
    usize::try_from(n).expect("a page index fits in memory")
}

/// The page's bits and their count, made first where the page was uniform. `len` is the number of
/// blocks on it.
fn mixed(page: &mut Page, len: u64) -> (&mut [u64; WORDS], &mut u32) {
    if !matches!(page, Page::Mixed(..)) {
        let mut words = Box::new([0; WORDS]);
        let ones = match page {
            Page::Full => change_bits(&mut words, 0, len, true),
            _ => 0,
        };
        *page = Page::Mixed(words, ones);
    }
    match page {
        Page::Mixed(words, ones) => (words, ones),
        Page::Empty | Page::Full => unreachable!("made mixed above"),
    }
}

fn change_bits(words: &mut [u64; WORDS], start: u64, end: u64, value: bool) -> u32 {
    let mut changed = 0;
    let mut at = start;
    while at < end {
        let word = &mut words[to_index(at / 64)];
        let low = at % 64;
        let high = (end - (at - low)).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        let before = *word;
        *word = if value { before | mask } else { before & !mask };
        changed += (before ^ *word).count_ones();
        at = at - low + 64;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 2 * PAGE_BLOCKS + 777;

    /// Positions near page and word edges are as likely as all the others together.
    fn position() -> impl Strategy<Value = u64> {
        prop_oneof![
            0..BLOCKS,
            (0u64..3, 0u64..130).prop_map(|(p, o)| (p * PAGE_BLOCKS + o).saturating_sub(65)),
            Just(BLOCKS)
        ]
        .prop_map(|p| p.min(BLOCKS))
    }

    proptest! {
        #[test]
        fn behaves_as_a_vector_of_bits(ops in prop::collection::vec((any::<bool>(), position(), position()), 1..12)) {
            let mut set = BlockSet::new(BLOCKS);
            let mut want = vec![false; usize::try_from(BLOCKS).unwrap()];
            for (put, a, b) in ops {
                let range = BlockRange::new(a.min(b), a.max(b));
                let bits = &mut want[to_index(range.start)..to_index(range.end)];
                let changing = bits.iter().filter(|&&bit| bit != put).count() as u64;
                bits.fill(put);
                let changed =
                    if put { set.insert_range(range) } else { set.remove_range(range) };
                prop_assert_eq!(changed, changing);
            }
            prop_assert_eq!(set.count(), want.iter().filter(|&&b| b).count() as u64);
            let mut got = vec![false; want.len()];
            let mut last_end = None;
            for run in set.runs() {
                prop_assert!(!run.is_empty() && last_end.is_none_or(|end| end < run.start));
                last_end = Some(run.end);
                got[to_index(run.start)..to_index(run.end)].fill(true);
                prop_assert!(set.contains_all(run));
            }
            prop_assert_eq!(&got, &want);
            for probe in [0, 63, 64, PAGE_BLOCKS - 1, PAGE_BLOCKS, BLOCKS - 1] {
                prop_assert_eq!(set.contains(BlockIndex(probe)), want[to_index(probe)]);
            }
            prop_assert!(!set.contains(BlockIndex(BLOCKS)));
        }

        #[test]
        fn union_and_difference(a in prop::collection::vec((position(), 0u64..300), 0..8),
                                b in prop::collection::vec((position(), 0u64..300), 0..8)) {
            let make = |runs: &[(u64, u64)]| {
                let mut set = BlockSet::new(BLOCKS);
                for &(start, len) in runs {
                    set.insert_range(BlockRange::new(start, (start + len).min(BLOCKS)));
                }
                set
            };
            let (left, right) = (make(&a), make(&b));
            let mut union = left.clone();
            union.union_with(&right);
            let mut difference = union.clone();
            difference.subtract(&right);
            for block in (0..BLOCKS).map(BlockIndex) {
                let (l, r) = (left.contains(block), right.contains(block));
                prop_assert_eq!(union.contains(block), l || r);
                prop_assert_eq!(difference.contains(block), l && !r);
            }
        }
    }

    #[test]
    fn a_uniform_tebibyte_is_small() {
        let tebibyte = (1u64 << 40) / crate::BLOCK_SIZE;
        let mut set = BlockSet::full(tebibyte);
        assert!(set.memory_bytes() <= 128 << 10, "{}", set.memory_bytes());
        set.remove(BlockIndex(5));
        set.insert(BlockIndex(5));
        assert!(
            set.memory_bytes() <= 128 << 10,
            "a page that is full again gives its bitmap back"
        );
        assert_eq!(set.count_in(BlockRange::new(3, 9)), 6);
    }

    #[test]
    #[should_panic(expected = "beyond the volume")]
    fn inserting_beyond_the_volume_is_a_bug() {
        BlockSet::new(10).insert(BlockIndex(10));
    }
}
