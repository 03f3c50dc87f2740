//! `flimcd`: copy what will stay as it is, switch, then bring the rest in the order it is needed.
//!
//! Liu, Jiang, Yang 2015 (the FlimCD paper) for the hybrid of pre-copy and post-copy; the criterion is ours.
//! Let `T` be the time to send all that is pending. A block that is written `λ` times a second will be
//! written again before the switch with probability `1 - exp(-λT)`; sending it now is wasted then. So
//! a chunk is sent before the switch only while that probability is below one half, coldest first, in sequential
//! runs: regions where nothing is written, then chunks that are not, then those that probably survive. Writes
//! have neighbours, so that a region tells within a tenth of a second what a chunk tells within many. As `T` shrinks with what is pending, chunks that were too hot come
//! within reach; when none is left that will probably survive, another round would not pay, and it is
//! time to switch. After the switch the hottest chunks go first, because what was written much is read
//! soon, then the rest, from where the guest last waited.

use std::time::Duration;

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ChunkIndex, Time};

use super::{
    Policy, View,
    cursor::{Cursor, in_chunk},
};

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
    cursor: Cursor,
    /// Hot chunks that the target misses, hottest last.
    hot: Vec<BlockIndex>,
    /// Nothing as cold as this is pending, as far as known, until the time: cold regions, cold chunks.
    none_until: [Time; 2],
    /// Nothing is worth sending, as far as known, until this time.
    dry_until: Option<Time>,
}

impl Flimcd {
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

    /// The next run in a chunk that is at most so hot.
    fn next_below(&mut self, view: &View<'_>, heat_max: f64) -> Option<BlockRange> {
        self.cursor.next(view.pending, |run| {
            view.write_heat.get(BlockIndex(run.start).chunk()) <= heat_max
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
    (region * REGION_CHUNKS..(region + 1) * REGION_CHUNKS)
        .all(|chunk| view.write_heat.get(ChunkIndex(chunk)) == 0.0)
}

/// The heat of a chunk above which one of its blocks will probably be written before the switch.
fn heat_limit(view: &View<'_>) -> f64 {
    // A decayed count of events at rate r settles at r × half-life ÷ ln 2; while counting is young it has
    // got only a part of the way.
    let half_life_s = crate::HEAT_HALF_LIFE.as_secs_f64();
    let age_s = view.now.since(view.heat_since).as_secs_f64();
    let settled = 1.0 - (-age_s / half_life_s).exp2();
    let rate_max = EXPECTED_WRITES_MAX / view.time_to_send_pending().as_secs_f64().max(1e-3);
    #[expect(clippy::cast_precision_loss, reason = "16")]
    let per_chunk = rate_max * BLOCKS_PER_CHUNK as f64;
    per_chunk * settled * half_life_s / std::f64::consts::LN_2
}

impl Policy for Flimcd {
    fn name(&self) -> &'static str {
        "flimcd"
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if self.dry_until.is_some_and(|until| view.now < until) {
            return None;
        }
        self.dry_until = None;
        if let Some(run) = self.next_cold(view) {
            return Some(run);
        }
        let next = self.next_below(view, heat_limit(view));
        if next.is_none() {
            self.dry_until = Some(view.now + SEARCH_INTERVAL);
        }
        next
    }

    fn is_ready(&mut self, _view: &View<'_>) -> bool {
        self.dry_until.is_some()
    }

    fn begin_push(&mut self, view: &View<'_>) {
        let mut hot: Vec<(f64, BlockIndex)> = Vec::new();
        let mut at = 0;
        while let Some(run) = view.pending.next_run(at, u64::MAX)
            && hot.len() < HOT_CHUNKS_MAX
        {
            let chunk = BlockIndex(run.start).chunk();
            let heat = view.write_heat.get(chunk);
            if heat > 0.0 {
                hot.push((heat, BlockIndex(run.start)));
            }
            at = chunk.blocks().end;
        }
        hot.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        self.hot = hot.into_iter().map(|(_, block)| block).collect();
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        while let Some(&block) = self.hot.last() {
            if let Some(run) = in_chunk(view.pending, block) {
                return Some(run);
            }
            self.hot.pop();
        }
        self.cursor.next(view.pending, |_| true)
    }

    fn on_demand(&mut self, range: BlockRange) {
        self.cursor.jump(BlockIndex(range.end));
    }
}

#[cfg(test)]
mod tests {
    use flimcd_core::{BlockSet, Heat, VolumeSize};

    use super::*;
    use crate::{HEAT_HALF_LIFE, LinkEstimate};

    const CHUNKS: u64 = 8;

    /// The chunks that go before the switch, in order, when `heat` events were counted on each and the link
    /// carries `chunks_per_sec` whole chunks.
    fn check(heat: [u64; 8], chunks_per_sec: u64, sent: &[u64]) {
        let size = VolumeSize::new(CHUNKS * flimcd_core::CHUNK_SIZE).unwrap();
        let mut write_heat = Heat::new(size, HEAT_HALF_LIFE, Time::ZERO);
        let now = Time::ZERO + HEAT_HALF_LIFE / 2;
        for (chunk, events) in (0..).map(ChunkIndex).zip(heat) {
            write_heat.add(chunk, events, now);
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
                write_heat: &write_heat,
                heat_since: Time::ZERO,
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
