//! The table of guest requests: a slab with generations, so that a request costs no allocation and a ticket of the past
//! is told from one of today.

use flimcd_core::{BlockRange, ByteRange, VolumeSize};

use super::GuestOp;

/// Name of a guest request between [`begin`](super::Rules::begin) and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket {
    slot: u32,
    generation: u32,
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits.
    Parked,
    /// Admitted after waiting; the caller does not know yet.
    Woken,
    /// Admitted, and the caller knows.
    Active,
}

/// A guest request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) kind: GuestOp,
    /// Whether it covers missing blocks that are its own until it ends.
    pub(super) claims: bool,
    /// Whether it was counted as a miss.
    pub(super) missed: bool,
    touched: BlockRange,
    covered: BlockRange,
}

impl Op {
    #[inline]
    pub(super) fn new(kind: GuestOp, range: ByteRange, size: VolumeSize) -> Self {
        let covered = range.blocks_covered(size);
        let touched = if kind == GuestOp::Trim {
            covered
        } else {
            range.blocks_touched()
        };
        Self {
            kind,
            claims: false,
            missed: false,
            touched,
            covered,
        }
    }

    /// Blocks that have a byte of the request; for a trim those it covers.
    #[inline]
    pub(super) fn blocks_touched(&self) -> BlockRange {
        self.touched
    }

    /// Blocks that are replaced as a whole.
    pub(super) fn blocks_covered(&self) -> BlockRange {
        self.covered
    }

    /// Whether it may depend on `blocks`. Requests on nothing are near everything, so that they never stay behind.
    pub(super) fn is_near(&self, blocks: BlockRange) -> bool {
        self.touched.is_empty() || self.touched.overlaps(blocks)
    }

    /// The blocks it needs the present content of: all for a read, the ones at the edges that are replaced in part for
    /// a write, none for a trim. At most two runs.
    pub(super) fn blocks_needed(&self) -> [BlockRange; 2] {
        let none = BlockRange::new(0, 0);
        match self.kind {
            GuestOp::Trim => [none, none],
            GuestOp::Read => [self.touched, none],
            GuestOp::Write | GuestOp::WriteZeroes if self.covered.is_empty() => {
                [self.touched, none]
            }
            GuestOp::Write | GuestOp::WriteZeroes => [
                BlockRange::new(self.touched.start, self.covered.start),
                BlockRange::new(self.covered.end, self.touched.end),
            ],
        }
    }
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: Option<State>,
    op: Op,
}

/// All requests that have begun and not ended.
#[derive(Debug, Default)]
pub(super) struct OpTable {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Requests in `Woken` or `Active`.
    admitted: usize,
}

impl OpTable {
    #[inline]
    pub(super) fn insert(&mut self, op: Op, state: State) -> Ticket {
        self.admitted += usize::from(state != State::Parked);
        if let Some(slot) = self.free.pop() {
            let entry = &mut self.slots[slot as usize];
            entry.state = Some(state);
            entry.op = op;
            let generation = entry.generation;
            return Ticket { slot, generation };
        }
        self.grow(op, state)
    }

    #[cold]
    fn grow(&mut self, op: Op, state: State) -> Ticket {
        #[expect(
            clippy::expect_used,
            reason = "4 billion guest requests at once do not fit in memory"
        )]
        let slot = u32::try_from(self.slots.len()).expect("less than 2^32 requests at once");
        self.slots.push(Slot {
            generation: 0,
            state: Some(state),
            op,
        });
        Ticket {
            slot,
            generation: 0,
        }
    }

    fn slot(&self, ticket: Ticket) -> Option<&Slot> {
        let slot = self.slots.get(ticket.slot as usize)?;
        (slot.generation == ticket.generation && slot.state.is_some()).then_some(slot)
    }

    pub(super) fn state(&self, ticket: Ticket) -> Option<State> {
        self.slot(ticket)?.state
    }

    /// # Panics
    /// When there is no such request.
    pub(super) fn op(&self, ticket: Ticket) -> &Op {
        let Some(slot) = self.slot(ticket) else {
            panic!("{ticket:?} has ended");
        };
        &slot.op
    }

    pub(super) fn op_mut(&mut self, ticket: Ticket) -> &mut Op {
        assert!(self.slot(ticket).is_some(), "{ticket:?} has ended");
        &mut self.slots[ticket.slot as usize].op
    }

    pub(super) fn set_state(&mut self, ticket: Ticket, state: State) {
        let before = self.state(ticket);
        assert!(before.is_some(), "{ticket:?} has ended");
        self.admitted -= usize::from(before != Some(State::Parked));
        self.admitted += usize::from(state != State::Parked);
        self.slots[ticket.slot as usize].state = Some(state);
    }

    /// Takes a request out.
    ///
    /// # Panics
    /// When there is none, or not in this state: it would be finished twice.
    #[inline]
    pub(super) fn remove(&mut self, ticket: Ticket, state: State) -> Op {
        let entry = &mut self.slots[ticket.slot as usize];
        assert!(
            entry.generation == ticket.generation && entry.state == Some(state),
            "{ticket:?} is not {state:?}"
        );
        entry.state = None;
        entry.generation = entry.generation.wrapping_add(1);
        let op = entry.op;
        self.admitted -= usize::from(state != State::Parked);
        self.free.push(ticket.slot);
        op
    }

    /// Number of requests that were admitted and have not ended.
    pub(super) fn admitted(&self) -> usize {
        self.admitted
    }

    /// Blocks of each admitted request that changes content.
    pub(super) fn writes_in_flight(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.slots
            .iter()
            .filter(|slot| {
                matches!(slot.state, Some(State::Active | State::Woken))
                    && slot.op.kind != GuestOp::Read
            })
            .map(|slot| slot.op.blocks_touched())
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.free.capacity() * size_of::<u32>()
    }
}
