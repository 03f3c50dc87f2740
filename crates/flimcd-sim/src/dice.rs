//! Seeded randomness: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
//! Own and short, so that a seed means the same run whatever a library changes.

use std::time::Duration;

/// Everything random in a run comes from one of these.
#[derive(Clone, Debug)]
pub(crate) struct Dice {
    state: u64,
}

/// The mixing step: a bijection that scatters neighbouring numbers.
pub(crate) const fn mix(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            state: mix(seed ^ 0x666c_696d_6364),
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number of `0..limit`; the bias for our small limits does not matter.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "nothing to choose from");
        self.next() % limit
    }

    /// A number of `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in so many cases of a thousand.
    pub(crate) fn permille(&mut self, chance: u64) -> bool {
        self.below(1000) < chance
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.permille(500)
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let at = self.below(from.len() as u64);
        from[usize::try_from(at).expect("an index")]
    }

    /// As likely to be between 1 and 10 times `low` as between 10 and 100 times.
    pub(crate) fn log_between(&mut self, low: u64, high: u64) -> u64 {
        let (mut low, mut top) = (low.max(1), low.max(1));
        while top * 4 < high && self.permille(700) {
            low = top;
            top *= 4;
        }
        let end = (top * 4).min(high).max(low);
        self.between(low, end)
    }

    pub(crate) fn micros(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_micros(self.between(low, high))
    }
}
