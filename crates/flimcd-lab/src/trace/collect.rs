//! Collects the records of a trace: counts and names what is bad, numbers contents and devices, sorts by time.

use std::{collections::HashMap, sync::Arc, time::Duration};

use flimcd_core::limits::{MAX_NBD_REQUEST_BYTES, MAX_VOLUME_BYTES};

use super::{SECTOR_BYTES, Trace, TraceRecord, TraceSummary};
use crate::load::ZERO_CONTENT;

/// Bad records that are described.
const DESCRIBED_MAX: usize = 8;
/// Disks of one trace at most; each lies at a multiple of the largest volume's size.
const DEVICES_MAX: usize = 1024;
/// Contents of one trace at most.
const CONTENTS_MAX: usize = (1 << 31) - 2;

/// What is wrong with a record.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRecord {
    #[error("command {0:#x} is neither a read nor a write")]
    Command(u16),
    #[error(
        "length {0} is not a positive multiple of {SECTOR_BYTES} up to {MAX_NBD_REQUEST_BYTES}"
    )]
    Length(u64),
    #[error("sector {0} is beyond any disk")]
    Sector(u64),
    #[error("{found} fields instead of {wanted}")]
    Fields { found: usize, wanted: &'static str },
    #[error("{what} {text:?} is no number")]
    Number { what: &'static str, text: String },
    #[error("{0:?} is neither a read nor a write")]
    Type(String),
    #[error("{0:?} is no device")]
    Device(String),
    #[error("more than {DEVICES_MAX} devices")]
    Devices,
    #[error("{0:?} is no list of MD5 sums of 32 hexadecimal digits")]
    Hash(String),
    #[error("{hashes} hashes for {sectors} sectors")]
    Hashes { hashes: usize, sectors: u64 },
}

/// The first characters of a field, for a message.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Reads a number field.
pub(super) fn number(what: &'static str, text: &str) -> Result<u64, BadRecord> {
    // Rust's parser takes a sign, which no trace has.
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = text.parse().ok().filter(|_| is_plain);
    parsed.ok_or_else(|| BadRecord::Number {
        what,
        text: excerpt(text),
    })
}

#[derive(Debug, Default)]
pub(super) struct Collector {
    records: Vec<TraceRecord>,
    pub(super) summary: TraceSummary,
    contents: HashMap<u128, u32>,
    devices: HashMap<String, u64>,
}

impl Collector {
    pub(super) fn new(format: &'static str) -> Self {
        let mut collector = Self::default();
        collector.summary.format = format;
        collector
    }

    /// Counts something that is no record; `place` says where it is.
    pub(super) fn bad(&mut self, place: &str, problem: &dyn std::fmt::Display) {
        self.summary.bad_records += 1;
        if self.summary.first_bad.len() < DESCRIBED_MAX {
            self.summary.first_bad.push(format!("{place}: {problem}"));
        }
    }

    /// Where a device's addresses start.
    pub(super) fn device(&mut self, name: &str) -> Result<u64, BadRecord> {
        if let Some(start) = self.devices.get(name) {
            return Ok(*start);
        }
        let number = self.devices.len();
        if number >= DEVICES_MAX {
            return Err(BadRecord::Devices);
        }
        let start = number as u64 * MAX_VOLUME_BYTES;
        self.devices.insert(name.to_owned(), start);
        Ok(start)
    }

    /// The number of a content that is known by a hash; `None` for zeroes.
    pub(super) fn content(&mut self, hash: Option<u128>) -> u32 {
        let Some(hash) = hash else {
            return ZERO_CONTENT;
        };
        // 0 is that of zeroes; what does not fit any more shares the last.
        let next = self.contents.len().min(CONTENTS_MAX - 1) + 1;
        let next = u32::try_from(next).unwrap_or(u32::MAX >> 2);
        *self.contents.entry(hash).or_insert(next)
    }

    /// Takes a record; `device` is what [`Self::device`] said.
    pub(super) fn push(
        &mut self,
        at: Duration,
        is_write: bool,
        (device, sector, bytes): (u64, u64, u64),
        content: Option<Arc<[u32]>>,
    ) -> Result<(), BadRecord> {
        let length = u32::try_from(bytes).ok().filter(|length| {
            *length > 0 && length.is_multiple_of(SECTOR_BYTES) && *length <= MAX_NBD_REQUEST_BYTES
        });
        let length = length.ok_or(BadRecord::Length(bytes))?;
        let unit = u64::from(SECTOR_BYTES);
        if sector > (MAX_VOLUME_BYTES - bytes) / unit {
            return Err(BadRecord::Sector(sector));
        }
        let summary = &mut self.summary;
        summary.end_offset = summary.end_offset.max(sector * unit + bytes);
        if is_write {
            summary.writes += 1;
            summary.write_bytes += bytes;
        } else {
            summary.reads += 1;
            summary.read_bytes += bytes;
        }
        if let Some(content) = &content {
            summary.blocks_with_content += content.len() as u64;
        }
        self.records.push(TraceRecord {
            at,
            is_write,
            offset: device + sector * unit,
            length,
            content,
        });
        Ok(())
    }

    pub(super) fn finish(mut self) -> Trace {
        let is_before = |pair: &&[TraceRecord]| pair[1].at < pair[0].at;
        let summary = &mut self.summary;
        summary.out_of_order = self.records.windows(2).filter(is_before).count() as u64;
        self.records.sort_by_key(|record| record.at);
        let start = self
            .records
            .first()
            .map_or(Duration::ZERO, |record| record.at);
        for record in &mut self.records {
            record.at -= start;
        }
        let last = self.records.last();
        summary.seconds = last.map_or(0.0, |record| record.at.as_secs_f64());
        summary.devices = self.devices.len().max(1) as u64;
        summary.contents = self.contents.len() as u64;
        Trace {
            records: self.records,
            summary: self.summary,
        }
    }
}
