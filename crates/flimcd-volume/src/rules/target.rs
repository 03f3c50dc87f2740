//! The target's part: the switch, content that arrives, and the end of post-copy.

use flimcd_core::{BlockRange, BlockSet};

use super::{ApplyPlan, ApplyToken, Mode, Mutation, Outcome, Rules, presence::Presence};

impl Rules {
    /// The switch: the guest runs here from now on, without the content of `missing`. Parked requests are decided
    /// again. Applies that wait are dropped, since their content may be older than the switch.
    ///
    /// # Panics
    /// Unless in `Incoming`, or when the set is of a volume of another size.
    pub fn start_postcopy(&mut self, missing: BlockSet) {
        self.expect_mode(&[Mode::Incoming], "start_postcopy");
        self.presence.start(missing);
        self.peeks.clear();
        self.note_parked_reads();
        self.mode = Mode::PostCopy;
        self.wake(self.size.all_blocks());
    }

    /// Content for `range` arrived: says which blocks of it to write. [`end_apply`](Self::end_apply) must follow, also when
    /// there is nothing to write. With [`ApplyPlan::wait`] set, nothing may be done before
    /// [`poll_apply_ready`](Self::poll_apply_ready) gives the plan with the same token again, decided.
    ///
    /// # Panics
    /// When the range reaches beyond the volume.
    pub fn begin_apply(&mut self, range: BlockRange) -> ApplyPlan {
        assert!(
            range.end <= self.size.blocks(),
            "{range:?} is not in the volume"
        );
        let broken = self.broken.is(Mutation::FetchedOverwritesGuestWrite);
        let plan = self.presence.begin_apply(range, self.mode, broken);
        self.count_apply(&plan);
        plan
    }

    /// An apply that had to wait and may run now.
    pub fn poll_apply_ready(&mut self) -> Option<ApplyPlan> {
        let broken = self.broken.is(Mutation::FetchedOverwritesGuestWrite);
        let plan = self.presence.poll_apply_ready(self.mode, broken)?;
        self.count_apply(&plan);
        Some(plan)
    }

    fn count_apply(&mut self, plan: &ApplyPlan) {
        if !plan.wait {
            self.stats.blocks_applied += plan.blocks_to_write();
            self.stats.blocks_dropped += plan.range.len() - plan.blocks_to_write();
        }
    }

    /// The writes of an apply ended. `Done`: in post-copy the blocks are present. `Failed`: they are missing as before.
    ///
    /// # Panics
    /// When `token` is not of an apply that runs.
    pub fn end_apply(&mut self, token: ApplyToken, outcome: Outcome) {
        let touched = self.presence.end_apply(token, outcome);
        if self.mode == Mode::PostCopy {
            self.wake(touched);
        }
        self.finish_if_idle();
    }

    /// Number of blocks whose content is not here.
    #[must_use]
    pub fn missing_count(&self) -> u64 {
        self.presence.missing().count()
    }

    /// The blocks whose content is not here; blocks being written stay in it until the write is done.
    #[must_use]
    pub fn missing(&self) -> &BlockSet {
        self.presence.missing()
    }

    /// The blocks that guest writes made present since the last call: the source need not send them.
    pub fn take_overwritten(&mut self) -> BlockSet {
        self.presence.take_overwritten()
    }

    /// Nothing is missing any more and the caller has made that durable: the volume is an ordinary one. An apply that
    /// still runs delays the change of mode to its end.
    ///
    /// # Panics
    /// Unless in `PostCopy` (or `Owner` already), or when blocks are missing.
    pub fn finish_postcopy(&mut self) {
        self.expect_mode(&[Mode::PostCopy, Mode::Owner], "finish_postcopy");
        assert_eq!(
            self.missing_count(),
            0,
            "post-copy ends with blocks missing"
        );
        self.presence.set_finishing();
        self.finish_if_idle();
    }

    fn finish_if_idle(&mut self) {
        if self.mode == Mode::PostCopy && self.presence.may_finish() {
            self.mode = Mode::Owner;
            self.presence = Presence::new(self.size);
        }
    }
}
