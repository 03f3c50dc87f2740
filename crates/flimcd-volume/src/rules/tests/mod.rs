//! Tests of the rules: cases by hand, and random interleavings against a model of a disk that loses
//! what was not synced, and threads under every schedule that shuttle tries.

mod cases;
mod mirror;
mod peeks;
mod random;
mod read_log;
mod schedules;
mod source_world;
mod target_world;

/// Numbers that decide what happens next. When they run out everything is the first choice.
pub(crate) struct Choices {
    numbers: Vec<u32>,
    at: usize,
}

impl Choices {
    fn new(numbers: Vec<u32>) -> Self {
        Self { numbers, at: 0 }
    }

    /// Numbers made from a seed by splitmix64.
    fn seeded(seed: u64, count: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u32::try_from((z ^ (z >> 31)) >> 32).unwrap()
        };
        Self::new((0..count).map(|_| next()).collect())
    }

    fn is_over(&self) -> bool {
        self.at >= self.numbers.len()
    }

    /// A number below `bound`, 0 when there is no choice.
    fn below(&mut self, bound: usize) -> usize {
        let number = self.numbers.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        if bound == 0 {
            return 0;
        }
        number as usize % bound
    }

    /// True once in `n`.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }
}
