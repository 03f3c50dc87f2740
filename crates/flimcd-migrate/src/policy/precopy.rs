//! `precopy`: everything, then what got dirty, in rounds, then stop and copy.
//!
//! Clark et al., "Live migration of virtual machines", NSDI 2005, for RAM; for disks the changed-block
//! tracking of ESX 4 (Mashtizadeh et al., ATC 2011) and what QEMU's mirror job does today: non-zero
//! blocks as they are, round after round, until what is left fits the downtime that is allowed.
//! `precopy-zstd` is the same with compression.

use flimcd_core::BlockRange;

use super::{Policy, View, cursor::Cursor, fits_downtime};

/// Rounds after which it stops waiting for convergence.
const ROUNDS_MAX: u64 = 30;

pub(super) struct PreCopy {
    compress: bool,
    cursor: Cursor,
}

impl PreCopy {
    pub(super) fn new(compress: bool) -> Self {
        Self {
            compress,
            cursor: Cursor::default(),
        }
    }
}

impl Policy for PreCopy {
    fn name(&self) -> &'static str {
        if self.compress {
            "precopy-zstd"
        } else {
            "precopy"
        }
    }

    fn compress(&self) -> bool {
        self.compress
    }

    fn uses_library(&self) -> bool {
        false
    }

    fn allows_postcopy(&self) -> bool {
        false
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.cursor.next(view.pending, |_| true)
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        fits_downtime(view) || self.cursor.rounds() >= ROUNDS_MAX
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.cursor.next(view.pending, |_| true)
    }
}
