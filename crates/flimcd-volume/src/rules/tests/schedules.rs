//! Threads over the rules behind a mutex, as a volume has them, under thousands of schedules (shuttle).
//!
//! The disk is a number per quarter of a block, accessed one by one, so that I/O of different threads can interleave as it does on
//! a real device.

use std::collections::{HashMap, HashSet};

use flimcd_core::{BlockIndex, BlockRange, BlockSet, ByteRange, VolumeSize};
use shuttle::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
};

use crate::rules::{
    Admission, ApplyPlan, ApplyToken, FlushStep, GuestOp, Mode, Mutation, Outcome, Rules, Ticket,
};

const BLOCKS: u64 = 3;
const QUARTERS: usize = 12;
const QUARTER: u64 = 1024;
const SCHEDULES: usize = 2000;
/// What lies under a missing block. Content of a quarter only grows, so that the newer of two is the greater.
const GARBAGE: u32 = 0;
/// What is fetched for it.
const FETCHED: u32 = 1;

struct Inner {
    rules: Rules,
    woken: HashSet<Ticket>,
    ready: HashMap<ApplyToken, ApplyPlan>,
    /// What was acknowledged last in each quarter.
    acknowledged: [u32; QUARTERS],
    /// What is durable: content and presence.
    durable: [u32; QUARTERS],
    missing_written: BlockSet,
    missing_durable: BlockSet,
}

struct Lab {
    inner: Mutex<Inner>,
    changed: Condvar,
    disk: Vec<AtomicU32>,
    /// Guest I/O in flight per block, and whether an apply writes it.
    guests_in: Vec<AtomicUsize>,
    apply_in: Vec<AtomicBool>,
}

impl Lab {
    fn new(mode: Mode, mutation: Option<Mutation>, content: u32) -> Arc<Self> {
        let size = VolumeSize::new(QUARTERS as u64 * QUARTER).unwrap();
        let mut rules = Rules::new(size, mode);
        rules.set_mutation(mutation);
        Arc::new(Self {
            inner: Mutex::new(Inner {
                rules,
                woken: HashSet::new(),
                ready: HashMap::new(),
                acknowledged: [0; QUARTERS],
                durable: [content; QUARTERS],
                missing_written: BlockSet::full(BLOCKS),
                missing_durable: BlockSet::full(BLOCKS),
            }),
            changed: Condvar::new(),
            disk: (0..QUARTERS).map(|_| AtomicU32::new(content)).collect(),
            guests_in: (0..BLOCKS).map(|_| AtomicUsize::new(0)).collect(),
            apply_in: (0..BLOCKS).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// Changes the rules and wakes whoever waits for what comes of it.
    fn change<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.inner.lock().unwrap();
        let result = change(&mut inner);
        while let Some((ticket, _)) = inner.rules.poll_woken() {
            inner.woken.insert(ticket);
        }
        while let Some(plan) = inner.rules.poll_apply_ready() {
            inner.ready.insert(plan.token, plan);
        }
        self.changed.notify_all();
        result
    }

    fn wait<R>(&self, ready: impl Fn(&mut Inner) -> Option<R>) -> R {
        let mut inner: MutexGuard<'_, Inner> = self.inner.lock().unwrap();
        loop {
            if let Some(result) = ready(&mut inner) {
                return result;
            }
            inner = self.changed.wait(inner).unwrap();
        }
    }

    fn get(&self, quarter: usize) -> u32 {
        self.disk[quarter].load(Ordering::SeqCst)
    }

    fn put(&self, quarter: usize, content: u32) {
        self.disk[quarter].store(content, Ordering::SeqCst);
    }

    /// A guest's request on some quarters from admission to acknowledgement; returns what a read found.
    fn guest(&self, op: GuestOp, quarters: std::ops::Range<usize>, content: u32) -> Vec<u32> {
        let range = ByteRange::new(
            quarters.start as u64 * QUARTER,
            quarters.end as u64 * QUARTER,
        );
        let ticket = match self.change(|inner| inner.rules.begin(op, range)) {
            Admission::Go { ticket, .. } => ticket,
            Admission::Parked { ticket } => {
                self.wait(|inner| inner.woken.remove(&ticket).then_some(()));
                ticket
            }
            Admission::Refused(_) | Admission::Answered => panic!("refused"),
        };
        let blocks = range.blocks_touched();
        for block in blocks.iter() {
            let block = usize::try_from(block.0).unwrap();
            self.guests_in[block].fetch_add(1, Ordering::SeqCst);
            assert!(
                !self.apply_in[block].load(Ordering::SeqCst),
                "guest I/O meets an apply of block {block}"
            );
        }
        let mut found = Vec::new();
        for quarter in quarters.clone() {
            match op {
                GuestOp::Read => found.push(self.get(quarter)),
                _ => self.put(quarter, content),
            }
        }
        for block in blocks.iter() {
            self.guests_in[usize::try_from(block.0).unwrap()].fetch_sub(1, Ordering::SeqCst);
        }
        self.change(|inner| {
            inner.rules.finish(ticket, Outcome::Done);
            if op != GuestOp::Read {
                inner.acknowledged[quarters].fill(content);
            }
        });
        found
    }

    fn apply(&self, range: BlockRange) {
        let mut plan = self.change(|inner| inner.rules.begin_apply(range));
        if plan.wait {
            plan = self.wait(|inner| inner.ready.remove(&plan.token));
        }
        for block in plan.write.iter().flat_map(|run| run.iter()) {
            let block = usize::try_from(block.0).unwrap();
            let other = self.apply_in[block].swap(true, Ordering::SeqCst);
            let guests = self.guests_in[block].load(Ordering::SeqCst);
            assert!(!other, "two applies of block {block} at once");
            assert_eq!(guests, 0, "an apply meets guest I/O on block {block}");
            for quarter in block * 4..block * 4 + 4 {
                self.put(quarter, FETCHED);
            }
            self.apply_in[block].store(false, Ordering::SeqCst);
        }
        self.change(|inner| inner.rules.end_apply(plan.token, Outcome::Done));
    }

    fn flush(&self) {
        let (mut plan, promised) = self.change(|inner| {
            let plan = inner.rules.begin_flush();
            (plan, inner.acknowledged)
        });
        loop {
            match plan.next() {
                FlushStep::SyncData => {
                    let now: Vec<u32> = (0..QUARTERS).map(|quarter| self.get(quarter)).collect();
                    // Another sync may have been faster: what is durable stays so.
                    self.change(|inner| {
                        for (durable, now) in inner.durable.iter_mut().zip(now) {
                            *durable = now.max(*durable);
                        }
                    });
                }
                FlushStep::WritePresence(set) => {
                    self.change(|inner| inner.missing_written.subtract(set));
                }
                FlushStep::SyncPresence => {
                    self.change(|inner| inner.missing_durable = inner.missing_written.clone());
                }
                FlushStep::Done => break,
            }
        }
        self.change(|inner| {
            inner.rules.end_flush(plan, true);
            for (quarter, &content) in promised.iter().enumerate() {
                let block = BlockIndex(quarter as u64 / 4);
                let lost =
                    inner.missing_durable.contains(block) || inner.durable[quarter] < content;
                assert!(
                    content == 0 || !lost,
                    "a flushed write of quarter {quarter} can be lost"
                );
            }
        });
    }
}

/// Two guests with quarters of their own in shared blocks, content that arrives twice, and two who flush.
fn target(mutation: Option<Mutation>) {
    let lab = Lab::new(Mode::Incoming, mutation, GARBAGE);
    lab.change(|inner| inner.rules.start_postcopy(BlockSet::full(BLOCKS)));
    let mut threads = Vec::new();
    let mut spawn = |work: fn(&Lab)| {
        let lab = lab.clone();
        threads.push(thread::spawn(move || work(&lab)));
    };
    spawn(|lab| {
        // Block 0 as a whole, the first half of block 1.
        lab.guest(GuestOp::Write, 0..4, 10);
        assert_eq!(lab.guest(GuestOp::Read, 0..4, 0), [10; 4]);
        lab.guest(GuestOp::WriteZeroes, 4..6, 11);
        assert_eq!(lab.guest(GuestOp::Read, 4..6, 0), [11; 2]);
    });
    spawn(|lab| {
        // The second half of block 1 and all of block 2 at once, so a merge and a claim.
        lab.guest(GuestOp::Write, 6..12, 20);
        assert_eq!(lab.guest(GuestOp::Read, 6..12, 0), [20; 6]);
    });
    spawn(|lab| {
        lab.apply(BlockRange::new(0, 2));
        lab.apply(BlockRange::new(2, 3));
    });
    spawn(|lab| {
        lab.apply(BlockRange::new(1, 3));
        lab.apply(BlockRange::new(0, 1));
    });
    spawn(Lab::flush);
    spawn(Lab::flush);
    for thread in threads {
        thread.join().unwrap();
    }
    lab.flush();
    let inner = lab.inner.lock().unwrap();
    assert_eq!(inner.rules.missing_count(), 0);
    assert!(inner.missing_durable.is_empty() || mutation.is_some());
    let end: Vec<u32> = (0..QUARTERS).map(|quarter| lab.get(quarter)).collect();
    assert_eq!(end, [10, 10, 10, 10, 11, 11, 20, 20, 20, 20, 20, 20]);
}

/// Two guests that write while a third thread reads and sends, until the guests are stopped.
fn source(mutation: Option<Mutation>) {
    let lab = Lab::new(Mode::Owner, mutation, FETCHED);
    let writer = |quarters: std::ops::Range<usize>, base: u32| {
        let lab = lab.clone();
        thread::spawn(move || {
            for round in 0..3 {
                lab.guest(GuestOp::Write, quarters.clone(), base + round);
            }
        })
    };
    let writers = [writer(0..3, 10), writer(2..7, 20)];
    lab.change(|inner| inner.rules.start_tracking());
    let sender = {
        let lab = lab.clone();
        thread::spawn(move || {
            let mut target = vec![GARBAGE; QUARTERS];
            let mut pending = BlockSet::full(BLOCKS);
            for _ in 0..3 {
                pending.union_with(&lab.change(|inner| inner.rules.take_dirty()));
                while let Some(run) = pending.next_run(0, BLOCKS) {
                    let block = BlockRange::new(run.start, run.start + 1);
                    pending.remove_range(block);
                    lab.change(|inner| inner.rules.begin_send(block));
                    let first = usize::try_from(block.start).unwrap() * 4;
                    for (quarter, slot) in (first..).zip(&mut target[first..first + 4]) {
                        *slot = lab.get(quarter);
                    }
                    lab.change(|inner| inner.rules.end_send(block));
                }
            }
            (target, pending)
        })
    };
    let (target, mut pending) = sender.join().unwrap();
    for writer in writers {
        writer.join().unwrap();
    }
    lab.change(|inner| {
        inner.rules.freeze();
        assert!(inner.rules.is_drained());
        pending.union_with(&inner.rules.take_dirty());
    });
    for (quarter, &sent) in target.iter().enumerate() {
        let known = pending.contains(BlockIndex(quarter as u64 / 4));
        assert!(
            known || sent == lab.get(quarter),
            "the target lacks quarter {quarter} unnoticed"
        );
    }
}

#[test]
fn a_target_under_many_schedules() {
    shuttle::check_random(|| target(None), SCHEDULES);
    shuttle::check_pct(|| target(None), SCHEDULES, 3);
}

#[test]
fn a_source_under_many_schedules() {
    shuttle::check_random(|| source(None), SCHEDULES);
    shuttle::check_pct(|| source(None), SCHEDULES, 3);
}

#[test]
#[should_panic]
fn finds_content_over_a_guest_write() {
    let mutation = Some(Mutation::FetchedOverwritesGuestWrite);
    shuttle::check_random(move || target(mutation), SCHEDULES);
}

#[test]
#[should_panic(expected = "can be lost")]
fn finds_an_early_acknowledgement() {
    let mutation = Some(Mutation::FlushBeforePresence);
    shuttle::check_random(move || target(mutation), SCHEDULES);
}

#[test]
#[should_panic(expected = "unnoticed")]
fn finds_marks_cleared_after_the_read() {
    let mutation = Some(Mutation::ClearAfterRead);
    shuttle::check_random(move || source(mutation), SCHEDULES);
}

#[test]
#[should_panic(expected = "unnoticed")]
fn finds_marks_cleared_during_a_write() {
    let mutation = Some(Mutation::IgnoreWriteInFlight);
    shuttle::check_random(move || source(mutation), SCHEDULES);
}
