//! Recorded disk traces as loads.
//!
//! A reader turns a file into [`TraceRecord`]s and counts what it could not use; [`Replay`] turns
//! records into requests for a disk of another size. Formats: CloudPhysics vscsi ([`vscsi`]).

mod fold;
mod replay;
pub mod vscsi;

use std::time::Duration;

use serde::Serialize;

pub use fold::Fold;
pub use replay::{Replay, ReplayOptions};

/// Unit in which recorded requests are addressed: the granule to survey an image with for a
/// replay.
pub const SECTOR_BYTES: u32 = 512;

/// A recorded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Time since the first record.
    pub at: Duration,
    /// Whether it is a write; otherwise a read.
    pub is_write: bool,
    /// First byte, a multiple of [`SECTOR_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`SECTOR_BYTES`], more than 0.
    pub length: u32,
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
    /// End of the request that reaches furthest.
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
        "{path} holds no usable record ({bad} bad ones, the first: {first}); is it a CloudPhysics \
         vscsi trace (32-byte little-endian records)?"
    )]
    Empty {
        /// The file.
        path: std::path::PathBuf,
        /// Bad records.
        bad: u64,
        /// What is wrong with the first.
        first: String,
    },
}
