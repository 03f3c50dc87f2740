//! Recorded disk traces as loads.
//!
//! ```text
//!  file ─► read (which format?) ─► fiu | vscsi | generic | blkparse ─► Collector ─► Trace ─► Replay
//!                               └► icf ─► access specifications
//! ```
//! A reader turns a file into [`TraceRecord`]s; what it cannot use is counted and the first of it named, never
//! dropped in silence. [`Replay`] turns records into requests for a disk of another size. Times are from the first
//! record, sectors have 512 bytes. Several disks in one trace are put one after the other.

mod blkparse;
mod collect;
mod fiu;
mod fold;
mod generic;
pub mod icf;
mod read;
mod replay;
#[cfg(test)]
mod tests;
pub mod vscsi;

use std::{sync::Arc, time::Duration};

use serde::Serialize;

pub use fold::Fold;
pub use read::{TraceFile, open, parse, read_file};
pub use replay::{Replay, ReplayOptions};

/// Unit in which recorded requests are addressed: the granule to survey an image with for a
/// replay.
pub const SECTOR_BYTES: u32 = 512;

/// A recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Time since the first record.
    pub at: Duration,
    /// Whether it is a write; otherwise a read.
    pub is_write: bool,
    /// First byte, a multiple of [`SECTOR_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`SECTOR_BYTES`], more than 0.
    pub length: u32,
    /// For a write whose content is known by hashes: a number for each block of 4 KiB, equal where the content
    /// was; [`crate::load::ZERO_CONTENT`] for zeroes.
    pub content: Option<Arc<[u32]>>,
}

/// A trace that was read.
#[derive(Clone, Debug)]
pub struct Trace {
    /// In order of time.
    pub records: Vec<TraceRecord>,
    /// What the file held.
    pub summary: TraceSummary,
}

/// What a trace file held.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TraceSummary {
    /// Format of the file.
    pub format: &'static str,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Seconds from first to last record.
    pub seconds: f64,
    /// Disks in it.
    pub devices: u64,
    /// Written blocks whose content is known by a hash.
    pub blocks_with_content: u64,
    /// Different contents among them, zeroes not counted.
    pub contents: u64,
    /// The action of which requests were taken (blkparse): `Q`, `D` or `C`.
    pub action: Option<&'static str>,
    /// Lines that are right and no request to take: remarks, events of other actions, flushes, discards, statistics.
    pub other_lines: u64,
    /// End of the request that reaches furthest on its disk.
    pub end_offset: u64,
    /// Records that are not used.
    pub bad_records: u64,
    /// What is wrong with the first of them.
    pub first_bad: Vec<String>,
    /// Records whose time was before that of their predecessor; they are sorted in.
    pub out_of_order: u64,
}

/// Why a trace cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read the trace {path}: {source}; check the path and its permissions")]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing in it could be used.
    #[error(
        "{path} holds no usable record (read as {format}: {bad} bad ones, the first: {first}); formats that can be \
         read: {}",
        read::known_formats()
    )]
    Empty {
        /// The file.
        path: std::path::PathBuf,
        /// What it looked like most.
        format: &'static str,
        /// Bad records.
        bad: u64,
        /// What is wrong with the first.
        first: String,
    },
    /// It says what requests are to be like, and holds none.
    #[error(
        "{path} is an Iometer access specification and no recording; use it where a load is asked for"
    )]
    Specification {
        /// The file.
        path: std::path::PathBuf,
    },
}
