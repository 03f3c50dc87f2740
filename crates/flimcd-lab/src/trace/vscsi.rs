//! CloudPhysics vscsi traces: 32-byte little-endian records.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–3 | serial number |
//! | 4–7 | length in bytes |
//! | 8–11 | scatter-gather elements |
//! | 12–13 | SCSI command: 0x28 READ(10), 0x2a WRITE(10), and their 6, 12 and 16-byte forms |
//! | 14–15 | version |
//! | 16–23 | first sector of 512 bytes |
//! | 24–31 | time in µs |

use std::{io::Read, path::Path, time::Duration};

use flimcd_core::limits::{MAX_NBD_REQUEST_BYTES, MAX_VOLUME_BYTES};

use super::{SECTOR_BYTES, Trace, TraceError, TraceRecord, TraceSummary};

/// Bytes of a record.
pub const RECORD_BYTES: usize = 32;
/// Bad records that are described.
const DESCRIBED_MAX: usize = 8;

/// Reads a trace file.
///
/// # Errors
/// [`TraceError`] when the file cannot be read or holds nothing usable. Bad records in between
/// are counted and left out.
pub fn read_file(path: &Path) -> Result<Trace, TraceError> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|source| TraceError::Read {
            path: path.to_owned(),
            source,
        })?;
    let trace = parse(&bytes);
    if trace.records.is_empty() {
        let TraceSummary {
            bad_records: bad,
            first_bad,
            ..
        } = trace.summary;
        let first = first_bad
            .into_iter()
            .next()
            .unwrap_or_else(|| "none".to_owned());
        return Err(TraceError::Empty {
            path: path.to_owned(),
            bad,
            first,
        });
    }
    Ok(trace)
}

/// Reads a trace from memory. Never fails: what is no record is counted.
#[must_use]
pub fn parse(bytes: &[u8]) -> Trace {
    let mut summary = TraceSummary::default();
    let mut bad = |what: String| {
        summary.bad_records += 1;
        if summary.first_bad.len() < DESCRIBED_MAX {
            summary.first_bad.push(what);
        }
    };
    let (records, rest) = bytes.as_chunks::<RECORD_BYTES>();
    let mut found = Vec::with_capacity(records.len());
    for (number, raw) in records.iter().enumerate() {
        match record(raw) {
            Ok(record) => found.push(record),
            Err(problem) => bad(format!("record {number}: {problem}")),
        }
    }
    if !rest.is_empty() {
        bad(format!("{} bytes after the last whole record", rest.len()));
    }
    let is_before = |pair: &&[TraceRecord]| pair[1].at < pair[0].at;
    summary.out_of_order = found.windows(2).filter(is_before).count() as u64;
    found.sort_by_key(|record| record.at);
    let start = found.first().map_or(Duration::ZERO, |record| record.at);
    for record in &mut found {
        record.at -= start;
        let length = u64::from(record.length);
        summary.end_offset = summary.end_offset.max(record.offset + length);
        if record.is_write {
            summary.writes += 1;
            summary.write_bytes += length;
        } else {
            summary.reads += 1;
            summary.read_bytes += length;
        }
    }
    summary.seconds = found.last().map_or(0.0, |record| record.at.as_secs_f64());
    Trace {
        records: found,
        summary,
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum BadRecord {
    #[error("command {0:#x} is neither a read nor a write")]
    Command(u16),
    #[error(
        "length {0} is not a positive multiple of {SECTOR_BYTES} up to {MAX_NBD_REQUEST_BYTES}"
    )]
    Length(u32),
    #[error("sector {0} is beyond any disk")]
    Sector(u64),
}

fn record(raw: &[u8; RECORD_BYTES]) -> Result<TraceRecord, BadRecord> {
    let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let length = u32_at(4);
    let command = u16::from_le_bytes([raw[12], raw[13]]);
    let sector = u64_at(16);
    let is_write = match command {
        0x08 | 0x28 | 0xa8 | 0x88 => false,
        0x0a | 0x2a | 0xaa | 0x8a => true,
        other => return Err(BadRecord::Command(other)),
    };
    if length == 0 || !length.is_multiple_of(SECTOR_BYTES) || length > MAX_NBD_REQUEST_BYTES {
        return Err(BadRecord::Length(length));
    }
    if sector > MAX_VOLUME_BYTES / u64::from(SECTOR_BYTES) {
        return Err(BadRecord::Sector(sector));
    }
    let offset = sector * u64::from(SECTOR_BYTES);
    Ok(TraceRecord {
        at: Duration::from_micros(u64_at(24)),
        is_write,
        offset,
        length,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A record as it stands in a file.
    pub(crate) fn raw(command: u16, length: u32, sector: u64, us: u64) -> Vec<u8> {
        let mut raw = 7u32.to_le_bytes().to_vec();
        raw.extend(length.to_le_bytes());
        raw.extend(1u32.to_le_bytes());
        raw.extend(command.to_le_bytes());
        raw.extend(256u16.to_le_bytes());
        raw.extend(sector.to_le_bytes());
        raw.extend(us.to_le_bytes());
        raw
    }

    #[test]
    fn records_are_read_sorted_and_counted() {
        let base = 5_637_000_000_000;
        let bytes = [raw(0x2a, 512, 8, base + 50), raw(0x28, 4096, 1 << 25, base)].concat();
        let trace = parse(&bytes);
        let read = TraceRecord {
            at: Duration::ZERO,
            is_write: false,
            offset: 1 << 34,
            length: 4096,
        };
        let write = TraceRecord {
            at: Duration::from_micros(50),
            is_write: true,
            offset: 4096,
            length: 512,
        };
        assert_eq!(trace.records, [read, write]);
        let summary = trace.summary;
        assert_eq!(
            (summary.reads, summary.write_bytes, summary.out_of_order),
            (1, 512, 1)
        );
        assert_eq!(
            (summary.end_offset, summary.bad_records),
            ((1 << 34) + 4096, 0)
        );
    }

    #[test]
    fn bad_records_are_named_and_left_out() {
        let bytes = [
            raw(0x35, 0, 0, 1),
            raw(0x28, 100, 0, 2),
            raw(0x28, u32::MAX, 0, 3),
            raw(0x28, 512, u64::MAX, 4),
            raw(0x28, 512, 1, 5),
            vec![1, 2, 3],
        ]
        .concat();
        let trace = parse(&bytes);
        assert_eq!(trace.records.len(), 1);
        assert_eq!(trace.summary.bad_records, 5);
        let check = |index: usize, part: &str| {
            let text = &trace.summary.first_bad[index];
            assert!(text.contains(part), "{text}");
        };
        check(0, "record 0: command 0x35");
        check(1, "record 1: length 100");
        check(2, "length 4294967295");
        check(3, "beyond any disk");
        check(4, "3 bytes after");
    }
}
