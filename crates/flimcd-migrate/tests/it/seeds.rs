//! What the target has at the same place does not cross the link, and what it turns out to lack does.

use flimcd_core::BlockRange;
use flimcd_migrate::{SourceEvent, SourcePhase, Switchover, TargetPhase};
use flimcd_wire::{Class, Content};

use crate::pair::{BLOCKS, Pair};

/// What the image holds in the beginning, with some blocks changed.
fn image(changed: &[u64]) -> Vec<u64> {
    (0..BLOCKS)
        .map(|block| block + 1 + if changed.contains(&block) { 1000 } else { 0 })
        .collect()
}

fn start(pair: &mut Pair) {
    pair.link_up();
    pair.source
        .handle_switchover(pair.now, Switchover::WhenReady);
}

/// Runs of blocks that were sent as being the same, and all others.
fn sent(pair: &Pair) -> (Vec<BlockRange>, Vec<BlockRange>) {
    let entries = pair.sent.iter().flat_map(|(_, blocks)| &blocks.entries);
    let (same, other): (Vec<_>, Vec<_>) = entries.partition(|entry| entry.content == Content::Same);
    let ranges = |entries: Vec<&flimcd_wire::Entry>| entries.iter().map(|e| e.range).collect();
    (ranges(same), ranges(other))
}

fn chunk(number: u64) -> BlockRange {
    BlockRange::new(number * 16, (number + 1) * 16)
}

#[test]
fn chunks_that_the_target_has_are_not_sent() {
    for strategy in ["flimcd", "postcopy"] {
        let mut pair = Pair::with_seed(strategy, image(&[20]), image(&[20]));
        start(&mut pair);
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image);
        let (same, other) = sent(&pair);
        let blocks = |runs: &[BlockRange]| runs.iter().map(|run| run.len()).sum::<u64>();
        assert_eq!((blocks(&same), other), (48, vec![chunk(1)]), "{strategy}");
        let named = SourceEvent::Seed("base".to_owned());
        assert!(pair.source_events.contains(&named), "{strategy}");
        assert_eq!(pair.source.progress().content.same_blocks, 48);
    }
}

#[test]
fn precopy_sends_everything() {
    let mut pair = Pair::with_seed("precopy", image(&[]), image(&[]));
    start(&mut pair);
    pair.drive();
    pair.assert_completed();
    assert_eq!(sent(&pair).0, []);
}

#[test]
fn what_the_image_does_not_hold_any_more_is_sent_in_full() {
    for strategy in ["flimcd", "postcopy"] {
        let mut pair = Pair::with_seed(strategy, image(&[]), image(&[20, 63]));
        start(&mut pair);
        pair.drive();
        pair.assert_completed();
        assert_eq!(pair.arrived, pair.image, "{strategy}");
        let mut other = sent(&pair).1;
        other.sort_unstable();
        assert_eq!(other, [chunk(1), chunk(3)], "{strategy}");
        let notes =
            |e: &&SourceEvent| matches!(e, SourceEvent::Note(text) if text.contains("library"));
        assert_eq!(pair.source_events.iter().filter(notes).count(), 1);
    }
}

#[test]
fn a_guest_that_waits_for_what_is_lacking_gets_it_first() {
    let mut pair = Pair::with_seed("postcopy", image(&[]), image(&[20]));
    start(&mut pair);
    pair.drive_until(|pair| pair.owner.is_some());
    pair.read_at_target(BlockRange::new(20, 21));
    pair.drive();
    pair.assert_completed();
    assert_eq!(pair.arrived, pair.image);
    let urgent = |(class, blocks): &&(Class, flimcd_wire::Blocks)| {
        *class == Class::Fault && blocks.entries.iter().any(|e| e.content != Content::Same)
    };
    assert_eq!(pair.sent.iter().filter(urgent).count(), 1);
}

/// Breaks and deaths after every number of messages, with an image that is right, and with one that is not.
#[test]
fn breaks_and_deaths_at_any_step_do_no_harm() {
    for strategy in ["flimcd", "postcopy"] {
        for lies in [&[][..], &[5, 20], &[5, 20, 40, 60]] {
            for step in 0..40 {
                for event in [Pair::link_down, Pair::restart_source, Pair::restart_target] {
                    let mut pair =
                        Pair::with_seed(strategy, image(&[35]), image(&[lies, &[35]].concat()));
                    start(&mut pair);
                    pair.drive_messages(step);
                    if pair.source.phase() < SourcePhase::Stopping {
                        pair.write(37, 99);
                        pair.drain_dirty();
                    }
                    if pair.is_over() {
                        continue;
                    }
                    event(&mut pair);
                    pair.link_down();
                    pair.link_up();
                    pair.drive();
                    pair.assert_completed();
                    assert_eq!(pair.arrived, pair.image, "{strategy} {lies:?} {step}");
                }
            }
        }
    }
}

/// A target that never answers costs a wait and nothing else.
#[test]
fn silence_is_not_waited_for_for_ever() {
    let mut pair = Pair::with_seed("flimcd", image(&[]), image(&[]));
    pair.is_silent = true;
    start(&mut pair);
    pair.drive();
    pair.assert_completed();
    assert_eq!(
        (pair.arrived.clone(), sent(&pair).0),
        (pair.image.clone(), vec![])
    );
    assert_eq!(pair.target.phase(), TargetPhase::Complete);
}

/// The switch is offered while a message is being applied that turns out to be lacking.
#[test]
fn a_switch_does_not_count_on_what_is_lacking() {
    let mut pair = Pair::with_seed("flimcd", image(&[]), image(&[3, 20, 40, 60]));
    pair.is_slow = true;
    pair.link_up();
    pair.drive_until(|pair| pair.sent.len() == 1);
    pair.source.handle_switchover(pair.now, Switchover::Now);
    let late = pair.now + std::time::Duration::from_secs(10);
    pair.drive_until(|pair| pair.target.phase() == TargetPhase::Switching || pair.now > late);
    assert_eq!(
        pair.target.phase(),
        TargetPhase::Switching,
        "nothing was held up"
    );
    pair.is_slow = false;
    pair.drive();
    pair.assert_completed();
    assert_eq!(pair.arrived, pair.image);
}
