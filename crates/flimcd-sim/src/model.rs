//! What a guest may see. Knows nothing of volumes, machines or sites: only requests, when they began and ended, and when
//! the guest's machine lost its power.
//!
//! Every sector is a register. A read may return the value of any write that was not certainly overwritten before the read
//! began, and not begun after it ended. A write that was never acknowledged may count or not, but once a read has
//! returned a value, values that ended before that read began do not come back. After a power loss a sector may also have
//! any older value since the last flush, but none from before it.
//!
//! Kept per sector are two sets of values, those it may have now (`volatile`), and those it may have after a power loss
//! (`durable`, a superset), and the facts that make the second set smaller when a flush comes.

use std::collections::{BTreeMap, BTreeSet};

use flimcd_core::ByteRange;

use crate::content::{self, SECTOR, SECTOR_LEN};

/// Order of the model's events.
type Tick = u64;

/// A value that a sector may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    stamp: u64,
    start: Tick,
    /// `None` while the write may still reach the disk.
    end: Option<Tick>,
}

/// At some moment of `start..end` the sector had this value.
#[derive(Clone, Copy, Debug)]
struct Fact {
    stamp: u64,
    start: Tick,
    end: Tick,
}

impl Fact {
    /// Whether `entry` may still be the value after this fact.
    fn leaves(&self, entry: &Entry) -> bool {
        entry.stamp == self.stamp || entry.end.is_none_or(|end| end >= self.start)
    }
}

#[derive(Clone, Debug, Default)]
struct Open {
    volatile: Vec<Entry>,
    durable: Vec<Entry>,
    facts: Vec<Fact>,
}

/// A read under way: what it may return, by sector.
#[derive(Debug)]
struct Reading {
    range: ByteRange,
    start: Tick,
    allowed: Vec<(u64, u64)>,
}

/// Name of a read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ReadId(u64);

/// See the module.
pub(crate) struct Model {
    /// Sectors with one possible value, and since when no other is.
    settled: Vec<(u64, Tick)>,
    /// The others, and those whose value is not durable.
    open: BTreeMap<u64, Open>,
    reading: BTreeMap<ReadId, Reading>,
    next_read: u64,
    tick: Tick,
    power_lost: Tick,
}

/// What a guest saw and could not have seen.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    sector: u64,
    /// `None`: no write ever left such bytes.
    got: Option<u64>,
    allowed: BTreeSet<u64>,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let block = self.sector / 8;
        match self.got {
            Some(stamp) => write!(
                f,
                "sector {} (block {block}) has the content of write {stamp}",
                self.sector
            )?,
            None => write!(
                f,
                "sector {} (block {block}) has content that no write ever left there",
                self.sector
            )?,
        }
        write!(
            f,
            "; it may have that of {:?} (0: zeroes, 1: the image's first content)",
            self.allowed
        )
    }
}

/// The sectors that a range has bytes of.
pub(crate) fn sectors(range: ByteRange) -> std::ops::Range<u64> {
    range.start / SECTOR..range.end.div_ceil(SECTOR)
}

impl Model {
    /// A volume of zeroes.
    pub(crate) fn new(bytes: u64) -> Self {
        let sectors = usize::try_from(bytes.div_ceil(SECTOR)).expect("volumes are small here");
        Self {
            settled: vec![(content::ZERO, 0); sectors],
            open: BTreeMap::new(),
            reading: BTreeMap::new(),
            next_read: 0,
            tick: 1,
            power_lost: 0,
        }
    }

    /// What the image holds before anything begins.
    pub(crate) fn format(&mut self, range: ByteRange, stamp: u64) {
        for sector in sectors(range) {
            self.settled[crate::disk::index(sector)] = (stamp, 0);
        }
    }

    /// The time of the model, for flushes.
    pub(crate) fn now(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    fn open(&mut self, sector: u64) -> &mut Open {
        let (stamp, end) = self.settled[crate::disk::index(sector)];
        self.open.entry(sector).or_insert_with(|| {
            let entry = Entry {
                stamp,
                start: 0,
                end: Some(end),
            };
            Open {
                volatile: vec![entry],
                durable: vec![entry],
                facts: Vec::new(),
            }
        })
    }

    /// The guest issues a write; names it by its stamp and the answer.
    pub(crate) fn begin_write(&mut self, range: ByteRange, stamp: u64) -> Tick {
        let start = self.now();
        let entry = Entry {
            stamp,
            start,
            end: None,
        };
        for sector in sectors(range) {
            let open = self.open(sector);
            open.volatile.push(entry);
            open.durable.push(entry);
        }
        for reading in self.reading.values_mut() {
            let both = ByteRange::new(
                reading.range.start.max(range.start),
                reading.range.end.min(range.end),
            );
            if !both.is_empty() {
                reading
                    .allowed
                    .extend(sectors(both).map(|sector| (sector, stamp)));
            }
        }
        start
    }

    /// A write ended. `certain`: it was acknowledged, and is there. Otherwise it may be there or not.
    pub(crate) fn end_write(&mut self, range: ByteRange, stamp: u64, start: Tick, certain: bool) {
        let end = self.now();
        let fact = Fact { stamp, start, end };
        for sector in sectors(range) {
            let open = self.open(sector);
            for entry in open.volatile.iter_mut().chain(&mut open.durable) {
                if entry.stamp == stamp && entry.start == start {
                    entry.end = Some(end);
                }
            }
            if certain {
                open.volatile.retain(|entry| fact.leaves(entry));
                open.facts.push(fact);
            }
        }
    }

    /// The guest issues a read.
    pub(crate) fn begin_read(&mut self, range: ByteRange) -> ReadId {
        let start = self.now();
        let mut allowed = Vec::new();
        for sector in sectors(range) {
            match self.open.get(&sector) {
                Some(open) => allowed.extend(open.volatile.iter().map(|e| (sector, e.stamp))),
                None => allowed.push((sector, self.settled[crate::disk::index(sector)].0)),
            }
        }
        self.next_read += 1;
        let id = ReadId(self.next_read);
        self.reading.insert(
            id,
            Reading {
                range,
                start,
                allowed,
            },
        );
        id
    }

    /// A read was answered with an error, or will not be.
    pub(crate) fn forget_read(&mut self, id: ReadId) {
        self.reading.remove(&id);
    }

    /// A read was answered with these bytes.
    pub(crate) fn end_read(&mut self, id: ReadId, bytes: &[u8]) -> Result<(), Wrong> {
        let reading = self.reading.remove(&id).expect("a read that began");
        let end = self.now();
        for (piece, sector) in bytes.chunks(SECTOR_LEN).zip(sectors(reading.range)) {
            let got = content::stamp_of(piece, sector);
            let allowed = reading.allowed.iter().filter(|(at, _)| *at == sector);
            let stamp = match got {
                Some(stamp) if allowed.clone().any(|&(_, s)| s == stamp) => stamp,
                _ => {
                    return Err(Wrong {
                        sector,
                        got,
                        allowed: allowed.map(|&(_, s)| s).collect(),
                    });
                }
            };
            let fact = Fact {
                stamp,
                start: reading.start,
                end,
            };
            self.learn(sector, fact);
        }
        Ok(())
    }

    fn learn(&mut self, sector: u64, fact: Fact) {
        let power_lost = self.power_lost;
        let Some(open) = self.open.get_mut(&sector) else {
            return;
        };
        open.volatile.retain(|entry| fact.leaves(entry));
        // What was there when the power came back is on the medium.
        let old = |entry: &Entry| entry.end.is_some_and(|end| end <= power_lost);
        if open
            .durable
            .iter()
            .filter(|e| e.stamp == fact.stamp)
            .all(old)
        {
            open.durable
                .retain(|entry| entry.stamp == fact.stamp || !old(entry));
        }
        if open.volatile.len() > 1 || open.durable.len() > 1 {
            open.facts.push(fact);
        }
    }

    /// A flush that was issued at `start` was acknowledged.
    pub(crate) fn end_flush(&mut self, start: Tick) {
        self.now();
        let mut settled = Vec::new();
        for (&sector, open) in &mut self.open {
            if let Some(value) = open.flush(start) {
                settled.push((sector, value));
            }
        }
        self.settle(&settled);
    }

    /// A write that is durable by itself was acknowledged; call it after [`end_write`](Self::end_write).
    pub(crate) fn end_durable_write(&mut self, range: ByteRange, stamp: u64, start: Tick) {
        let end = self.now();
        let fact = Fact { stamp, start, end };
        for sector in sectors(range) {
            if let Some(open) = self.open.get_mut(&sector) {
                open.durable.retain(|entry| fact.leaves(entry));
            }
        }
    }

    fn settle(&mut self, settled: &[(u64, (u64, Tick))]) {
        for &(sector, value) in settled {
            self.open.remove(&sector);
            self.settled[crate::disk::index(sector)] = value;
        }
    }

    /// The guest's machine lost its power, and what it had in flight is gone with it.
    pub(crate) fn lose_power(&mut self) {
        let end = self.now();
        self.power_lost = end;
        self.reading.clear();
        let mut settled = Vec::new();
        for (&sector, open) in &mut self.open {
            for entry in &mut open.durable {
                entry.end.get_or_insert(end);
            }
            open.facts.clear();
            open.volatile.clone_from(&open.durable);
            if let Some(value) = open.only_value() {
                settled.push((sector, value));
            }
        }
        self.settle(&settled);
    }

    /// Checks a whole image that nobody writes to.
    pub(crate) fn check(&self, bytes: &[u8]) -> Result<(), Wrong> {
        for (piece, sector) in bytes.chunks(SECTOR_LEN).zip(0..) {
            let got = content::stamp_of(piece, sector);
            let allowed: BTreeSet<u64> = match self.open.get(&sector) {
                Some(open) => open.volatile.iter().map(|e| e.stamp).collect(),
                None => BTreeSet::from([self.settled[crate::disk::index(sector)].0]),
            };
            if !got.is_some_and(|stamp| allowed.contains(&stamp)) {
                return Err(Wrong {
                    sector,
                    got,
                    allowed,
                });
            }
        }
        Ok(())
    }
}

impl Open {
    fn flush(&mut self, start: Tick) -> Option<(u64, Tick)> {
        let (now, later): (Vec<_>, Vec<_>) = self.facts.drain(..).partition(|f| f.end < start);
        self.facts = later;
        for fact in now {
            self.durable.retain(|entry| fact.leaves(entry));
        }
        self.only_value()
    }

    /// The value, when no other is possible now or after a power loss.
    fn only_value(&self) -> Option<(u64, Tick)> {
        let stamp = self.durable.first()?.stamp;
        let mut last = 0;
        for entry in &self.durable {
            if entry.stamp != stamp {
                return None;
            }
            last = last.max(entry.end?);
        }
        Some((stamp, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ByteRange = ByteRange::new(0, SECTOR);

    fn sector(stamp: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR_LEN];
        content::fill(&mut bytes, 0, stamp);
        bytes
    }

    fn read(model: &mut Model, stamp: u64) -> bool {
        let id = model.begin_read(RANGE);
        model.end_read(id, &sector(stamp)).is_ok()
    }

    #[test]
    fn an_acknowledged_write_is_all_there_is() {
        let mut model = Model::new(SECTOR);
        let start = model.begin_write(RANGE, 5);
        let early = model.begin_read(RANGE);
        model.end_write(RANGE, 5, start, true);
        assert!(
            model.end_read(early, &sector(0)).is_ok(),
            "it began before the end"
        );
        assert!(!read(&mut model, 0));
        assert!(read(&mut model, 5));
    }

    #[test]
    fn an_unacknowledged_write_may_count_but_not_flicker() {
        for stamp in [0, 7] {
            let mut model = Model::new(SECTOR);
            let start = model.begin_write(RANGE, 7);
            model.end_write(RANGE, 7, start, false);
            assert!(read(&mut model, stamp));
            assert!(!read(&mut model, 7 - stamp));
            assert!(read(&mut model, stamp));
        }
    }

    #[test]
    fn overlapping_writes_may_win_in_any_order() {
        for winner in [5, 6] {
            let mut model = Model::new(SECTOR);
            let five = model.begin_write(RANGE, 5);
            let six = model.begin_write(RANGE, 6);
            model.end_write(RANGE, 5, five, true);
            model.end_write(RANGE, 6, six, true);
            assert!(read(&mut model, winner));
            assert!(!read(&mut model, 11 - winner));
        }
    }

    #[test]
    fn a_slow_read_says_nothing_of_later_writes() {
        let mut model = Model::new(SECTOR);
        let slow = model.begin_read(RANGE);
        let start = model.begin_write(RANGE, 5);
        model.end_write(RANGE, 5, start, true);
        let flush = model.now();
        model.end_flush(flush);
        let start = model.begin_write(RANGE, 6);
        assert!(model.end_read(slow, &sector(0)).is_ok());
        assert!(read(&mut model, 5));
        model.end_write(RANGE, 6, start, true);
        assert!(!read(&mut model, 5));
    }

    #[test]
    fn power_takes_what_was_not_flushed_and_nothing_else() {
        let write = |model: &mut Model, stamp| {
            let start = model.begin_write(RANGE, stamp);
            model.end_write(RANGE, stamp, start, true);
        };
        let after = |stamp| {
            let mut model = Model::new(SECTOR);
            write(&mut model, 5);
            let flush = model.now();
            write(&mut model, 6);
            model.end_flush(flush);
            write(&mut model, 7);
            model.lose_power();
            let seen = read(&mut model, stamp);
            model.lose_power();
            let other = if stamp == 5 { 7 } else { 5 };
            seen && read(&mut model, stamp) && !read(&mut model, other)
        };
        assert!(!after(0), "5 was flushed over it");
        assert!(after(5) && after(6) && after(7));
        let mut model = Model::new(SECTOR);
        write(&mut model, 5);
        let flush = model.now();
        model.end_flush(flush);
        assert!(model.open.is_empty(), "nothing is uncertain any more");
        assert!(model.check(&sector(5)).is_ok() && model.check(&sector(0)).is_err());
    }
}
