//! A volume moves from one directory to another, with restarts at each stage.

use std::sync::Arc;

use flimcd_core::{BlockRange, Epoch};
use flimcd_volume::{
    Applied, ApplyData, Ownership, Volume, device::IoBuf, device::OpenOptions, rules::Mode,
};
use tempfile::TempDir;

use super::{
    MIGRATION, arriving, ask, begin, block_of, create, flush, incoming, open, owner, read, set,
    volumes, write,
};
use flimcd_volume::{GuestError, RequestKind};

const BLOCKS: u64 = 32;

fn prepared(epoch: u64) -> Ownership {
    Ownership::Prepared {
        epoch: Epoch(epoch),
        migration: MIGRATION,
        peer: "east".parse().unwrap(),
    }
}

fn released(epoch: u64, complete: bool) -> Ownership {
    Ownership::Released {
        epoch: Epoch(epoch),
        migration: MIGRATION,
        peer: "east".parse().unwrap(),
        complete,
    }
}

fn reopen(volume: Arc<Volume>, dir: &TempDir) -> Arc<Volume> {
    drop(volume);
    open(dir.path())
}

fn send(source: &Arc<Volume>, target: &Volume, start: u64, end: u64) -> Applied {
    let range = BlockRange::new(start, end);
    let mut buf = vec![0; usize::try_from(range.len()).unwrap() * 4096];
    source.begin_send(range).read(&mut buf).unwrap();
    let applied = target.apply(range, ApplyData::Bytes(&buf)).unwrap();
    target.sync().unwrap();
    source.mark_clean(&[range]).unwrap();
    applied
}

#[test]
fn a_whole_migration_with_restarts() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = create(here.path(), BLOCKS, owner(1));
    let mut guest = source.guest_port().unwrap();
    for block in 0..8 {
        write(&mut guest, block, 100 + block);
    }
    let data = begin(&source);
    assert_eq!(data, set(BLOCKS, &[(0, 8)]));
    assert_eq!(source.unacked().unwrap().unwrap(), data);
    let target = create(there.path(), BLOCKS, incoming());

    assert_eq!(send(&source, &target, 0, 4).written, 4);
    assert_eq!(
        source.unacked().unwrap().unwrap(),
        set(BLOCKS, &[(4, 8)]),
        "what arrived is taken out"
    );
    write(&mut guest, 1, 201);
    write(&mut guest, 20, 220);
    source.mark_clean(&[BlockRange::new(0, BLOCKS)]).unwrap();
    let dirty = set(BLOCKS, &[(1, 2), (20, 21)]);
    assert_eq!(
        source.unacked().unwrap().unwrap(),
        dirty,
        "what is marked stays in"
    );

    // The source's agent restarts: marks are set from the first write on.
    drop(guest);
    let source = reopen(source, &here);
    let unacked = source.unacked().unwrap().unwrap();
    assert_eq!(unacked, dirty);
    let mut guest = source.guest_port().unwrap();
    write(&mut guest, 21, 221);
    source.start_tracking(Some(&unacked)).unwrap();
    assert_eq!(source.take_dirty(), set(BLOCKS, &[(21, 22)]));
    assert_eq!(
        source.unacked().unwrap().unwrap(),
        set(BLOCKS, &[(1, 2), (20, 22)])
    );
    drop(guest);

    // The switch: 1, 20 and 21 are missing, and 4..8 are as well.
    assert!(source.freeze());
    source.set_ownership(prepared(1)).unwrap();
    let source = reopen(source, &here);
    assert_eq!(source.mode(), Mode::Frozen);
    let target = reopen(target, &there);
    assert_eq!(target.mode(), Mode::Incoming);
    let missing = set(BLOCKS, &[(1, 2), (4, 8), (20, 22)]);
    target.take_over(missing.clone(), arriving(2)).unwrap();
    source.set_ownership(released(2, false)).unwrap();
    source.release();
    let mut late = source.guest_port().unwrap();
    let reply = ask(&mut late, RequestKind::Read, 0, IoBuf::zeroed(4096));
    assert!(matches!(reply.result, Err(GuestError::Moved)));
    drop(late);
    let source = reopen(source, &here);
    assert_eq!(source.mode(), Mode::Released);
    assert!(source.unacked().unwrap().is_some());

    // Post-copy: the guest overwrites 20, flushes, and the target's agent restarts.
    let mut guest = target.guest_port().unwrap();
    assert_eq!(read(&mut guest, 0), 100);
    write(&mut guest, 20, 320);
    flush(&mut guest);
    assert_eq!(target.take_overwritten(), set(BLOCKS, &[(20, 21)]));
    assert_eq!(
        target.first_missing(3),
        [BlockRange::new(1, 2), BlockRange::new(4, 6)]
    );
    assert_eq!(
        target.set_ownership(owner(2)).unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    drop(guest);
    let target = reopen(target, &there);
    assert_eq!(target.mode(), Mode::PostCopy);
    assert_eq!(
        target.missing_count(),
        6,
        "the flushed write is not missing"
    );
    let applied = send(&source, &target, 0, BLOCKS);
    assert_eq!(
        applied,
        Applied {
            written: 6,
            dropped: BLOCKS - 6
        }
    );
    assert!(
        target.finish_postcopy().is_err(),
        "the record has to say so first"
    );
    target.set_ownership(owner(2)).unwrap();
    target.finish_postcopy().unwrap();
    source.set_ownership(released(2, true)).unwrap();
    assert!(source.unacked().unwrap().is_none());

    let target = reopen(target, &there);
    assert_eq!(target.mode(), Mode::Owner);
    let mut guest = target.guest_port().unwrap();
    for (block, want) in [(0, 100), (1, 201), (7, 107), (8, 0), (20, 320), (21, 221)] {
        assert_eq!(read(&mut guest, block), want, "block {block}");
    }
    let record = target.record().unwrap();
    assert_eq!(
        (record.epoch, record.last_migration),
        (Epoch(2), Some(MIGRATION))
    );
    assert!(!there.path().join("volumes/vm/missing").exists());

    // And back: the old source takes content again.
    source.enter_incoming(incoming()).unwrap();
    assert_eq!(source.mode(), Mode::Incoming);
    let content = block_of(1);
    let applied = source.apply(BlockRange::new(0, 1), ApplyData::Bytes(&content));
    assert_eq!(applied.unwrap().written, 1);
}

#[test]
fn a_cancelled_migration_leaves_an_ordinary_owner() {
    let here = tempfile::tempdir().unwrap();
    let source = create(here.path(), BLOCKS, owner(1));
    begin(&source);
    source.freeze();
    source.set_ownership(prepared(1)).unwrap();
    source.thaw();
    source.set_ownership(owner(1)).unwrap();
    source.stop_tracking().unwrap();
    let source = reopen(source, &here);
    assert_eq!(source.mode(), Mode::Owner);
    assert!(source.unacked().unwrap().is_none());
    let mut guest = source.guest_port().unwrap();
    write(&mut guest, 1, 1);
    assert!(source.take_dirty().is_empty(), "nobody tracks any more");
}

#[test]
fn damaged_state_is_named_and_not_guessed_at() {
    let dir = tempfile::tempdir().unwrap();
    let volume = create(dir.path(), BLOCKS, incoming());
    volume
        .take_over(set(BLOCKS, &[(0, 9)]), arriving(2))
        .unwrap();
    drop(volume);
    let missing = dir.path().join("volumes/vm/missing");
    let good = std::fs::read(&missing).unwrap();
    let fails = |words: &str| {
        let _no_forks = super::no_forks();
        let name = "vm".parse().unwrap();
        let opened = Volume::open(&volumes(dir.path()), &name, &OpenOptions::default());
        let error = opened.err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    };
    std::fs::write(&missing, &good[..4000]).unwrap();
    fails("too short");
    std::fs::remove_file(&missing).unwrap();
    fails("it is not there");
    let mut bad = good.clone();
    bad[40] ^= 1;
    std::fs::write(&missing, &bad).unwrap();
    fails("checksum");
    std::fs::write(&missing, &good).unwrap();
    assert_eq!(open(dir.path()).missing_count(), 9);
}

#[test]
fn an_arrival_that_no_guest_has_seen_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let target = create(dir.path(), BLOCKS, incoming());
    let missing = set(BLOCKS, &[(0, 9)]);
    target.record_arrival(&missing, arriving(2)).unwrap();
    assert_eq!(target.mode(), Mode::Incoming, "guests still wait");
    target.take_arrival_back(incoming()).unwrap();
    target.take_arrival_back(incoming()).unwrap();
    let target = reopen(target, &dir);
    assert_eq!(target.record().unwrap().ownership, incoming());
    assert_eq!(target.mode(), Mode::Incoming);
    // From the beginning again, with what is missing then.
    let missing = set(BLOCKS, &[(3, 4)]);
    target.record_arrival(&missing, arriving(2)).unwrap();
    let target = reopen(target, &dir);
    assert_eq!((target.mode(), target.missing_count()), (Mode::PostCopy, 1));
    assert!(target.take_arrival_back(incoming()).is_err());
}
