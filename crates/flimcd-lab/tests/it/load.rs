//! Loads against disks in memory: right ones, wrong ones, and ones that go away.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use flimcd_lab::load::{
    Baseline, Content, DiskOp, DiskReply, DiskRequest, GuestDisk, Load, LoadError, LoadHandle,
    LoadOptions, LoadPhase, MemoryDisk, PlannedOp, RequestSource, Synthetic,
};

const SIZE: usize = (4 << 20) + 512;

/// A disk in memory that several connections share, with faults to switch on.
#[derive(Clone)]
struct Shared {
    disk: Arc<Mutex<MemoryDisk>>,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    /// Drop the connection with everything in flight.
    is_gone: AtomicBool,
    /// Return the content of another block for every read.
    misplace_reads: AtomicBool,
    /// Acknowledge writes without doing them.
    lose_writes: AtomicBool,
    /// Fail every request.
    fail: AtomicBool,
    /// Answers given.
    answers: AtomicU64,
}

/// One connection to it. Answers in an order that has nothing to do with that of the requests.
struct Connection {
    shared: Shared,
    replies: Vec<DiskReply>,
}

impl Shared {
    fn new() -> (Self, Baseline) {
        let bytes: Vec<u8> = (0..SIZE)
            .map(|i| u8::try_from(i / 4096 % 251).unwrap())
            .collect();
        let mut disk = MemoryDisk::new(bytes);
        let baseline = Baseline::of_disk(&mut disk, 512).unwrap();
        (
            Self {
                disk: Arc::new(Mutex::new(disk)),
                faults: Arc::default(),
            },
            baseline,
        )
    }

    fn connect(&self) -> Box<dyn GuestDisk> {
        self.faults.is_gone.store(false, Ordering::SeqCst);
        Box::new(Connection {
            shared: self.clone(),
            replies: Vec::new(),
        })
    }
}

impl GuestDisk for Connection {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn submit(&mut self, mut request: DiskRequest) -> io::Result<()> {
        let faults = &self.shared.faults;
        if faults.is_gone.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        if faults.fail.load(Ordering::SeqCst) {
            let result = Err(io::Error::from_raw_os_error(5));
            self.replies.push(DiskReply {
                id: request.id,
                result,
                data: request.data,
            });
            return Ok(());
        }
        if faults.misplace_reads.load(Ordering::SeqCst) && request.op == DiskOp::Read {
            request.offset = (request.offset + 65536) % (SIZE as u64 - 65536) / 4096 * 4096;
        }
        if faults.lose_writes.load(Ordering::SeqCst) && request.op == DiskOp::Write {
            self.replies.push(DiskReply {
                id: request.id,
                result: Ok(()),
                data: request.data,
            });
            return Ok(());
        }
        let mut disk = self
            .shared
            .disk
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        disk.submit(request)?;
        self.replies.extend(disk.receive(Duration::ZERO)?);
        Ok(())
    }

    fn receive(&mut self, _timeout: Duration) -> io::Result<Option<DiskReply>> {
        if self.shared.faults.is_gone.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        let count = self.shared.faults.answers.fetch_add(1, Ordering::SeqCst);
        if self.replies.is_empty() {
            std::thread::yield_now();
            return Ok(None);
        }
        let index = usize::try_from(count % self.replies.len() as u64).unwrap();
        Ok(Some(self.replies.swap_remove(index)))
    }
}

fn start(shared: &Shared, baseline: Baseline) -> LoadHandle {
    let synthetic = Synthetic {
        zero_share: 0.1,
        working_set_share: 1.0,
        zipf_exponent: 0.9,
        flush_every_writes: 10,
        ..Synthetic::default()
    };
    Load::start(
        shared.connect(),
        baseline,
        synthetic,
        LoadOptions::default(),
    )
    .unwrap()
}

/// Waits until so many requests were answered.
fn run_for(load: &LoadHandle, ops: u64) {
    let goal = load.snapshot().all.ops + ops;
    while load.snapshot().all.ops < goal {
        std::thread::yield_now();
    }
}

fn wait_for_phase(load: &LoadHandle, phase: LoadPhase) {
    while load.phase() != phase {
        std::thread::yield_now();
    }
}

#[test]
fn a_right_disk_is_found_right_across_a_move() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    run_for(&load, 20_000);
    load.begin_phase("move");
    let paused = load.pause().unwrap();
    assert!(paused.last_completed.is_some() && paused.disk.is_some());
    assert!(matches!(load.pause(), Ok(again) if again.disk.is_none()));
    let resumed = load.resume_on(shared.connect()).unwrap();
    assert!(resumed.downtime.is_some());
    run_for(&load, 20_000);
    assert!(matches!(
        load.final_check(&mut *shared.connect()),
        Err(LoadError::NotPaused)
    ));
    load.pause().unwrap();
    let stats = load.snapshot();
    assert_eq!(
        (stats.reads_wrong, stats.errors, stats.unanswered),
        (0, 0, 0)
    );
    assert!(stats.reads.ops > stats.writes.ops && stats.zeroes.ops > 0 && stats.flushes.ops > 0);
    assert!(
        stats.fresh_dirty_bytes > 0
            && stats.fresh_dirty_bytes <= stats.writes.bytes + stats.zeroes.bytes
    );
    let names: Vec<String> = load.phases().into_iter().map(|phase| phase.phase).collect();
    assert_eq!(names, ["start", "move"]);
    let check = load.final_check(&mut *shared.connect()).unwrap();
    assert!(check.is_right() && check.bytes == SIZE as u64, "{check:?}");
}

#[test]
fn misplaced_reads_are_found() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    run_for(&load, 1000);
    shared.faults.misplace_reads.store(true, Ordering::SeqCst);
    run_for(&load, 1000);
    let stats = load.snapshot();
    assert!(stats.reads_wrong > 100, "{}", stats.reads_wrong);
    assert_eq!(stats.wrong.len(), 16);
}

#[test]
fn a_lost_write_is_found_by_the_check_and_named() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    run_for(&load, 1000);
    shared.faults.lose_writes.store(true, Ordering::SeqCst);
    run_for(&load, 1000);
    load.pause().unwrap();
    let check = load.final_check(&mut *shared.connect()).unwrap();
    assert!(!check.is_right());
    let is_stale = |found| {
        matches!(
            found,
            Content::Original | Content::Version(_) | Content::Zeroes
        )
    };
    assert!(
        check.wrong.iter().all(|wrong| is_stale(wrong.found)),
        "{check:?}"
    );
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    run_for(&load, 5000);
    load.pause().unwrap();
    for at in [0, SIZE / 2 + 77, SIZE - 1] {
        shared.disk.lock().unwrap().bytes_mut()[at] ^= 0x10;
        let check = load.final_check(&mut *shared.connect()).unwrap();
        assert_eq!(check.wrong_granules, 1);
        assert_eq!(check.wrong[0].offset, at as u64 / 512 * 512);
        shared.disk.lock().unwrap().bytes_mut()[at] ^= 0x10;
    }
    assert!(load.final_check(&mut *shared.connect()).unwrap().is_right());
}

#[test]
fn a_disk_that_goes_away_leaves_old_or_new() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    for _ in 0..20 {
        run_for(&load, 500);
        shared.faults.is_gone.store(true, Ordering::SeqCst);
        wait_for_phase(&load, LoadPhase::Broken);
        assert!(load.broken_by().is_some());
        load.resume_on(shared.connect()).unwrap();
    }
    load.pause().unwrap();
    let stats = load.snapshot();
    assert!(stats.unanswered > 0);
    assert_eq!(stats.reads_wrong, 0, "{:?}", stats.wrong);
    assert!(load.final_check(&mut *shared.connect()).unwrap().is_right());
    assert_eq!(load.unsettled_granules(), 0);
}

#[test]
fn errors_are_counted_and_do_not_stop_the_load() {
    let (shared, baseline) = Shared::new();
    let load = start(&shared, baseline);
    run_for(&load, 100);
    shared.faults.fail.store(true, Ordering::SeqCst);
    while load.snapshot().errors < 100 {
        std::thread::yield_now();
    }
    shared.faults.fail.store(false, Ordering::SeqCst);
    run_for(&load, 1000);
    load.pause().unwrap();
    let stats = load.snapshot();
    assert!(
        stats.first_errors[0].contains("os error 5"),
        "{:?}",
        stats.first_errors
    );
    assert_eq!(stats.reads_wrong, 0);
    assert!(load.final_check(&mut *shared.connect()).unwrap().is_right());
}

/// Requests that conflict as much as they can.
struct Hammer(u64);

impl RequestSource for Hammer {
    fn next_op(&mut self) -> Option<PlannedOp> {
        self.0 += 1;
        let op = match self.0 % 3 {
            0 => DiskOp::Read,
            1 => DiskOp::Write,
            _ => DiskOp::WriteZeroes,
        };
        let offset = self.0 % 4 * 512;
        (self.0 <= 30_000).then_some(PlannedOp {
            op,
            offset,
            length: 1024,
            due: None,
            content: None,
        })
    }
}

#[test]
fn overlapping_requests_are_kept_apart_and_in_order() {
    let (shared, baseline) = Shared::new();
    let load = Load::start_with(
        shared.connect(),
        baseline,
        Box::new(Hammer(0)),
        LoadOptions::default(),
    )
    .unwrap();
    wait_for_phase(&load, LoadPhase::Ended);
    let stats = load.snapshot();
    assert_eq!(
        (stats.all.ops, stats.reads_wrong),
        (30_000, 0),
        "{:?}",
        stats.wrong
    );
    assert!(load.final_check(&mut *shared.connect()).unwrap().is_right());
    assert!(matches!(
        load.resume_on(shared.connect()),
        Err(LoadError::Ended)
    ));
}

#[test]
fn disks_of_another_size_are_refused() {
    let (shared, baseline) = Shared::new();
    let small = Box::new(MemoryDisk::new(vec![0; 4096]));
    let refused = Load::start(
        small,
        baseline.clone(),
        Synthetic::default(),
        LoadOptions::default(),
    );
    assert!(matches!(refused, Err(LoadError::Size { .. })));
    let load = start(&shared, baseline.clone());
    load.pause().unwrap();
    let other = Box::new(MemoryDisk::new(vec![0; 4096]));
    assert!(matches!(load.resume_on(other), Err(LoadError::Size { .. })));
    let odd = Synthetic {
        request_bytes: 700,
        ..Synthetic::default()
    };
    let refused = Load::start(shared.connect(), baseline, odd, LoadOptions::default());
    assert!(matches!(refused, Err(LoadError::Granule { .. })));
}
