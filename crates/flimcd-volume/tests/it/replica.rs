//! Copies that stay, and volumes that come back onto them.

use std::{fs::File, path::Path, sync::Arc, time::SystemTime};

use flimcd_core::{BlockRange, BlockSet, Epoch, MigrationId, SiteName};
use flimcd_volume::{ApplyData, Ownership, Standing, Volume};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{block_of, create, open, owner, read, set, write};

const BLOCKS: u64 = 16;
const SITES: [&str; 2] = ["west", "east"];

fn site(number: usize) -> SiteName {
    SITES[number].parse().unwrap()
}

/// A volume that moves between two sites, and what its guest has written.
struct World {
    dirs: [TempDir; 2],
    volumes: [Option<Arc<Volume>>; 2],
    at: usize,
    model: Vec<u64>,
    migrations: u64,
}

impl World {
    fn new() -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let first = create(dirs[0].path(), BLOCKS, owner(1));
        Self {
            dirs,
            volumes: [Some(first), None],
            at: 0,
            model: vec![0; usize::try_from(BLOCKS).unwrap()],
            migrations: 0,
        }
    }

    fn here(&self) -> Arc<Volume> {
        self.volumes[self.at].clone().unwrap()
    }

    fn there(&self) -> Arc<Volume> {
        self.volumes[1 - self.at].clone().unwrap()
    }

    fn image(&self, number: usize) -> std::path::PathBuf {
        self.dirs[number].path().join("vm.raw")
    }

    fn write(&mut self, block: u64, tag: u64) {
        write(&mut self.here().guest_port().unwrap(), block, tag);
        self.model[usize::try_from(block).unwrap()] = tag;
    }

    /// The agent ends, in order or not, and another one begins.
    fn reopen(&mut self, number: usize, is_sealed: bool) {
        if let Some(volume) = self.volumes[number].take() {
            if is_sealed {
                volume.sync().unwrap();
                volume.seal().unwrap();
            }
            drop(volume);
            self.volumes[number] = Some(open(self.dirs[number].path()));
        }
    }

    /// The next migration's number.
    fn migration(&mut self) -> MigrationId {
        self.migrations += 1;
        MigrationId(self.migrations)
    }

    /// Begins to move: what the other site may lack of it.
    fn begin(&mut self, migration: MigrationId) -> BlockSet {
        let here = self.here();
        let begun = here.begin_migration(&site(1 - self.at), migration).unwrap();
        let incoming = Ownership::Incoming {
            migration,
            peer: site(self.at),
        };
        let pending = match &self.volumes[1 - self.at] {
            None => {
                let dir = self.dirs[1 - self.at].path();
                self.volumes[1 - self.at] = Some(create(dir, BLOCKS, incoming));
                begun.data
            }
            Some(there) => {
                let standing = there.standing().unwrap();
                there.enter_incoming(incoming).unwrap();
                match (standing, begun.changed) {
                    (Standing::Untouched(left), Some((base, changed))) if left == base => changed,
                    _ => BlockSet::full(BLOCKS),
                }
            }
        };
        let mut clean = BlockSet::full(BLOCKS);
        clean.subtract(&pending);
        here.mark_clean(&clean.runs().collect::<Vec<_>>()).unwrap();
        pending
    }

    fn send(&self, pending: &mut BlockSet, block: u64) {
        let range = BlockRange::new(block, block + 1);
        let mut buf = vec![0; 4096];
        self.here().begin_send(range).read(&mut buf).unwrap();
        pending.remove_range(range);
        self.there().apply(range, ApplyData::Bytes(&buf)).unwrap();
        self.there().sync().unwrap();
        self.here().mark_clean(&[range]).unwrap();
    }

    fn cancel(&self) {
        let there = self.there();
        if there.record().unwrap().in_place {
            there.leave_incoming().unwrap();
        }
    }

    /// The switch and what follows. With `held` blocks not fetched before the guest has written at the target.
    fn finish(&mut self, migration: MigrationId, mut pending: BlockSet, write: Option<(u64, u64)>) {
        let (here, there) = (self.here(), self.there());
        assert!(here.freeze());
        pending.union_with(&here.take_dirty());
        let epoch = here.record().unwrap().epoch;
        let peer = site(1 - self.at);
        let released = |complete| Ownership::Released {
            epoch: epoch.next(),
            migration,
            peer: peer.clone(),
            complete,
        };
        here.set_ownership(Ownership::Prepared {
            epoch,
            migration,
            peer: site(1 - self.at),
        })
        .unwrap();
        let arriving = Ownership::Arriving {
            epoch: epoch.next(),
            migration,
            peer: site(self.at),
        };
        there.take_over(pending.clone(), arriving).unwrap();
        here.set_ownership(released(false)).unwrap();
        here.release();
        self.at = 1 - self.at;
        if let Some((block, tag)) = write {
            self.write(block, tag);
        }
        for run in pending.runs() {
            let mut buf = vec![0; usize::try_from(run.len()).unwrap() * 4096];
            here.read_for_send(run, &mut buf).unwrap();
            there.apply(run, ApplyData::Bytes(&buf)).unwrap();
        }
        let epoch = epoch.next();
        there.set_ownership(Ownership::Owner { epoch }).unwrap();
        there.finish_postcopy().unwrap();
        here.set_ownership(released(true)).unwrap();
    }

    fn move_all(&mut self) -> BlockSet {
        let migration = self.migration();
        let pending = self.begin(migration);
        self.finish(migration, pending.clone(), None);
        pending
    }

    fn check(&self) {
        let mut port = self.here().guest_port().unwrap();
        for (block, &expected) in (0..).zip(&self.model) {
            assert_eq!(read(&mut port, block), expected, "block {block}");
        }
    }
}

/// As somebody else would: the content and the time of its change.
fn touch(image: &Path, block: u64, tag: u64) {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(image).unwrap();
    file.write_all_at(&block_of(tag), block * 4096).unwrap();
    // A test is quicker than the clock that files get their times from.
    let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(tag + 1);
    file.set_modified(at).unwrap();
}

#[test]
fn the_way_back_is_what_changed_also_over_restarts() {
    let mut world = World::new();
    for block in 0..8 {
        world.write(block, 100 + block);
    }
    assert_eq!(world.move_all(), set(BLOCKS, &[(0, 8)]));
    world.write(3, 203);
    world.reopen(0, false);
    world.reopen(1, false);
    world.write(12, 212);
    world.reopen(1, true);
    assert_eq!(world.move_all(), set(BLOCKS, &[(3, 4), (12, 13)]));
    world.check();
    world.write(0, 1);
    assert_eq!(world.move_all(), set(BLOCKS, &[(0, 1)]));
    world.check();
}

#[test]
fn what_the_guest_wrote_while_blocks_were_missing_goes_back() {
    let mut world = World::new();
    world.write(1, 101);
    world.write(2, 102);
    let migration = world.migration();
    let pending = world.begin(migration);
    world.finish(migration, pending, Some((2, 202)));
    world.check();
    assert_eq!(world.move_all(), set(BLOCKS, &[(2, 3)]));
    world.check();
}

#[test]
fn a_copy_that_was_touched_is_not_trusted_and_one_that_is_gone_not_written_to() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    let standing = || world.there().standing().unwrap();
    assert_eq!(standing(), Standing::Untouched(MigrationId(1)));
    let image = world.image(0);
    touch(&image, 5, 9);
    assert_eq!(standing(), Standing::Unsure);
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(standing(), Standing::Lost);
    file.set_len(BLOCKS * 4096).unwrap();
    assert_eq!(standing(), Standing::Unsure);
    std::fs::rename(&image, image.with_extension("old")).unwrap();
    assert_eq!(standing(), Standing::Lost);
    std::fs::copy(image.with_extension("old"), &image).unwrap();
    assert_eq!(standing(), Standing::Lost, "another file");
    assert!(world.here().standing().is_none(), "the owner is no copy");
}

#[test]
fn a_way_back_that_was_cancelled_leaves_a_copy_and_the_next_one_sends_the_rest() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    for block in 4..8 {
        world.write(block, 200 + block);
    }
    let migration = world.migration();
    let mut pending = world.begin(migration);
    world.send(&mut pending, 4);
    world.send(&mut pending, 5);
    world.write(5, 305);
    world.cancel();
    assert_eq!(
        world.there().standing(),
        Some(Standing::Untouched(migration))
    );
    world.reopen(0, false);
    world.reopen(1, false);
    assert_eq!(world.move_all(), set(BLOCKS, &[(5, 8)]));
    world.check();
}

#[test]
fn a_copy_that_was_written_over_by_two_processes_is_not_trusted() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    let migration = world.migration();
    world.begin(migration);
    world.reopen(0, false);
    world.cancel();
    assert_eq!(world.there().standing(), Some(Standing::Unsure));
    assert_eq!(world.move_all(), BlockSet::full(BLOCKS));
    world.check();
}

#[test]
fn an_image_that_was_changed_while_no_agent_had_it_is_compared_as_a_whole() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    let volume = world.volumes[1].take().unwrap();
    volume.sync().unwrap();
    volume.seal().unwrap();
    drop(volume);
    touch(&world.image(1), 7, 707);
    world.model[7] = 707;
    world.volumes[1] = Some(open(world.dirs[1].path()));
    assert_eq!(world.here().record().unwrap().baseline, None);
    assert_eq!(world.move_all(), BlockSet::full(BLOCKS));
    world.check();
}

#[test]
fn without_the_set_of_this_boot_nothing_is_known() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    world.volumes[1] = None;
    std::fs::remove_file(world.dirs[1].path().join("volumes/vm/unacked")).unwrap();
    world.volumes[1] = Some(open(world.dirs[1].path()));
    world.write(2, 102);
    assert_eq!(world.move_all(), BlockSet::full(BLOCKS));
    world.check();
}

#[test]
fn a_set_of_an_older_migration_is_not_taken_for_that_of_a_newer_one() {
    let mut world = World::new();
    world.write(1, 101);
    world.move_all();
    let (here, east) = (world.here(), site(0));
    // An agent that was killed before the next migration had begun.
    let all = here.resume_migration(&east, MigrationId(2)).unwrap();
    assert_eq!(all, BlockSet::full(BLOCKS));
    here.mark_clean(&[BlockRange::new(0, 8)]).unwrap();
    let rest = here.resume_migration(&east, MigrationId(2)).unwrap();
    assert_eq!(rest, set(BLOCKS, &[(8, BLOCKS)]));
}

#[test]
fn what_stands_right_is_present_without_a_write() {
    let mut world = World::new();
    world.write(1, 101);
    world.write(2, 102);
    world.move_all();
    let (here, migration) = (world.there(), MigrationId(2));
    let incoming = Ownership::Incoming {
        migration,
        peer: site(1),
    };
    here.enter_incoming(incoming).unwrap();
    let arriving = Ownership::Arriving {
        epoch: Epoch(3),
        migration,
        peer: site(1),
    };
    here.take_over(set(BLOCKS, &[(1, 3)]), arriving).unwrap();
    let mut port = here.guest_port().unwrap();
    write(&mut port, 1, 500);
    let applied = here.apply(BlockRange::new(0, 3), ApplyData::Kept).unwrap();
    assert_eq!((applied.written, applied.dropped), (1, 2));
    assert_eq!(here.missing_count(), 0);
    assert_eq!((read(&mut port, 1), read(&mut port, 2)), (500, 102));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64),
    Reopen {
        number: usize,
        is_sealed: bool,
    },
    TouchCopy(u64),
    Cancelled {
        sent: usize,
        written: u64,
    },
    Moved {
        sent: usize,
        written: u64,
        late: Option<u64>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let block = 0..BLOCKS;
    prop_oneof![
        4 => block.clone().prop_map(Step::Write),
        2 => (0..2usize, any::<bool>())
            .prop_map(|(number, is_sealed)| Step::Reopen { number, is_sealed }),
        1 => block.clone().prop_map(Step::TouchCopy),
        2 => (0..12usize, block.clone())
            .prop_map(|(sent, written)| Step::Cancelled { sent, written }),
        3 => (0..12usize, block.clone(), prop::option::of(block))
            .prop_map(|(sent, written, late)| Step::Moved { sent, written, late }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn back_and_forth_the_content_is_right(steps in prop::collection::vec(step(), 1..25)) {
        let mut world = World::new();
        for (tag, step) in (1..).zip(steps) {
            match step {
                Step::Write(block) => world.write(block, tag),
                Step::Reopen { number, is_sealed } => world.reopen(number, is_sealed),
                Step::TouchCopy(block) => {
                    if let Some(copy) = &world.volumes[1 - world.at]
                        && copy.standing().is_some()
                    {
                        touch(&world.image(1 - world.at), block, 1 << 40 | tag);
                    }
                }
                Step::Cancelled { sent, written } | Step::Moved { sent, written, .. } => {
                    // A first arrival that was cancelled is removed by its agent: not played here.
                    if world.volumes[1].is_none() && matches!(step, Step::Cancelled { .. }) {
                        continue;
                    }
                    let migration = world.migration();
                    let mut pending = world.begin(migration);
                    world.write(written, 1 << 20 | tag);
                    let first: Vec<_> = pending.runs().flat_map(|run| run.start..run.end).collect();
                    for block in first.into_iter().take(sent) {
                        world.send(&mut pending, block);
                    }
                    if let Step::Moved { late, .. } = step {
                        let late = late.map(|block| (block, 1 << 30 | tag));
                        world.finish(migration, pending, late);
                    } else {
                        world.cancel();
                    }
                }
            }
        }
        world.check();
    }
}
