//! What the target has anywhere does not cross the link, nor what stands there already.

use flimcd_core::BlockRange;
use flimcd_migrate::{SourcePhase, Switchover};
use flimcd_wire::{Base, Content};

use crate::pair::{BLOCKS, Pair};

fn start(pair: &mut Pair) {
    pair.link_up();
    pair.source
        .handle_switchover(pair.now, Switchover::WhenReady);
}

/// Blocks that were sent in full, each time.
fn in_full(pair: &Pair) -> u64 {
    let entries = pair.sent.iter().flat_map(|(_, blocks)| &blocks.entries);
    let in_full = entries.filter(|entry| matches!(entry.content, Content::Raw { .. }));
    in_full.map(|entry| entry.range.len()).sum()
}

#[test]
fn blocks_that_are_elsewhere_are_not_sent() {
    for strategy in ["flimcd", "postcopy"] {
        let mut pair = Pair::new(strategy);
        pair.store.values = (0..BLOCKS).rev().filter(|v| v % 5 != 0).collect();
        start(&mut pair);
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image, "{strategy}");
        let content = pair.source.progress().content;
        assert_eq!((content.elsewhere_blocks, in_full(&pair)), (51, 13));
    }
}

#[test]
fn a_place_that_was_written_meanwhile_is_noticed() {
    for strategy in ["flimcd", "postcopy"] {
        let mut pair = Pair::new(strategy);
        pair.store.values = (1..=BLOCKS).collect();
        start(&mut pair);
        pair.drive_until(|pair| pair.source.progress().content.elsewhere_blocks > 0);
        for value in &mut pair.store.values {
            *value += 1000;
        }
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image, "{strategy}");
        assert_eq!(in_full(&pair), BLOCKS);
    }
}

#[test]
fn a_guest_does_not_wait_for_an_answer() {
    let mut pair = Pair::new("postcopy");
    start(&mut pair);
    pair.drive_until(|pair| pair.owner.is_some());
    pair.store.values = (1..=BLOCKS).collect();
    pair.read_at_target(BlockRange::new(40, 41));
    let asked = pair.now;
    pair.drive_until(|pair| !pair.missing.contains(flimcd_core::BlockIndex(40)));
    assert!(pair.now.since(asked) < crate::pair::DELAY * 3);
    pair.drive();
    pair.assert_completed();
    assert_eq!(pair.arrived, pair.image);
}

#[test]
fn a_known_copy_gets_what_changed_and_an_unknown_one_is_asked_about_everything() {
    for strategy in ["flimcd", "postcopy", "precopy"] {
        for base in [Base::Known, Base::Unknown] {
            let mut copy: Vec<u64> = (1..=BLOCKS).collect();
            for block in [3, 17, 18, 60] {
                copy[block] += 500;
            }
            let mut pair = Pair::on_copy(strategy, copy, base);
            pair.link_up();
            pair.write(9, 77);
            pair.drain_dirty();
            pair.source
                .handle_switchover(pair.now, Switchover::WhenReady);
            pair.drive();
            pair.assert_completed();
            assert_eq!(pair.arrived, pair.image, "{strategy}");
            let expected = if base == Base::Known { 5 } else { BLOCKS };
            assert_eq!(in_full(&pair), expected, "{strategy} {base:?}");
        }
    }
}

/// Breaks and deaths after every number of messages.
#[test]
fn breaks_and_deaths_at_any_step_do_no_harm() {
    for strategy in ["flimcd", "postcopy"] {
        for step in 0..60 {
            for event in [Pair::link_down, Pair::restart_source, Pair::restart_target] {
                let mut pair = Pair::new(strategy);
                pair.store.values = (1..=BLOCKS).filter(|v| v % 3 != 0).collect();
                start(&mut pair);
                pair.drive_messages(step);
                if pair.source.phase() < SourcePhase::Stopping {
                    pair.write(37, 99);
                    pair.drain_dirty();
                }
                if step % 2 == 0 {
                    pair.store.values[20] = 12345;
                }
                event(&mut pair);
                pair.link_up();
                pair.drive();
                pair.assert_completed();
                assert_eq!(pair.arrived, pair.image, "{strategy} {step}");
            }
        }
    }
}
