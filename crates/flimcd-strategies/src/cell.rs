//! What is measured, and what came out: the same for simulated and real runs, and the schema of the JSON.

use serde::{Deserialize, Serialize};

/// The link between the sites.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkModel {
    /// Bits per second in each direction.
    pub rate_bits_per_sec: u64,
    /// Round trip without a queue, in milliseconds.
    pub rtt_ms: f64,
    /// Share of packets that are lost.
    pub loss: f64,
    /// Most that a packet is late, in milliseconds.
    pub jitter_ms: f64,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the load, `trace:FILE` for a recorded one.
    pub load: String,
    /// Bytes of the volume.
    pub size_bytes: u64,
    /// The link.
    pub link: LinkModel,
    /// Share of its blocks in which the target's replica differs; `None`: the target has nothing.
    pub replica_differs: Option<f64>,
    /// Name of the strategy.
    pub strategy: String,
    /// Parts of `flimcd` that are left out (`dedup`, `prefetch`, `order`, `pacing`, `replica`), sorted.
    pub without: Vec<String>,
    /// Switch when this share of the data has been sent, whatever the strategy says.
    pub switch_at: Option<f64>,
    /// How many times faster than it says the load runs.
    pub speed: f64,
    /// Decides load and image.
    pub seed: u64,
    /// In virtual time, by the simulator.
    pub is_simulated: bool,
}

/// Bytes and blocks by how they travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the kinds")]
pub struct Kinds {
    pub zero_blocks: u64,
    pub same_blocks: u64,
    pub elsewhere_blocks: u64,
    pub repeated_blocks: u64,
    pub zstd_blocks: u64,
    pub zstd_bytes: u64,
    pub raw_blocks: u64,
}

/// Where the migration was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names of the phases")]
pub enum Phase {
    Before,
    Precopy,
    Switchover,
    Postcopy,
    After,
}

/// One interval of the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Its end, in seconds since the request to migrate; negative before it.
    pub at_s: f64,
    /// Where the migration was at its end.
    pub phase: Phase,
    /// Guest reads that were answered in it.
    pub reads: u64,
    /// Guest writes that were answered in it.
    pub writes: u64,
    /// 99th percentile of their latency in milliseconds.
    pub latency_p99_ms: f64,
    /// Longest of them in milliseconds.
    pub latency_max_ms: f64,
    /// Bytes that left the source in it.
    pub bytes: u64,
    /// Guest reads in it that touched a block that was not there.
    pub misses: u64,
}

/// A part of the disk, in the order of its addresses; all are of the same size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Region {
    /// When its last block went over, in seconds since the request; `None`: nothing of it did.
    pub sent_at_s: Option<f64>,
    /// Guest reads of it during the run.
    pub reads: u64,
    /// Guest writes of it during the run.
    pub writes: u64,
    /// Misses in it.
    pub misses: u64,
}

/// Guest reads after the switch until everything was there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "percentiles in milliseconds")]
pub struct ReadLatency {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

/// What the strategy thought when it switched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Bytes that would go over after the switch.
    pub bytes: u64,
    /// Guest reads that would miss.
    pub misses: f64,
    /// Seconds from the switch to the end.
    pub seconds: f64,
}

/// What was possible, for somebody who knows the future.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Least bytes on the link.
    pub bytes: u64,
    /// Least seconds from the request until the source is not needed.
    pub seconds: f64,
    /// Misses at that bandwidth when switching where the run did and sending by earliest deadline. Not always the least: where not
    /// everything can be in time, another choice of what is late can have fewer.
    pub misses: u64,
}

/// What came out of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// What was run.
    pub cell: Cell,
    /// Seconds from the request until the source was not needed any more.
    pub migration_s: f64,
    /// Seconds from the request to the switch.
    pub switch_s: f64,
    /// From the guest's stop to its start, in milliseconds.
    pub downtime_ms: f64,
    /// Bytes on the link from source to target, with everything around the content that the engine can count.
    pub link_bytes: u64,
    /// How content travelled.
    pub kinds: Kinds,
    /// Guest reads from the switch to the end.
    pub reads_after: u64,
    /// Those that touched a block that was not there.
    pub misses: u64,
    /// Latency of guest reads from the switch to the end.
    pub read_latency_after: ReadLatency,
    /// Requests per second of the guest without a migration.
    pub requests_per_sec_alone: f64,
    /// And from the request to the end.
    pub requests_per_sec: f64,
    /// Longest time in which no request was answered although some waited, in milliseconds.
    pub stall_max_ms: f64,
    /// What the strategy expected when it switched, if it says.
    pub predicted: Option<Prediction>,
    /// The oracle's bound for this load, link and switch.
    pub bound: Bound,
    /// The run in intervals.
    pub samples: Vec<Sample>,
    /// The disk, at most 1024 parts.
    pub regions: Vec<Region>,
}
