//! What a plan reads, piece by piece, as a migration would read it.

use flimcd_core::{BLOCKS_PER_CHUNK, BlockRange, BlockSet, limits};

/// Chunks that are read together at least and at most: see the source's machine, which does the same.
const CHUNKS_MIN: u64 = 4;
/// See [`CHUNKS_MIN`].
const CHUNKS_MAX: u64 = limits::MAX_BLOCKS_PER_MESSAGE / BLOCKS_PER_CHUNK;

/// Blocks that are to be looked at, in ascending order.
pub(super) struct Todo {
    set: BlockSet,
    /// Where each volume lies: no piece goes over the end of one.
    places: Vec<BlockRange>,
    from: u64,
    /// Chunks that the next piece may have.
    chunks: u64,
}

impl Todo {
    /// All of `set`.
    pub(super) fn new(set: BlockSet, places: Vec<BlockRange>) -> Self {
        Self {
            set,
            places,
            from: 0,
            chunks: CHUNKS_MIN,
        }
    }

    /// Blocks in all.
    pub(super) fn blocks(&self) -> u64 {
        self.set.count()
    }

    /// The last piece was all the same as what the target has, or was not: the next ones are larger, or smaller.
    pub(super) fn adapt(&mut self, is_same: bool) {
        self.chunks = if is_same {
            (self.chunks * 2).min(CHUNKS_MAX)
        } else {
            (self.chunks / 2).max(CHUNKS_MIN)
        };
    }

    fn next(&mut self) -> Option<BlockRange> {
        let first = self.set.next_run(self.from, self.set.capacity())?;
        let place = self.places.iter().find(|place| place.end > first.start);
        let run_end = place.map_or(first.end, |place| first.end.min(place.end));
        let floor = |block: u64| block / BLOCKS_PER_CHUNK * BLOCKS_PER_CHUNK;
        let mut end = (floor(first.start) + self.chunks * BLOCKS_PER_CHUNK).min(run_end);
        // Only whole chunks are compared with a table: what is cut goes by itself.
        if !first.start.is_multiple_of(BLOCKS_PER_CHUNK) {
            end = end.min(first.start.next_multiple_of(BLOCKS_PER_CHUNK));
        } else if floor(end) > first.start {
            end = floor(end);
        }
        self.from = end;
        Some(BlockRange::new(first.start, end))
    }

    /// Draws up to `count` pieces, each as likely as any other; also says how many there are.
    fn draw(mut self, count: usize) -> (Vec<BlockRange>, u64) {
        let mut drawn: Vec<BlockRange> = Vec::new();
        let mut seen = 0u64;
        while let Some(piece) = self.next() {
            seen += 1;
            if drawn.len() < count {
                drawn.push(piece);
            } else if let Ok(at) = usize::try_from(rand::random_range(0..seen))
                && let Some(place) = drawn.get_mut(at)
            {
                *place = piece;
            }
        }
        drawn.sort_by_key(|piece| piece.start);
        (drawn, seen)
    }
}

/// The pieces of a plan.
pub(super) enum Pieces {
    /// All of them.
    All(Todo),
    /// Some of them, the next one last.
    Sample(Vec<BlockRange>),
}

impl Pieces {
    /// A sample of `todo`, and how many pieces that has.
    pub(super) fn sample(todo: Todo, count: usize) -> (Self, u64) {
        let (mut drawn, all) = todo.draw(count);
        drawn.reverse();
        (Self::Sample(drawn), all)
    }

    /// Blocks of a sample that are left; of all pieces none are counted.
    pub(super) fn sampled_blocks(&self) -> u64 {
        match self {
            Self::All(_) => 0,
            Self::Sample(left) => left.iter().map(|piece| piece.len()).sum(),
        }
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Option<BlockRange> {
        match self {
            Self::All(todo) => todo.next(),
            Self::Sample(left) => left.pop(),
        }
    }

    /// See [`Todo::adapt`].
    pub(super) fn adapt(&mut self, is_same: bool) {
        if let Self::All(todo) = self {
            todo.adapt(is_same);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(runs: &[(u64, u64)], blocks: u64) -> BlockSet {
        let mut set = BlockSet::new(blocks);
        for &(start, len) in runs {
            let start = start.min(blocks);
            set.insert_range(BlockRange::new(start, (start + len).min(blocks)));
        }
        set
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_set(
            runs in prop::collection::vec((0u64..5000, 1u64..900), 0..20),
            cut in 1u64..5000, grows in prop::collection::vec(any::<bool>(), 1..50),
        ) {
            let todo = set(&runs, 5000);
            let places = vec![BlockRange::new(0, cut), BlockRange::new(cut, 5000)];
            let mut pieces = Pieces::All(Todo::new(todo.clone(), places.clone()));
            let mut seen = BlockSet::new(5000);
            let mut grows = grows.iter().cycle();
            while let Some(piece) = pieces.next() {
                prop_assert!(!piece.is_empty() && piece.len() <= limits::MAX_BLOCKS_PER_MESSAGE);
                prop_assert!(places.iter().any(|p| p.start <= piece.start && piece.end <= p.end));
                prop_assert_eq!(seen.insert_range(piece), piece.len());
                pieces.adapt(*grows.next().unwrap());
            }
            prop_assert!(seen == todo);

            let (mut drawn, all) = Pieces::sample(Todo::new(todo.clone(), places), 10);
            let blocks = drawn.sampled_blocks();
            let (mut count, mut counted) = (0, 0);
            let mut end = 0;
            while let Some(piece) = drawn.next() {
                prop_assert!(piece.start >= end && todo.contains_all(piece));
                end = piece.end;
                count += 1;
                counted += piece.len();
            }
            prop_assert_eq!(counted, blocks);
            prop_assert_eq!(count, all.min(10));
        }
    }
}
