//! The guest's way through the rules: admission, waiting, faults.

use flimcd_core::{BlockRange, ByteRange};

use super::{
    Admission, Completion, GuestOp, Mode, Mutation, Outcome, Refusal, Rules, Ticket,
    ops::{Op, State},
    presence::Decision,
};

impl Rules {
    /// A guest asks for `op` on `range`. On `Go` the dirty mark is already set and the I/O may be submitted.
    ///
    /// # Panics
    /// When the range reaches beyond the volume.
    #[inline]
    pub fn begin(&mut self, op: GuestOp, range: ByteRange) -> Admission {
        assert!(
            range.end <= self.size.bytes() && range.start <= range.end,
            "{range:?} is not in the volume"
        );
        if self.is_peeking() {
            return self.begin_peek(op, range);
        }
        self.count(op, range);
        let op = Op::new(op, range, self.size);
        match self.mode {
            Mode::Owner => {
                self.reads.note(&op);
                let newly_dirty = self.mark_dirty(&op);
                let ticket = self.ops.insert(op, State::Active);
                Admission::Go {
                    ticket,
                    newly_dirty,
                }
            }
            Mode::Released => Admission::Refused(Refusal::Moved),
            Mode::Frozen | Mode::Incoming => self.park(op),
            Mode::PostCopy => self.begin_postcopy(op),
        }
    }

    fn begin_peek(&mut self, op: GuestOp, range: ByteRange) -> Admission {
        if op != GuestOp::Read {
            return Admission::Refused(Refusal::NotHere);
        }
        let admission = self.park(Op::new(op, range, self.size));
        if let Admission::Parked { ticket } = admission {
            self.peek(ticket);
        }
        admission
    }

    fn begin_postcopy(&mut self, mut op: Op) -> Admission {
        self.reads.note(&op);
        self.count_miss(&mut op);
        match self.presence.decide(&mut op) {
            Decision::Go => {
                let newly_dirty = self.mark_dirty(&op);
                Admission::Go {
                    ticket: self.ops.insert(op, State::Active),
                    newly_dirty,
                }
            }
            Decision::Wait => {
                self.presence.report_faults(&op);
                self.park(op)
            }
        }
    }

    fn park(&mut self, op: Op) -> Admission {
        let ticket = self.ops.insert(op, State::Parked);
        self.parked.push(ticket);
        Admission::Parked { ticket }
    }

    #[inline]
    fn count(&mut self, op: GuestOp, range: ByteRange) {
        match op {
            GuestOp::Read => {
                self.stats.guest_reads += 1;
                self.stats.read_bytes += range.len();
            }
            GuestOp::Write => {
                self.stats.guest_writes += 1;
                self.stats.written_bytes += range.len();
            }
            GuestOp::WriteZeroes => self.stats.guest_zeroes += 1,
            GuestOp::Trim => self.stats.guest_trims += 1,
        }
    }

    /// Counts a read that meets missing blocks, once per request however often it is decided again.
    fn count_miss(&mut self, op: &mut Op) {
        if op.kind == GuestOp::Read && !op.missed {
            let missing = self.presence.count_awaited(op.blocks_touched());
            if missing > 0 {
                op.missed = true;
                self.stats.guest_reads_missed += 1;
                self.stats.blocks_missed += missing;
            }
        }
    }

    #[inline]
    fn mark_dirty(&mut self, op: &Op) -> bool {
        match &mut self.tracking {
            Some(tracking) if op.kind != GuestOp::Read => {
                !self.broken.is(Mutation::MarkDirtyAfterWrite) && tracking.mark(op.blocks_touched())
            }
            _ => false,
        }
    }

    /// The I/O of an admitted request ended. Says whether the guest may hear of it: always now, unless there is mirroring or a
    /// limit of writes.
    ///
    /// # Panics
    /// When `ticket` is not of a request that was admitted and has not been finished.
    #[inline]
    pub fn finish(&mut self, ticket: Ticket, outcome: Outcome) -> Completion {
        let op = self.ops.remove(ticket, State::Active);
        if self.broken.is(Mutation::MarkDirtyAfterWrite)
            && op.kind != GuestOp::Read
            && let Some(tracking) = &mut self.tracking
        {
            tracking.mark(op.blocks_touched());
        }
        if op.claims {
            self.finish_claim(&op, outcome);
        }
        self.completion(ticket, &op, outcome)
    }

    fn finish_claim(&mut self, op: &Op, outcome: Outcome) {
        self.presence.end_claim(op.blocks_covered(), outcome);
        self.wake(op.blocks_covered());
    }

    /// Forgets a request that was parked, because nobody waits for it any more. Also right for one that has been
    /// decided, as long as [`poll_woken`](Self::poll_woken) has not named it: it counts as failed.
    pub fn cancel_parked(&mut self, ticket: Ticket) {
        self.woken.retain(|(woken, _)| *woken != ticket);
        match self.ops.state(ticket) {
            Some(State::Parked) => {
                self.ops.remove(ticket, State::Parked);
                self.peeks.forget(ticket);
                self.parked.retain(|parked| *parked != ticket);
            }
            Some(State::Woken) => {
                let op = self.ops.remove(ticket, State::Woken);
                if op.claims {
                    self.finish_claim(&op, Outcome::Failed);
                }
            }
            Some(State::Active) => panic!("{ticket:?} is running: finish it"),
            None => {}
        }
    }

    /// A parked request that has been decided since: `Go` with the same ticket, or `Refused`.
    pub fn poll_woken(&mut self) -> Option<(Ticket, Admission)> {
        let (ticket, admission) = self.woken.pop_front()?;
        if matches!(admission, Admission::Go { .. }) {
            self.ops.set_state(ticket, State::Active);
        }
        Some((ticket, admission))
    }

    /// Whether one of the `poll_*` calls has something.
    #[inline]
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.woken.is_empty()
            || self.mirror.has_output()
            || self.presence.has_output()
            || self.peeks.has_output()
    }

    /// Whether [`poll_fault`](Self::poll_fault) may have something.
    #[must_use]
    pub fn has_faults(&self) -> bool {
        self.presence.has_faults()
    }

    /// Number of requests that are parked.
    #[must_use]
    pub fn parked_count(&self) -> usize {
        self.parked.len()
    }

    /// Decides the parked requests that touch `blocks` again.
    pub(super) fn wake(&mut self, blocks: BlockRange) {
        if self.parked.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut self.parked);
        for ticket in parked {
            if !self.ops.op(ticket).is_near(blocks) || !self.try_wake(ticket) {
                self.parked.push(ticket);
            }
        }
    }

    fn try_wake(&mut self, ticket: Ticket) -> bool {
        let mut op = *self.ops.op(ticket);
        let newly_dirty = match self.mode {
            Mode::Frozen | Mode::Incoming => return false,
            Mode::Released => {
                self.ops.remove(ticket, State::Parked);
                self.woken
                    .push_back((ticket, Admission::Refused(Refusal::Moved)));
                return true;
            }
            Mode::Owner => self.mark_dirty(&op),
            Mode::PostCopy => {
                self.count_miss(&mut op);
                let decision = self.presence.decide(&mut op);
                *self.ops.op_mut(ticket) = op;
                if decision == Decision::Wait {
                    self.presence.report_faults(&op);
                    return false;
                }
                self.mark_dirty(&op)
            }
        };
        self.ops.set_state(ticket, State::Woken);
        let admission = Admission::Go {
            ticket,
            newly_dirty,
        };
        self.woken.push_back((ticket, admission));
        true
    }

    /// Blocks that a parked request needs and that nothing here brings. Each is reported once, until it was present or
    /// [`requeue_faults`](Self::requeue_faults) was called.
    pub fn poll_fault(&mut self) -> Option<BlockRange> {
        self.presence.poll_fault()
    }

    /// Reports every block that is still needed again, because the earlier reports may be lost with a link.
    pub fn requeue_faults(&mut self) {
        self.presence.forget_reports();
        for ticket in &self.parked {
            let op = *self.ops.op(*ticket);
            self.presence.report_faults(&op);
        }
    }
}
