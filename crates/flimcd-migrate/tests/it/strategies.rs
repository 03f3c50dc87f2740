//! Whole migrations without anything going wrong.

use flimcd_core::BlockRange;
use flimcd_migrate::{SourceEvent, SourcePhase, policy};
use flimcd_wire::Class;

use crate::pair::{BLOCKS, Pair, seqs_of, times_sent};

#[test]
fn every_strategy_brings_everything_once() {
    for strategy in policy::STRATEGIES {
        let mut pair = Pair::started(strategy);
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image, "{strategy}");
        for block in 0..BLOCKS {
            assert_eq!(times_sent(&pair, block), 1, "{strategy}, block {block}");
        }
    }
}

#[test]
fn precopy_leaves_nothing_for_after_the_switch() {
    let mut pair = Pair::started("precopy");
    pair.drive_until(|pair| pair.source.phase() == SourcePhase::PreCopy);
    pair.drive_messages(4);
    pair.write(3, 1003);
    pair.write(60, 1060);
    pair.drive_until(|pair| pair.owner.is_some());
    assert!(pair.missing.is_empty());
    pair.drive();
    pair.assert_completed();
    assert_eq!((pair.arrived[3], pair.arrived[60]), (1003, 1060));
}

#[test]
fn postcopy_sends_nothing_before_the_switch_and_what_is_waited_for_first() {
    let mut pair = Pair::started("postcopy");
    pair.drive_until(|pair| pair.owner.is_some());
    assert!(pair.sent.is_empty());
    assert_eq!(pair.missing.count(), BLOCKS);
    pair.read_at_target(BlockRange::new(50, 52));
    pair.write(7, 1007);
    pair.drive();
    pair.assert_completed();
    let mut want = pair.image.clone();
    want[7] = 1007;
    assert_eq!(
        pair.arrived, want,
        "fetched content never overwrites what the guest wrote"
    );
    let (class, first) = &pair.sent[0];
    assert_eq!(*class, Class::Fault);
    assert_eq!(seqs_of(&pair, 50), [first.seq]);
}

#[test]
fn the_switch_waits_for_a_grant_and_flimcd_leaves_what_is_hot() {
    let mut pair = Pair::new("flimcd");
    pair.link_up();
    for round in 0..400 {
        let next = pair.now + std::time::Duration::from_millis(10);
        pair.drive_until(|pair| pair.now >= next);
        // Two chunks are written all the time, the others never.
        pair.write(16 + round % 16, 2000 + round);
        pair.write(40, 3000 + round);
    }
    assert!(
        pair.source_events
            .contains(&SourceEvent::ReadyForSwitchover)
    );
    assert_eq!(pair.source.phase(), SourcePhase::PreCopy);
    pair.source
        .handle_switchover(pair.now, flimcd_migrate::Switchover::WhenReady);
    pair.drive();
    pair.assert_completed();
    assert_eq!(pair.arrived, pair.image);
}
