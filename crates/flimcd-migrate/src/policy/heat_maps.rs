//! How often each chunk is read and written.

use std::time::Duration;

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ChunkIndex, Heat, Time, VolumeSize};

use crate::{HEAT_HALF_LIFE, LONG_HALF_LIFE};

/// Decayed counts of what the guest does: writes over seconds, because they decide what is sent again, and reads and writes over
/// minutes, because they tell one chunk from another. Blocks are counted, not requests.
#[derive(Clone, Debug)]
pub struct HeatMaps {
    recent_writes: Heat,
    writes: Heat,
    reads: Heat,
    since: Time,
    /// Counted before this machine began.
    is_warm: bool,
}

impl HeatMaps {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(size: VolumeSize, now: Time) -> Self {
        Self {
            recent_writes: Heat::new(size, HEAT_HALF_LIFE, now),
            writes: Heat::new(size, LONG_HALF_LIFE, now),
            reads: Heat::new(size, LONG_HALF_LIFE, now),
            since: now,
            is_warm: false,
        }
    }

    /// Adds what was counted before, with a half-life of [`LONG_HALF_LIFE`].
    pub fn warm_up(&mut self, reads: &Heat, writes: &Heat) {
        self.reads.merge(reads, ChunkIndex(0));
        self.writes.merge(writes, ChunkIndex(0));
        self.is_warm = true;
    }

    /// The guest has written a run.
    pub fn written(&mut self, run: BlockRange, now: Time) {
        count(run, |chunk, blocks| {
            self.recent_writes.add(chunk, blocks, now);
            self.writes.add(chunk, blocks, now);
        });
    }

    /// The guest has read a run.
    pub fn read(&mut self, run: BlockRange, now: Time) {
        count(run, |chunk, blocks| self.reads.add(chunk, blocks, now));
    }

    /// Counts of reads over minutes.
    #[must_use]
    pub fn reads(&self) -> &Heat {
        &self.reads
    }

    /// Counts of writes over minutes.
    #[must_use]
    pub fn writes(&self) -> &Heat {
        &self.writes
    }

    /// Whether the chunk has been written in the last minutes, as far as known.
    #[must_use]
    pub fn is_written(&self, chunk: ChunkIndex) -> bool {
        self.writes.get(chunk) > 0.0 || self.recent_writes.get(chunk) > 0.0
    }

    /// Blocks of the chunk that are written in a second. Of what it does now and what it does in the long run the higher.
    #[must_use]
    pub fn write_rate(&self, chunk: ChunkIndex, now: Time) -> f64 {
        let recent = self.rate(&self.recent_writes, chunk, now, false);
        recent.max(self.rate(&self.writes, chunk, now, self.is_warm))
    }

    /// Blocks of the chunk that are read in a second.
    #[must_use]
    pub fn read_rate(&self, chunk: ChunkIndex, now: Time) -> f64 {
        self.rate(&self.reads, chunk, now, self.is_warm)
    }

    /// A decayed count of events at rate r settles at r × half-life ÷ ln 2; while counting is young it has got only a part
    /// of the way.
    fn rate(&self, heat: &Heat, chunk: ChunkIndex, now: Time, is_settled: bool) -> f64 {
        let half_life_s = heat.half_life().as_secs_f64();
        let age_s = now.since(self.since).as_secs_f64();
        let settled = if is_settled {
            1.0
        } else {
            (1.0 - (-age_s / half_life_s).exp2()).max(1e-3)
        };
        heat.get(chunk) * std::f64::consts::LN_2 / (half_life_s * settled)
    }

    /// Bytes of memory.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.recent_writes.memory_bytes() + self.writes.memory_bytes() + self.reads.memory_bytes()
    }

    /// Counts go down although nothing is added.
    pub fn decay(&mut self, now: Time) {
        for heat in [&mut self.recent_writes, &mut self.writes, &mut self.reads] {
            heat.decay(now);
        }
    }

    /// How long writes have been counted here.
    #[must_use]
    pub fn age(&self, now: Time) -> Duration {
        now.since(self.since)
    }
}

fn count(run: BlockRange, mut add: impl FnMut(ChunkIndex, u64)) {
    let mut at = run.start;
    while at < run.end {
        let chunk = BlockIndex(at).chunk();
        let end = run.end.min(at - at % BLOCKS_PER_CHUNK + BLOCKS_PER_CHUNK);
        add(chunk, end - at);
        at = end;
    }
}
