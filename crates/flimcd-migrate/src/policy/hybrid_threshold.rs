//! `hybrid-threshold`: chunks are pushed until they have been written too often, then left for after the switch.
//!
//! Nicolae and Cappello, "A hybrid local storage transfer scheme for live migration of I/O intensive workloads", HPDC 2012. A
//! chunk that was written [`WRITES_MAX`] times since the migration began is not pushed any more. When nothing else is left the
//! guest moves; what is missing is fetched when it is needed, and prefetched in descending order of how often it was written,
//! because that is what will be accessed.

use std::collections::BTreeMap;

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange};

use super::{
    Policy, View,
    cursor::{Cursor, Ordered},
};

/// The paper's experiments leave a chunk after three writes.
const WRITES_MAX: u32 = 3;

#[derive(Default)]
pub(super) struct HybridThreshold {
    cursor: Cursor,
    /// Writes of each chunk that was written.
    writes: BTreeMap<u64, u32>,
    /// What to prefetch.
    order: Ordered,
    is_dry: bool,
}

impl Policy for HybridThreshold {
    fn name(&self) -> &'static str {
        "hybrid-threshold"
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn on_dirtied(&mut self, run: BlockRange) {
        for chunk in run.start / BLOCKS_PER_CHUNK..run.end.div_ceil(BLOCKS_PER_CHUNK) {
            let writes = self.writes.entry(chunk).or_default();
            *writes = writes.saturating_add(1);
        }
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let writes = &self.writes;
        let next = self.cursor.next(view.pending, |run| {
            let count = writes.get(&BlockIndex(run.start).chunk().0);
            count.is_none_or(|&count| count < WRITES_MAX)
        });
        self.is_dry = next.is_none();
        next
    }

    fn is_ready(&mut self, _view: &View<'_>) -> bool {
        self.is_dry
    }

    fn begin_push(&mut self, view: &View<'_>) {
        self.order = Ordered::by_key(view.pending, usize::MAX, |chunk| {
            self.writes.get(&chunk.0).map(|&writes| f64::from(writes))
        });
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let next = self.order.next(view.pending);
        next.or_else(|| self.cursor.next(view.pending, |_| true))
    }
}
