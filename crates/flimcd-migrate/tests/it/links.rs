//! The link breaks: at every moment, and right where it matters.

use flimcd_core::BlockRange;
use flimcd_migrate::{SourcePhase, Switchover, policy};

use crate::pair::{Pair, times_sent};

/// The pair itself asserts that no block that arrived is sent again.
#[test]
fn a_link_break_after_any_message_loses_nothing_and_repeats_nothing() {
    for strategy in policy::STRATEGIES {
        for after in 0..60 {
            let mut pair = Pair::started(strategy);
            pair.drive_messages(after);
            pair.link_down();
            let while_down = pair.now + std::time::Duration::from_millis(300);
            pair.drive_until(|pair| pair.now >= while_down);
            pair.link_up();
            pair.drive();
            pair.assert_completed();
            assert_eq!(
                pair.arrived, pair.image,
                "{strategy}, after {after} messages"
            );
        }
    }
}

#[test]
fn a_demanded_block_that_is_on_its_way_is_not_sent_twice() {
    let mut pair = Pair::started("postcopy");
    pair.drive_until(|pair| pair.owner.is_some());
    pair.drive_until(|pair| !pair.sent.is_empty());
    // The push has begun; its first messages are on their way when the guest asks for what is in them.
    pair.read_at_target(BlockRange::new(0, 2));
    pair.drive();
    pair.assert_completed();
    assert_eq!(times_sent(&pair, 0), 1);
    assert_eq!(times_sent(&pair, 1), 1);
}

#[test]
fn a_fault_whose_demand_was_lost_is_asked_for_again() {
    let mut pair = Pair::started("postcopy");
    pair.drive_until(|pair| pair.owner.is_some());
    pair.read_at_target(BlockRange::new(33, 34));
    pair.link_down();
    pair.link_up();
    pair.drive_until(|pair| !pair.missing.contains(flimcd_core::BlockIndex(33)));
    pair.drive();
    pair.assert_completed();
}

#[test]
fn content_that_was_outdated_when_the_guest_stopped_is_dropped() {
    let mut pair = Pair::new("flimcd");
    pair.link_up();
    pair.drive_until(|pair| !pair.sent.is_empty());
    // In flight now: the guest writes into it, and stops at once.
    pair.write(5, 1005);
    pair.source.handle_switchover(pair.now, Switchover::Now);
    pair.drive_until(|pair| pair.source.phase() == SourcePhase::Switching);
    pair.drive();
    pair.assert_completed();
    assert_eq!(pair.arrived[5], 1005);
    assert_eq!(pair.arrived, pair.image);
}

#[test]
fn what_arrived_before_the_switch_without_an_acknowledgement_is_not_missing() {
    let mut pair = Pair::new("flimcd");
    pair.link_up();
    // Content has just arrived, its acknowledgement has not.
    pair.drive_until(|pair| pair.arrived[0] != 0);
    pair.source.handle_switchover(pair.now, Switchover::Now);
    pair.drive_until(|pair| pair.owner.is_some());
    assert!(!pair.missing.contains(flimcd_core::BlockIndex(0)));
    pair.drive();
    pair.assert_completed();
}
