//! Volumes of the agent as content: replicas, in place, and volumes in use.

use super::*;
use flimcd_core::{SiteName, VolumeLayout};
use flimcd_volume::VolumeRecord;
use std::os::unix::fs::FileExt;

fn peer() -> SiteName {
    "beta".parse().unwrap()
}

fn owner() -> Ownership {
    Ownership::Owner { epoch: Epoch(1) }
}

fn released() -> Ownership {
    Ownership::Released {
        epoch: Epoch(2),
        migration: MigrationId(3),
        peer: peer(),
        complete: true,
    }
}

/// A volume whose image holds these chunks.
fn volume(at: &Fixture, name: &str, chunks: &[u8], ownership: Ownership) -> Arc<Volume> {
    let volumes = VolumesDir::open(at.dir.path().join("volumes")).unwrap();
    let new = NewVolume {
        id: VolumeId(u128::from(name.as_bytes()[0])),
        image: at.path(name),
        name: name.parse().unwrap(),
        tenant: DEFAULT_TENANT.to_owned(),
        epoch: Epoch::FIRST,
        ownership,
    };
    let size = VolumeSize::new(chunks.len() as u64 * CHUNK_SIZE).unwrap();
    let made = Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap();
    let file = File::options().write(true).open(at.path(name)).unwrap();
    for (place, &value) in (0..).zip(chunks).filter(|(_, value)| **value > 0) {
        file.write_all_at(&chunk(value), place * CHUNK_SIZE)
            .unwrap();
    }
    made
}

fn record(volume: &Volume) -> VolumeRecord {
    volume.record().unwrap().clone()
}

fn choose(
    at: &Fixture,
    volume: &Arc<Volume>,
    base: Base,
    sample: &[SampleChunk],
) -> Option<Chosen> {
    let set = VolumeSet::new(vec![volume.clone()]).unwrap();
    let tenants = [DEFAULT_TENANT.to_owned()];
    at.library.choose(&set, &[base], &tenants, sample)
}

#[test]
fn a_replica_is_compared_with_in_place_until_it_is_touched() {
    let at = Fixture::new();
    let replica = volume(&at, "vm", &[1, 2, 0, 3], released());
    at.library.replica_made(&record(&replica));
    let name = "vm".parse().unwrap();
    assert!(
        choose(&at, &replica, Base::Known, &[]).is_none(),
        "not read yet"
    );
    at.read_all();
    let shown = at.library.get(&name).unwrap();
    assert_eq!(
        (shown.kind, shown.state),
        (LibraryKind::Replica, LibraryState::Ready)
    );
    for base in [Base::Known, Base::Unknown] {
        let chosen = choose(&at, &replica, base, &[]).unwrap();
        assert!(chosen.choice.in_place);
        assert_eq!(chosen.choice.name, "replica vm");
        let run = ChunkIndex(1).blocks();
        assert!(chosen.seeds.is_in_place(run));
        let right = Fingerprint::of_run(&chunk(2));
        assert!(chosen.seeds.read(run, right, &mut Vec::new()).is_some());
    }
    // A file of its own that is empty: the replica is an image like others then.
    let elsewhere = at.arriving(&[4]);
    let tenants = [DEFAULT_TENANT.to_owned()];
    let other = at
        .library
        .choose(&elsewhere, &[Base::Zeroes], &tenants, &sample(&[(0, 1)]));
    assert!(!other.unwrap().choice.in_place);
    let file = File::options().write(true).open(at.path("vm")).unwrap();
    file.write_all_at(b"touched", 0).unwrap();
    file.sync_all().unwrap();
    assert!(choose(&at, &replica, Base::Known, &[]).is_none());
    assert_eq!(at.library.get(&name).unwrap().state, LibraryState::Stale);
    at.library.replica_made(&record(&replica));
    at.read_all();
    assert!(choose(&at, &replica, Base::Unknown, &[]).is_some());
    at.library.volume_gone(&name);
    assert!(at.library.list().is_empty());
}

/// What was read of a replica before the agent stopped counts.
#[test]
fn a_replica_that_is_read_in_part_is_compared_with_as_far_as_that_goes() {
    let at = Fixture::new();
    let chunks: Vec<u8> = (1..=64).collect();
    let replica = volume(&at, "vm", &chunks, released());
    at.library.replica_made(&record(&replica));
    let steps = std::cell::Cell::new(0);
    at.library.scan(&Key::volume(&"vm".parse().unwrap()), || {
        steps.set(steps.get() + 1);
        steps.get() <= 2
    });
    let chosen = choose(&at, &replica, Base::Known, &[]).unwrap();
    let table = &chosen.choice.table;
    assert!(table.get(ChunkIndex(0)).is_some() && table.get(ChunkIndex(31)).is_some());
    assert_eq!(table.get(ChunkIndex(32)), None);
}

#[test]
fn volumes_in_use_are_found_in_though_they_are_written() {
    let at = Fixture::new();
    let used = volume(&at, "vm", &[1, 2, 3], owner());
    at.library.reconcile(&[record(&used)]);
    at.read_all();
    let file = File::options().write(true).open(at.path("vm")).unwrap();
    file.write_all_at(&chunk(9), 0).unwrap();
    let name = "vm".parse().unwrap();
    let shown = at.library.get(&name).unwrap();
    assert_eq!(
        (shown.kind, shown.state),
        (LibraryKind::Volume, LibraryState::Ready)
    );
    assert_eq!(at.library.indexed(&[DEFAULT_TENANT.to_owned()]).len(), 1);
    assert_eq!(at.library.indexed(&["acme".to_owned()]).len(), 0);
    let refused = at.library.remove(&name).unwrap_err();
    assert!(refused.hint.unwrap().contains("replica drop"));
    // It moves away, comes back, and is removed.
    let gone = VolumeRecord {
        ownership: released(),
        ..record(&used)
    };
    at.library.reconcile(std::slice::from_ref(&gone));
    let shown = at.library.get(&name).unwrap();
    assert_eq!(
        (shown.kind, shown.state),
        (LibraryKind::Replica, LibraryState::Scanning)
    );
    at.read_all();
    let reopened = Library::open(at.library.dir.clone()).unwrap();
    assert_eq!(reopened.get(&name).unwrap().state, LibraryState::Ready);
    let arriving = VolumeRecord {
        ownership: Ownership::Incoming {
            migration: MigrationId(4),
            peer: peer(),
        },
        ..record(&used)
    };
    at.library.reconcile(&[arriving]);
    assert_eq!(at.library.get(&name).unwrap().kind, LibraryKind::Replica);
    at.library.reconcile(&[record(&used)]);
    assert_eq!(at.library.get(&name).unwrap().kind, LibraryKind::Volume);
    at.library.reconcile(&[]);
    assert!(at.library.list().is_empty());
}

/// Another volume's replica, of the same name but another file or size, is not what stands here.
#[test]
fn a_replica_of_another_volume_with_the_same_name_is_not_used() {
    let at = Fixture::new();
    let replica = volume(&at, "vm", &[1, 2, 3], released());
    at.library.replica_made(&record(&replica));
    at.read_all();
    let moved = at.dir.path().join("old.raw");
    fs::rename(at.path("vm"), &moved).unwrap();
    write_image(&at.path("vm"), &[4, 5, 6]);
    assert!(choose(&at, &replica, Base::Known, &[]).is_none());
    assert_eq!(
        VolumeLayout::new([replica.size()]).unwrap().size(),
        replica.size()
    );
}
