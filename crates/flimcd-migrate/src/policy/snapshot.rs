//! `snapshot`: a frozen base goes over, then what was written meanwhile as the next one, and so on, then stop and copy.
//!
//! Mashtizadeh et al., "The design and evolution of live storage migration in VMware ESX", ATC 2011: the snapshots of ESX 3.5.
//! Each round sends what was there at its beginning, and what is written during it waits for the next. There is no
//! copy-on-write here: a block that is written before its turn goes once, with its new content, where the original sends it twice.

use flimcd_core::{BlockRange, BlockSet};

use super::{Policy, View, cursor::Cursor, fits_downtime};

/// Rounds after which it stops waiting for convergence.
const ROUNDS_MAX: u64 = 30;

#[derive(Default)]
pub(super) struct Snapshot {
    /// What is left of the round.
    base: Option<BlockSet>,
    rounds: u64,
    cursor: Cursor,
}

impl Snapshot {
    fn next_of_base(&mut self, view: &View<'_>) -> Option<BlockRange> {
        let base = self.base.as_mut()?;
        loop {
            let run = self.cursor.next(base, |_| true)?;
            base.remove_range(run);
            if let Some(found) = view.pending.next_run(run.start, run.end) {
                let rest = BlockRange::new(found.end, run.end);
                if !rest.is_empty() {
                    base.insert_range(rest);
                    self.cursor.jump(flimcd_core::BlockIndex(rest.start));
                }
                return Some(found);
            }
        }
    }
}

impl Policy for Snapshot {
    fn name(&self) -> &'static str {
        "snapshot"
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn allows_postcopy(&self) -> bool {
        false
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if let Some(run) = self.next_of_base(view) {
            return Some(run);
        }
        // The next snapshot is taken when the last one is over, not while parts of it are on their way.
        if view.in_flight_blocks > 0 || view.pending.is_empty() {
            return None;
        }
        self.rounds += 1;
        self.base = Some(view.pending.clone());
        self.next_of_base(view)
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.rounds > 0 && fits_downtime(view) || self.rounds >= ROUNDS_MAX
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.cursor.next(view.pending, |_| true)
    }
}
