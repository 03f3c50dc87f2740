//! Requests that were submitted and not answered: no write overlaps anything else in flight.

use std::{collections::HashMap, ops::Range, time::Duration};

use super::{PlannedOp, oracle::States};

/// A submitted request.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) plan: PlannedOp,
    pub(super) granules: Range<usize>,
    /// What its granules hold once it is done; meaningless for reads.
    pub(super) states: States,
    pub(super) submitted: Duration,
}

/// Everything in flight. They are few, so looking at all of them is cheaper than an index.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    pending: HashMap<u64, Pending>,
    last_id: u64,
}

impl InFlight {
    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether a request may be submitted now.
    pub(super) fn admits(&self, plan: &PlannedOp) -> bool {
        !self
            .pending
            .values()
            .any(|pending| pending.plan.conflicts_with(plan))
    }

    /// Notes a request that [`Self::admits`] allows and returns its id.
    pub(super) fn insert(&mut self, pending: Pending) -> u64 {
        self.last_id += 1;
        self.pending.insert(self.last_id, pending);
        self.last_id
    }

    /// Takes the request with this id out: it was answered.
    pub(super) fn remove(&mut self, id: u64) -> Option<Pending> {
        self.pending.remove(&id)
    }

    /// Takes everything out: no answer will come.
    pub(super) fn take_all(&mut self) -> Vec<Pending> {
        self.pending.drain().map(|(_, pending)| pending).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::DiskOp;

    fn plan(op: DiskOp, range: Range<u32>) -> PlannedOp {
        PlannedOp {
            op,
            offset: range.start.into(),
            length: range.end - range.start,
            due: None,
            content: None,
        }
    }

    fn pending(op: DiskOp, range: Range<u32>) -> Pending {
        Pending {
            plan: plan(op, range),
            granules: 0..0,
            states: States::Same(0),
            submitted: Duration::ZERO,
        }
    }

    #[test]
    fn reads_share_and_writes_do_not() {
        let mut flight = InFlight::default();
        let one = flight.insert(pending(DiskOp::Read, 0..4));
        assert!(flight.admits(&plan(DiskOp::Read, 3..5)));
        assert!(!flight.admits(&plan(DiskOp::Write, 3..5)));
        let two = flight.insert(pending(DiskOp::Read, 3..5));
        flight.remove(one).unwrap();
        assert!(flight.admits(&plan(DiskOp::Write, 0..3)));
        assert!(!flight.admits(&plan(DiskOp::WriteZeroes, 3..4)));
        flight.remove(two).unwrap();
        let three = flight.insert(pending(DiskOp::Write, 3..4));
        assert!(!flight.admits(&plan(DiskOp::Read, 0..8)));
        assert!(flight.admits(&PlannedOp::FLUSH));
        assert!(flight.remove(three).is_some() && flight.remove(three).is_none());
        assert!(flight.is_empty());
    }
}
