//! The bookkeeping against a model of both disks: whatever is dirtied, lost and repeated, what is neither
//! pending nor in flight has arrived in its newest version, and what is called clean is durable.

use super::*;
use flimcd_core::BlockIndex;
use proptest::prelude::*;
use std::collections::BTreeMap;

const BLOCKS: u64 = 12;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest writes a block.
    Write(u64),
    /// A run of pending blocks is read.
    Read(u64),
    /// The oldest flight that was read goes to the link.
    TakeOff,
    /// The target writes the flight at this position of those on the link.
    Arrive(usize),
    /// The target acknowledges all that has arrived.
    Acknowledge,
    /// The target syncs, and says so.
    Sync,
    /// The link breaks and comes back.
    Break,
    /// The target loses what is not durable.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..BLOCKS).prop_map(Step::Write),
        4 => (0..BLOCKS).prop_map(Step::Read),
        4 => Just(Step::TakeOff),
        3 => (0usize..4).prop_map(Step::Arrive),
        2 => Just(Step::Acknowledge),
        1 => Just(Step::Sync),
        1 => Just(Step::Break),
        1 => Just(Step::Restart),
    ]
}

struct World {
    flights: Flights,
    pending: BlockSet,
    /// Version of each block at the source, in the target's cache, on the target's disk.
    source: Vec<u32>,
    target: Vec<u32>,
    durable: Vec<u32>,
    /// Versions that a flight carries.
    read: BTreeMap<Seq, Vec<(u64, u32)>>,
    queued: Vec<Seq>,
    on_link: Vec<Seq>,
    received: SeqSet,
    unsynced: SeqSet,
}

impl World {
    fn new() -> Self {
        let blocks = usize::try_from(BLOCKS).unwrap();
        Self {
            flights: Flights::new(BLOCKS),
            pending: BlockSet::full(BLOCKS),
            source: vec![1; blocks],
            target: vec![0; blocks],
            durable: vec![0; blocks],
            read: BTreeMap::new(),
            queued: Vec::new(),
            on_link: Vec::new(),
            received: SeqSet::new(),
            unsynced: SeqSet::new(),
        }
    }

    fn at(versions: &[u32], block: u64) -> u32 {
        versions[usize::try_from(block).unwrap()]
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(block) => {
                self.source[usize::try_from(block).unwrap()] += 1;
                let mut dirty = BlockSet::new(BLOCKS);
                dirty.insert(BlockIndex(block));
                self.flights.dirtied(&dirty, &mut self.pending);
            }
            Step::Read(from) => {
                let Some(run) = self.pending.next_run(from, from + 3) else {
                    return;
                };
                self.pending.remove_range(run);
                let seq = self.flights.start(run, Class::Bulk);
                let content = run
                    .iter()
                    .map(|b| (b.0, Self::at(&self.source, b.0)))
                    .collect();
                self.read.insert(seq, content);
                self.flights.get_mut(seq).unwrap().stage = Stage::Queued;
                self.queued.push(seq);
            }
            Step::TakeOff => {
                if self.queued.is_empty() {
                    return;
                }
                let seq = self.queued.remove(0);
                if self.flights.take_off(seq) {
                    self.on_link.push(seq);
                } else {
                    self.flights.abandon(seq, &mut self.pending);
                }
            }
            Step::Arrive(at) => {
                if at >= self.on_link.len() {
                    return;
                }
                let seq = self.on_link.remove(at);
                for &(block, version) in &self.read[&seq] {
                    let block = usize::try_from(block).unwrap();
                    assert!(
                        self.target[block] <= version,
                        "older content overtook newer"
                    );
                    self.target[block] = version;
                }
                self.received.insert(seq);
                self.unsynced.insert(seq);
            }
            Step::Acknowledge => {
                self.flights
                    .acknowledged(&self.received, &mut self.pending, |_| ());
            }
            Step::Sync => {
                self.flights
                    .acknowledged(&self.received, &mut self.pending, |_| ());
                self.durable.clone_from(&self.target);
                let seqs = std::mem::take(&mut self.unsynced);
                for run in self.flights.durable(&seqs, &self.pending) {
                    for block in run.iter() {
                        let want = Self::at(&self.source, block.0);
                        assert_eq!(
                            Self::at(&self.durable, block.0),
                            want,
                            "not clean: {block:?}"
                        );
                    }
                }
            }
            Step::Break => {
                self.on_link.clear();
                self.flights.lost_except(&self.received, &mut self.pending);
            }
            Step::Restart => {
                self.on_link.clear();
                self.target.clone_from(&self.durable);
                self.received = SeqSet::new();
                self.unsynced = SeqSet::new();
                self.flights.lost_undurable(&mut self.pending);
            }
        }
        self.check();
    }

    fn check(&self) {
        for block in (0..BLOCKS).map(BlockIndex) {
            let (pending, flying) = (
                self.pending.contains(block),
                self.flights.blocks().contains(block),
            );
            assert!(
                !(pending && flying),
                "{block:?} is both pending and in flight"
            );
            if !pending && !flying {
                let want = Self::at(&self.source, block.0);
                assert_eq!(
                    Self::at(&self.target, block.0),
                    want,
                    "{block:?} was forgotten"
                );
            }
        }
        let prepared: u64 = self
            .flights
            .flights
            .values()
            .filter(|flight| flight.stage != Stage::Sent)
            .map(|flight| flight.range.len())
            .sum();
        assert_eq!(self.flights.prepared_blocks(), prepared);
    }
}

proptest! {
    #[test]
    fn nothing_is_forgotten_and_nothing_is_called_clean_too_early(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
    }

    #[test]
    fn at_the_switch_only_current_content_is_in_flight(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        let stale = world.flights.retire_outdated(&mut world.pending);
        for (seq, flight) in &world.flights.flights {
            prop_assert!(!stale.contains(*seq));
            for block in flight.range.iter() {
                let carried = world.read[seq].iter().find(|(b, _)| *b == block.0).unwrap().1;
                prop_assert_eq!(carried, World::at(&world.source, block.0));
            }
        }
    }
}
