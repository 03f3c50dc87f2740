//! `postcopy`: switch at once, then demand fetch and a sequential background push that goes on from
//! where the guest last waited.
//!
//! Hines and Gopalan, "Post-copy based live virtual machine migration", VEE 2009 (the moving pivot);
//! Hirofuchi et al., "A live storage migration mechanism over WAN", CCGrid 2009 (xNBD).

use flimcd_core::{BlockIndex, BlockRange, Time};

use super::{Policy, View, cursor::Cursor};

#[derive(Default)]
pub(super) struct PostCopy {
    cursor: Cursor,
}

impl Policy for PostCopy {
    fn name(&self) -> &'static str {
        "postcopy"
    }

    fn next_precopy(&mut self, _view: &View<'_>) -> Option<BlockRange> {
        None
    }

    fn is_ready(&mut self, _view: &View<'_>) -> bool {
        true
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.cursor.next(view.pending, |_| true)
    }

    fn on_demand(&mut self, _now: Time, range: BlockRange) {
        self.cursor.jump(BlockIndex(range.end));
    }
}
