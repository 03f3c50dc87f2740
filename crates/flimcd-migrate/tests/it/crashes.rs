//! An agent dies and comes back, at every moment. What a crash does to disks and to requests in flight is the simulator's subject.

use flimcd_migrate::{SourceRecord, policy};

use crate::pair::Pair;

fn ends_well(mut pair: Pair, what: &str) {
    pair.link_up();
    pair.drive();
    if matches!(pair.record, SourceRecord::Retired(_)) {
        assert!(pair.owner.is_some() && pair.missing.is_empty(), "{what}");
    } else {
        pair.assert_completed();
    }
    assert_eq!(pair.arrived, pair.image, "{what}");
}

#[test]
fn the_target_restarts_after_any_message() {
    for strategy in policy::STRATEGIES {
        for after in 0..60 {
            let mut pair = Pair::started(strategy);
            pair.drive_messages(after);
            pair.restart_target();
            ends_well(pair, &format!("{strategy}, after {after} messages"));
        }
    }
}

#[test]
fn the_source_restarts_after_any_message() {
    for strategy in policy::STRATEGIES {
        for after in 0..60 {
            let mut pair = Pair::started(strategy);
            pair.drive_messages(after);
            pair.restart_source();
            ends_well(pair, &format!("{strategy}, after {after} messages"));
        }
    }
}

#[test]
fn both_restart_and_the_link_breaks_in_between() {
    for strategy in policy::STRATEGIES {
        for after in (0..60).step_by(3) {
            let mut pair = Pair::started(strategy);
            pair.drive_messages(after);
            pair.restart_source();
            pair.link_up();
            pair.drive_messages(after + 5);
            pair.link_down();
            pair.link_up();
            pair.drive_messages(after + 9);
            pair.restart_target();
            ends_well(pair, &format!("{strategy}, after {after} messages"));
        }
    }
}
