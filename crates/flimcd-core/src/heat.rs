//! Decayed write or read rates per chunk.

use std::time::Duration;

use crate::{ChunkIndex, Time, VolumeSize};

/// Chunks counted by one lazily allocated page: 256 MiB of volume.
const PAGE_CHUNKS: u64 = 4096;
/// One event, in the fixed point of the counters.
const UNIT: u16 = 16;

/// First byte of the encoding.
const VERSION: u8 = 1;

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

    /// Time after which a count weighs half.
    #[must_use]
    pub const fn half_life(&self) -> Duration {
        self.half_life
    }

    /// Bytes of memory of the counters.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let page = index(PAGE_CHUNKS) * size_of::<u16>();
        self.pages.capacity() * size_of::<Option<Box<[u16]>>>()
            + self.pages.iter().flatten().count() * page
    }

    /// The chunks that are not quite cold, in ascending order, with their decayed counts.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkIndex, f64)> + '_ {
        self.slots()
            .map(|(chunk, slot)| (ChunkIndex(chunk), f64::from(slot) / f64::from(UNIT)))
    }

    fn slots(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        let pages = (0..).step_by(index(PAGE_CHUNKS)).zip(&self.pages);
        pages
            .filter_map(|(first, page)| page.as_ref().map(|page| (first, page)))
            .flat_map(|(first, page)| (first..).zip(page.iter().copied()))
            .filter(|&(_, slot)| slot > 0)
    }

    /// Adds the counts of `other`, whose first chunk lies at `first` here. What would lie beyond the end is left out.
    pub fn merge(&mut self, other: &Self, first: ChunkIndex) {
        for (chunk, slot) in other.slots() {
            self.add_slot(first.0.saturating_add(chunk), slot);
        }
    }

    /// Adds a count as [`Heat::chunks`] gives it.
    pub fn add_count(&mut self, chunk: ChunkIndex, count: f64) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "saturates"
        )]
        self.add_slot(chunk.0, (count * f64::from(UNIT)).round() as u16);
    }

    fn add_slot(&mut self, chunk: u64, add: u16) {
        if let Some(page) = self.pages.get_mut(index(chunk / PAGE_CHUNKS)) {
            let page = page.get_or_insert_with(|| vec![0; index(PAGE_CHUNKS)].into());
            let slot = &mut page[index(chunk % PAGE_CHUNKS)];
            *slot = slot.saturating_add(add);
        }
    }

    /// The counts as bytes, for a file or a message: a version, then for each run of chunks that are not cold how many
    /// cold ones lie before it, its length, and its counts, all as LEB128.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        let mut slots = self.slots().peekable();
        let mut end = 0;
        while let Some(&(first, _)) = slots.peek() {
            let mut run = Vec::new();
            while let Some((_, slot)) =
                slots.next_if(|&(chunk, _)| chunk == first + run.len() as u64)
            {
                run.push(slot);
            }
            put(&mut bytes, first - end);
            put(&mut bytes, run.len() as u64);
            end = first + run.len() as u64;
            for slot in run {
                put(&mut bytes, u64::from(slot));
            }
        }
        bytes
    }

    /// What [`Heat::encode`] has made of the counts of a volume of `size`; `None` if it is no such thing.
    #[must_use]
    pub fn decode(
        size: VolumeSize,
        half_life: Duration,
        now: Time,
        mut bytes: &[u8],
    ) -> Option<Self> {
        let mut heat = Self::new(size, half_life, now);
        let bytes = &mut bytes;
        if take_byte(bytes)? != VERSION {
            return None;
        }
        let mut at: u64 = 0;
        while !bytes.is_empty() {
            at = at.checked_add(take(bytes)?)?;
            let count = take(bytes)?;
            let end = at.checked_add(count)?;
            if end > size.chunks() || count == 0 {
                return None;
            }
            while at < end {
                let slot = u16::try_from(take(bytes)?).ok()?;
                heat.add_slot(at, slot);
                at += 1;
            }
        }
        Some(heat)
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

fn put(bytes: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        bytes.push(n.to_le_bytes()[0] | 0x80);
        n >>= 7;
    }
    bytes.push(n.to_le_bytes()[0]);
}

fn take_byte(bytes: &mut &[u8]) -> Option<u8> {
    let (&first, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(first)
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for shift in (0..63).step_by(7) {
        let byte = take_byte(bytes)?;
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
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

    #[test]
    fn counts_travel_as_bytes_and_add_up_elsewhere() {
        let size = VolumeSize::new(3 << 30).unwrap();
        let second = Duration::from_secs(1);
        let mut heat = Heat::new(size, second, Time::ZERO);
        for (chunk, events) in [(0, 1), (1, 4095), (5000, 7), (size.chunks() - 1, 2)] {
            heat.add(ChunkIndex(chunk), events, Time::ZERO);
        }
        let bytes = heat.encode();
        assert!(bytes.len() < 32, "{}", bytes.len());
        let back = Heat::decode(size, second, Time::ZERO, &bytes).unwrap();
        assert_eq!(
            back.chunks().collect::<Vec<_>>(),
            heat.chunks().collect::<Vec<_>>()
        );
        let large = VolumeSize::new(6 << 30).unwrap();
        let mut sum = Heat::new(large, second, Time::ZERO);
        sum.merge(&heat, ChunkIndex(size.chunks()));
        sum.merge(&heat, ChunkIndex(size.chunks()));
        assert!((sum.get(ChunkIndex(size.chunks() + 5000)) - 14.0).abs() < 1e-9);
        sum.merge(&heat, ChunkIndex(2 * size.chunks() - 1));
        assert!((sum.get(ChunkIndex(2 * size.chunks() - 1)) - 5.0).abs() < 1e-9);
    }

    #[test]
    fn other_bytes_are_refused() {
        let size = VolumeSize::new(1 << 20).unwrap();
        let decode = |bytes: &[u8]| Heat::decode(size, Duration::from_secs(1), Time::ZERO, bytes);
        assert!(decode(&[1]).is_some());
        let bad: [&[u8]; 6] = [
            &[],
            &[2],
            &[1, 0],
            &[1, 0, 0],
            &[1, 16, 1, 1],
            &[1, 0, 1, 0xff, 0xff, 0xff],
        ];
        for bytes in bad {
            assert!(decode(bytes).is_none(), "{bytes:?}");
        }
        assert!(
            decode(&[
                1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1, 1
            ])
            .is_none()
        );
    }
}
