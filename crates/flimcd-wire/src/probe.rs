//! Probes: asking the target, before content is sent, which blocks it has.
//!
//! ```text
//!  source                                        target
//!    Probe (8 bytes of each block's fingerprint) ──►   looks: same place, library, replicas, own volumes, what has come already
//!                                                ◄──   Probed (which of them it has, and how many of each kind)
//!    Blocks: Copy, and the rest in full          ──►   reads the places, checks the run's whole fingerprint, writes
//!                                                ◄──   Lacking, where a place was written meanwhile: sent in full then
//! ```
//! A probe has the number that the message with the content will have. The target remembers the places of a limited number of
//! probes; what it has forgotten is lacking. As with seeds, eight bytes are enough to *propose*, and content is *taken*
//! only after the whole fingerprint of what the source read has matched what the target read.

use bytes::Bytes;
use flimcd_core::{Seq, limits};
use serde::{Deserialize, Serialize};

use crate::Runs;

/// Bytes of a block's fingerprint in a probe.
pub const PROBE_PREFIX_BYTES: usize = 8;

/// The first eight bytes of a block's fingerprint, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockPrefix(pub u64);

impl BlockPrefix {
    /// The prefix of a whole fingerprint.
    #[must_use]
    pub const fn of(fingerprint: &[u8; 32]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *fingerprint;
        Self(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The number that the message with the content will have.
    pub seq: Seq,
    /// The blocks; at most [`limits::MAX_BLOCKS_PER_MESSAGE`].
    pub blocks: Runs,
    /// The prefix of each, eight bytes little-endian.
    #[serde(skip)]
    pub payload: Bytes,
}

impl Probe {
    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        let blocks = self.blocks.blocks();
        (1..=limits::MAX_BLOCKS_PER_MESSAGE).contains(&blocks)
            && self.payload.len() as u64 == blocks * PROBE_PREFIX_BYTES as u64
    }

    /// The prefixes, in the order of the blocks.
    pub fn prefixes(&self) -> impl Iterator<Item = BlockPrefix> + '_ {
        let (prefixes, _) = self.payload.as_chunks::<PROBE_PREFIX_BYTES>();
        prefixes
            .iter()
            .map(|&bytes| BlockPrefix(u64::from_le_bytes(bytes)))
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// Number of the probe.
    pub seq: Seq,
    /// The blocks that the target has, among those of the probe.
    pub had: Runs,
    /// How many of them at the same place of a seed or of the copy that stands there.
    pub same_place: u32,
    /// How many of them because they have come before in this migration. The others are elsewhere at the target.
    pub repeated: u32,
}

impl Probed {
    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        let blocks = self.had.blocks();
        blocks <= limits::MAX_BLOCKS_PER_MESSAGE
            && u64::from(self.same_place) + u64::from(self.repeated) <= blocks
    }
}
