//! Counters of heat, small enough to be kept for every volume all the time.
//!
//! One byte each, for a chunk, or for two in volumes of more than 16 GiB: 8 MiB per TiB and kind where all of it is hot. A byte is a
//! number of four binary digits and an exponent, in eighths: exact up to 4, then within a sixteenth, up to 63488. What does not fit
//! the digits is rounded up or down by chance, so that many small events add up to what they are: within some 15%.

use std::ops::Range;

use flimcd_core::{ChunkIndex, Heat, Time, VolumeSize};

/// Counters in a page, which is there when one of them is not cold.
const PAGE: usize = 4096;
/// Counters hold eighths of an event.
const UNITS: u64 = 8;
/// Volumes of more chunks than this count two of them together.
const CHUNKS_EXACT: u64 = 1 << 18;
const SLOT_MAX: u64 = 255;
/// Longer runs of cold counters end a run of hot ones in the encoding.
const GAP_MAX: u64 = 4;

/// Decayed counts by chunk. See the module.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    size: VolumeSize,
    /// Chunks of a counter, as a power of two.
    shift: u32,
    pages: Vec<Option<Box<[u8]>>>,
    /// What chance is made of; any number but 0.
    random: u64,
}

impl Counts {
    pub(crate) fn new(size: VolumeSize) -> Self {
        let shift = u32::from(size.chunks() > CHUNKS_EXACT);
        let counters = index(size.chunks().div_ceil(1 << shift));
        Self {
            size,
            shift,
            pages: vec![None; counters.div_ceil(PAGE)],
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn counters(&self) -> u64 {
        self.size.chunks().div_ceil(1 << self.shift)
    }

    /// Counts `events` on a chunk. One beyond the volume's end is left out.
    #[inline]
    pub(crate) fn add(&mut self, chunk: ChunkIndex, events: u64) {
        if chunk.0 < self.size.chunks() {
            self.add_units(chunk.0 >> self.shift, events.saturating_mul(UNITS));
        }
    }

    #[inline]
    fn add_units(&mut self, counter: u64, units: u64) {
        let at = index(counter);
        let page = &mut self.pages[at / PAGE];
        let page = page.get_or_insert_with(|| vec![0; PAGE].into());
        let slot = &mut page[at % PAGE];
        *slot = slot_of(units_of(*slot).saturating_add(units), &mut self.random);
    }

    /// Adds counts that were made elsewhere.
    pub(crate) fn merge(&mut self, heat: &Heat) {
        for (chunk, count) in heat.chunks() {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "small and not negative"
            )]
            let units = (count * UNITS as f64).round() as u64;
            if chunk.0 < self.size.chunks() {
                self.add_units(chunk.0 >> self.shift, units);
            }
        }
    }

    /// Halves every count, and gives back what is cold.
    pub(crate) fn halve(&mut self) {
        for page in &mut self.pages {
            let Some(slots) = page else { continue };
            for slot in slots.iter_mut() {
                *slot = if *slot < 32 { *slot / 2 } else { *slot - 16 };
            }
            if slots.iter().all(|&slot| slot == 0) {
                *page = None;
            }
        }
    }

    /// The counts in the form that everybody else knows. Where two chunks have one counter each has half of it.
    pub(crate) fn heat(&self, half_life: std::time::Duration) -> Heat {
        let mut heat = Heat::new(self.size, half_life, Time::ZERO);
        for (counter, slot) in self.slots() {
            #[expect(clippy::cast_precision_loss, reason = "a few binary digits")]
            let count = units_of(slot) as f64 / (UNITS << self.shift) as f64;
            let first = counter << self.shift;
            for chunk in first..(first + (1 << self.shift)).min(self.size.chunks()) {
                heat.add_count(ChunkIndex(chunk), count);
            }
        }
        heat
    }

    /// The counters that are not cold.
    fn slots(&self) -> impl Iterator<Item = (u64, u8)> + '_ {
        let pages = (0u64..).step_by(PAGE).zip(&self.pages);
        pages
            .filter_map(|(first, page)| page.as_ref().map(|page| (first, page)))
            .flat_map(|(first, page)| (first..).zip(page.iter().copied()))
            .filter(|&(_, slot)| slot > 0)
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.pages.capacity() * size_of::<Option<Box<[u8]>>>()
            + self.pages.iter().flatten().count() * PAGE
    }

    /// For each run of counters: how many cold ones lie before it, its length, both as 8 bytes, and the counters.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (counter, _) in self.slots() {
            match runs.last_mut() {
                Some(run) if counter <= run.end + GAP_MAX => run.end = counter + 1,
                _ => runs.push(counter..counter + 1),
            }
        }
        let mut bytes = Vec::new();
        let mut end = 0;
        for run in runs {
            bytes.extend_from_slice(&(run.start - end).to_le_bytes());
            bytes.extend_from_slice(&(run.end - run.start).to_le_bytes());
            end = run.end;
            bytes.extend(run.map(|counter| self.slot(index(counter))));
        }
        bytes
    }

    fn slot(&self, at: usize) -> u8 {
        let page = self.pages.get(at / PAGE).and_then(Option::as_ref);
        page.map_or(0, |page| page[at % PAGE])
    }

    /// What [`encode`](Self::encode) has made of the counts of a volume of this size; `None` if it is no such thing.
    pub(crate) fn decode(size: VolumeSize, mut bytes: &[u8]) -> Option<Self> {
        let mut counts = Self::new(size);
        let mut at = 0u64;
        while !bytes.is_empty() {
            at = at.checked_add(take(&mut bytes)?)?;
            let length = take(&mut bytes)?;
            let end = at.checked_add(length)?;
            if end > counts.counters() || length == 0 {
                return None;
            }
            let (slots, rest) = bytes.split_at_checked(index(length))?;
            bytes = rest;
            for (at, &slot) in (index(at)..).zip(slots) {
                if slot > 0 {
                    let page = &mut counts.pages[at / PAGE];
                    page.get_or_insert_with(|| vec![0; PAGE].into())[at % PAGE] = slot;
                }
            }
            at = end;
        }
        Some(counts)
    }
}

/// Eighths of an event.
#[inline]
const fn units_of(slot: u8) -> u64 {
    let slot = slot as u64;
    if slot < 32 {
        slot
    } else {
        (16 + slot % 16) << (slot / 16 - 1)
    }
}

/// The counter for so many eighths; one of the two next to them, so that it is right on average.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "at most 255")]
fn slot_of(units: u64, random: &mut u64) -> u8 {
    if units < 32 {
        return units as u8;
    }
    let shift = u64::from(59 - units.leading_zeros());
    let below = (shift + 1) * 16 + (units >> shift) - 16;
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let rest = units & ((1 << shift) - 1);
    let is_up = (*random >> 1) & ((1 << shift) - 1) < rest;
    (below + u64::from(is_up)).min(SLOT_MAX) as u8
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size(chunks: u64) -> VolumeSize {
        VolumeSize::new(chunks * flimcd_core::CHUNK_SIZE).unwrap()
    }

    #[test]
    fn slots_ascend_and_halve() {
        let mut random = 1;
        for slot in 0..255u8 {
            assert!(units_of(slot) < units_of(slot + 1));
            assert_eq!(slot_of(units_of(slot), &mut random), slot);
            if slot >= 32 {
                assert_eq!(units_of(slot - 16) * 2, units_of(slot));
            }
        }
        assert_eq!(slot_of(u64::MAX, &mut random), 255);
    }

    #[test]
    fn many_small_events_add_up() {
        let mut counts = Counts::new(size(256));
        for _ in 0..20_000 {
            for chunk in 0..256 {
                counts.add(ChunkIndex(chunk), 1);
            }
        }
        let all: Vec<_> = counts
            .slots()
            .map(|(_, slot)| units_of(slot) / UNITS)
            .collect();
        let mean = all.iter().sum::<u64>() / 256;
        assert!(mean.abs_diff(20_000) < 800, "{mean}");
        assert!(all.iter().all(|&n| (8_000..40_000).contains(&n)), "{all:?}");
    }

    #[test]
    fn a_tebibyte_that_is_hot_everywhere_fits() {
        let mut counts = Counts::new(VolumeSize::new(1 << 40).unwrap());
        assert!(counts.memory_bytes() < 64 << 10);
        for chunk in (0..1 << 24).step_by(4096) {
            counts.add(ChunkIndex(chunk), 3);
        }
        assert!(counts.memory_bytes() <= (8 << 20) + (64 << 10));
        for _ in 0..8 {
            counts.halve();
        }
        assert!(
            counts.memory_bytes() < 64 << 10,
            "cold pages are given back"
        );
    }

    #[test]
    fn the_heat_of_two_chunks_is_halved_between_them() {
        let half_life = std::time::Duration::from_secs(60);
        let chunks = CHUNKS_EXACT + 1;
        let mut counts = Counts::new(size(chunks));
        counts.add(ChunkIndex(5), 8);
        counts.add(ChunkIndex(chunks - 1), 4);
        counts.add(ChunkIndex(chunks), 4);
        let heat = counts.heat(half_life);
        let all: Vec<_> = heat.chunks().map(|(chunk, n)| (chunk.0, n)).collect();
        assert_eq!(all, [(4, 4.0), (5, 4.0), (chunks - 1, 2.0)]);
        let mut sum = Counts::new(size(chunks));
        sum.merge(&heat);
        assert!(sum.slots().eq([(2, slot_of(64, &mut 1)), (chunks / 2, 16)]));
    }

    proptest! {
        #[test]
        fn counts_come_back_as_they_were(
            added in prop::collection::vec((0u64..9000, 1u64..70_000), 0..200)
        ) {
            let mut counts = Counts::new(size(9000));
            for (chunk, events) in added {
                counts.add(ChunkIndex(chunk), events);
            }
            let bytes = counts.encode();
            let back = Counts::decode(size(9000), &bytes).unwrap();
            prop_assert!(back.slots().eq(counts.slots()));
            for cut in 1..bytes.len().min(24) {
                prop_assert!(Counts::decode(size(9000), &bytes[..bytes.len() - cut]).is_none() || cut >= 16);
            }
        }

        #[test]
        fn any_bytes_are_refused_or_bounded(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(counts) = Counts::decode(size(100), &bytes) {
                prop_assert!(counts.slots().all(|(counter, _)| counter < 100));
            }
        }
    }
}
