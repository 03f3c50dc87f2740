//! Reads before the switch: by hand, against a source that keeps writing, and under every schedule tried.

use std::collections::{BTreeMap, HashMap};

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, ByteRange, VolumeSize};

use super::Choices;
use crate::rules::{Admission, GuestOp, Mode, Outcome, Peek, Refusal, Rules, Ticket};

const BLOCKS: u64 = 600;

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * BLOCK_SIZE - 100).unwrap()
}

fn whole(start: u64, end: u64) -> ByteRange {
    BlockRange::new(start, end).bytes(size())
}

fn peeking() -> Rules {
    let mut rules = Rules::new(size(), Mode::Incoming);
    rules.set_peeking(true);
    rules
}

fn read(rules: &mut Rules, range: ByteRange) -> Ticket {
    match rules.begin(GuestOp::Read, range) {
        Admission::Parked { ticket } => ticket,
        other => panic!("{other:?}"),
    }
}

fn questions(rules: &mut Rules) -> Vec<Peek> {
    std::iter::from_fn(|| rules.poll_peek()).collect()
}

fn ranges(peeks: &[Peek]) -> Vec<(u64, u64)> {
    let range = |peek: &Peek| (peek.range.start, peek.range.end);
    peeks.iter().map(range).collect()
}

#[test]
fn a_read_becomes_questions_and_ends_with_the_last_answer() {
    let mut rules = peeking();
    let ticket = read(&mut rules, ByteRange::at(BLOCK_SIZE + 5, 300 * BLOCK_SIZE));
    assert!(rules.has_output() && rules.has_peeks());
    let peeks = questions(&mut rules);
    assert_eq!(ranges(&peeks), [(1, 257), (257, 302)]);
    assert_eq!(rules.peeked(peeks[0].number).unwrap().ticket, ticket);
    rules.end_peek(peeks[1].number, true);
    rules.end_peek(peeks[1].number, true);
    assert_eq!(rules.poll_woken(), None);
    rules.end_peek(peeks[0].number, true);
    assert_eq!(rules.poll_woken(), Some((ticket, Admission::Answered)));
    assert_eq!(rules.peeked(peeks[0].number), None);
    assert_eq!(rules.parked_count(), 0);
    let stats = rules.stats();
    assert_eq!((stats.peeks, stats.guest_reads), (1, 0));
}

#[test]
fn a_bad_answer_fails_the_read_and_forgets_its_other_questions() {
    let mut rules = peeking();
    let ticket = read(&mut rules, whole(0, 600));
    let other = read(&mut rules, whole(599, 600));
    let peeks = questions(&mut rules);
    assert_eq!(peeks.len(), 4);
    rules.end_peek(peeks[1].number, false);
    let refused = Admission::Refused(Refusal::Unreadable);
    assert_eq!(rules.poll_woken(), Some((ticket, refused)));
    rules.end_peek(peeks[0].number, true);
    assert_eq!(rules.poll_woken(), None);
    rules.requeue_peeks();
    assert_eq!(questions(&mut rules), peeks[3..]);
    rules.cancel_parked(other);
    rules.requeue_peeks();
    assert_eq!(questions(&mut rules), []);
}

#[test]
fn nothing_but_reads_and_flushes_before_the_switch() {
    let mut rules = peeking();
    for op in [GuestOp::Write, GuestOp::WriteZeroes, GuestOp::Trim] {
        let refused = Admission::Refused(Refusal::NotHere);
        assert_eq!(rules.begin(op, whole(0, 1)), refused);
    }
    assert!(rules.begin_flush().is_data_only());
    assert!(rules.is_drained());
}

#[test]
fn few_questions_are_with_the_source_at_once() {
    let mut rules = peeking();
    for block in 0..100 {
        read(&mut rules, whole(block, block + 1));
    }
    let mut asked = questions(&mut rules);
    assert_eq!(asked.len(), 16);
    let mut count = 0;
    while let Some(peek) = asked.pop() {
        rules.end_peek(peek.number, true);
        count += 1;
        asked.extend(questions(&mut rules));
        assert!(asked.len() <= 16);
    }
    assert_eq!(count, 100);
}

#[test]
fn requests_that_wait_are_decided_again_when_peeking_begins_or_ends() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    let ticket = read(&mut rules, whole(3, 4));
    let Admission::Parked { ticket: write } = rules.begin(GuestOp::Write, whole(5, 6)) else {
        panic!("it waits for the switch");
    };
    assert_eq!(questions(&mut rules), []);
    rules.set_peeking(true);
    let refused = Admission::Refused(Refusal::NotHere);
    assert_eq!(rules.poll_woken(), Some((write, refused)));
    assert_eq!(ranges(&questions(&mut rules)), [(3, 4)]);
    rules.set_peeking(false);
    rules.requeue_peeks();
    assert_eq!(questions(&mut rules), []);
    rules.start_postcopy(BlockSet::new(BLOCKS));
    let Some((woken, Admission::Go { .. })) = rules.poll_woken() else {
        panic!("it runs after the switch");
    };
    assert_eq!(woken, ticket);
}

#[test]
fn open_questions_are_forgotten_at_the_switch_and_no_miss_is_counted() {
    let mut rules = peeking();
    let here = read(&mut rules, whole(0, 1));
    let missing = read(&mut rules, whole(7, 8));
    let peeks = questions(&mut rules);
    let mut set = BlockSet::new(BLOCKS);
    set.insert_range(BlockRange::new(7, 8));
    rules.start_postcopy(set);
    for peek in peeks {
        assert_eq!(rules.peeked(peek.number), None);
        rules.end_peek(peek.number, true);
    }
    assert!(matches!(rules.poll_woken(), Some((ticket, Admission::Go { .. })) if ticket == here));
    assert_eq!(rules.poll_woken(), None);
    assert_eq!(rules.poll_fault(), Some(BlockRange::new(7, 8)));
    let plan = rules.begin_apply(BlockRange::new(7, 8));
    rules.end_apply(plan.token, Outcome::Done);
    assert!(
        matches!(rules.poll_woken(), Some((ticket, Admission::Go { .. })) if ticket == missing)
    );
    rules.finish(here, Outcome::Done);
    rules.finish(missing, Outcome::Done);
    assert_eq!(rules.stats().guest_reads_missed, 0);
    assert!(rules.is_drained());
}

/// What each of some blocks has: a number, which only grows.
type Blocks = BTreeMap<u64, u64>;

/// A read under way.
struct Read {
    /// What the source had when it began.
    begin: Blocks,
    /// What was answered.
    answer: Blocks,
}

#[derive(Default)]
struct World {
    source: Blocks,
    reads: HashMap<Ticket, Read>,
    /// Questions on their way to the source, and answers back.
    asked: Vec<Peek>,
    answers: Vec<(Peek, Blocks)>,
}

impl World {
    fn content(&self, range: BlockRange) -> Blocks {
        let of = |block: u64| (block, self.source.get(&block).copied().unwrap_or(0));
        (range.start..range.end).map(of).collect()
    }

    fn step(&mut self, rules: &mut Rules, choices: &mut Choices) {
        match choices.below(12) {
            0..3 => {
                let block = choices.below(8) as u64 * 75;
                *self.source.entry(block).or_default() += 1;
            }
            3..5 if self.reads.len() < 8 => {
                let start = choices.below(590) as u64;
                let end = (start + 1 + choices.below(400) as u64).min(BLOCKS);
                let ticket = read(rules, whole(start, end));
                let read = Read {
                    begin: self.content(BlockRange::new(start, end)),
                    answer: Blocks::new(),
                };
                self.reads.insert(ticket, read);
            }
            3..7 if !self.asked.is_empty() => {
                let peek = self.asked.swap_remove(choices.below(self.asked.len()));
                self.answers.push((peek, self.content(peek.range)));
            }
            7..10 if !self.answers.is_empty() => {
                let at = choices.below(self.answers.len());
                let (peek, content) = self.answers.swap_remove(at);
                if let Some(answered) = rules.peeked(peek.number) {
                    assert_eq!(answered.range, peek.range);
                    let read = self.reads.get_mut(&answered.ticket).unwrap();
                    read.answer.extend(content);
                    rules.end_peek(peek.number, true);
                }
            }
            10 => {
                // The link breaks.
                self.asked.clear();
                self.answers.clear();
                rules.requeue_peeks();
            }
            11 if !self.reads.is_empty() && choices.once_in(4) => {
                let ticket = *self.reads.keys().next().unwrap();
                self.reads.remove(&ticket);
                rules.cancel_parked(ticket);
            }
            _ => {}
        }
        self.asked.extend(questions(rules));
        while let Some((ticket, admission)) = rules.poll_woken() {
            assert_eq!(admission, Admission::Answered);
            let read = self.reads.remove(&ticket).unwrap();
            for (block, then) in read.begin {
                let now = self.source.get(&block).copied().unwrap_or(0);
                let got = read.answer[&block];
                assert!((then..=now).contains(&got), "block {block}: {got}");
            }
        }
    }
}

#[test]
fn an_answer_is_what_stood_there_between_question_and_answer() {
    for seed in 0..500 {
        let mut choices = Choices::seeded(seed, 600);
        let (mut world, mut rules) = (World::default(), peeking());
        while !choices.is_over() {
            world.step(&mut rules, &mut choices);
        }
        // Nobody is left waiting: everything asked is answered.
        let mut rounds = 0;
        while !world.reads.is_empty() {
            world.asked.extend(questions(&mut rules));
            assert!(!world.asked.is_empty() || !world.answers.is_empty());
            for peek in std::mem::take(&mut world.asked) {
                world.answers.push((peek, world.content(peek.range)));
            }
            while !world.answers.is_empty() {
                world.step(&mut rules, &mut Choices::new(vec![7, 0]));
            }
            rounds += 1;
            assert!(rounds < 1000);
        }
        assert_eq!(rules.parked_count(), 0);
    }
}

/// A reader, somebody who asks and answers, and the switch: whatever comes first, the reader's request ends.
#[test]
fn a_question_meets_the_switch_under_many_schedules() {
    use shuttle::{
        sync::{Arc, Condvar, Mutex},
        thread,
    };

    struct Shared {
        rules: Rules,
        ended: Option<Admission>,
        switched: bool,
    }

    fn collect(shared: &mut Shared) {
        while let Some((ticket, admission)) = shared.rules.poll_woken() {
            assert_eq!(shared.ended.replace(admission), None);
            if let Admission::Go { .. } = admission {
                shared.rules.finish(ticket, Outcome::Done);
            }
        }
    }

    fn run() {
        let shared = Shared {
            rules: peeking(),
            ended: None,
            switched: false,
        };
        let lab = Arc::new((Mutex::new(shared), Condvar::new()));
        let spawn = |work: fn(&mut Shared) -> bool| {
            let lab = lab.clone();
            thread::spawn(move || {
                let mut shared = lab.0.lock().unwrap();
                // Who waits has changed nothing, so nobody has to know.
                while !work(&mut shared) {
                    if shared.ended.is_some() {
                        return;
                    }
                    shared = lab.1.wait(shared).unwrap();
                }
                collect(&mut shared);
                lab.1.notify_all();
            })
        };
        let reader = spawn(|shared| {
            if shared.switched {
                let admission = shared.rules.begin(GuestOp::Read, whole(1, 2));
                if let Admission::Parked { .. } = admission {
                    return true;
                }
                panic!("block 1 is missing");
            }
            read(&mut shared.rules, whole(1, 2));
            true
        });
        let answerer = spawn(|shared| match shared.rules.poll_peek() {
            Some(peek) => {
                shared.rules.end_peek(peek.number, true);
                true
            }
            None => shared.switched,
        });
        let switch = spawn(|shared| {
            shared.rules.start_postcopy(BlockSet::full(BLOCKS));
            shared.switched = true;
            true
        });
        let arrival = spawn(|shared| {
            if !shared.switched || shared.rules.poll_fault().is_none() {
                return shared.ended.is_some();
            }
            let plan = shared.rules.begin_apply(BlockRange::new(1, 2));
            shared.rules.end_apply(plan.token, Outcome::Done);
            true
        });
        for thread in [reader, answerer, switch, arrival] {
            thread.join().unwrap();
        }
        assert!(lab.0.lock().unwrap().ended.is_some());
    }
    shuttle::check_random(run, 2000);
    shuttle::check_pct(run, 2000, 3);
}
