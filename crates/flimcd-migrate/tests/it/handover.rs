//! Cancelling, refusing, and who owns the volume then.

use flimcd_migrate::{SourceEvent, SourcePhase, SourceRecord, Switchover, TargetPhase, policy};

use crate::pair::Pair;

#[test]
fn a_cancellation_after_any_message_leaves_the_guest_at_one_site() {
    let mut completed = 0;
    let mut cancelled = 0;
    for strategy in policy::STRATEGIES {
        for after in 0..60 {
            let mut pair = Pair::started(strategy);
            pair.drive_messages(after);
            pair.source.handle_cancel(pair.now);
            pair.drive();
            if pair.owner.is_some() {
                completed += 1;
                pair.assert_completed();
                assert_eq!(pair.arrived, pair.image);
            } else {
                cancelled += 1;
                pair.assert_at_source();
                assert_eq!(pair.source.phase(), SourcePhase::Cancelled);
                assert_eq!(pair.target.phase(), TargetPhase::Cancelled);
                assert!(pair.discarded);
            }
        }
    }
    assert!(completed > 0 && cancelled > 0, "{completed} {cancelled}");
}

#[test]
fn a_cancellation_while_the_link_is_down_is_said_later() {
    let mut pair = Pair::started("precopy");
    pair.drive_messages(2);
    pair.link_down();
    pair.source.handle_cancel(pair.now);
    pair.drive_until(|pair| pair.source.phase() == SourcePhase::Cancelled);
    pair.assert_at_source();
    pair.link_up();
    pair.drive();
    assert_eq!(pair.target.phase(), TargetPhase::Cancelled);
}

#[test]
fn an_offer_is_taken_back_only_after_the_target_has_refused_for_good() {
    let mut pair = Pair::started("postcopy");
    pair.drive_until(|pair| pair.source.phase() == SourcePhase::Switching);
    pair.link_down();
    pair.source.handle_cancel(pair.now);
    let long = pair.now + std::time::Duration::from_secs(20);
    pair.drive_until(|pair| pair.now >= long);
    assert_eq!(
        pair.source.phase(),
        SourcePhase::Switching,
        "no timeout decides it"
    );
    assert!(!pair.serving);
    pair.link_up();
    pair.drive();
    pair.assert_at_source();
    assert_eq!(pair.source.phase(), SourcePhase::Cancelled);
}

#[test]
fn a_target_that_cannot_take_over_gives_the_guest_back() {
    for strategy in policy::STRATEGIES {
        let mut pair = Pair::started(strategy);
        pair.take_over_fails = true;
        pair.drive();
        pair.assert_at_source();
        let failed = |event: &SourceEvent| matches!(event, SourceEvent::Failed(_));
        assert!(pair.source_events.iter().any(failed), "{strategy}");
    }
}

#[test]
fn a_target_that_failed_answers_a_source_that_has_prepared() {
    let mut pair = Pair::new("postcopy");
    pair.link_up();
    pair.drive_until(|pair| pair.source.phase() == SourcePhase::PreCopy);
    // It ends at the target, which cannot say so, while the source stops the guest.
    pair.link_down();
    pair.target.handle_cancel(pair.now);
    pair.drive_until(|pair| pair.target.phase() == TargetPhase::Failed);
    pair.record = SourceRecord::Prepared(flimcd_core::Epoch(2));
    pair.restart_source();
    assert_eq!(pair.source.phase(), SourcePhase::Switching);
    pair.link_up();
    pair.drive();
    pair.assert_at_source();
}

#[test]
fn the_guest_can_be_stopped_at_once() {
    for strategy in policy::STRATEGIES {
        let mut pair = Pair::new(strategy);
        pair.link_up();
        pair.source.handle_switchover(pair.now, Switchover::Now);
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image);
    }
}
