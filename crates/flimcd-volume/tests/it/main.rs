//! Volumes over real files and processes.

mod handover;
mod heat;
mod killed;
mod lifecycle;
mod live;
mod replica;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, Epoch, MigrationId, VolumeId, VolumeSize};
use flimcd_volume::{
    GuestPort, GuestReply, GuestRequest, NewVolume, Ownership, RequestKind, Volume, VolumesDir,
    device::{IoBuf, OpenOptions},
};
use rustix::event::{PollFd, PollFlags, poll};

const MIGRATION: MigrationId = MigrationId(9);

fn size(blocks: u64) -> VolumeSize {
    VolumeSize::new(blocks * BLOCK_SIZE).unwrap()
}

fn owner(epoch: u64) -> Ownership {
    Ownership::Owner {
        epoch: Epoch(epoch),
    }
}

fn incoming() -> Ownership {
    Ownership::Incoming {
        migration: MIGRATION,
        peer: "west".parse().unwrap(),
    }
}

fn arriving(epoch: u64) -> Ownership {
    Ownership::Arriving {
        epoch: Epoch(epoch),
        migration: MIGRATION,
        peer: "west".parse().unwrap(),
    }
}

/// Keeps other tests from starting processes. A process that has forked and not begun its program yet has every open file,
/// and with it every lock, of all tests; so locks are only looked at while there is none.
fn no_forks() -> MutexGuard<'static, ()> {
    static FORKS: Mutex<()> = Mutex::new(());
    FORKS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn volumes(dir: &Path) -> VolumesDir {
    VolumesDir::open(dir.join("volumes")).unwrap()
}

/// A volume to be made in `dir`.
fn new_volume(dir: &Path, ownership: Ownership) -> NewVolume {
    NewVolume {
        id: VolumeId(5),
        name: "vm".parse().unwrap(),
        tenant: "default".into(),
        image: dir.join("vm.raw"),
        epoch: Epoch::FIRST,
        ownership,
    }
}

fn create(dir: &Path, blocks: u64, ownership: Ownership) -> Arc<Volume> {
    let new = new_volume(dir, ownership);
    let _no_forks = no_forks();
    Volume::create(&volumes(dir), new, size(blocks), &OpenOptions::default()).unwrap()
}

fn open(dir: &Path) -> Arc<Volume> {
    let name = "vm".parse().unwrap();
    let _no_forks = no_forks();
    Volume::open(&volumes(dir), &name, &OpenOptions::default()).unwrap()
}

/// Begins a migration to a target with zeroes: what it lacks.
fn begin(volume: &Volume) -> BlockSet {
    let site = "east".parse().unwrap();
    let data = volume.begin_migration(&site, MIGRATION).unwrap().data;
    let mut clean = BlockSet::full(data.capacity());
    clean.subtract(&data);
    let clean: Vec<_> = clean.runs().collect();
    volume.mark_clean(&clean).unwrap();
    data
}

fn set(blocks: u64, ranges: &[(u64, u64)]) -> BlockSet {
    let mut set = BlockSet::new(blocks);
    for &(start, end) in ranges {
        set.insert_range(BlockRange::new(start, end));
    }
    set
}

/// Content of one block.
fn block_of(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(512)
}

/// Runs one request to its end.
fn ask(port: &mut GuestPort, kind: RequestKind, block: u64, buf: IoBuf) -> GuestReply {
    port.submit(GuestRequest {
        id: 1,
        kind,
        offset: block * BLOCK_SIZE,
        length: BLOCK_SIZE,
        fua: false,
        buf,
    });
    port.kick().unwrap();
    wait(port)
}

/// The next reply.
fn wait(port: &mut GuestPort) -> GuestReply {
    let mut out = Vec::new();
    loop {
        port.poll(&mut out).unwrap();
        if let Some(reply) = out.pop() {
            return reply;
        }
        let (queue, inbox) = port.wait_fds();
        let mut fds = vec![PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
        fds.extend(queue.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
    }
}

fn write(port: &mut GuestPort, block: u64, tag: u64) {
    let buf = IoBuf::copy_of(&block_of(tag));
    ask(port, RequestKind::Write, block, buf).result.unwrap();
}

/// Writes a block of ones to each place, many at once.
fn write_all(port: &mut GuestPort, blocks: &[u64]) {
    let mut replies = Vec::new();
    for (block, id) in blocks.iter().zip(0..) {
        port.submit(GuestRequest {
            id,
            kind: RequestKind::Write,
            offset: block * BLOCK_SIZE,
            length: BLOCK_SIZE,
            fua: false,
            buf: IoBuf::copy_of(&block_of(1)),
        });
        if id % 64 == 0 {
            port.kick().unwrap();
            port.poll(&mut replies).unwrap();
        }
    }
    port.kick().unwrap();
    while replies.len() < blocks.len() {
        let (queue, inbox) = port.wait_fds();
        let mut fds = vec![PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
        fds.extend(queue.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
        port.poll(&mut replies).unwrap();
    }
    for reply in replies {
        reply.result.unwrap();
    }
}

fn read(port: &mut GuestPort, block: u64) -> u64 {
    let reply = ask(port, RequestKind::Read, block, IoBuf::zeroed(4096));
    reply.result.unwrap();
    let tag = u64::from_le_bytes(reply.buf[..8].try_into().unwrap());
    assert_eq!(reply.buf[..], block_of(tag), "block {block} is torn");
    tag
}

fn flush(port: &mut GuestPort) {
    let reply = ask(port, RequestKind::Flush, 0, IoBuf::empty());
    reply.result.unwrap();
}
