//! Whole migrations without anything going wrong.

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, ChunkIndex, Heat, VolumeSize};
use flimcd_migrate::{LONG_HALF_LIFE, SourceEvent, SourcePhase, policy};
use flimcd_wire::{Class, HeatKind};

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

#[test]
fn the_target_is_told_what_was_hot() {
    let mut pair = Pair::started("flimcd");
    let size = VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap();
    let mut reads = Heat::new(size, LONG_HALF_LIFE, pair.now);
    reads.add(ChunkIndex(2), 40, pair.now);
    let writes = Heat::new(size, LONG_HALF_LIFE, pair.now);
    pair.source.set_heat(&reads, &writes);
    pair.source
        .handle_reads(pair.now, &[BlockRange::new(0, 3), BlockRange::new(15, 17)]);
    pair.drive();
    pair.assert_completed();
    let [part] = &pair.heat[..] else {
        panic!("{:?}", pair.heat);
    };
    assert_eq!((part.kind, part.first), (HeatKind::Read, 0));
    let heat = part.heat(LONG_HALF_LIFE).unwrap();
    let hot: Vec<_> = heat.chunks().map(|(chunk, _)| chunk.0).collect();
    assert_eq!(hot, [0, 1, 2]);
    assert!((heat.get(ChunkIndex(2)) - 40.0).abs() < 1.0);
}

#[test]
fn a_mirror_says_what_is_there_and_ends_with_the_guests_stop() {
    let mut pair = Pair::new("mirror");
    pair.link_up();
    let acked = |pair: &Pair, range| {
        let mut set = BlockSet::new(BLOCKS);
        for run in &pair.acked {
            set.insert_range(*run);
        }
        set.contains_all(range)
    };
    pair.drive_until(|pair| acked(pair, BlockRange::new(0, BLOCKS)));
    assert!(pair.mirrors);
    pair.acked.clear();
    pair.write(7, 1007);
    pair.drive_until(|pair| acked(pair, BlockRange::new(7, 8)));
    assert_eq!(pair.arrived[7], 1007);
    pair.source
        .handle_switchover(pair.now, flimcd_migrate::Switchover::WhenReady);
    pair.drive_until(|pair| pair.owner.is_some());
    assert!(!pair.mirrors);
    assert!(pair.missing.is_empty(), "everything goes before the switch");
    pair.drive();
    pair.assert_completed();
}
