//! `workload-aware`: before the switch what is written least goes first, after it what is read most.
//!
//! Zheng et al., "Workload-aware live storage migration for clouds", VEE 2011. Chunks go in the order of their write
//! frequency, in passes: a chunk that is written after its turn waits for the next. After [`PASSES_MAX`] passes, or when what is
//! left fits the downtime, the guest moves, and what is missing follows in the order of its read frequency.

use flimcd_core::BlockRange;

use super::{
    Policy, View,
    cursor::{Cursor, Ordered},
    fits_downtime,
};

/// The paper's pre-copy has a bulk phase and one iteration for what got dirty.
const PASSES_MAX: u32 = 2;
/// Chunks that are ordered at once; the rest goes in the order of addresses.
const ORDERED_MAX: usize = 1 << 20;

#[derive(Default)]
pub(super) struct WorkloadAware {
    order: Ordered,
    passes: u32,
    cursor: Cursor,
}

impl Policy for WorkloadAware {
    fn name(&self) -> &'static str {
        "workload-aware"
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if let Some(run) = self.order.next(view.pending) {
            return Some(run);
        }
        if self.passes >= PASSES_MAX || view.pending.is_empty() {
            return None;
        }
        self.passes += 1;
        self.order = Ordered::by_key(view.pending, ORDERED_MAX, |chunk| {
            Some(-view.heat.write_rate(chunk, view.now))
        });
        self.order.next(view.pending)
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.passes > 0 && fits_downtime(view)
            || self.passes >= PASSES_MAX && self.order.next(view.pending).is_none()
    }

    fn begin_push(&mut self, view: &View<'_>) {
        self.order = Ordered::by_key(view.pending, ORDERED_MAX, |chunk| {
            Some(view.heat.read_rate(chunk, view.now))
        });
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let next = self.order.next(view.pending);
        next.or_else(|| self.cursor.next(view.pending, |_| true))
    }
}
