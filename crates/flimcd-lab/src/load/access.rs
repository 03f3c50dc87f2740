//! Iometer's access specifications: mixes of sizes, reads and random places over one area.

use std::time::Duration;

use super::{
    PlannedOp, RequestSource,
    arrivals::{Arrivals, BURST_MEAN},
    disk::DiskOp,
};
use crate::rng::Rng;

/// Blocks that a file system would place a test file's requests by.
const ALIGN_MAX: u64 = 4096;
/// A flush after so many writes: Iometer makes none, a guest's file system does.
const FLUSH_EVERY_WRITES: u32 = 256;
/// Distinguishes these draws from those of other sources with the same seed.
const SALT: u64 = 0x6163_6365_7373_2121;

/// One line of a specification: requests that are alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AccessLine {
    /// Bytes of a request, a positive multiple of 512.
    pub bytes: u32,
    /// Share of the requests that are of this line; those of a specification make 1 together.
    pub share: f64,
    /// Share of them that read.
    pub read_share: f64,
    /// Share of them that go anywhere; the others go on where the last request ended.
    pub random_share: f64,
    /// Pause after each burst.
    pub delay: Duration,
    /// Requests of a burst.
    pub burst: u32,
    /// Offsets are multiples of this; 0: of the request's size up to 4 KiB, as a file system places them.
    pub align_bytes: u64,
}

impl AccessLine {
    const fn new(bytes: u32, share: f64, read_share: f64, random_share: f64) -> Self {
        Self {
            bytes,
            share,
            read_share,
            random_share,
            delay: Duration::ZERO,
            burst: 1,
            align_bytes: 0,
        }
    }

    /// What offsets are multiples of.
    fn align(&self) -> u64 {
        let natural = 1 << u64::from(self.bytes).trailing_zeros();
        if self.align_bytes >= 512 && self.align_bytes.is_multiple_of(512) {
            self.align_bytes
        } else {
            ALIGN_MAX.min(natural)
        }
    }
}

/// A named mix of requests.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessSpec {
    /// Name in Iometer.
    pub name: String,
    /// At least one.
    pub lines: Vec<AccessLine>,
}

impl AccessSpec {
    /// Database: 8 KiB, 67% reads, all random.
    #[must_use]
    pub fn database() -> Self {
        Self::of("Database", &[(8192, 1.0)], 0.67, 1.0)
    }

    /// File server: 0.5 to 64 KiB, 80% reads, all random.
    #[must_use]
    pub fn file_server() -> Self {
        let sizes = [
            (512, 0.10),
            (1024, 0.05),
            (2048, 0.05),
            (4096, 0.60),
            (8192, 0.02),
            (16_384, 0.04),
            (32_768, 0.04),
            (65_536, 0.10),
        ];
        Self::of("File Server", &sizes, 0.8, 1.0)
    }

    /// Web server: 0.5 to 512 KiB, only reads, all random.
    #[must_use]
    pub fn web_server() -> Self {
        let sizes = [
            (512, 0.22),
            (1024, 0.15),
            (2048, 0.08),
            (4096, 0.23),
            (8192, 0.15),
            (16_384, 0.02),
            (32_768, 0.06),
            (65_536, 0.07),
            (131_072, 0.01),
            (524_288, 0.01),
        ];
        Self::of("Web Server", &sizes, 1.0, 1.0)
    }

    /// Workstation: 8 KiB, 80% reads, 80% random.
    #[must_use]
    pub fn workstation() -> Self {
        Self::of("Workstation", &[(8192, 1.0)], 0.8, 0.8)
    }

    fn of(name: &str, sizes: &[(u32, f64)], read_share: f64, random_share: f64) -> Self {
        let line =
            |&(bytes, share): &(u32, f64)| AccessLine::new(bytes, share, read_share, random_share);
        Self {
            name: name.to_owned(),
            lines: sizes.iter().map(line).collect(),
        }
    }

    /// What every offset and length is a multiple of, at most 4096.
    #[must_use]
    pub fn granule(&self) -> u32 {
        let unit = |line: &AccessLine| {
            let zeros = u64::from(line.bytes) | line.align();
            1 << zeros.trailing_zeros().clamp(9, 12)
        };
        self.lines.iter().map(unit).min().unwrap_or(512)
    }

    /// Mean of some property of the lines.
    pub(super) fn mean(&self, property: impl Fn(&AccessLine) -> f64) -> f64 {
        let sum =
            |value: &dyn Fn(&AccessLine) -> f64| -> f64 { self.lines.iter().map(value).sum() };
        sum(&|line| line.share * property(line)) / sum(&|line| line.share)
    }

    /// The mix in words.
    pub(super) fn describe(&self) -> String {
        let sizes: Vec<String> = self
            .lines
            .iter()
            .map(|line| format!("{:.0}% {} B", line.share * 100.0, line.bytes))
            .collect();
        format!(
            "{:.0}% reads, {:.0}% random; {}",
            self.mean(|line| line.read_share) * 100.0,
            self.mean(|line| line.random_share) * 100.0,
            sizes.join(", ")
        )
    }
}

/// Endless requests of a specification over one area of the disk, with times.
#[derive(Debug)]
pub(super) struct AccessSource {
    spec: AccessSpec,
    rng: Rng,
    arrivals: Arrivals,
    /// First byte and bytes of the area.
    area: (u64, u64),
    /// Where the last request ended, within the area.
    end: u64,
    speed: f64,
    /// Sum of the pauses that the specification asks for.
    paused: Duration,
    /// Line of the burst that is under way, and requests left of it.
    burst: (usize, u32),
    writes_since_flush: u32,
    /// When the last request is due.
    last: Duration,
}

impl AccessSource {
    /// `rate_per_sec` is the mean at this speed, where the specification has no delays.
    pub(super) fn new(
        spec: AccessSpec,
        area: (u64, u64),
        (rate_per_sec, speed): (f64, f64),
        seed: u64,
    ) -> Self {
        Self {
            spec,
            rng: Rng::new(seed ^ SALT),
            arrivals: Arrivals::new(rate_per_sec, seed),
            area,
            end: 0,
            speed,
            paused: Duration::ZERO,
            burst: (0, 0),
            writes_since_flush: 0,
            last: Duration::ZERO,
        }
    }

    fn choose_line(&mut self) -> AccessLine {
        if self.burst.1 == 0 {
            let total: f64 = self.spec.lines.iter().map(|line| line.share).sum();
            let mut draw = self.rng.unit() * total;
            let found = self.spec.lines.iter().position(|line| {
                draw -= line.share;
                draw < 0.0
            });
            let place = found.unwrap_or(self.spec.lines.len() - 1);
            self.burst = (place, self.spec.lines[place].burst.max(1));
        }
        self.burst.1 -= 1;
        self.spec.lines[self.burst.0]
    }

    fn place(&mut self, line: &AccessLine) -> u64 {
        let (bytes, align) = (u64::from(line.bytes), line.align());
        let slots = self.area.1.saturating_sub(bytes) / align + 1;
        let at = if self.rng.chance(line.random_share) {
            self.rng.below(slots) * align
        } else {
            self.end.next_multiple_of(align)
        };
        let at = if at + bytes > self.area.1 { 0 } else { at };
        self.end = at + bytes;
        self.area.0 + at
    }
}

impl RequestSource for AccessSource {
    fn next_op(&mut self) -> Option<PlannedOp> {
        if self.writes_since_flush >= FLUSH_EVERY_WRITES {
            self.writes_since_flush = 0;
            return Some(PlannedOp {
                due: Some(self.last),
                ..PlannedOp::FLUSH
            });
        }
        let line = self.choose_line();
        let op = if self.rng.chance(line.read_share) {
            DiskOp::Read
        } else {
            self.writes_since_flush += 1;
            DiskOp::Write
        };
        let offset = self.place(&line);
        self.last = self.arrivals.next_due() + self.paused;
        if self.burst.1 == 0 {
            self.paused += line.delay.div_f64(self.speed.max(1e-3));
        }
        Some(PlannedOp {
            op,
            offset,
            length: line
                .bytes
                .min(u32::try_from(self.area.1).unwrap_or(u32::MAX)),
            due: Some(self.last),
            content: None,
        })
    }
}

/// How the times come about, in words.
pub(super) fn describe_rate(rate_per_sec: f64) -> String {
    format!("{rate_per_sec:.0} requests per second in bursts of {BURST_MEAN:.0}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ops(spec: AccessSpec, seed: u64) -> Vec<PlannedOp> {
        let mut source = AccessSource::new(spec, (MIB, 64 * MIB), (100.0, 1.0), seed);
        (0..40_000).filter_map(|_| source.next_op()).collect()
    }

    #[test]
    fn each_specification_has_its_mix_and_keeps_to_its_area() {
        for spec in [
            AccessSpec::database(),
            AccessSpec::file_server(),
            AccessSpec::web_server(),
            AccessSpec::workstation(),
        ] {
            let total: f64 = spec.lines.iter().map(|line| line.share).sum();
            assert!((total - 1.0).abs() < 1e-9, "{}", spec.name);
            let granule = u64::from(spec.granule());
            let all = ops(spec.clone(), 3);
            assert_eq!(all, ops(spec.clone(), 3));
            let all: Vec<_> = all.iter().filter(|op| op.op != DiskOp::Flush).collect();
            let share = |is: &dyn Fn(&PlannedOp) -> bool| {
                all.iter().filter(|op| is(op)).count() as f64 / all.len() as f64
            };
            let reads = share(&|op| op.op == DiskOp::Read);
            let stated = spec.mean(|line| line.read_share);
            assert!((reads - stated).abs() < 0.02, "{}: {reads}", spec.name);
            for line in &spec.lines {
                let found = share(&|op| op.length == line.bytes);
                assert!((found - line.share).abs() < 0.02, "{}: {found}", spec.name);
            }
            for op in &all {
                assert!(op.offset >= MIB && op.offset + u64::from(op.length) <= 65 * MIB);
                assert!(op.offset % granule == 0 && u64::from(op.length) % granule == 0);
            }
            let sequential = all
                .windows(2)
                .filter(|pair| pair[0].offset + u64::from(pair[0].length) == pair[1].offset)
                .count() as f64
                / all.len() as f64;
            let stated = 1.0 - spec.mean(|line| line.random_share);
            assert!(
                (sequential - stated).abs() < 0.02,
                "{}: {sequential}",
                spec.name
            );
        }
        assert_eq!(AccessSpec::database().granule(), 4096);
        assert_eq!(AccessSpec::file_server().granule(), 512);
    }

    #[test]
    fn delays_follow_bursts() {
        let mut spec = AccessSpec::database();
        spec.lines[0].delay = Duration::from_secs(10);
        spec.lines[0].burst = 5;
        let due: Vec<u64> = ops(spec, 1)[..20]
            .iter()
            .map(|op| op.due.unwrap().as_secs() / 10)
            .collect();
        assert_eq!(due[0], due[4]);
        assert!(due[5] > due[4] && due[19] >= 3, "{due:?}");
    }
}
