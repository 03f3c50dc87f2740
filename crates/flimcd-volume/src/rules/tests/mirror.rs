//! Held writes: by hand, and random interleavings of guest, sender and acknowledgements against a model of the target.

use std::time::Duration;

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, ByteRange, Time, VolumeSize};
use proptest::prelude::*;

use super::Choices;
use crate::rules::{Admission, Completion, GuestOp, Mode, Outcome, Rules, Ticket};

const BLOCKS: u64 = 8;

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap()
}

fn blocks(start: u64, end: u64) -> BlockRange {
    BlockRange::new(start, end)
}

fn set(ranges: &[BlockRange]) -> BlockSet {
    let mut set = BlockSet::new(BLOCKS);
    for range in ranges {
        set.insert_range(*range);
    }
    set
}

/// Rules that mirror, with a target that lacks `lacking`.
fn mirroring(lacking: &[BlockRange]) -> Rules {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.start_tracking();
    rules.set_mirroring(Some(set(lacking)));
    rules
}

fn begin(rules: &mut Rules, op: GuestOp, range: BlockRange) -> Ticket {
    match rules.begin(op, range.bytes(size())) {
        Admission::Go { ticket, .. } => ticket,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn write(rules: &mut Rules, range: BlockRange, expected: Completion) -> Ticket {
    let ticket = begin(rules, GuestOp::Write, range);
    assert_eq!(rules.finish(ticket, Outcome::Done), expected, "{range:?}");
    ticket
}

/// The sender takes the marks, reads and sends `range`, and the target acknowledges.
fn send(rules: &mut Rules, range: BlockRange) {
    rules.begin_send(range);
    rules.end_send(range);
    rules.acked(&[range]);
}

fn released(rules: &mut Rules) -> Vec<Ticket> {
    std::iter::from_fn(|| rules.poll_released()).collect()
}

#[test]
fn only_writes_to_what_the_target_has_wait_for_it() {
    let mut rules = mirroring(&[blocks(0, 4)]);
    write(&mut rules, blocks(0, 4), Completion::Now);
    let both = write(&mut rules, blocks(3, 6), Completion::Held);
    let one = write(&mut rules, blocks(7, 8), Completion::Held);
    let read = begin(&mut rules, GuestOp::Read, blocks(4, 8));
    assert_eq!(rules.finish(read, Outcome::Done), Completion::Now);
    let failed = begin(&mut rules, GuestOp::Write, blocks(4, 8));
    assert_eq!(rules.finish(failed, Outcome::Failed), Completion::Now);
    assert!(rules.is_drained(), "held writes delay no switch");
    assert!(!rules.has_output() && rules.held_count() == 2);
    let first = rules.oldest_held();
    // The failed write left its marks, so that nothing is acknowledged before it was sent again.
    rules.acked(&[blocks(4, 8)]);
    assert_eq!(released(&mut rules), []);
    send(&mut rules, blocks(7, 8));
    assert_eq!(released(&mut rules), [one]);
    send(&mut rules, blocks(4, 5));
    assert_eq!(released(&mut rules), []);
    assert_eq!(rules.oldest_held(), first);
    // Block 3 was never copied, and is not waited for.
    send(&mut rules, blocks(5, 6));
    assert_eq!(released(&mut rules), [both]);
    assert_eq!(rules.oldest_held(), None);
    // Now it is copied.
    send(&mut rules, blocks(3, 4));
    write(&mut rules, blocks(3, 4), Completion::Held);
    write(&mut rules, blocks(2, 3), Completion::Now);
}

#[test]
fn what_was_on_its_way_before_the_write_does_not_count() {
    let mut rules = mirroring(&[]);
    // Read and sent before the write, and acknowledged while it runs and after it.
    rules.begin_send(blocks(0, 1));
    rules.end_send(blocks(0, 1));
    let ticket = begin(&mut rules, GuestOp::WriteZeroes, blocks(0, 1));
    rules.acked(&[blocks(0, 1)]);
    assert_eq!(rules.finish(ticket, Outcome::Done), Completion::Held);
    rules.acked(&[blocks(0, 1)]);
    assert_eq!(released(&mut rules), []);
    // A second write to the block: the content of the first is overwritten before it was sent.
    let second = begin(&mut rules, GuestOp::Trim, blocks(0, 1));
    send(&mut rules, blocks(0, 1));
    assert_eq!(released(&mut rules), [], "a write is in flight");
    assert_eq!(rules.finish(second, Outcome::Done), Completion::Held);
    send(&mut rules, blocks(0, 1));
    assert_eq!(released(&mut rules), [ticket, second]);
}

#[test]
fn whatever_ends_serving_lets_writes_go() {
    let ends: [fn(&mut Rules); 4] = [
        |rules| rules.set_mirroring(None),
        Rules::freeze,
        Rules::stop_tracking,
        |rules| {
            rules.freeze();
            rules.release();
        },
    ];
    for end in ends {
        let mut rules = mirroring(&[]);
        rules.set_write_limit(Some(1), Time(0));
        let held = [
            write(&mut rules, blocks(0, 8), Completion::Held),
            write(&mut rules, blocks(0, 1), Completion::Held),
        ];
        rules.forget_held(held[1]);
        end(&mut rules);
        rules.set_write_limit(None, Time(0));
        assert_eq!(released(&mut rules), [held[0]]);
        assert_eq!(rules.held_count(), 0);
        rules.forget_held(held[0]);
    }
    let mut rules = mirroring(&[]);
    rules.freeze();
    rules.thaw();
    // It goes on after a switch that was called off.
    let held = write(&mut rules, blocks(0, 1), Completion::Held);
    rules.freeze();
    rules.forget_held(held);
    assert_eq!(released(&mut rules), [], "forgotten after it was let go");
}

#[test]
fn writers_get_what_the_limit_allows_in_order() {
    const RATE: u64 = 40 * BLOCK_SIZE;
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.start_tracking();
    let mut now = Time(0);
    rules.set_write_limit(Some(RATE), now);
    // The burst, and one that may exceed it.
    for _ in 0..4 {
        write(&mut rules, blocks(0, 1), Completion::Now);
    }
    let held: Vec<_> = (0..100)
        .map(|_| write(&mut rules, blocks(0, 1), Completion::Held))
        .collect();
    let zeroes = begin(&mut rules, GuestOp::WriteZeroes, blocks(0, 8));
    assert_eq!(
        rules.finish(zeroes, Outcome::Done),
        Completion::Held,
        "in turn"
    );
    let mut let_go = Vec::new();
    for step in 1..=100 {
        now = Time(0) + Duration::from_millis(25) * step;
        rules.refill_writes(now);
        let_go.extend(released(&mut rules));
        assert_eq!(let_go.len(), step as usize, "one block in 25 ms");
    }
    assert_eq!(let_go, held);
    rules.set_write_limit(None, now);
    assert_eq!(released(&mut rules), [zeroes]);
    write(&mut rules, blocks(0, 8), Completion::Now);
}

/// A guest, a sender and a target.
struct World {
    rules: Rules,
    /// Number of the write that each block has, here and at the target.
    disk: Vec<u64>,
    target: Vec<u64>,
    executed: u64,
    writes: Vec<Write>,
    held: Vec<Write>,
    pending: BlockSet,
    flights: Vec<(u64, Option<u64>)>,
    /// Blocks that the target has had.
    had: BlockSet,
    on: bool,
}

#[derive(Clone, Debug)]
struct Write {
    ticket: Ticket,
    range: BlockRange,
    /// Its place in the order of writes, once it is on the disk.
    number: Option<u64>,
    /// What it has to wait for.
    awaited: Vec<u64>,
}

type Checked = Result<(), String>;

impl World {
    fn new() -> Self {
        let mut rules = Rules::new(size(), Mode::Owner);
        rules.start_tracking();
        let len = usize::try_from(BLOCKS).unwrap();
        Self {
            rules,
            disk: vec![0; len],
            target: vec![0; len],
            executed: 0,
            writes: Vec::new(),
            held: Vec::new(),
            pending: BlockSet::full(BLOCKS),
            flights: Vec::new(),
            had: BlockSet::new(BLOCKS),
            on: false,
        }
    }

    fn step(&mut self, choices: &mut Choices) -> Checked {
        let frozen = self.rules.mode() == Mode::Frozen;
        match choices.below(24) {
            0..5 if self.writes.len() < 4 && !frozen => {
                let start = choices.below(8) as u64;
                let end = (start + 1 + choices.below(3) as u64).min(BLOCKS);
                let ticket = begin(&mut self.rules, GuestOp::Write, blocks(start, end));
                self.writes.push(Write {
                    ticket,
                    range: blocks(start, end),
                    number: None,
                    awaited: Vec::new(),
                });
            }
            5..8 if !self.writes.is_empty() => {
                let at = choices.below(self.writes.len());
                let write = &mut self.writes[at];
                self.executed += 1;
                write.number = Some(self.executed);
                for block in write.range.iter() {
                    self.disk[usize::try_from(block.0).unwrap()] = self.executed;
                }
            }
            8..12 => return self.finish(choices),
            12..14 => self.pending.union_with(&self.rules.take_dirty()),
            14..17 => {
                let run = self.pending.next_run(choices.below(8) as u64, BLOCKS);
                if let Some(run) = run
                    && self.flights.iter().all(|(block, _)| *block != run.start)
                {
                    self.pending.remove_range(blocks(run.start, run.start + 1));
                    self.rules.begin_send(blocks(run.start, run.start + 1));
                    self.flights.push((run.start, None));
                }
            }
            17..19 if !self.flights.is_empty() => {
                let at = choices.below(self.flights.len());
                let (block, content) = &mut self.flights[at];
                let here = self.disk[usize::try_from(*block).unwrap()];
                content.get_or_insert(here);
            }
            19..22 => return self.ack(choices),
            22 if choices.once_in(3) => self.toggle(choices),
            23 if choices.once_in(3) && !self.held.is_empty() => {
                let at = choices.below(self.held.len());
                let gone = self.held.swap_remove(at);
                self.rules.forget_held(gone.ticket);
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(&mut self, choices: &mut Choices) -> Checked {
        let done: Vec<_> = (0..self.writes.len())
            .filter(|&at| self.writes[at].number.is_some())
            .collect();
        let Some(&at) = done.get(choices.below(done.len())) else {
            return Ok(());
        };
        let mut write = self.writes.swap_remove(at);
        let completion = self.rules.finish(write.ticket, Outcome::Done);
        let waits = self.on && self.rules.mode() == Mode::Owner;
        if waits {
            let had = |block: &u64| self.had.intersects(blocks(*block, block + 1));
            write.awaited = (write.range.start..write.range.end).filter(had).collect();
        }
        let expected = if write.awaited.is_empty() {
            Completion::Now
        } else {
            Completion::Held
        };
        if completion != expected {
            return Err(format!("{write:?} is {completion:?}"));
        }
        if completion == Completion::Held {
            self.held.push(write);
        }
        Ok(())
    }

    fn ack(&mut self, choices: &mut Choices) -> Checked {
        let read: Vec<_> = (0..self.flights.len())
            .filter(|&at| self.flights[at].1.is_some())
            .collect();
        let Some(&at) = read.get(choices.below(read.len())) else {
            return Ok(());
        };
        let (block, content) = self.flights.swap_remove(at);
        let range = blocks(block, block + 1);
        if choices.once_in(8) {
            self.pending.insert_range(range);
            return Ok(());
        }
        self.target[usize::try_from(block).unwrap()] = content.unwrap_or(0);
        if self.pending.intersects(range) {
            return Ok(());
        }
        self.rules.acked(&[range]);
        if self.on {
            self.had.insert_range(range);
        }
        while let Some(ticket) = self.rules.poll_released() {
            let write = self.take_held(ticket)?;
            for block in &write.awaited {
                let has = self.target[usize::try_from(*block).unwrap()];
                if Some(has) < write.number {
                    return Err(format!("{write:?} is let go, and the target has {has}"));
                }
            }
        }
        Ok(())
    }

    fn take_held(&mut self, ticket: Ticket) -> Result<Write, String> {
        let at = self.held.iter().position(|write| write.ticket == ticket);
        let at = at.ok_or_else(|| format!("{ticket:?} is let go and was not held"))?;
        Ok(self.held.swap_remove(at))
    }

    /// Mirroring on or off, or a switch that is begun or called off.
    fn toggle(&mut self, choices: &mut Choices) {
        match choices.below(3) {
            0 => {
                self.on = !self.on;
                let mut lacking = BlockSet::full(BLOCKS);
                lacking.subtract(&self.had);
                self.rules.set_mirroring(self.on.then_some(lacking));
            }
            1 => self.rules.freeze(),
            _ => self.rules.thaw(),
        }
        // Whatever went by that was right to go.
        while let Some(ticket) = self.rules.poll_released() {
            self.held.retain(|write| write.ticket != ticket);
        }
    }

    /// What is sent to the end lets everything go.
    fn end(mut self) -> Checked {
        let mut none = Choices::new(Vec::new());
        if self.rules.mode() == Mode::Frozen {
            self.rules.thaw();
        }
        while !self.writes.is_empty() {
            for at in 0..self.writes.len() {
                self.executed += 1;
                self.writes[at].number.get_or_insert(self.executed);
            }
            self.finish(&mut none)?;
        }
        loop {
            self.pending.union_with(&self.rules.take_dirty());
            while !self.flights.is_empty() {
                for (block, content) in &mut self.flights {
                    let here = self.disk[usize::try_from(*block).unwrap()];
                    content.get_or_insert(here.max(self.executed));
                }
                self.ack(&mut none)?;
            }
            let Some(run) = self.pending.next_run(0, BLOCKS) else {
                break;
            };
            self.pending.remove_range(run);
            self.rules.begin_send(run);
            self.flights
                .extend((run.start..run.end).map(|block| (block, None)));
        }
        if self.rules.held_count() > 0 || !self.held.is_empty() {
            return Err(format!("{:?} wait for ever", self.held));
        }
        Ok(())
    }
}

fn run(mut choices: Choices) -> Checked {
    let mut world = World::new();
    while !choices.is_over() {
        world.step(&mut choices)?;
    }
    world.end()
}

#[test]
fn a_write_is_let_go_when_the_target_has_it_and_not_before() {
    for seed in 0..3000 {
        run(Choices::seeded(seed, 400)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

proptest! {
    /// The same, so that a failure is shrunk to a short one.
    #[test]
    fn held_writes_end(numbers in prop::collection::vec(any::<u32>(), 0..400)) {
        if let Err(error) = run(Choices::new(numbers)) {
            prop_assert!(false, "{}", error);
        }
    }
}

#[test]
fn a_write_of_part_of_a_block_waits_for_the_block() {
    let mut rules = mirroring(&[]);
    let Admission::Go { ticket, .. } = rules.begin(GuestOp::Write, ByteRange::at(100, 10)) else {
        panic!("not admitted")
    };
    assert_eq!(rules.finish(ticket, Outcome::Done), Completion::Held);
    send(&mut rules, blocks(0, 1));
    assert_eq!(released(&mut rules), [ticket]);
}
