//! What a target knows of its blocks after its agent died, without and with the machine.

use std::sync::Arc;

use flimcd_core::{
    BLOCK_SIZE, BlockIndex, BlockRange, BlockSet, Epoch, MigrationId, VolumeId, VolumeSize,
};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::{ApplyData, NewVolume, Volume};
use crate::{
    device::{IoBuf, OpenOptions},
    port::{GuestPort, GuestRequest, RequestKind},
    state::{Ownership, VolumesDir},
};

const BLOCKS: u64 = 8;

/// A target after the switch with every block missing, in which block 2 was written by the guest and block 5 fetched.
fn target(dir: &TempDir) -> VolumesDir {
    let volumes = VolumesDir::open(dir.path().join("state")).unwrap();
    let (migration, peer) = (MigrationId(1), "a".parse().unwrap());
    let new = NewVolume {
        id: VolumeId(7),
        name: "vm".parse().unwrap(),
        tenant: "t".into(),
        image: dir.path().join("image"),
        epoch: Epoch(1),
        ownership: Ownership::Incoming { migration, peer },
    };
    let size = VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap();
    let volume = Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap();
    let (epoch, peer) = (Epoch(2), "a".parse().unwrap());
    let arriving = Ownership::Arriving {
        epoch,
        migration,
        peer,
    };
    volume.take_over(BlockSet::full(BLOCKS), arriving).unwrap();
    let mut port = volume.guest_port().unwrap();
    write(&mut port, 2);
    volume
        .apply(
            BlockRange::single(BlockIndex(5)),
            ApplyData::Bytes(&[5; 4096]),
        )
        .unwrap();
    assert_eq!(volume.missing_count(), BLOCKS - 2);
    volumes
}

fn write(port: &mut GuestPort, block: u64) {
    port.submit(GuestRequest {
        id: 1,
        kind: RequestKind::Write,
        offset: block * BLOCK_SIZE,
        length: BLOCK_SIZE,
        fua: false,
        buf: IoBuf::copy_of(&[2; 4096]),
    });
    port.kick().unwrap();
    let mut replies = Vec::new();
    while replies.is_empty() {
        let (queue, inbox) = port.wait_fds();
        let mut fds = vec![PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
        fds.extend(queue.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
        port.poll(&mut replies).unwrap();
    }
    assert!(replies[0].result.is_ok());
}

fn reopen(volumes: &VolumesDir) -> Arc<Volume> {
    Volume::open(volumes, &"vm".parse().unwrap(), &OpenOptions::default()).unwrap()
}

#[test]
fn an_acknowledged_write_is_not_fetched_over_after_the_agent_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = target(&dir);
    let volume = reopen(&volumes);
    assert_eq!(volume.missing_count(), BLOCKS - 2);
    let applied = volume
        .apply(BlockRange::new(0, 4), ApplyData::Bytes(&[9; 4 * 4096]))
        .unwrap();
    assert_eq!((applied.written, applied.dropped), (3, 1));
    let image = std::fs::read(dir.path().join("image")).unwrap();
    assert_eq!(image[2 * 4096..3 * 4096], [2; 4096]);
    assert_eq!(image[3 * 4096..4 * 4096], [9; 4096]);
    drop(volume);

    // The restart has made it durable: it holds without the file of this boot as well.
    std::fs::remove_file(dir.path().join("state/vm/missing-now")).unwrap();
    assert_eq!(reopen(&volumes).missing_count(), BLOCKS - 2);
}

#[test]
fn after_a_reboot_only_what_was_flushed_counts() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = target(&dir);
    let now = dir.path().join("state/vm/missing-now");
    std::fs::remove_file(&now).unwrap();
    let volume = reopen(&volumes);
    assert_eq!(volume.missing_count(), BLOCKS);
    assert!(now.exists());
    volume
        .apply(BlockRange::new(0, 2), ApplyData::Zeroes)
        .unwrap();
    volume.sync().unwrap();
    drop(volume);
    std::fs::remove_file(&now).unwrap();
    assert_eq!(reopen(&volumes).missing_count(), BLOCKS - 2);
}
