//! What a guest will read next, after the switch.
//!
//! ```text
//!   reads at the source ──► successors                      ┌─ the rest of the chunk that was missed
//!   reads at the target ──► streams ────────► next() ◄──────┼─ the next steps of streams, window by window
//!   faults ─────────────────────┘                           └─ what followed that chunk at the source
//! ```
//! All of it is advice: content that is fetched ahead has to come anyway, so that a wrong guess costs only that something else comes
//! later. Faults go before all of this on the link, so that it never delays one.

mod streams;
mod successors;

use std::collections::VecDeque;

use flimcd_core::{BlockIndex, BlockRange, BlockSet, Time};

use streams::Streams;
use successors::Successors;

/// Runs that wait to be fetched; older ones go.
const WANTED_MAX: usize = 64;
/// How many reads ahead the source's history is followed.
const SUCCESSORS_DEEP: usize = 4;
/// Most blocks that are fetched ahead for one stream: 4 MiB.
const WINDOW_BLOCKS_MAX: u64 = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Prefetch {
    streams: Streams,
    successors: Successors,
    /// Latest first.
    wanted: VecDeque<BlockRange>,
    /// The guest runs at the target.
    follows: bool,
}

impl Prefetch {
    /// The guest has read a run, at either site.
    pub(crate) fn read(&mut self, now: Time, run: BlockRange) {
        if run.is_empty() {
            return;
        }
        self.successors.read(BlockIndex(run.start).chunk());
        if self.follows {
            self.streams.read(now, run, false, WINDOW_BLOCKS_MAX);
        }
    }

    /// The guest runs at the target from now on.
    pub(crate) fn begin(&mut self) {
        self.follows = true;
    }

    /// A guest at the target waits for a run. Its read is told by [`Prefetch::read`] too, later.
    pub(crate) fn missed(&mut self, now: Time, run: BlockRange) {
        if run.is_empty() {
            return;
        }
        let is_of_stream = self.streams.read(now, run, true, WINDOW_BLOCKS_MAX);
        let chunk = BlockIndex(run.start).chunk();
        let mut next = chunk;
        for _ in 0..SUCCESSORS_DEEP {
            let mut after = self.successors.of(next);
            let Some(likely) = after.next() else { break };
            if next == chunk
                && let Some(other) = after.next()
            {
                self.want(other.blocks());
            }
            self.want(likely.blocks());
            next = likely;
        }
        if !is_of_stream {
            self.want(chunk.blocks());
        }
    }

    fn want(&mut self, run: BlockRange) {
        self.wanted.retain(|wanted| *wanted != run);
        self.wanted.push_front(run);
        self.wanted.truncate(WANTED_MAX);
    }

    /// The next pending run inside one chunk that is worth fetching before others.
    pub(crate) fn next(&mut self, pending: &BlockSet) -> Option<BlockRange> {
        let blocks = pending.capacity();
        while let Some(&run) = self.wanted.front() {
            if let Some(found) = first_pending(pending, run) {
                return Some(found);
            }
            self.wanted.pop_front();
        }
        loop {
            let run = self.streams.next(blocks)?;
            // What is only partly there is wanted as a whole: a read needs all of it.
            let Some(found) = first_pending(pending, run) else {
                continue;
            };
            if found.end < run.end {
                self.want(run);
            }
            return Some(found);
        }
    }
}

fn first_pending(pending: &BlockSet, run: BlockRange) -> Option<BlockRange> {
    let end = run.end.min(pending.capacity());
    let found = pending.next_run(run.start.min(end), end)?;
    Some(found.intersect(BlockIndex(found.start).chunk().blocks()))
}

#[cfg(test)]
mod tests {
    use flimcd_core::{BLOCKS_PER_CHUNK, ChunkIndex};

    use super::*;

    fn all(prefetch: &mut Prefetch, pending: &mut BlockSet) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        while let Some(run) = prefetch.next(pending) {
            pending.remove_range(run);
            runs.push((run.start, run.end));
        }
        runs
    }

    #[test]
    fn a_lonely_miss_brings_its_neighbours_and_a_stream_what_follows() {
        let mut prefetch = Prefetch::default();
        prefetch.begin();
        let mut pending = BlockSet::full(10_000);
        pending.remove_range(BlockRange::new(805, 806));
        prefetch.missed(Time::ZERO, BlockRange::new(805, 806));
        assert_eq!(all(&mut prefetch, &mut pending), [(800, 805), (806, 816)]);
        prefetch.missed(Time::ZERO, BlockRange::new(1600, 1632));
        let _ = all(&mut prefetch, &mut pending);
        prefetch.missed(Time::ZERO, BlockRange::new(1632, 1664));
        let got = all(&mut prefetch, &mut pending);
        assert_eq!(got.first(), Some(&(1664, 1680)));
        assert_eq!(got.last(), Some(&(1776, 1792)));
    }

    #[test]
    fn what_followed_at_the_source_is_fetched_too() {
        let chunk = |n: u64| ChunkIndex(n).blocks();
        let mut prefetch = Prefetch::default();
        for n in [3, 50, 20, 90, 3] {
            prefetch.read(Time::ZERO, chunk(n));
        }
        prefetch.begin();
        let mut pending = BlockSet::full(100 * BLOCKS_PER_CHUNK);
        prefetch.missed(Time::ZERO, BlockRange::new(3 * 16 + 1, 3 * 16 + 2));
        let mut got: Vec<u64> = all(&mut prefetch, &mut pending)
            .into_iter()
            .map(|(start, _)| start / BLOCKS_PER_CHUNK)
            .collect();
        got.sort_unstable();
        assert_eq!(got, [3, 20, 50, 90]);
    }
}
