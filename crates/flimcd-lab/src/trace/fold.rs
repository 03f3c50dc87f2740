//! Fits the addresses of a trace to a disk of another size.
//!
//! 1. The recorded address space is cut into extents of 1 MiB. Those that any request touches are
//!    put side by side in their order, so that a small working set on a large recorded disk
//!    does not fold onto itself, and neighbours stay neighbours.
//! 2. If they are still more than the disk has, extents wrap around: extent number `n` lies
//!    where `n mod (extents of the disk)` does. Then places that were different share one.
//!
//! A request that crosses from one extent to the next is cut where the two do not stay side by
//! side. On a disk smaller than an extent, and in its short last one, addresses wrap too.

use std::collections::BTreeMap;

use super::{SECTOR_BYTES, TraceRecord};

/// Bytes of an extent.
const EXTENT_BYTES: u64 = 1 << 20;

/// A mapping from recorded addresses to those of a disk.
#[derive(Clone, Debug)]
pub struct Fold {
    /// Start on the disk of each extent that is touched.
    starts: BTreeMap<u64, u64>,
    touched_bytes: u64,
    usable: u64,
}

impl Fold {
    /// The mapping of `records` to a disk of `size` bytes. A disk without a whole sector gets no
    /// requests at all.
    #[must_use]
    pub fn new(records: &[TraceRecord], size: u64) -> Self {
        let sector = u64::from(SECTOR_BYTES);
        let usable = size / sector * sector;
        let slots = (usable / EXTENT_BYTES).max(1);
        let mut starts = BTreeMap::new();
        for record in records {
            let last = (record.offset + u64::from(record.length) - 1) / EXTENT_BYTES;
            for extent in record.offset / EXTENT_BYTES..=last {
                starts.insert(extent, 0);
            }
        }
        for (number, start) in (0..).zip(starts.values_mut()) {
            *start = number % slots * EXTENT_BYTES;
        }
        let touched_bytes = starts.len() as u64 * EXTENT_BYTES;
        Self {
            starts,
            touched_bytes,
            usable,
        }
    }

    /// Bytes of the extents that the trace touches.
    #[must_use]
    pub const fn touched_bytes(&self) -> u64 {
        self.touched_bytes
    }

    /// Whether different recorded places share one on the disk.
    #[must_use]
    pub const fn is_aliasing(&self) -> bool {
        self.touched_bytes > self.usable
    }

    /// Where the bytes of a record lie on the disk: ranges in order, as offset and length.
    #[must_use]
    pub fn map(&self, record: &TraceRecord) -> Vec<(u64, u32)> {
        let mut parts: Vec<(u64, u32)> = Vec::with_capacity(1);
        let (mut at, end) = (record.offset, record.offset + u64::from(record.length));
        while at < end && self.usable > 0 {
            let extent = at / EXTENT_BYTES;
            let start = self.starts.get(&extent).copied().unwrap_or(0);
            let offset = (start + at % EXTENT_BYTES) % self.usable;
            let length = (end - at)
                .min((extent + 1) * EXTENT_BYTES - at)
                .min(self.usable - offset);
            at += length;
            // Below the request's own length.
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            match parts.last_mut() {
                Some((last, bytes)) if *last + u64::from(*bytes) == offset => *bytes += length,
                _ => parts.push((offset, length)),
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn record(offset: u64, length: u32) -> TraceRecord {
        TraceRecord {
            at: Duration::ZERO,
            is_write: false,
            offset,
            length,
            content: None,
        }
    }

    #[test]
    fn touched_extents_are_put_side_by_side() {
        let records = [
            record(100 * MIB + 512, 512),
            record(7 * MIB, 4096),
            record(101 * MIB, 512),
        ];
        let fold = Fold::new(&records, 64 * MIB);
        assert_eq!(fold.map(&records[1]), [(0, 4096)]);
        assert_eq!(fold.map(&records[0]), [(MIB + 512, 512)]);
        assert_eq!(fold.map(&records[2]), [(2 * MIB, 512)]);
        assert!(!fold.is_aliasing());
        assert_eq!(fold.touched_bytes(), 3 * MIB);
    }

    #[test]
    fn requests_across_extents_stay_whole_where_they_can() {
        let across = record(9 * MIB - 1024, 4096);
        let fold = Fold::new(std::slice::from_ref(&across), 64 * MIB);
        assert_eq!(fold.map(&across), [(MIB - 1024, 4096)]);
        // With room for one extent only, the second part wraps.
        let tight = Fold::new(std::slice::from_ref(&across), MIB + 512);
        assert_eq!(tight.map(&across), [(MIB - 1024, 1024), (0, 3072)]);
        assert!(tight.is_aliasing());
    }

    #[test]
    fn every_part_lies_on_the_disk_whatever_its_size() {
        for size in [512, 1000, 4096, MIB - 512, MIB, 3 * MIB + 700] {
            let records: Vec<TraceRecord> = (0..50)
                .map(|i| record(i * 777 * 512, 512 * (1 + u32::try_from(i).unwrap())))
                .collect();
            let fold = Fold::new(&records, size);
            for record in &records {
                let parts = fold.map(record);
                let total: u32 = parts.iter().map(|part| part.1).sum();
                assert_eq!(total, record.length);
                for (offset, length) in parts {
                    assert!(offset + u64::from(length) <= size, "{size}");
                    assert!(offset % 512 == 0 && length % 512 == 0 && length > 0);
                }
            }
        }
    }
}
