//! How hot the parts of a volume are: decayed counts of the blocks that its guest reads and writes, chunk by chunk.
//!
//! A migration orders content by it, from its first moment on if the volume was served for a while before; people see it in
//! `flimcd heat`. It is advice: nothing is wrong when it is lost or damaged, only slower.
//!
//! # On the guest's path
//! A port takes note of its requests while it holds the core's lock anyway, which is a push to a vector of its own, and counts
//! them when they are on their way to the disk, under a lock that nothing but heat takes. Where that lock is held, by another port or by somebody who
//! looks, the port goes on and counts with its next requests. No clock is read: counts are halved by whoever looks, which the agent
//! does once a minute for every volume ([`Volume::store_heat`]). The test `cost` measures what it takes: 15 ns a request where the
//! hot regions' counters are in the processor's cache (10 GiB), 65 to 110 ns where all of a TiB is equally hot, after the request was submitted.
//!
//! # Memory and disk
//! A byte per chunk and kind, in volumes of more than 16 GiB per two chunks, for the regions that are touched: at most 16 MiB per TiB, and
//! regions that cool down are given back. Whoever looks gets larger copies. The file `heat` in the volume's directory is replaced at most once a minute when something has changed, when
//! the volume is handed over and when the agent stops in order. While no agent has the volume open its clock stands still.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
    time::{Duration, Instant},
};

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ByteRange, Heat, VolumeSize};

use super::Volume;
use crate::{
    rules::GuestOp,
    state::{HeatFile, HeatKind, HeatRecord, HeatTotals},
};

/// Time after which a count weighs half.
pub const HEAT_HALF_LIFE: Duration = Duration::from_secs(60);
/// Requests that a port keeps while it cannot count them at once.
const WAITING_MAX: usize = 8192;

/// How hot a volume is at a moment.
#[derive(Clone, Debug)]
pub struct HeatSnapshot {
    /// Decayed counts of blocks read, by chunk.
    pub read: Heat,
    /// Decayed counts of blocks written, by chunk.
    pub write: Heat,
    /// The time that those stand for: a count divided by it is a rate. What a migration brought is a part of it.
    pub window: Duration,
    /// Reads that were counted here.
    pub reads: HeatTotals,
    /// Writes that were counted here.
    pub writes: HeatTotals,
    /// The time that `reads` and `writes` stand for.
    pub counted: Duration,
}

/// A guest's request, to be counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    blocks: BlockRange,
    kind: HeatKind,
}

impl Touch {
    /// `None` for what does not count.
    #[inline]
    pub(crate) fn of(op: GuestOp, range: ByteRange) -> Option<Self> {
        let kind = match op {
            GuestOp::Read => HeatKind::Read,
            GuestOp::Write | GuestOp::WriteZeroes => HeatKind::Write,
            GuestOp::Trim => return None,
        };
        let blocks = range.blocks_touched();
        Some(Self { blocks, kind })
    }
}

/// The counts of a volume.
pub(crate) struct HeatBook {
    counts: Mutex<Counts>,
    /// Held while the file is written, so that an older state never replaces a newer one.
    storing: Mutex<()>,
}

struct Counts {
    record: HeatRecord,
    /// When counts were halved last, or counting began.
    ticked: Instant,
    /// Whether the file says something else.
    changed: bool,
}

impl HeatBook {
    /// Goes on from what the file had, or begins cold.
    pub(crate) fn new(size: VolumeSize, before: Option<HeatRecord>) -> Self {
        let cold = || HeatRecord::cold(size);
        Self {
            counts: Mutex::new(Counts {
                record: before.unwrap_or_else(cold),
                ticked: Instant::now(),
                changed: false,
            }),
            storing: Mutex::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts requests and takes them off the list; leaves them there when somebody else is at it and there are few.
    #[inline]
    pub(crate) fn count(&self, touches: &mut Vec<Touch>) {
        if touches.is_empty() {
            return;
        }
        let mut counts = match self.counts.try_lock() {
            Ok(counts) => counts,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if touches.len() < WAITING_MAX => return,
            Err(TryLockError::WouldBlock) => self.lock(),
        };
        for touch in touches.drain(..) {
            counts.count(touch);
        }
    }

    /// As [`count`](Self::count), for a port that will not come again.
    pub(crate) fn count_last(&self, touches: &mut Vec<Touch>) {
        let mut counts = self.lock();
        for touch in touches.drain(..) {
            counts.count(touch);
        }
    }

    fn snapshot(&self, now: Instant) -> HeatSnapshot {
        let mut counts = self.lock();
        counts.catch_up(now);
        let since = now.saturating_duration_since(counts.ticked);
        let record = counts.record.clone();
        drop(counts);
        let counted = record.counted + since;
        HeatSnapshot {
            window: counted + record.carried,
            reads: record.reads,
            writes: record.writes,
            counted,
            read: record.read.heat(HEAT_HALF_LIFE),
            write: record.write.heat(HEAT_HALF_LIFE),
        }
    }

    fn merge(&self, kind: HeatKind, heat: &Heat, now: Instant) {
        let mut counts = self.lock();
        counts.catch_up(now);
        let own = counts.record.counted + now.saturating_duration_since(counts.ticked);
        let record = &mut counts.record;
        // A count that has settled stands for this time.
        let settled = HEAT_HALF_LIFE.div_f64(std::f64::consts::LN_2);
        record.carried = record.carried.max(settled.saturating_sub(own));
        record.of(kind).0.merge(heat);
        counts.changed = true;
    }

    pub(crate) fn clear(&self, size: VolumeSize) {
        let mut counts = self.lock();
        counts.record = HeatRecord::cold(size);
        counts.ticked = Instant::now();
        counts.changed = true;
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let counts = self.lock();
        counts.record.read.memory_bytes() + counts.record.write.memory_bytes()
    }

    /// Writes the file if it would say something else. Whether it did.
    fn store(&self, file: &HeatFile, now: Instant) -> io::Result<bool> {
        let _storing = self.storing.lock().unwrap_or_else(PoisonError::into_inner);
        let record = {
            let mut counts = self.lock();
            counts.catch_up(now);
            if !std::mem::take(&mut counts.changed) {
                return Ok(false);
            }
            let mut record = counts.record.clone();
            record.counted += now.saturating_duration_since(counts.ticked);
            record
        };
        let stored = file.store(&record);
        if stored.is_err() {
            self.lock().changed = true;
        }
        stored.map(|()| true)
    }
}

impl Counts {
    #[inline]
    fn count(&mut self, touch: Touch) {
        let (heat, totals) = self.record.of(touch.kind);
        totals.requests += 1;
        totals.blocks += touch.blocks.len();
        let mut at = touch.blocks.start;
        while at < touch.blocks.end {
            let chunk = BlockIndex(at).chunk();
            let end = ((chunk.0 + 1) * BLOCKS_PER_CHUNK).min(touch.blocks.end);
            heat.add(chunk, end - at);
            at = end;
        }
        self.changed = true;
    }

    /// Halves the counts once for each half-life that has ended.
    fn catch_up(&mut self, now: Instant) {
        while now.saturating_duration_since(self.ticked) >= HEAT_HALF_LIFE {
            self.ticked += HEAT_HALF_LIFE;
            let record = &mut self.record;
            record.counted = (record.counted + HEAT_HALF_LIFE) / 2;
            record.carried /= 2;
            let mut is_warm = false;
            for kind in [HeatKind::Read, HeatKind::Write] {
                let (heat, totals) = record.of(kind);
                is_warm |= totals.requests > 0;
                totals.requests /= 2;
                totals.blocks /= 2;
                heat.halve();
            }
            self.changed |= is_warm;
        }
    }
}

impl Volume {
    /// How hot the volume is now. Takes some 0.2 s for a TiB that is hot everywhere; guests do not wait for it.
    #[must_use]
    pub fn heat(&self) -> HeatSnapshot {
        self.heat.snapshot(Instant::now())
    }

    /// Adds counts that were made elsewhere, of the same chunks and with the half-life [`HEAT_HALF_LIFE`].
    pub fn merge_heat(&self, kind: HeatKind, heat: &Heat) {
        self.heat.merge(kind, heat, Instant::now());
    }

    /// Writes down how hot the volume is, if that has changed; whether it did. To be called once a minute, because counts
    /// are halved by it as well. Waits for the disk.
    ///
    /// # Errors
    /// When the state directory cannot be written. Nothing is lost but a warm start.
    pub fn store_heat(&self) -> io::Result<bool> {
        self.store_heat_at(Instant::now())
    }

    fn store_heat_at(&self, now: Instant) -> io::Result<bool> {
        let file = self.durable.as_ref();
        let file = file.map(|durable| durable.state().heat_file());
        match file {
            Some(file) => self.heat.store(&file, now),
            None => {
                self.heat.lock().catch_up(now);
                Ok(false)
            }
        }
    }

    /// As [`store_heat`](Self::store_heat), where nothing depends on it.
    pub(super) fn try_store_heat(&self) {
        if let Err(error) = self.store_heat() {
            tracing::warn!(volume = %self.name, %error, "cannot write down what is hot: the next migration starts cold");
        }
    }
}

/// What the file in a volume's directory says; cold, with a line in the log, when that cannot be known.
pub(super) fn load(file: &HeatFile, size: VolumeSize) -> HeatBook {
    let before = file.load(HEAT_HALF_LIFE).unwrap_or_else(|error| {
        tracing::warn!(%error, "what was hot is not known any more");
        None
    });
    HeatBook::new(size, before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::{ChunkIndex, Time};

    fn size() -> VolumeSize {
        VolumeSize::new(1 << 30).unwrap()
    }

    fn touch(op: GuestOp, start: u64, length: u64) -> Vec<Touch> {
        Touch::of(op, ByteRange::at(start, length))
            .into_iter()
            .collect()
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn blocks_are_counted_in_the_chunks_they_lie_in() {
        let book = HeatBook::new(size(), None);
        let now = book.lock().ticked;
        // From the second block of chunk 0 to the first of chunk 2.
        let mut touched = touch(GuestOp::Read, 4096, 2 * 65536 - 4096 + 1);
        touched.extend(touch(GuestOp::WriteZeroes, 65536 + 100, 200));
        touched.extend(touch(GuestOp::Trim, 0, 1 << 20));
        book.count(&mut touched);
        assert!(touched.is_empty());
        let heat = book.snapshot(now + Duration::from_secs(10));
        let read: Vec<_> = heat.read.chunks().map(|(chunk, n)| (chunk.0, n)).collect();
        assert_eq!(read, [(0, 15.0), (1, 16.0), (2, 1.0)]);
        let written: Vec<_> = heat.write.chunks().map(|(chunk, n)| (chunk.0, n)).collect();
        assert_eq!(written, [(1, 1.0)]);
        let (requests, blocks) = (heat.reads.requests, heat.reads.blocks);
        assert_eq!((requests, blocks), (1, 32));
        assert_eq!(heat.window, Duration::from_secs(10));
    }

    #[test]
    fn a_steady_load_has_its_rate_at_any_time() {
        const CHUNKS: u32 = 32;
        let book = HeatBook::new(size(), None);
        let begin = book.lock().ticked;
        for second in 1..=600u32 {
            for chunk in 0..CHUNKS {
                book.count(&mut touch(
                    GuestOp::Write,
                    65536 * u64::from(chunk),
                    4096 * 4,
                ));
            }
            let now = begin + Duration::from_secs(1) * second;
            if second % 7 == 0 {
                let heat = book.snapshot(now);
                let per_second = |count: f64, time: Duration| count / time.as_secs_f64();
                let sum: f64 = heat.write.chunks().map(|(_, count)| count).sum();
                let blocks = per_second(sum / f64::from(CHUNKS), heat.window);
                assert!((3.6..4.4).contains(&blocks), "{blocks} after {second} s");
                #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
                let requests = heat.writes.requests as f64 / f64::from(CHUNKS);
                let requests = per_second(requests, heat.counted);
                assert!(
                    (0.9..1.1).contains(&requests),
                    "{requests} after {second} s"
                );
            }
        }
    }

    #[test]
    fn what_cools_down_is_given_back_and_said_once_more() {
        let book = HeatBook::new(size(), None);
        let idle = book.memory_bytes();
        let begin = book.lock().ticked;
        book.count(&mut touch(GuestOp::Read, 0, 4096));
        assert!(book.memory_bytes() > idle + 4000);
        let warm = book.snapshot(begin + HEAT_HALF_LIFE * 3);
        assert!(near(warm.read.get(ChunkIndex(0)), 0.125));
        assert!(std::mem::take(&mut book.lock().changed));
        let cold = book.snapshot(begin + HEAT_HALF_LIFE * 5000);
        assert_eq!(cold.read.chunks().count(), 0);
        assert!(cold.window <= HEAT_HALF_LIFE * 2);
        assert_eq!(book.memory_bytes(), idle);
        book.lock().changed = false;
        let _ = book.snapshot(begin + HEAT_HALF_LIFE * 5001);
        assert!(!book.lock().changed, "a cold volume is not written again");
    }

    #[test]
    fn what_a_migration_brings_counts_as_settled() {
        let book = HeatBook::new(size(), None);
        let begin = book.lock().ticked;
        let mut brought = Heat::new(size(), HEAT_HALF_LIFE, Time::ZERO);
        brought.add(ChunkIndex(9), 100, Time::ZERO);
        book.merge(HeatKind::Read, &brought, begin + Duration::from_secs(1));
        let heat = book.snapshot(begin + Duration::from_secs(1));
        let window = heat.window.as_secs_f64();
        assert!((86.0..87.0).contains(&window), "{window}");
        assert_eq!(heat.counted, Duration::from_secs(1));
        assert!(near(heat.read.get(ChunkIndex(9)), 100.0));
        assert_eq!(heat.write.chunks().count(), 0);
    }

    /// Nanoseconds per guest request, to be run by hand in a release build:
    /// `cargo test --release -p flimcd-volume -- --ignored --nocapture cost`.
    #[test]
    #[ignore = "measures, and checks nothing"]
    #[expect(
        clippy::print_stderr,
        clippy::cast_precision_loss,
        reason = "for people"
    )]
    fn cost() {
        const REQUESTS: u64 = 4_000_000;
        for (name, size) in [("10 GiB", 10 << 30), ("1 TiB", 1u64 << 40)] {
            for batch in [1, 32] {
                let book = HeatBook::new(VolumeSize::new(size).unwrap(), None);
                let mut touched = Vec::new();
                let mut random = 1u64;
                let mut run = |counts: bool| {
                    let begin = Instant::now();
                    for number in 0..REQUESTS {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let range = ByteRange::at(random % (size / 4096) * 4096, 4096);
                        touched.extend(Touch::of(GuestOp::Read, range));
                        if number % batch == 0 {
                            if counts {
                                book.count(&mut touched);
                            }
                            std::hint::black_box(&mut touched).clear();
                        }
                    }
                    begin.elapsed().as_nanos() as f64 / REQUESTS as f64
                };
                run(true);
                let (off, on) = (run(false), run(true));
                eprintln!("heat, {name}, {batch} requests at once: {:.1} ns", on - off);
                let begin = Instant::now();
                drop(book.snapshot(begin + HEAT_HALF_LIFE));
                let took = begin.elapsed();
                eprintln!(
                    "  a look that halves: {took:.1?}, {} KiB",
                    book.memory_bytes() >> 10
                );
            }
        }
    }

    #[test]
    fn a_port_does_not_wait_for_somebody_who_looks() {
        let book = HeatBook::new(size(), None);
        let mut touched = touch(GuestOp::Read, 0, 4096);
        let looking = book.lock();
        book.count(&mut touched);
        drop(looking);
        assert_eq!(touched.len(), 1);
        touched.extend(touch(GuestOp::Read, 0, 4096));
        book.count(&mut touched);
        assert_eq!(book.lock().record.reads.requests, 2);
    }
}
