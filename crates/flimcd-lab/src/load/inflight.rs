//! Requests that were submitted and not answered, and the granules they use: no write overlaps
//! anything else in flight.

use std::{collections::HashMap, ops::Range, time::Duration};

use super::{DiskOp, PlannedOp};

/// A submitted request.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) plan: PlannedOp,
    pub(super) granules: Range<usize>,
    /// What its granules hold once it is done; meaningless for reads.
    pub(super) state: u32,
    pub(super) submitted: Duration,
}

/// How a granule is used.
#[derive(Debug)]
enum Use {
    Readers(u32),
    Writer,
}

/// Everything in flight.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    pending: HashMap<u64, Pending>,
    uses: HashMap<usize, Use>,
    next_id: u64,
}

impl InFlight {
    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether a request may be submitted now.
    pub(super) fn admits(&self, op: DiskOp, mut granules: Range<usize>) -> bool {
        match op {
            DiskOp::Flush => true,
            DiskOp::Read => !granules.any(|g| matches!(self.uses.get(&g), Some(Use::Writer))),
            DiskOp::Write | DiskOp::WriteZeroes => !granules.any(|g| self.uses.contains_key(&g)),
        }
    }

    /// Notes a request that [`Self::admits`] allows and returns its id.
    pub(super) fn insert(&mut self, pending: Pending) -> u64 {
        for granule in pending.granules.clone() {
            match pending.plan.op {
                DiskOp::Read => {
                    if let Use::Readers(count) = self.uses.entry(granule).or_insert(Use::Readers(0))
                    {
                        *count += 1;
                    }
                }
                DiskOp::Write | DiskOp::WriteZeroes => {
                    self.uses.insert(granule, Use::Writer);
                }
                DiskOp::Flush => {}
            }
        }
        self.next_id += 1;
        self.pending.insert(self.next_id, pending);
        self.next_id
    }

    /// Takes the request with this id out: it was answered.
    pub(super) fn remove(&mut self, id: u64) -> Option<Pending> {
        let pending = self.pending.remove(&id)?;
        for granule in pending.granules.clone() {
            match self.uses.get_mut(&granule) {
                Some(Use::Readers(count)) if *count > 1 => *count -= 1,
                _ => {
                    self.uses.remove(&granule);
                }
            }
        }
        Some(pending)
    }

    /// Takes everything out: no answer will come.
    pub(super) fn take_all(&mut self) -> Vec<Pending> {
        self.uses.clear();
        self.pending.drain().map(|(_, pending)| pending).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(op: DiskOp, granules: Range<usize>) -> Pending {
        let plan = PlannedOp {
            op,
            offset: 0,
            length: 0,
            due: None,
        };
        Pending {
            plan,
            granules,
            state: 0,
            submitted: Duration::ZERO,
        }
    }

    #[test]
    fn reads_share_and_writes_do_not() {
        let mut flight = InFlight::default();
        let one = flight.insert(pending(DiskOp::Read, 0..4));
        assert!(flight.admits(DiskOp::Read, 3..5));
        assert!(!flight.admits(DiskOp::Write, 3..5));
        let two = flight.insert(pending(DiskOp::Read, 3..5));
        flight.remove(one).unwrap();
        assert!(flight.admits(DiskOp::Write, 0..3));
        assert!(!flight.admits(DiskOp::WriteZeroes, 3..4));
        flight.remove(two).unwrap();
        let three = flight.insert(pending(DiskOp::Write, 3..4));
        assert!(!flight.admits(DiskOp::Read, 0..8));
        assert!(flight.admits(DiskOp::Flush, 0..0));
        assert!(flight.remove(three).is_some() && flight.remove(three).is_none());
        assert!(flight.is_empty());
    }
}
