//! The rules one by one.

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, ByteRange, VolumeSize};

use crate::rules::{
    Admission, FlushStep, GuestOp, Mode, Mutation, Outcome, Refusal, Rules, Ticket,
};

const BLOCKS: u64 = 16;

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap()
}

fn blocks(start: u64, end: u64) -> BlockRange {
    BlockRange::new(start, end)
}

/// Bytes of whole blocks.
fn whole(start: u64, end: u64) -> ByteRange {
    blocks(start, end).bytes(size())
}

/// A few bytes inside of `block`.
fn inside(block: u64) -> ByteRange {
    ByteRange::at(block * BLOCK_SIZE + 100, 200)
}

fn set(ranges: &[(u64, u64)]) -> BlockSet {
    let mut set = BlockSet::new(BLOCKS);
    for &(start, end) in ranges {
        set.insert_range(blocks(start, end));
    }
    set
}

fn postcopy(missing: &[(u64, u64)]) -> Rules {
    let mut rules = Rules::new(size(), Mode::Incoming);
    rules.start_postcopy(set(missing));
    rules
}

#[track_caller]
fn go(rules: &mut Rules, op: GuestOp, range: ByteRange) -> Ticket {
    match rules.begin(op, range) {
        Admission::Go { ticket, .. } => ticket,
        other => panic!("{op:?} {range:?}: {other:?}"),
    }
}

#[track_caller]
fn parked(rules: &mut Rules, op: GuestOp, range: ByteRange) -> Ticket {
    match rules.begin(op, range) {
        Admission::Parked { ticket } => ticket,
        other => panic!("{op:?} {range:?}: {other:?}"),
    }
}

fn woken(rules: &mut Rules) -> Vec<Ticket> {
    std::iter::from_fn(|| rules.poll_woken())
        .map(|(ticket, admission)| {
            assert!(matches!(admission, Admission::Go { ticket: t, .. } if t == ticket));
            ticket
        })
        .collect()
}

fn faults(rules: &mut Rules) -> Vec<(u64, u64)> {
    std::iter::from_fn(|| rules.poll_fault())
        .map(|run| (run.start, run.end))
        .collect()
}

/// Runs an apply from begin to end and returns what it wrote.
fn apply(rules: &mut Rules, start: u64, end: u64) -> Vec<BlockRange> {
    let plan = rules.begin_apply(blocks(start, end));
    assert!(!plan.wait);
    rules.end_apply(plan.token, Outcome::Done);
    plan.write
}

#[test]
fn a_block_written_while_it_is_sent_is_sent_again() {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.start_tracking();
    let Admission::Go {
        ticket,
        newly_dirty,
    } = rules.begin(GuestOp::Write, inside(3))
    else {
        panic!("an owner runs requests")
    };
    assert!(newly_dirty);
    assert_eq!(rules.take_dirty(), set(&[(3, 4)]));
    assert!(rules.is_dirty(blocks(3, 4)), "in flight, so kept");
    rules.begin_send(blocks(0, 8));
    assert!(rules.is_dirty(blocks(3, 4)), "in flight, so kept");
    rules.finish(ticket, Outcome::Done);
    rules.begin_send(blocks(0, 8));
    assert!(!rules.is_dirty(blocks(0, 8)));

    let ticket = go(&mut rules, GuestOp::Write, inside(3));
    rules.end_send(blocks(0, 8));
    assert!(rules.is_dirty(blocks(3, 4)), "written during the read");
    rules.finish(ticket, Outcome::Failed);
    assert_eq!(
        rules.take_dirty(),
        set(&[(3, 4)]),
        "a failed write changed who knows what"
    );
    assert!(rules.take_dirty().is_empty());
}

#[test]
fn writes_in_flight_when_tracking_starts_are_marked() {
    let mut rules = Rules::new(size(), Mode::Owner);
    let write = go(&mut rules, GuestOp::WriteZeroes, whole(2, 5));
    let read = go(&mut rules, GuestOp::Read, whole(8, 9));
    rules.start_tracking();
    rules.finish(write, Outcome::Done);
    rules.finish(read, Outcome::Done);
    assert_eq!(rules.take_dirty(), set(&[(2, 5)]));
}

#[test]
fn a_trim_marks_whole_blocks_only() {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.start_tracking();
    let ticket = go(
        &mut rules,
        GuestOp::Trim,
        ByteRange::new(100, 3 * BLOCK_SIZE + 5),
    );
    rules.finish(ticket, Outcome::Done);
    assert_eq!(rules.take_dirty(), set(&[(1, 3)]));
    let ticket = go(&mut rules, GuestOp::Trim, inside(0));
    rules.finish(ticket, Outcome::Done);
    assert!(rules.take_dirty().is_empty());
}

#[test]
fn freezing_drains_parks_and_thaws_or_refuses() {
    let mut rules = Rules::new(size(), Mode::Owner);
    rules.start_tracking();
    let running = go(&mut rules, GuestOp::Write, whole(0, 1));
    rules.freeze();
    assert!(!rules.is_drained());
    let waiting = parked(&mut rules, GuestOp::Write, whole(1, 2));
    let gone = parked(&mut rules, GuestOp::Read, whole(1, 2));
    rules.cancel_parked(gone);
    rules.finish(running, Outcome::Done);
    assert!(rules.is_drained());
    assert_eq!(
        rules.take_dirty(),
        set(&[(0, 1)]),
        "a parked write is not one"
    );

    rules.thaw();
    assert!(
        rules.is_dirty(blocks(1, 2)),
        "marked before the caller can submit it"
    );
    rules.begin_send(blocks(1, 2));
    assert!(rules.is_dirty(blocks(1, 2)), "in flight from here on");
    rules.freeze();
    assert!(
        !rules.is_drained(),
        "woken is admitted, whether polled or not"
    );
    assert_eq!(woken(&mut rules), [waiting]);
    rules.finish(waiting, Outcome::Done);

    let refused = parked(&mut rules, GuestOp::Read, whole(1, 2));
    rules.release();
    assert_eq!(
        rules.poll_woken(),
        Some((refused, Admission::Refused(Refusal::Moved)))
    );
    assert_eq!(
        rules.begin(GuestOp::Read, whole(0, 1)),
        Admission::Refused(Refusal::Moved)
    );
    rules.cancel_parked(refused);
    assert!(rules.is_drained());
}

#[test]
#[should_panic(expected = "released with guest requests in flight")]
fn release_before_the_drain_is_a_bug() {
    let mut rules = Rules::new(size(), Mode::Owner);
    go(&mut rules, GuestOp::Write, whole(0, 1));
    rules.freeze();
    rules.release();
}

#[test]
#[should_panic(expected = "is not Active")]
fn finishing_twice_is_a_bug() {
    let mut rules = Rules::new(size(), Mode::Owner);
    let ticket = go(&mut rules, GuestOp::Read, whole(0, 1));
    rules.finish(ticket, Outcome::Done);
    rules.finish(ticket, Outcome::Done);
}

#[test]
fn a_read_of_a_missing_block_waits_for_it() {
    let mut rules = postcopy(&[(4, 8)]);
    let read = parked(&mut rules, GuestOp::Read, whole(3, 6));
    let second = parked(&mut rules, GuestOp::Read, whole(5, 7));
    assert_eq!(
        faults(&mut rules),
        [(4, 6), (6, 7)],
        "each block is reported once"
    );
    assert_eq!(apply(&mut rules, 4, 5), [blocks(4, 5)]);
    assert!(woken(&mut rules).is_empty());
    rules.requeue_faults();
    assert_eq!(faults(&mut rules), [(5, 6), (6, 7)]);
    assert_eq!(
        apply(&mut rules, 0, 8),
        [blocks(5, 8)],
        "present blocks take nothing"
    );
    assert_eq!(woken(&mut rules), [read, second]);
    let stats = rules.stats();
    assert_eq!(
        (
            stats.guest_reads,
            stats.guest_reads_missed,
            stats.blocks_missed
        ),
        (2, 2, 4)
    );
    assert_eq!((stats.blocks_applied, stats.blocks_dropped), (4, 5));
    assert_eq!(rules.missing_count(), 0);
    assert!(
        rules.take_overwritten().is_empty(),
        "the guest wrote nothing"
    );
    rules.finish_postcopy();
    assert_eq!(rules.mode(), Mode::Owner);
}

#[test]
fn a_covering_write_claims_and_what_is_fetched_meanwhile_is_dropped() {
    let mut rules = postcopy(&[(4, 8)]);
    let write = go(&mut rules, GuestOp::Write, whole(5, 7));
    let read = parked(&mut rules, GuestOp::Read, whole(5, 6));
    let other = parked(&mut rules, GuestOp::Write, whole(6, 7));
    let part = parked(&mut rules, GuestOp::Write, inside(6));
    assert!(
        faults(&mut rules).is_empty(),
        "the guest itself brings the content"
    );
    assert_eq!(rules.stats().guest_reads_missed, 0);
    assert_eq!(apply(&mut rules, 4, 8), [blocks(4, 5), blocks(7, 8)]);
    rules.finish(write, Outcome::Done);
    assert_eq!(woken(&mut rules), [read, other, part]);
    assert_eq!(rules.take_overwritten(), set(&[(5, 7)]));
    assert_eq!(rules.missing_count(), 0);
    assert!(apply(&mut rules, 4, 8).is_empty());
}

#[test]
fn a_failed_covering_write_leaves_the_block_missing_and_asks_for_it() {
    let mut rules = postcopy(&[(4, 8)]);
    let write = go(&mut rules, GuestOp::Write, whole(4, 6));
    let read = parked(&mut rules, GuestOp::Read, whole(4, 5));
    assert_eq!(
        apply(&mut rules, 4, 6),
        [] as [BlockRange; 0],
        "dropped: the guest is writing"
    );
    rules.finish(write, Outcome::Failed);
    assert!(woken(&mut rules).is_empty());
    assert_eq!(rules.missing_count(), 4);
    assert_eq!(faults(&mut rules), [(4, 6)]);
    rules.requeue_faults();
    assert_eq!(
        faults(&mut rules),
        [(4, 6)],
        "asked for again although nobody waits for 5"
    );
    assert_eq!(apply(&mut rules, 4, 6), [blocks(4, 6)]);
    assert_eq!(woken(&mut rules), [read]);
    assert!(rules.take_overwritten().is_empty());
}

#[test]
fn a_partial_write_waits_for_its_edges_only() {
    let mut rules = postcopy(&[(2, 10)]);
    let range = ByteRange::new(2 * BLOCK_SIZE + 1, 6 * BLOCK_SIZE + 1);
    let write = parked(&mut rules, GuestOp::Write, range);
    assert_eq!(faults(&mut rules), [(2, 3), (6, 7)]);
    apply(&mut rules, 2, 3);
    assert!(woken(&mut rules).is_empty());
    apply(&mut rules, 6, 7);
    assert_eq!(woken(&mut rules), [write]);
    assert!(
        apply(&mut rules, 3, 6).is_empty(),
        "claimed when it was admitted"
    );
    rules.finish(write, Outcome::Done);
    assert_eq!(rules.take_overwritten(), set(&[(3, 6)]));
}

#[test]
fn guest_requests_wait_for_an_apply_that_runs() {
    let mut rules = postcopy(&[(4, 8)]);
    let plan = rules.begin_apply(blocks(4, 6));
    let write = parked(&mut rules, GuestOp::Write, whole(5, 6));
    let read = parked(&mut rules, GuestOp::Read, whole(4, 5));
    assert!(faults(&mut rules).is_empty(), "it is on its way");
    rules.end_apply(plan.token, Outcome::Failed);
    assert_eq!(
        woken(&mut rules),
        [write],
        "missing again, so the write covers it"
    );
    assert_eq!(faults(&mut rules), [(4, 5)]);
    rules.finish(write, Outcome::Done);
    apply(&mut rules, 4, 8);
    assert_eq!(woken(&mut rules), [read]);
}

#[test]
fn trims_claim_whole_missing_blocks_and_ignore_parts() {
    let mut rules = postcopy(&[(4, 8)]);
    let part = go(&mut rules, GuestOp::Trim, inside(4));
    rules.finish(part, Outcome::Done);
    assert_eq!(rules.missing_count(), 4);
    let range = ByteRange::new(4 * BLOCK_SIZE + 1, 6 * BLOCK_SIZE + 1);
    let trim = go(&mut rules, GuestOp::Trim, range);
    rules.finish(trim, Outcome::Done);
    assert_eq!(rules.take_overwritten(), set(&[(5, 6)]));
    assert!(faults(&mut rules).is_empty());
}

#[test]
fn one_block_has_one_apply_at_a_time_in_order_of_arrival() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    let first = rules.begin_apply(blocks(0, 4));
    let second = rules.begin_apply(blocks(3, 6));
    let third = rules.begin_apply(blocks(5, 6));
    let apart = rules.begin_apply(blocks(8, 9));
    assert!(!first.wait && second.wait && third.wait && !apart.wait);
    assert_eq!(
        rules.poll_apply_ready(),
        None,
        "the third waits behind the second"
    );
    rules.end_apply(first.token, Outcome::Done);
    let ready = rules.poll_apply_ready().unwrap();
    assert_eq!(
        (ready.token, ready.write.as_slice()),
        (second.token, &[blocks(3, 6)][..])
    );
    assert_eq!(rules.poll_apply_ready(), None);
    rules.end_apply(second.token, Outcome::Done);
    assert_eq!(rules.poll_apply_ready().unwrap().token, third.token);
    rules.end_apply(third.token, Outcome::Done);
    rules.end_apply(apart.token, Outcome::Done);
}

#[test]
fn an_apply_from_before_the_switch_makes_nothing_present() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    let before = rules.begin_apply(blocks(0, 2));
    let queued = rules.begin_apply(blocks(1, 2));
    let read = parked(&mut rules, GuestOp::Read, whole(0, 1));
    let ready = parked(&mut rules, GuestOp::Write, whole(8, 9));
    assert_eq!(
        rules.stats().guest_reads_missed,
        0,
        "not known before the switch"
    );
    rules.start_postcopy(set(&[(0, 2)]));
    assert_eq!(woken(&mut rules), [ready]);
    assert_eq!(rules.stats().guest_reads_missed, 1);
    let write = parked(&mut rules, GuestOp::Write, whole(1, 2));
    rules.end_apply(before.token, Outcome::Done);
    assert_eq!(rules.missing_count(), 2);
    assert_eq!(faults(&mut rules), [(0, 1)]);
    let late = rules.poll_apply_ready().unwrap();
    assert_eq!(
        (late.token, late.write.len()),
        (queued.token, 0),
        "older than the switch"
    );
    rules.end_apply(late.token, Outcome::Done);
    assert_eq!(woken(&mut rules), [write]);
    apply(&mut rules, 0, 1);
    assert_eq!(woken(&mut rules), [read]);
}

#[test]
fn content_that_arrives_when_nobody_asks_is_dropped() {
    for mode in [Mode::Owner, Mode::Frozen, Mode::Released] {
        assert!(
            apply(&mut Rules::new(size(), mode), 0, 4).is_empty(),
            "{mode:?}"
        );
    }
}

#[test]
fn the_end_of_postcopy_waits_for_applies_that_run() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    let before = rules.begin_apply(blocks(0, 2));
    rules.start_postcopy(set(&[]));
    rules.finish_postcopy();
    assert_eq!(
        rules.mode(),
        Mode::PostCopy,
        "a guest write could meet the apply"
    );
    rules.end_apply(before.token, Outcome::Done);
    assert_eq!(rules.mode(), Mode::Owner);
    rules.finish_postcopy();
}

/// Steps of a plan as letters: D data, W with the blocks written, P presence synced.
fn steps(plan: &mut crate::rules::FlushPlan) -> String {
    let mut text = String::new();
    loop {
        match plan.next() {
            FlushStep::SyncData => text.push('D'),
            FlushStep::WritePresence(set) => {
                text.push_str(&format!("W{}", set.count()));
            }
            FlushStep::SyncPresence => text.push('P'),
            FlushStep::Done => return text,
        }
    }
}

#[test]
fn a_flush_makes_data_then_presence_durable() {
    let mut rules = postcopy(&[(0, 8)]);
    let mut plan = rules.begin_flush();
    assert!(plan.is_data_only());
    assert_eq!(steps(&mut plan), "D");
    rules.end_flush(plan, true);

    let write = go(&mut rules, GuestOp::Write, whole(0, 2));
    apply(&mut rules, 2, 5);
    let mut first = rules.begin_flush();
    rules.finish(write, Outcome::Done);
    let mut second = rules.begin_flush();
    assert_eq!(
        steps(&mut first),
        "DW3P",
        "the write was not done when it began"
    );
    assert_eq!(
        steps(&mut second),
        "DW3W2P",
        "what the first took is not durable yet"
    );
    rules.end_flush(first, false);
    rules.end_flush(second, true);
    let mut third = rules.begin_flush();
    assert_eq!(steps(&mut third), "DW3P", "put back by the one that failed");
    rules.end_flush(third, true);
    let mut last = rules.begin_flush();
    assert_eq!(steps(&mut last), "D");
    rules.end_flush(last, true);
}

#[test]
#[should_panic(expected = "before its last step")]
fn acknowledging_a_flush_early_is_a_bug() {
    let mut rules = postcopy(&[(0, 8)]);
    apply(&mut rules, 0, 1);
    let mut plan = rules.begin_flush();
    assert_eq!(plan.next(), FlushStep::SyncData);
    rules.end_flush(plan, true);
}

#[test]
fn cancelling_a_decided_request_gives_its_claim_back() {
    let mut rules = postcopy(&[(0, 2)]);
    let plan = rules.begin_apply(blocks(0, 1));
    let write = parked(&mut rules, GuestOp::Write, whole(0, 2));
    rules.end_apply(plan.token, Outcome::Failed);
    rules.cancel_parked(write);
    assert_eq!(rules.poll_woken(), None);
    assert_eq!(apply(&mut rules, 0, 2), [blocks(0, 2)]);
    assert!(rules.is_drained());
}

#[test]
fn a_short_last_block_is_covered_by_a_write_to_the_end() {
    let size = VolumeSize::new(3 * BLOCK_SIZE + 10).unwrap();
    let mut rules = Rules::new(size, Mode::Incoming);
    rules.start_postcopy(BlockSet::full(4));
    let write = go(
        &mut rules,
        GuestOp::Write,
        ByteRange::new(3 * BLOCK_SIZE, size.bytes()),
    );
    rules.finish(write, Outcome::Done);
    assert_eq!(rules.missing_count(), 3);
}

#[test]
fn an_idle_owner_of_a_tebibyte_costs_next_to_nothing() {
    let size = VolumeSize::new(1 << 40).unwrap();
    let mut rules = Rules::new(size, Mode::Owner);
    let ticket = go(&mut rules, GuestOp::Write, ByteRange::at(1 << 39, 4096));
    rules.finish(ticket, Outcome::Done);
    assert!(rules.memory_bytes() < 1 << 20, "{}", rules.memory_bytes());
}

#[test]
fn every_mutation_breaks_something() {
    for mutation in Mutation::ALL {
        let mut rules = Rules::new(size(), Mode::Owner);
        rules.set_mutation(Some(mutation));
        rules.start_tracking();
        let write = go(&mut rules, GuestOp::Write, whole(0, 1));
        let marked_before = rules.is_dirty(blocks(0, 1));
        let taken = rules.take_dirty();
        let kept = rules.is_dirty(blocks(0, 1));
        rules.finish(write, Outcome::Done);
        rules.begin_send(blocks(0, 1));
        let during = go(&mut rules, GuestOp::Write, whole(0, 1));
        rules.finish(during, Outcome::Done);
        rules.end_send(blocks(0, 1));
        let after_read = rules.is_dirty(blocks(0, 1));

        let mut target = postcopy(&[(0, 2)]);
        target.set_mutation(Some(mutation));
        let write = go(&mut target, GuestOp::Write, whole(0, 1));
        target.finish(write, Outcome::Done);
        let dropped = apply(&mut target, 0, 1).is_empty();
        let flushed = steps(&mut target.begin_flush()).ends_with('P');
        assert!(
            !(marked_before && taken.count() == 1 && kept && after_read && dropped && flushed),
            "{mutation:?} is not broken"
        );
    }
}

#[test]
fn writes_after_the_switch_are_marked_and_what_arrives_is_not() {
    let mut rules = Rules::new(size(), Mode::Incoming);
    rules.start_tracking();
    apply(&mut rules, 0, 1);
    rules.start_postcopy(set(&[(2, 6)]));
    apply(&mut rules, 2, 3);
    let ticket = go(&mut rules, GuestOp::Write, inside(0));
    rules.finish(ticket, Outcome::Done);
    let Admission::Parked { ticket } = rules.begin(GuestOp::Write, inside(4)) else {
        panic!("a part of a missing block waits")
    };
    assert_eq!(rules.dirty(), set(&[(0, 1)]), "not before it runs");
    apply(&mut rules, 4, 5);
    assert_eq!(woken(&mut rules), [ticket]);
    assert_eq!(rules.dirty(), set(&[(0, 1), (4, 5)]));
    rules.finish(ticket, Outcome::Done);
}

#[test]
fn a_way_back_that_is_given_up_refuses_its_guests() {
    let mut rules = Rules::new(size(), Mode::Released);
    rules.enter_incoming();
    let Admission::Parked { .. } = rules.begin(GuestOp::Read, inside(1)) else {
        panic!("parked until the switch")
    };
    rules.leave_incoming();
    let refused = Admission::Refused(Refusal::Moved);
    assert_eq!(
        rules.poll_woken().map(|(_, admission)| admission),
        Some(refused)
    );
    assert_eq!(rules.begin(GuestOp::Read, inside(1)), refused);
}
