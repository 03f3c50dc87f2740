#![expect(clippy::cast_possible_truncation, reason = "small numbers")]
#![expect(clippy::print_stderr, reason = "a test that cannot test says so")]

use std::{fs, os::unix::fs::FileExt, thread};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::*;
use crate::device::{BufPool, IoDone, IoKind, IoOp};

/// A size that is a multiple of nothing.
const ODD: usize = 1_000_003;

fn image(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("disk.img");
    fs::write(&path, bytes).unwrap();
    path
}

/// Every way to do I/O.
fn ways() -> Vec<OpenOptions> {
    let mut ways = Vec::new();
    for direct in [DirectIo::Auto, DirectIo::Off] {
        for io_uring in [UringUse::Auto, UringUse::Off] {
            ways.push(OpenOptions {
                direct,
                io_uring,
                ..OpenOptions::default()
            });
        }
    }
    ways
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i * 31 + seed * 7) % 251) as u8 + 1)
        .collect()
}

/// A queue that is driven to the end of everything pushed.
struct Driver(Box<dyn IoQueue>);

impl Driver {
    fn run(&mut self, ops: Vec<IoOp>) -> Vec<IoDone> {
        let wanted = ops.len();
        let mut done = Vec::new();
        for op in ops {
            self.0.push(op);
        }
        loop {
            self.0.submit().unwrap();
            self.0.completions(&mut done);
            if done.len() == wanted {
                return done;
            }
            let fd = self
                .0
                .poll_fd()
                .expect("what is not done must be waited for");
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        }
    }

    fn one(&mut self, kind: IoKind, offset: usize, length: usize, buf: IoBuf) -> IoDone {
        let (offset, length) = (offset as u64, length as u64);
        self.run(vec![IoOp {
            id: 1,
            kind,
            offset,
            length,
            buf,
        }])
        .pop()
        .unwrap()
    }
}

#[derive(Clone, Debug)]
struct Step {
    kind: u8,
    offset: usize,
    len: usize,
    queued: bool,
}

fn steps(size: usize) -> impl Strategy<Value = Vec<Step>> {
    let place = prop_oneof![
        3 => (0..size / 512).prop_map(|sector| sector * 512),
        2 => 0..size,
        1 => size - 5000..size
    ];
    let len = prop_oneof![
        3 => (1usize..40).prop_map(|sectors| sectors * 512),
        2 => 1usize..20_000,
        1 => Just(usize::MAX)
    ];
    let step =
        (0u8..6, place, len, any::<bool>()).prop_map(move |(kind, offset, len, queued)| Step {
            kind,
            offset,
            len: len.min(size - offset),
            queued,
        });
    prop::collection::vec(step, 1..40)
}

fn apply(device: &FileDevice, queue: &mut Driver, model: &mut [u8], index: usize, step: &Step) {
    let Step {
        kind,
        offset,
        len,
        queued,
    } = *step;
    let range = ByteRange::at(offset as u64, len as u64);
    let zeroes = |queue: &mut Driver, kind, direct: io::Result<()>| {
        if queued {
            queue.one(kind, offset, len, IoBuf::empty()).result
        } else {
            direct
        }
        .unwrap();
    };
    match kind {
        0 | 1 => {
            let got = if queued {
                let done = queue.one(IoKind::Read, offset, len, IoBuf::zeroed(len));
                done.result.unwrap();
                done.buf.to_vec()
            } else {
                let mut got = vec![0; len];
                device.read_at(offset as u64, &mut got).unwrap();
                got
            };
            assert!(got == model[offset..offset + len], "read {step:?}");
        }
        2 | 3 => {
            let data = pattern(index, len);
            if queued {
                let done = queue.one(IoKind::Write, offset, len, IoBuf::copy_of(&data));
                done.result.unwrap();
            } else {
                device.write_at(offset as u64, &data).unwrap();
            }
            model[offset..offset + len].copy_from_slice(&data);
        }
        4 => {
            let punch = index.is_multiple_of(2);
            zeroes(
                queue,
                IoKind::WriteZeroes { punch },
                device.write_zeroes(range, punch),
            );
            model[offset..offset + len].fill(0);
        }
        _ => {
            zeroes(queue, IoKind::Discard, device.discard(range));
            model[offset..offset + len].fill(0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_way_behaves_as_an_array_of_bytes(steps in steps(ODD)) {
        for options in ways() {
            let dir = TempDir::new().unwrap();
            let mut model = pattern(0, ODD);
            let path = image(&dir, &model);
            let device = FileDevice::open(&path, &options).unwrap();
            let mut queue = Driver(device.open_queue(8).unwrap());
            for (index, step) in steps.iter().enumerate() {
                apply(&device, &mut queue, &mut model, index, step);
            }
            device.sync_data().unwrap();
            drop(queue);
            drop(device);
            prop_assert!(fs::read(&path).unwrap() == model, "{options:?}");
        }
    }
}

#[test]
fn this_machine_runs_the_fast_way() {
    let dir = TempDir::new().unwrap();
    let device = FileDevice::open(image(&dir, &[0; 8192]), &OpenOptions::default()).unwrap();
    if let Some(why) = &device.backend().fallback {
        eprintln!("SKIPPED: needs direct I/O and io_uring for the full test: {why}");
    }
}

/// Unaligned writes share blocks with aligned ones of other threads; no byte may be lost.
#[test]
fn unaligned_writes_do_not_undo_their_neighbours() {
    const BLOCKS: usize = 16;
    let dir = TempDir::new().unwrap();
    let path = image(&dir, &[0; BLOCKS * 4096]);
    let device = FileDevice::open(path, &OpenOptions::default()).unwrap();
    // In each block, thread 0 owns the first half by sectors, threads 1 and 2 odd pieces of the
    // rest.
    let pieces = [(0usize, 2048usize), (2048, 1003), (3051, 1045)];
    thread::scope(|scope| {
        for (thread, &(start, len)) in pieces.iter().enumerate() {
            let device = &device;
            scope.spawn(move || {
                let mut queue = Driver(device.open_queue(BLOCKS as u32).unwrap());
                for round in 0..60 {
                    let ops = (0..BLOCKS).map(|block| IoOp {
                        id: block as u64,
                        kind: IoKind::Write,
                        offset: (block * 4096 + start) as u64,
                        length: len as u64,
                        buf: IoBuf::copy_of(&pattern(round * 3 + thread + block, len)),
                    });
                    for done in queue.run(ops.collect()) {
                        done.result.unwrap();
                    }
                    for block in 0..BLOCKS {
                        let mut got = vec![0; len];
                        device
                            .read_at((block * 4096 + start) as u64, &mut got)
                            .unwrap();
                        assert!(
                            got == pattern(round * 3 + thread + block, len),
                            "{thread} {round}"
                        );
                    }
                }
            });
        }
    });
}

#[test]
fn more_requests_than_slots_all_complete_once() {
    for options in ways() {
        let dir = TempDir::new().unwrap();
        let device = FileDevice::open(image(&dir, &pattern(0, 1 << 20)), &options).unwrap();
        let mut queue = Driver(device.open_queue(4).unwrap());
        let mut pool = BufPool::new(1 << 20);
        let ops = (0..200u64).map(|id| IoOp {
            id,
            kind: if id % 10 == 0 {
                IoKind::Sync
            } else {
                IoKind::Read
            },
            offset: id * 512,
            length: 4096,
            buf: pool.take(4096),
        });
        let mut ids: Vec<u64> = queue
            .run(ops.collect())
            .iter()
            .map(|done| done.id)
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..200).collect::<Vec<_>>());
    }
}

#[test]
fn dropping_a_queue_waits_for_what_is_in_flight() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, &[0; 1 << 20]);
    let device = FileDevice::open(&path, &OpenOptions::default()).unwrap();
    for round in 1..20u8 {
        let mut queue = device.open_queue(64).unwrap();
        for id in 0..64 {
            queue.push(IoOp {
                id,
                kind: IoKind::Write,
                offset: id * 4096,
                length: 4096,
                buf: IoBuf::copy_of(&[round; 4096]),
            });
        }
        queue.submit().unwrap();
        drop(queue);
        let file = File::open(&path).unwrap();
        let mut got = vec![0; 64 * 4096];
        file.read_exact_at(&mut got, 0).unwrap();
        assert!(got.iter().all(|&b| b == round));
    }
    // An unaligned write that never got its turn leaves the line.
    let mut queue = device.open_queue(4).unwrap();
    let op = |id, offset| IoOp {
        id,
        kind: IoKind::Write,
        offset,
        length: 4096,
        buf: IoBuf::zeroed(4096),
    };
    queue.push(op(0, 0));
    queue.push(op(1, 5));
    queue.submit().unwrap();
    drop(queue);
    Driver(device.open_queue(4).unwrap()).one(IoKind::Write, 0, 4096, IoBuf::zeroed(4096));
}

#[test]
fn ranges_outside_are_refused() {
    let dir = TempDir::new().unwrap();
    let device = FileDevice::open(image(&dir, &[1; 5000]), &OpenOptions::default()).unwrap();
    let mut queue = Driver(device.open_queue(4).unwrap());
    let is_refused = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    };
    is_refused(device.read_at(4999, &mut [0; 2]));
    is_refused(device.write_at(u64::MAX, &[0; 2]));
    is_refused(device.write_zeroes(ByteRange::new(0, 5001), true));
    is_refused(queue.one(IoKind::Read, 5000, 1, IoBuf::zeroed(1)).result);
    is_refused(queue.one(IoKind::Write, 0, 100, IoBuf::zeroed(10)).result);
    assert_eq!(fs::metadata(device.path()).unwrap().len(), 5000);
}

#[test]
fn extents_follow_holes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sparse.img");
    let file = File::create(&path).unwrap();
    file.set_len(3 << 20).unwrap();
    file.write_all_at(&[1; 65536], 1 << 20).unwrap();
    let device = FileDevice::open(&path, &OpenOptions::default()).unwrap();
    let all = ByteRange::new(0, 3 << 20);
    let extents = device.data_extents(all, 100).unwrap();
    let want = [
        (0, 1 << 20, true),
        (1 << 20, (1 << 20) + 65536, false),
        ((1 << 20) + 65536, 3 << 20, true),
    ];
    let got: Vec<_> = extents
        .iter()
        .map(|e| (e.range.start, e.range.end, e.is_hole))
        .collect();
    assert_eq!(got, want);
    assert_eq!(device.data_extents(all, 1).unwrap().len(), 1);
    let inside = device.data_extents(ByteRange::new(1000, 2000), 9).unwrap();
    assert_eq!(
        (inside[0].range, inside[0].is_hole, inside.len()),
        (ByteRange::new(1000, 2000), true, 1)
    );
    // Zeroing with punch gives the space back, without keeps it.
    let data = ByteRange::at(1 << 20, 65536);
    device.write_zeroes(data, true).unwrap();
    assert_eq!(device.data_extents(all, 100).unwrap().len(), 1);
}

#[test]
fn locks_keep_two_users_apart() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, &[0; 8192]);
    let first = FileDevice::open(&path, &OpenOptions::default()).unwrap();
    let refused = FileDevice::open(&path, &OpenOptions::default()).unwrap_err();
    assert!(
        refused.to_string().contains("in use by another process"),
        "{refused}"
    );
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    FileDevice::open(&path, &read_only).unwrap_err();
    FileDevice::open(
        &path,
        &OpenOptions {
            lock: false,
            ..OpenOptions::default()
        },
    )
    .unwrap();
    // Free at once, also after a ring was used on it.
    Driver(first.open_queue(4).unwrap()).one(IoKind::Write, 0, 4096, IoBuf::zeroed(4096));
    drop(first);
    lock::try_lock(&File::open(&path).unwrap(), &path, true).unwrap();
    let reader = FileDevice::open(&path, &read_only).unwrap();
    FileDevice::open(&path, &read_only).unwrap();
    FileDevice::open(&path, &OpenOptions::default()).unwrap_err();
    drop(reader);
    FileDevice::open(&path, &OpenOptions::default()).unwrap();
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = TempDir::new().unwrap();
    let open =
        |path: &std::path::Path| FileDevice::open(path, &OpenOptions::default()).unwrap_err();
    assert!(matches!(
        open(dir.path()),
        OpenError::Open { .. } | OpenError::NotAnImage { .. }
    ));
    assert!(matches!(
        open(&dir.path().join("nothing")),
        OpenError::Open { .. }
    ));
    assert!(matches!(open(&image(&dir, &[])), OpenError::Size { .. }));
}
