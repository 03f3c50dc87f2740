//! Where requests come from: made up with stated parameters, or a recorded trace.

use std::{sync::Arc, time::Duration};

use flimcd_core::CHUNK_SIZE;

use super::{DiskOp, options::Synthetic};
use crate::rng::Rng;

/// Extents of the working set: long enough for neighbouring chunks to be hot together.
const EXTENT_BYTES: u64 = 4 << 20;

/// A request that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedOp {
    /// What to do.
    pub op: DiskOp,
    /// First byte, a multiple of the granule. 0 for a flush.
    pub offset: u64,
    /// Bytes: a multiple of the granule, or up to the disk's end. 0 for a flush.
    pub length: u32,
    /// Not before the load has been running for this long (pauses do not count).
    pub due: Option<Duration>,
    /// What a write writes, where that was recorded: a number for each block of 4 KiB. Blocks with the
    /// same number have the same bytes anywhere; [`ZERO_CONTENT`] is zeroes. All are below 2^31 - 1. Used
    /// where offset and length are multiples of 4 KiB and the granule is no longer than that;
    /// otherwise, and when it is `None`, the load makes the content.
    pub content: Option<Arc<[u32]>>,
}

/// Number of the recorded content that is all zeroes.
pub const ZERO_CONTENT: u32 = 0;

impl PlannedOp {
    /// A flush as soon as possible.
    pub(crate) const FLUSH: Self = Self {
        op: DiskOp::Flush,
        offset: 0,
        length: 0,
        due: None,
        content: None,
    };

    /// Whether the requests share a byte and their order matters.
    pub(super) const fn conflicts_with(&self, other: &Self) -> bool {
        let overlap = self.offset < other.offset + other.length as u64
            && other.offset < self.offset + self.length as u64;
        overlap && !(matches!(self.op, DiskOp::Read) && matches!(other.op, DiskOp::Read))
    }
}

/// A stream of requests; the same every time, whatever clock and disk do.
pub trait RequestSource: Send {
    /// The next request, `None` at the end.
    fn next_op(&mut self) -> Option<PlannedOp>;
}

/// Endless requests as [`Synthetic`] describes them.
#[derive(Debug)]
pub(super) struct SyntheticSource {
    options: Synthetic,
    rng: Rng,
    size: u64,
    /// Chunks of the working set, hottest first.
    chunks: Vec<u64>,
    /// Probability that one of the first `i + 1` is chosen.
    cumulative: Vec<f64>,
    writes_since_flush: u32,
}

impl SyntheticSource {
    /// Requests to a disk of `size` bytes.
    pub(super) fn new(options: Synthetic, size: u64, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let chunks = working_set(&options, size, &mut rng);
        let mut sum = 0.0;
        let mut cumulative: Vec<f64> = (1..=chunks.len())
            .map(|rank| {
                #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
                let weight = (rank as f64).powf(-options.zipf_exponent);
                sum += weight;
                sum
            })
            .collect();
        for value in &mut cumulative {
            *value /= sum;
        }
        Self {
            options,
            rng,
            size,
            chunks,
            cumulative,
            writes_since_flush: 0,
        }
    }

    fn place(&mut self) -> (u64, u32) {
        let draw = self.rng.unit();
        let rank = self.cumulative.partition_point(|sum| *sum <= draw);
        let chunk = self.chunks[rank.min(self.chunks.len() - 1)];
        let start = chunk * CHUNK_SIZE;
        let request = u64::from(self.options.request_bytes);
        let slots = (CHUNK_SIZE.min(self.size - start)).div_ceil(request).max(1);
        let offset = start + self.rng.below(slots) * request;
        let length = request.min(self.size - offset);
        (
            offset,
            u32::try_from(length).unwrap_or(self.options.request_bytes),
        )
    }
}

/// The chunks that are touched at all, in random order.
fn working_set(options: &Synthetic, size: u64, rng: &mut Rng) -> Vec<u64> {
    let chunks = size.div_ceil(CHUNK_SIZE);
    let per_extent = EXTENT_BYTES / CHUNK_SIZE;
    let mut extents: Vec<u64> = (0..chunks.div_ceil(per_extent)).collect();
    rng.shuffle(&mut extents);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a count, clamped to it"
    )]
    let wanted = ((chunks as f64 * options.working_set_share).round() as u64).clamp(1, chunks);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    let mut set: Vec<u64> = extents
        .iter()
        .flat_map(|extent| extent * per_extent..((extent + 1) * per_extent).min(chunks))
        .take(wanted)
        .collect();
    rng.shuffle(&mut set);
    set
}

impl RequestSource for SyntheticSource {
    fn next_op(&mut self) -> Option<PlannedOp> {
        let every = self.options.flush_every_writes;
        if every > 0 && self.writes_since_flush >= every {
            self.writes_since_flush = 0;
            return Some(PlannedOp::FLUSH);
        }
        let op = if self.rng.chance(self.options.read_share) {
            DiskOp::Read
        } else {
            self.writes_since_flush += 1;
            if self.rng.chance(self.options.zero_share) {
                DiskOp::WriteZeroes
            } else {
                DiskOp::Write
            }
        };
        let (offset, length) = self.place();
        Some(PlannedOp {
            op,
            offset,
            length,
            due: None,
            content: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn ops(options: &Synthetic, size: u64, seed: u64, count: usize) -> Vec<PlannedOp> {
        let mut source = SyntheticSource::new(options.clone(), size, seed);
        (0..count).filter_map(|_| source.next_op()).collect()
    }

    #[test]
    fn the_default_load_has_the_stated_mix_and_working_set() {
        let size = 256 << 20;
        let all = ops(&Synthetic::default(), size, 1, 100_000);
        let reads = all.iter().filter(|op| op.op == DiskOp::Read).count();
        assert!((69_000..71_000).contains(&reads), "{reads}");
        assert!(
            all.iter()
                .all(|op| op.offset + u64::from(op.length) <= size)
        );
        let mut by_chunk = HashMap::new();
        for op in all.iter().filter(|op| op.op != DiskOp::Flush) {
            *by_chunk.entry(op.offset / CHUNK_SIZE).or_insert(0u32) += 1;
        }
        assert!(
            by_chunk.len() <= 1024 && by_chunk.len() > 1000,
            "{}",
            by_chunk.len()
        );
        let hottest = by_chunk.values().max().unwrap();
        assert!(*hottest > 1000, "{hottest}");
        assert_eq!(all, ops(&Synthetic::default(), size, 1, 100_000));
        assert_ne!(all, ops(&Synthetic::default(), size, 2, 100_000));
    }

    #[test]
    fn tiny_and_odd_disks_work() {
        for size in [1u64, 511, 4096, 4097, 65_537] {
            let options = Synthetic {
                zero_share: 0.3,
                ..Synthetic::default()
            };
            for op in ops(&options, size, 1, 1000)
                .iter()
                .filter(|op| op.op != DiskOp::Flush)
            {
                assert!(
                    op.length > 0 && op.offset + u64::from(op.length) <= size,
                    "{op:?}"
                );
            }
        }
    }

    #[test]
    fn exponent_zero_is_uniform() {
        let options = Synthetic {
            zipf_exponent: 0.0,
            working_set_share: 1.0,
            ..Synthetic::default()
        };
        let places: HashSet<u64> = ops(&options, 4 << 20, 1, 20_000)
            .iter()
            .map(|op| op.offset)
            .collect();
        assert!(places.len() > 1000, "{}", places.len());
    }
}
