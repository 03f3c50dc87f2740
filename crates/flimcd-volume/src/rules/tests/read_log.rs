//! The log of reads, against a list kept by hand.

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, ByteRange, VolumeSize};
use proptest::prelude::*;

use crate::rules::{Admission, GuestOp, Mode, Outcome, READS_KEPT_MAX, Rules};

const BLOCKS: u64 = 16;

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap()
}

fn run(rules: &mut Rules, op: GuestOp, start: u64, end: u64) {
    let range = BlockRange::new(start, end).bytes(size());
    if let Admission::Go { ticket, .. } = rules.begin(op, range) {
        rules.finish(ticket, Outcome::Done);
    }
}

fn read(rules: &mut Rules, start: u64, end: u64) {
    run(rules, GuestOp::Read, start, end);
}

fn taken(rules: &mut Rules) -> Vec<(u64, u64)> {
    let mut reads = Vec::new();
    rules.take_reads(&mut reads);
    reads.into_iter().map(|run| (run.start, run.end)).collect()
}

#[test]
fn reads_are_kept_in_order_while_the_log_is_on() {
    let mut rules = Rules::new(size(), Mode::Owner);
    read(&mut rules, 0, 1);
    assert!(taken(&mut rules).is_empty(), "off at first");
    rules.set_read_log(true);
    assert!(!rules.poll_read_news());
    read(&mut rules, 5, 7);
    assert!(rules.poll_read_news());
    run(&mut rules, GuestOp::Write, 1, 2);
    read(&mut rules, 5, 7);
    read(&mut rules, 2, 3);
    assert!(!rules.poll_read_news(), "told once");
    rules.set_read_log(true);
    assert_eq!(taken(&mut rules), [(5, 7), (5, 7), (2, 3)]);
    assert!(taken(&mut rules).is_empty());
    read(&mut rules, 3, 4);
    rules.set_read_log(false);
    rules.set_read_log(true);
    assert!(taken(&mut rules).is_empty(), "nothing is kept while off");
}

#[test]
fn hits_and_misses_after_the_switch_count_once_and_peeks_do_not() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    rules.set_read_log(true);
    rules.set_peeking(true);
    read(&mut rules, 0, 1);
    rules.set_peeking(false);
    read(&mut rules, 8, 9);
    let write = BlockRange::new(10, 11).bytes(size());
    assert!(matches!(
        rules.begin(GuestOp::Write, write),
        Admission::Parked { .. }
    ));
    assert!(taken(&mut rules).is_empty(), "no guest runs here yet");
    let mut missing = BlockSet::new(BLOCKS);
    missing.insert_range(BlockRange::new(4, 10));
    rules.start_postcopy(missing);
    assert!(rules.poll_read_news());
    read(&mut rules, 3, 4);
    read(&mut rules, 3, 6);
    let plan = rules.begin_apply(BlockRange::new(4, 5));
    rules.end_apply(plan.token, Outcome::Done);
    assert_eq!(taken(&mut rules), [(8, 9), (3, 4), (3, 6)]);
    let plan = rules.begin_apply(BlockRange::new(5, 10));
    rules.end_apply(plan.token, Outcome::Done);
    assert!(taken(&mut rules).is_empty(), "each once");
}

#[test]
fn a_frozen_volume_logs_its_reads_when_they_run() {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.set_read_log(true);
    rules.thaw();
    rules.freeze();
    read(&mut rules, 1, 2);
    assert!(taken(&mut rules).is_empty());
    rules.thaw();
    assert_eq!(taken(&mut rules), [(1, 2)]);
    assert!(rules.poll_woken().is_some());
}

#[test]
fn a_full_log_drops_the_newest_and_counts_them() {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.set_read_log(true);
    for at in 0..READS_KEPT_MAX as u64 + 5 {
        read(&mut rules, at % BLOCKS, at % BLOCKS + 1);
    }
    assert_eq!(rules.reads_dropped(), 5);
    let kept = taken(&mut rules);
    assert_eq!(kept.len(), READS_KEPT_MAX);
    assert_eq!(kept[17], (1, 2));
    read(&mut rules, 3, 4);
    assert_eq!(taken(&mut rules), [(3, 4)]);
}

/// Nanoseconds per guest read, to be run by hand in a release build:
/// `cargo test --release -p flimcd-volume -- --ignored --nocapture cost`.
#[test]
#[ignore = "measures, and checks nothing"]
#[expect(
    clippy::print_stderr,
    clippy::cast_precision_loss,
    reason = "for people"
)]
fn cost() {
    const REQUESTS: u64 = 20_000_000;
    for is_on in [false, true, false, true] {
        let mut rules = Rules::new(size(), Mode::Owner);
        rules.set_read_log(is_on);
        let mut reads = Vec::new();
        let begin = std::time::Instant::now();
        for number in 0..REQUESTS {
            let at = number % BLOCKS;
            read(&mut rules, at, at + 1);
            if number % 512 == 0 {
                rules.take_reads(&mut reads);
                std::hint::black_box(&mut reads).clear();
            }
        }
        let ns = begin.elapsed().as_nanos() as f64 / REQUESTS as f64;
        eprintln!("begin and finish of a read, log on: {is_on}: {ns:.2} ns");
    }
}

/// What happens to the rules of an owner.
#[derive(Clone, Copy, Debug)]
enum Step {
    Ask(GuestOp, u64, u64),
    Take,
    SetLog(bool),
    Freeze,
    Thaw,
}

fn steps() -> impl Strategy<Value = Step> {
    let op = prop_oneof![
        3 => Just(GuestOp::Read),
        1 => Just(GuestOp::Write),
        1 => Just(GuestOp::WriteZeroes),
        1 => Just(GuestOp::Trim),
    ];
    let bytes = BLOCKS * BLOCK_SIZE;
    prop_oneof![
        12 => (op, 0..bytes, 0..bytes).prop_map(|(op, a, b)| Step::Ask(op, a.min(b), a.max(b))),
        2 => Just(Step::Take),
        1 => any::<bool>().prop_map(Step::SetLog),
        1 => Just(Step::Freeze),
        1 => Just(Step::Thaw),
    ]
}

proptest! {
    #[test]
    fn the_log_has_what_ran_since(steps in prop::collection::vec(steps(), 0..200)) {
        let mut rules = Rules::new(size(), Mode::Owner);
        let (mut is_on, mut expected, mut waiting) = (false, Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Ask(op, start, end) => {
                    let range = ByteRange::new(start, end);
                    let blocks = range.blocks_touched();
                    let counts = op == GuestOp::Read && !blocks.is_empty();
                    match rules.begin(op, range) {
                        Admission::Go { ticket, .. } => {
                            rules.finish(ticket, Outcome::Done);
                            expected.extend((counts && is_on).then_some(blocks));
                        }
                        _ => waiting.extend(counts.then_some(blocks)),
                    }
                }
                Step::Take => {
                    let mut reads = Vec::new();
                    rules.take_reads(&mut reads);
                    prop_assert_eq!(&reads, &expected);
                    expected.clear();
                }
                Step::SetLog(on) => {
                    if on != is_on {
                        expected.clear();
                    }
                    is_on = on;
                    rules.set_read_log(on);
                }
                Step::Freeze => rules.freeze(),
                Step::Thaw => {
                    rules.thaw();
                    let ran = std::mem::take(&mut waiting);
                    if is_on {
                        expected.extend(ran);
                    }
                    while let Some((ticket, _)) = rules.poll_woken() {
                        rules.finish(ticket, Outcome::Done);
                    }
                }
            }
        }
    }
}
