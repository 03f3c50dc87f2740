//! Where a server's data lies: extents spread over the disk, each with a few blocks of metadata and files after
//! them, and a journal and logs in places of their own.

use std::collections::BTreeSet;

use super::server::{Server, blocks};
use crate::rng::Rng;

/// Blocks of the longest extent: 2 MiB.
const EXTENT_MAX: u64 = 512;
/// Blocks of the shortest.
const EXTENT_MIN: u64 = 4;
/// Extents that each part of the data has at least, if it has so many blocks.
const EXTENTS_MIN: u64 = 8;
/// Of an extent's blocks, one in so many is metadata, at its start.
const BLOCKS_PER_HEAD: u64 = 16;
/// Blocks of the longest and the shortest file; lengths are evenly distributed by their logarithm.
const FILE_MAX: u64 = 256;
const FILE_MIN: u64 = 4;
/// Files that are read or written one after the other: a directory.
const GROUP_FILES: usize = 6;
/// Share of what is only written that is the journal, and that is logs.
const JOURNAL_SHARE: f64 = 0.10;
const LOGS_SHARE: f64 = 0.10;
/// Logs.
const LOGS: u64 = 4;

/// Some blocks that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Files that belong together, in the order of their addresses.
pub(super) type Group = Vec<Run>;

/// What is where.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) journal: Vec<Run>,
    pub(super) logs: Vec<Run>,
    /// Metadata that is written, in random order.
    pub(super) hot_written: Vec<u64>,
    /// Metadata that is read, in random order.
    pub(super) hot_read: Vec<u64>,
    pub(super) written: Vec<Group>,
    pub(super) read: Vec<Group>,
    pub(super) written_extents: Vec<Run>,
    pub(super) read_extents: Vec<Run>,
    /// Extents that are read and written, by their start.
    shared: std::collections::BTreeMap<u64, u64>,
}

impl Layout {
    /// Lays out `server` on a disk of so many blocks.
    pub(super) fn new(server: &Server, disk_blocks: u64, rng: &mut Rng) -> Self {
        let share = |share: f64| share_of(disk_blocks, share);
        let (read, written) = (share(server.read_share), share(server.written_share));
        let both = (read + written).saturating_sub(share(server.touched_share));
        let mut space = Space::new(disk_blocks);
        let mut layout = Self::default();
        let only_written = written.saturating_sub(both).max(4);
        let journal = share_of(only_written, JOURNAL_SHARE);
        layout.journal = space.extents(journal, 1, rng);
        let logs = share_of(only_written, LOGS_SHARE).max(LOGS);
        layout.logs = space.extents(logs, LOGS, rng);
        let rest = only_written.saturating_sub(journal + logs).max(1);
        for extent in space.extents(rest, EXTENTS_MIN, rng) {
            layout.add_written(extent, rng);
        }
        for extent in space.extents(both.max(1), EXTENTS_MIN, rng) {
            layout.shared.insert(extent.start, extent.len);
            // Files are the same for both, so both are cut with the same draws.
            let mut again = rng.clone();
            layout.add_written(extent, rng);
            layout.add_read(extent, &mut again);
        }
        for extent in space.extents(read.saturating_sub(both).max(1), EXTENTS_MIN, rng) {
            layout.add_read(extent, rng);
        }
        rng.shuffle(&mut layout.hot_written);
        rng.shuffle(&mut layout.hot_read);
        rng.shuffle(&mut layout.written);
        rng.shuffle(&mut layout.read);
        layout
    }

    /// Whether a block is among those that are read and written.
    pub(super) fn is_shared(&self, block: u64) -> bool {
        self.shared
            .range(..=block)
            .next_back()
            .is_some_and(|(start, len)| block - start < *len)
    }

    fn add_written(&mut self, extent: Run, rng: &mut Rng) {
        let head = head_blocks(extent);
        self.hot_written.extend(extent.start..extent.start + head);
        self.written.extend(groups(extent, head, rng));
        self.written_extents.push(extent);
    }

    fn add_read(&mut self, extent: Run, rng: &mut Rng) {
        let head = head_blocks(extent);
        self.hot_read.extend(extent.start..extent.start + head);
        self.read.extend(groups(extent, head, rng));
        self.read_extents.push(extent);
    }
}

fn head_blocks(extent: Run) -> u64 {
    extent.len.div_ceil(BLOCKS_PER_HEAD)
}

/// The files of an extent after its head.
fn groups(extent: Run, head: u64, rng: &mut Rng) -> Vec<Group> {
    let (mut at, end) = (extent.start + head, extent.start + extent.len);
    let mut files = Vec::new();
    while at < end {
        let octaves = blocks(FILE_MAX / FILE_MIN).log2();
        let wanted = FILE_MIN * whole((octaves * rng.unit()).exp2());
        let len = wanted.min(end - at);
        files.push(Run { start: at, len });
        at += len;
    }
    files.chunks(GROUP_FILES).map(<[Run]>::to_vec).collect()
}

/// The disk's cells, of which some are taken.
struct Space {
    cell: u64,
    cells: u64,
    taken: BTreeSet<u64>,
}

impl Space {
    fn new(disk_blocks: u64) -> Self {
        // A 256th of a small disk.
        let cell = floor_power_of_two(disk_blocks / 256).clamp(EXTENT_MIN, EXTENT_MAX);
        Self {
            cell,
            cells: disk_blocks / cell,
            taken: BTreeSet::new(),
        }
    }

    /// So many blocks in at least `count_min` extents, if there are so many, in random places.
    fn extents(&mut self, blocks: u64, count_min: u64, rng: &mut Rng) -> Vec<Run> {
        let len = floor_power_of_two(blocks.div_ceil(count_min)).clamp(1, self.cell);
        let mut left = blocks;
        let mut runs = Vec::new();
        while left > 0 && (self.taken.len() as u64) < self.cells {
            let cell = rng.below(self.cells);
            if self.taken.insert(cell) {
                let len = len.min(left);
                left -= len;
                runs.push(Run {
                    start: cell * self.cell,
                    len,
                });
            }
        }
        runs
    }
}

const fn floor_power_of_two(value: u64) -> u64 {
    if value == 0 { 1 } else { 1 << value.ilog2() }
}

/// A share of a count, at least 1.
#[expect(
    clippy::cast_precision_loss,
    reason = "blocks of a disk are below 2^53"
)]
pub(super) fn share_of(count: u64, share: f64) -> u64 {
    whole(count as f64 * share).max(1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count that was a count before it was scaled"
)]
fn whole(value: f64) -> u64 {
    value.round() as u64
}
