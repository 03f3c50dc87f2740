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

use std::time::Duration;

use super::{
    Trace,
    collect::{BadRecord, Collector},
};

pub(super) const FORMAT: &str = "CloudPhysics vscsi (32-byte little-endian records)";
/// Bytes of a record.
pub const RECORD_BYTES: usize = 32;

/// Reads a trace from memory. Never fails: what is no record is counted.
#[must_use]
pub fn parse(bytes: &[u8]) -> Trace {
    let mut collector = Collector::new(FORMAT);
    let (records, rest) = bytes.as_chunks::<RECORD_BYTES>();
    for (number, raw) in records.iter().enumerate() {
        if let Err(problem) = take(raw, &mut collector) {
            collector.bad(&format!("record {number}"), &problem);
        }
    }
    if !rest.is_empty() {
        let problem = format!("{} bytes after the last whole record", rest.len());
        collector.bad("end", &problem);
    }
    collector.finish()
}

fn take(raw: &[u8; RECORD_BYTES], collector: &mut Collector) -> Result<(), BadRecord> {
    let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let is_write = match u16::from_le_bytes([raw[12], raw[13]]) {
        0x08 | 0x28 | 0xa8 | 0x88 => false,
        0x0a | 0x2a | 0xaa | 0x8a => true,
        other => return Err(BadRecord::Command(other)),
    };
    let at = Duration::from_micros(u64_at(24));
    let (sector, bytes) = (u64_at(16), u64::from(u32_at(4)));
    collector.push(at, is_write, (0, sector, bytes), None)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::trace::TraceRecord;

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
            content: None,
        };
        let write = TraceRecord {
            at: Duration::from_micros(50),
            is_write: true,
            offset: 4096,
            length: 512,
            content: None,
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
