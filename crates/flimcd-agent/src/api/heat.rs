//! Types of the API that are about heat: what is hot in a volume, and what a switch was expected to cost.

use flimcd_core::VolumeName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/volumes/{name}/heat`: what is hot in a volume. Rates are decayed averages: what happened a minute ago weighs half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeatReport {
    /// The volume.
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// Its size.
    pub size_bytes: u64,
    /// What one chunk has.
    pub chunk_bytes: u64,
    /// After so many seconds a count weighs half.
    pub half_life_s: f64,
    /// Seconds that the rates are averages of; few for a volume that has just been opened for the first time.
    pub window_s: f64,
    /// What the guest reads.
    pub reads: HeatOf,
    /// What it writes. Trims do not count.
    pub writes: HeatOf,
    /// The volume as a row of cells of the same size, the last one perhaps shorter: bytes read and written per second in each.
    pub cells: Vec<HeatCell>,
    /// What a cell has.
    pub cell_bytes: u64,
    /// The chunks that are touched most, the hottest first.
    pub hottest: Vec<HotChunk>,
}

/// Reads or writes of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeatOf {
    /// Requests a second that the guest made here.
    pub requests_per_s: f64,
    /// Bytes a second in all chunks, whole blocks counted, with what a migration has told of the time before.
    pub bytes_per_s: f64,
    /// Bytes of the chunks that are not cold.
    pub touched_bytes: u64,
    /// How little of the volume has how much of that.
    pub shares: Vec<HeatShare>,
    /// Chunks that are touched more often than can be counted; their rates are too low.
    pub saturated_chunks: u64,
}

/// How little of a volume has a share of what is touched.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeatShare {
    /// This share of the bytes read or written, in percent,
    pub percent: f64,
    /// is in so many bytes of the volume: the hottest chunks.
    pub bytes: u64,
    /// Those, as a part of the volume in percent.
    pub percent_of_volume: f64,
}

/// A part of the picture of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeatCell {
    /// Bytes read per second.
    pub read_bytes_per_s: f64,
    /// Bytes written per second.
    pub written_bytes_per_s: f64,
}

/// A hot chunk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HotChunk {
    /// Its first byte.
    pub offset: u64,
    /// Bytes read per second.
    pub read_bytes_per_s: f64,
    /// Bytes written per second.
    pub written_bytes_per_s: f64,
}

/// How a [`HeatReport`] is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatQuery {
    /// Cells of the picture at most; 64 if not said, 65536 at most.
    pub cells: Option<u32>,
    /// How many of the hottest chunks; 10 if not said, 10000 at most.
    pub top: Option<u32>,
}

/// What was expected of the time after the switch when it was made. What came of it stands beside it in the migration: reads that
/// met missing blocks, what was sent since, and when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Predicted {
    /// Bytes that were still to go over.
    pub bytes: u64,
    /// Guest reads that would meet a missing block.
    pub misses: f64,
    /// Seconds until everything would be there.
    pub duration_s: f64,
    /// Bytes that had been sent by then.
    pub bytes_sent_before: u64,
}
