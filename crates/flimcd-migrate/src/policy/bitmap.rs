//! `bitmap`: rounds of pre-copy, then the switch with the bitmap of what is dirty, then push and pull.
//!
//! Luo et al., "Live and incremental whole-system migration of virtual machines using block-bitmap", CLUSTER 2008. Rounds end
//! when what is left fits the downtime, when a round leaves no less than the one before it (writes come as fast as content
//! goes), or after [`ROUNDS_MAX`]. The way back sends what the bitmap has, which the engine does for every strategy.

use flimcd_core::BlockRange;

use super::{Policy, View, cursor::Cursor, fits_downtime};

/// The paper stops its iterations at a fixed number; four are its example.
const ROUNDS_MAX: u64 = 4;

#[derive(Default)]
pub(super) struct Bitmap {
    cursor: Cursor,
    /// The round that is under way, and what was left at its beginning.
    round: (u64, u64),
    has_stopped: bool,
}

impl Policy for Bitmap {
    fn name(&self) -> &'static str {
        "bitmap"
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if self.has_stopped {
            return None;
        }
        let next = self.cursor.next(view.pending, |_| true);
        let rounds = self.cursor.rounds();
        if rounds > self.round.0 {
            let left = view.pending.count();
            let is_stubborn = self.round.0 > 0 && left >= self.round.1;
            self.has_stopped = is_stubborn || rounds >= ROUNDS_MAX;
            self.round = (rounds, left);
        }
        next
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.has_stopped || fits_downtime(view)
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.cursor.next(view.pending, |_| true)
    }
}
