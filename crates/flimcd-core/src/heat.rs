//! Decayed write or read rates per chunk.

use std::time::Duration;

use crate::{ChunkIndex, Time, VolumeSize};

/// Chunks counted by one lazily allocated page: 256 MiB of volume.
const PAGE_CHUNKS: u64 = 4096;
/// One event, in the fixed point of the counters.
const UNIT: u16 = 16;

/// How often each chunk was touched lately: an exponentially decayed count, halved every half-life.
///
/// Two bytes per chunk, taken only for the 256 MiB regions that were touched: 32 MiB for a TiB that is
/// hot everywhere. Counting is one add; the decay walks the touched pages once per half-life.
#[derive(Clone, Debug)]
pub struct Heat {
    pages: Vec<Option<Box<[u16]>>>,
    half_life: Duration,
    halved: Time,
}

impl Heat {
    /// No heat anywhere. `half_life` is the time after which a count weighs half.
    #[must_use]
    pub fn new(size: VolumeSize, half_life: Duration, now: Time) -> Self {
        let pages = size.chunks().div_ceil(PAGE_CHUNKS);
        Self {
            pages: (0..pages).map(|_| None).collect(),
            half_life,
            halved: now,
        }
    }

    /// Counts `events` on `chunk` at `now`.
    pub fn add(&mut self, chunk: ChunkIndex, events: u64, now: Time) {
        self.decay(now);
        let Some(page) = self.pages.get_mut(index(chunk.0 / PAGE_CHUNKS)) else {
            return;
        };
        let page = page.get_or_insert_with(|| vec![0; index(PAGE_CHUNKS)].into());
        let slot = &mut page[index(chunk.0 % PAGE_CHUNKS)];
        let add = u16::try_from(events.saturating_mul(u64::from(UNIT))).unwrap_or(u16::MAX);
        *slot = slot.saturating_add(add);
    }

    /// The decayed count of `chunk`, as of the last [`Heat::add`] or [`Heat::decay`].
    #[must_use]
    pub fn get(&self, chunk: ChunkIndex) -> f64 {
        self.pages
            .get(index(chunk.0 / PAGE_CHUNKS))
            .and_then(Option::as_ref)
            .map_or(0.0, |page| {
                f64::from(page[index(chunk.0 % PAGE_CHUNKS)]) / f64::from(UNIT)
            })
    }

    /// Halves every count once for each half-life passed.
    pub fn decay(&mut self, now: Time) {
        while now.since(self.halved) >= self.half_life {
            self.halved = self.halved + self.half_life;
            let mut any = false;
            for page in &mut self.pages {
                let Some(counts) = page else { continue };
                for count in counts.iter_mut() {
                    *count /= 2;
                }
                if counts.iter().all(|&count| count == 0) {
                    *page = None;
                } else {
                    any = true;
                }
            }
            if !any {
                self.halved = now;
            }
        }
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a page index fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_every_half_life() {
        let size = VolumeSize::new(1 << 40).unwrap();
        let second = Duration::from_secs(1);
        let mut heat = Heat::new(size, second, Time::ZERO);
        heat.add(ChunkIndex(70_000), 8, Time::ZERO);
        assert!((heat.get(ChunkIndex(70_000)) - 8.0).abs() < 1e-9);
        heat.decay(Time::ZERO + second * 2);
        assert!((heat.get(ChunkIndex(70_000)) - 2.0).abs() < 1e-9);
        heat.decay(Time::ZERO + second * 1000);
        assert!(heat.get(ChunkIndex(70_000)).abs() < 1e-9);
        assert!(
            heat.pages.iter().all(Option::is_none),
            "cold pages are given back"
        );
    }
}
