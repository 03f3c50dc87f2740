//! The source's part: dirty marks, and the way to the switch.

use flimcd_core::{BlockRange, BlockSet};

use super::{Mode, Mutation, Rules, tracking::Tracking};

impl Rules {
    /// Starts to mark what the guest writes, with the writes in flight as the first marks. Keeps the marks there are.
    pub fn start_tracking(&mut self) {
        if self.tracking.is_none() {
            let mut tracking = Tracking::new(self.size);
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks);
            }
            self.tracking = Some(tracking);
        }
    }

    /// Stops marking and drops the marks. Mirroring and the limit of writes end as well.
    pub fn stop_tracking(&mut self) {
        self.tracking = None;
        self.mirror.stop();
    }

    /// Whether writes are marked.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.tracking.is_some()
    }

    /// Hands the marks over and clears them, except those of blocks with a write in flight, which are handed over *and*
    /// kept: the block has to be sent after the write as well.
    pub fn take_dirty(&mut self) -> BlockSet {
        let Some(tracking) = &mut self.tracking else {
            return BlockSet::new(self.size.blocks());
        };
        let taken = tracking.take();
        // Whatever is in flight was marked when it was admitted, so this puts back and adds nothing.
        if !self.broken.is(Mutation::IgnoreWriteInFlight) {
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks);
            }
        }
        taken
    }

    /// To be called before `range` is read to be sent: clears the marks of blocks without a write in flight, so that
    /// every write from here on, and every one in flight, leaves the block marked after the read.
    pub fn begin_send(&mut self, range: BlockRange) {
        if !self.broken.is(Mutation::ClearAfterRead) {
            self.clear_marks(range);
        }
    }

    /// To be called after the read that [`begin_send`](Self::begin_send) announced. Nothing follows from it: clearing
    /// after the read is the mistake that the mutation `ClearAfterRead` makes here.
    pub fn end_send(&mut self, range: BlockRange) {
        if self.broken.is(Mutation::ClearAfterRead) {
            self.clear_marks(range);
        }
    }

    fn clear_marks(&mut self, range: BlockRange) {
        let Some(tracking) = &mut self.tracking else {
            return;
        };
        tracking.clear(range);
        if !self.broken.is(Mutation::IgnoreWriteInFlight) {
            for blocks in self.ops.writes_in_flight() {
                tracking.mark(blocks.intersect(range));
            }
        }
    }

    /// Whether a block of `range` is marked.
    #[must_use]
    pub fn is_dirty(&self, range: BlockRange) -> bool {
        self.tracking.as_ref().is_some_and(|t| t.is_dirty(range))
    }

    /// The runs of `range` that are marked.
    pub fn dirty_in(&self, range: BlockRange) -> Vec<BlockRange> {
        let dirty = self.tracking.as_ref().map(Tracking::dirty);
        dirty.map_or_else(Vec::new, |dirty| dirty.runs_in(range).collect())
    }

    /// A copy of the marks.
    #[must_use]
    pub fn dirty(&self) -> BlockSet {
        match &self.tracking {
            Some(tracking) => tracking.dirty().clone(),
            None => BlockSet::new(self.size.blocks()),
        }
    }

    /// Appends the runs of `range` that are neither marked nor have a write in flight.
    pub fn clean_runs(&self, range: BlockRange, out: &mut Vec<BlockRange>) {
        let range = range.intersect(self.size.all_blocks());
        let mut busy: Vec<BlockRange> = self.ops.writes_in_flight().collect();
        if let Some(tracking) = &self.tracking {
            busy.extend(tracking.dirty().runs_in(range));
        }
        busy.retain(|run| run.overlaps(range));
        busy.sort_unstable();
        let mut at = range.start;
        for run in busy {
            if at < run.start {
                out.push(BlockRange::new(at, run.start));
            }
            at = at.max(run.end);
        }
        if at < range.end {
            out.push(BlockRange::new(at, range.end));
        }
    }

    /// Whether a write to a block of `range` is in flight.
    #[must_use]
    pub fn is_writing(&self, range: BlockRange) -> bool {
        self.ops.writes_in_flight().any(|b| b.overlaps(range))
    }

    /// Parks every request from here on. Those admitted go on: see [`is_drained`](Self::is_drained).
    ///
    /// # Panics
    /// Unless in `Owner` or `Frozen`.
    pub fn freeze(&mut self) {
        self.expect_mode(&[Mode::Owner, Mode::Frozen], "freeze");
        self.mode = Mode::Frozen;
        self.release_held();
    }

    /// Whether no admitted request is in flight.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.ops.admitted() == 0
    }

    /// Back from `Frozen` to `Owner`: parked requests run.
    ///
    /// # Panics
    /// Unless in `Owner` or `Frozen`.
    pub fn thaw(&mut self) {
        self.expect_mode(&[Mode::Owner, Mode::Frozen], "thaw");
        if self.mode == Mode::Frozen {
            self.note_parked_reads();
        }
        self.mode = Mode::Owner;
        self.wake(self.size.all_blocks());
    }

    /// The volume has moved: parked requests are refused, and so are all from here on.
    ///
    /// # Panics
    /// Unless in `Frozen` and drained, or `Released`: a request in flight could write what the new owner never sees.
    pub fn release(&mut self) {
        self.expect_mode(&[Mode::Frozen, Mode::Released], "release");
        assert!(self.is_drained(), "released with guest requests in flight");
        self.mode = Mode::Released;
        self.tracking = None;
        self.mirror.stop();
        self.wake(self.size.all_blocks());
    }

    /// The way back was given up: requests are refused again, those that were parked and all from here on.
    ///
    /// # Panics
    /// Unless in `Incoming` or `Released`.
    pub fn leave_incoming(&mut self) {
        self.expect_mode(&[Mode::Incoming, Mode::Released], "leave_incoming");
        self.peeks.clear();
        self.mode = Mode::Released;
        self.wake(self.size.all_blocks());
    }

    /// A volume that moved away comes back: requests are parked until the switch.
    ///
    /// # Panics
    /// Unless in `Released` or `Incoming`.
    pub fn enter_incoming(&mut self) {
        self.expect_mode(&[Mode::Released, Mode::Incoming], "enter_incoming");
        self.mode = Mode::Incoming;
    }
}
