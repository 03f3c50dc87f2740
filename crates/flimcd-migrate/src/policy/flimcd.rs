//! `flimcd`: copy what will stay as it is, switch, then bring the rest in the order it is needed.
//!
//! Liu, Jiang, Yang 2015 (the FlimCD paper) for the hybrid of pre-copy and post-copy, the order by heat and the prefetch around
//! missing blocks; the criteria are ours.
//!
//! # Before the switch
//! Let `T` be the time to send all that is pending. A block that is written `λ` times a second will be
//! written again before the switch with probability `1 - exp(-λT)`; sending it now is wasted then. So
//! a chunk is sent before the switch only while that probability is below one half, coldest first, in sequential
//! runs: regions where nothing is written, then chunks that are not, then those that probably survive. Writes
//! have neighbours, so that a region tells within a tenth of a second what a chunk tells within many. As `T` shrinks with
//! what is pending, chunks that were too hot come within reach; when none is left that will probably survive, another round would
//! not pay, and it is time to switch.
//!
//! # After it
//! What a guest waits for goes at once, then what it will probably ask for next (see the module `prefetch`), then the rest, by
//! how many misses it saves: a chunk that is read `r` times and written `w` times a second is next touched by a read with
//! probability `r / (r + w)`, since a write of whole blocks needs nothing. So chunks go in the order of `r² / (r + w)`, and those
//! that nobody reads come last, from where the guest last waited.
//!
//! Left out for comparisons: without `order` all goes once in the order of addresses, then the guest moves; without `prefetch` only
//! what a guest waits for and what is pushed goes.

use std::time::Duration;

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ChunkIndex, Time};

use super::{
    Part, Policy, Prediction, View,
    cursor::{Cursor, Ordered},
};
use crate::prefetch::Prefetch;

/// `ln 2`: expected writes before the switch at which a rewrite is as likely as not.
const EXPECTED_WRITES_MAX: f64 = std::f64::consts::LN_2;
/// Chunks that are looked at together before there is time to know each: 16 MiB.
const REGION_CHUNKS: u64 = 256;
/// A search of the whole volume that found nothing is not repeated before this has passed.
const SEARCH_INTERVAL: Duration = Duration::from_millis(50);
/// Chunks that are ordered by heat at the switch: 8 bytes each, 16 GiB of hot volume.
const HOT_CHUNKS_MAX: usize = 1 << 18;

#[derive(Default)]
pub(super) struct Flimcd {
    without_dedup: bool,
    without_order: bool,
    prefetch: Option<Prefetch>,
    cursor: Cursor,
    /// Chunks that the target misses and its guest will read.
    hot: Ordered,
    /// Nothing as cold as this is pending, as far as known, until the time: cold regions, cold chunks.
    none_until: [Time; 2],
    /// Nothing is worth sending, as far as known, until this time.
    dry_until: Option<Time>,
}

impl Flimcd {
    pub(super) fn new(without: &[Part]) -> Self {
        Self {
            without_dedup: without.contains(&Part::Dedup),
            without_order: without.contains(&Part::Order),
            prefetch: (!without.contains(&Part::Prefetch)).then(Prefetch::default),
            ..Self::default()
        }
    }

    /// The next run in a region where nothing has been written lately.
    fn next_in_cold_region(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let mut known: Option<(u64, bool)> = None;
        self.cursor.next(view.pending, |run| {
            let region = BlockIndex(run.start).chunk().0 / REGION_CHUNKS;
            match known {
                Some((of, is_cold)) if of == region => is_cold,
                _ => {
                    let is_cold = is_cold_region(view, region);
                    known = Some((region, is_cold));
                    is_cold
                }
            }
        })
    }

    /// The next run in a chunk of which at most so many blocks are written in a second.
    fn next_below(&mut self, view: &View<'_>, rate_max: f64) -> Option<BlockRange> {
        self.cursor.next(view.pending, |run| {
            view.heat
                .write_rate(BlockIndex(run.start).chunk(), view.now)
                <= rate_max
        })
    }

    /// As cold as it gets: a region without writes, then a chunk without.
    fn next_cold(&mut self, view: &View<'_>) -> Option<BlockRange> {
        for level in 0..self.none_until.len() {
            if view.now < self.none_until[level] {
                continue;
            }
            let next = match level {
                0 => self.next_in_cold_region(view),
                _ => self.next_below(view, 0.0),
            };
            if next.is_some() {
                return next;
            }
            self.none_until[level] = view.now + SEARCH_INTERVAL;
        }
        None
    }
}

fn is_cold_region(view: &View<'_>, region: u64) -> bool {
    !(region * REGION_CHUNKS..(region + 1) * REGION_CHUNKS)
        .any(|chunk| view.heat.is_written(ChunkIndex(chunk)))
}

/// Blocks of a chunk that may be written in a second while one of them will probably stay as it is until the switch.
fn write_rate_max(view: &View<'_>) -> f64 {
    let per_block = EXPECTED_WRITES_MAX / view.time_to_send_pending().as_secs_f64().max(1e-3);
    #[expect(clippy::cast_precision_loss, reason = "16")]
    let per_chunk = per_block * BLOCKS_PER_CHUNK as f64;
    per_chunk
}

/// Misses in a second that a chunk saves by being there; `None` if nobody reads it.
fn worth(view: &View<'_>, chunk: ChunkIndex) -> Option<f64> {
    let reads = view.heat.read_rate(chunk, view.now);
    let writes = view.heat.write_rate(chunk, view.now);
    (reads > 0.0).then(|| reads * reads / (reads + writes))
}

impl Policy for Flimcd {
    fn name(&self) -> &'static str {
        "flimcd"
    }

    fn uses_library(&self) -> bool {
        !self.without_dedup
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if self.dry_until.is_some_and(|until| view.now < until) {
            return None;
        }
        self.dry_until = None;
        let next = if self.without_order {
            let next = self.cursor.next(view.pending, |_| true);
            next.filter(|_| self.cursor.rounds() == 0)
        } else {
            self.next_cold(view)
                .or_else(|| self.next_below(view, write_rate_max(view)))
        };
        if next.is_none() {
            self.dry_until = Some(view.now + SEARCH_INTERVAL);
        }
        next
    }

    fn is_ready(&mut self, _view: &View<'_>) -> bool {
        self.dry_until.is_some()
    }

    fn predict(&mut self, view: &View<'_>) -> Option<Prediction> {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let blocks = (view.pending.count() + view.in_flight_blocks) as f64;
        let bytes = blocks * view.bytes_per_block;
        let duration = view.time_to_send_pending();
        // What is read is pushed first, so that a chunk is missing for as long as those before it take.
        let mut hot: Vec<(f64, f64, u64)> = Vec::new();
        let mut at = 0;
        while let Some(run) = view.pending.next_run(at, u64::MAX)
            && hot.len() < HOT_CHUNKS_MAX
        {
            let chunk = BlockIndex(run.start).chunk();
            let pending: u64 = view
                .pending
                .runs_in(chunk.blocks())
                .map(BlockRange::len)
                .sum();
            hot.extend(
                worth(view, chunk)
                    .map(|worth| (worth, view.heat.read_rate(chunk, view.now), pending)),
            );
            at = chunk.blocks().end;
        }
        hot.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (mut at_s, mut misses) = (0.0, 0.0);
        for (_, reads, pending) in hot {
            #[expect(clippy::cast_precision_loss, reason = "at most 16")]
            let pending = pending as f64;
            at_s += pending * view.bytes_per_block / view.link.rate_or_default();
            // The first miss brings the rest of the chunk.
            #[expect(clippy::cast_precision_loss, reason = "16")]
            let share = pending / BLOCKS_PER_CHUNK as f64;
            misses += 1.0 - (-reads * share * at_s).exp();
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate"
        )]
        Some(Prediction {
            bytes: bytes as u64,
            misses,
            duration,
        })
    }

    fn on_read(&mut self, now: Time, range: BlockRange) {
        if let Some(prefetch) = &mut self.prefetch {
            prefetch.read(now, range);
        }
    }

    fn begin_push(&mut self, view: &View<'_>) {
        if let Some(prefetch) = &mut self.prefetch {
            prefetch.begin();
        }
        if !self.without_order {
            self.hot = Ordered::by_key(view.pending, HOT_CHUNKS_MAX, |chunk| worth(view, chunk));
        }
    }

    fn next_prefetch(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.prefetch.as_mut()?.next(view.pending)
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let next = self.hot.next(view.pending);
        next.or_else(|| self.cursor.next(view.pending, |_| true))
    }

    fn on_demand(&mut self, now: Time, range: BlockRange) {
        if let Some(prefetch) = &mut self.prefetch {
            prefetch.missed(now, range);
        }
        if !self.without_order {
            self.cursor.jump(BlockIndex(range.end));
        }
    }
}

#[cfg(test)]
mod tests {
    use flimcd_core::{BlockSet, VolumeSize};

    use super::*;
    use crate::{HEAT_HALF_LIFE, LinkEstimate, policy::HeatMaps};

    const CHUNKS: u64 = 8;

    /// The chunks that go before the switch, in order, when `heat` events were counted on each and the link
    /// carries `chunks_per_sec` whole chunks.
    fn check(heat: [u64; 8], chunks_per_sec: u64, sent: &[u64]) {
        let size = VolumeSize::new(CHUNKS * flimcd_core::CHUNK_SIZE).unwrap();
        let mut maps = HeatMaps::new(size, Time::ZERO);
        let now = Time::ZERO + HEAT_HALF_LIFE / 2;
        for (chunk, events) in (0..).map(ChunkIndex).zip(heat) {
            for _ in 0..events {
                maps.written(
                    BlockRange::single(BlockIndex(chunk.0 * BLOCKS_PER_CHUNK)),
                    now,
                );
            }
        }
        let mut pending = BlockSet::full(size.blocks());
        let mut policy = Flimcd::default();
        let mut got = Vec::new();
        loop {
            let rate = chunks_per_sec * flimcd_core::CHUNK_SIZE;
            let view = View {
                now,
                size,
                pending: &pending,
                in_flight_blocks: 0,
                heat: &maps,
                link: LinkEstimate {
                    rate_bytes_per_sec: Some(rate),
                    rtt: None,
                },
                bytes_per_block: 4096.0,
            };
            assert!(!policy.is_ready(&view));
            let Some(run) = policy.next_precopy(&view) else {
                assert!(policy.is_ready(&view));
                break;
            };
            got.push(BlockIndex(run.start).chunk().0);
            pending.remove_range(run);
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn never_written_chunks_go_first_and_hot_ones_wait_for_the_switch() {
        let heat = [0, 1, 0, 4000, 0, 1, 0, 0];
        check(heat, 1, &[0, 2, 4, 6, 7, 1, 5]);
    }

    #[test]
    fn a_fast_link_outruns_the_writes() {
        check(
            [9, 9, 9, 9, 9, 9, 9, 9],
            1_000_000,
            &[0, 1, 2, 3, 4, 5, 6, 7],
        );
        check([90, 90, 90, 90, 90, 90, 90, 90], 1, &[]);
    }
}
