//! The plain form that most traces can be brought into: one request a line, fields apart by spaces or commas.
//!
//! ```text
//! ns dev lba sectors type        type: R or Read, W or Write; sectors of 512 bytes
//! ```

use std::time::Duration;

use super::collect::{BadRecord, Collector, excerpt, number};

pub(super) const FORMAT: &str = "ns dev lba sectors type";

/// Takes one line.
pub(super) fn line(line: &str, collector: &mut Collector) -> Result<(), BadRecord> {
    let fields: Vec<&str> = line
        .split(|c: char| c.is_whitespace() || c == ',')
        .filter(|field| !field.is_empty())
        .collect();
    let &[ns, device, lba, sectors, kind] = fields.as_slice() else {
        return Err(BadRecord::Fields {
            found: fields.len(),
            wanted: "5 (ns dev lba sectors type)",
        });
    };
    let at = Duration::from_nanos(number("time", ns)?);
    let is_write = match kind.to_ascii_lowercase().as_str() {
        "r" | "read" | "rs" | "ra" => false,
        "w" | "write" | "ws" => true,
        _ => return Err(BadRecord::Type(excerpt(kind))),
    };
    let (sector, sectors) = (number("lba", lba)?, number("size", sectors)?);
    let bytes = sectors
        .checked_mul(512)
        .ok_or(BadRecord::Length(u64::MAX))?;
    if device.len() > 64 {
        return Err(BadRecord::Device(excerpt(device)));
    }
    let device = collector.device(device)?;
    collector.push(at, is_write, (device, sector, bytes), None)
}
