//! What load to make.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the load behaves, whatever its requests are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadOptions {
    /// Decides requests and contents.
    pub seed: u64,
    /// Requests in flight at most.
    pub queue_depth: u32,
    /// Freshly dirtied bytes per second at most: bytes of blocks that were not written within
    /// `dirty_window` before. Writes wait for it, and what follows them too. `None`: no limit.
    pub dirty_bytes_per_sec: Option<u64>,
    /// A block written again within this time is not freshly dirtied.
    pub dirty_window: Duration,
    /// Share of the written blocks that compress (about 2.5 times); the others are noise.
    pub compressible_share: f64,
    /// Written blocks whose content is not new; `None`: all of it is.
    #[serde(default)]
    pub duplicates: Option<Duplicates>,
    /// Length of the intervals of the time series.
    pub interval: Duration,
    /// How long a pause waits for answers before it gives up.
    pub drain_timeout: Duration,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            queue_depth: 16,
            dirty_bytes_per_sec: None,
            dirty_window: Duration::from_secs(1),
            compressible_share: 0.5,
            duplicates: None,
            interval: Duration::from_millis(500),
            drain_timeout: Duration::from_secs(60),
        }
    }
}

/// Written blocks that have one of a few contents, the same bytes wherever they are written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Duplicates {
    /// Share of the written blocks.
    pub share: f64,
    /// How many contents there are. Early ones are far more frequent.
    pub contents: u64,
}

/// Requests with stated parameters. The default is the project's moderate load: 4 KiB, 70% reads,
/// Zipf over a quarter of the image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Synthetic {
    /// Bytes of each request, a multiple of 512.
    pub request_bytes: u32,
    /// Share of reads among reads and writes.
    pub read_share: f64,
    /// Share of the writes that write zeroes.
    pub zero_share: f64,
    /// Share of the image that is touched at all. It lies in extents of 4 MiB, spread over it.
    pub working_set_share: f64,
    /// Skew: chunks of 64 KiB are chosen with a probability proportional to `rank^-exponent`,
    /// blocks within a chunk evenly. 0 is uniform.
    pub zipf_exponent: f64,
    /// A flush after so many writes; 0 for none.
    pub flush_every_writes: u32,
}

impl Default for Synthetic {
    fn default() -> Self {
        Self {
            request_bytes: 4096,
            read_share: 0.7,
            zero_share: 0.0,
            working_set_share: 0.25,
            zipf_exponent: 0.8,
            flush_every_writes: 256,
        }
    }
}
