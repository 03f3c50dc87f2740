//! Memory in use: pages whose content follows from how often they were touched, checked whenever
//! they are touched again and all at once by `verify`. Memory that moves wrongly is found here.

use crate::{
    content::fill_noise,
    rng::{Rng, mix3},
};

const PAGE_BYTES: usize = 4096;
/// The rest of a page repeats the noise at its beginning, so that pages compress about two times.
const NOISE_BYTES: usize = 2048;

/// A number of pages that are touched at random.
pub(crate) struct Ram {
    pages: Vec<u8>,
    /// How often each was touched.
    touched: Vec<u32>,
    rng: Rng,
    scratch: Vec<u8>,
}

impl Ram {
    pub(crate) fn new(pages: usize) -> Self {
        let mut ram = Self {
            pages: vec![0; pages * PAGE_BYTES],
            touched: vec![0; pages],
            rng: Rng::new(7),
            scratch: vec![0; PAGE_BYTES],
        };
        for (page, bytes) in ram.pages.chunks_exact_mut(PAGE_BYTES).enumerate() {
            fill(page, 0, bytes);
        }
        ram
    }

    pub(crate) fn pages(&self) -> usize {
        self.touched.len()
    }

    /// Checks and changes `count` pages; returns how many were wrong.
    pub(crate) fn touch(&mut self, count: usize) -> u64 {
        if self.touched.is_empty() {
            return 0;
        }
        let mut wrong = 0;
        for _ in 0..count {
            let bound = self.touched.len() as u64;
            let page = usize::try_from(self.rng.below(bound)).unwrap_or(0);
            wrong += u64::from(!self.check(page));
            self.touched[page] += 1;
            let at = page * PAGE_BYTES;
            fill(
                page,
                self.touched[page],
                &mut self.pages[at..at + PAGE_BYTES],
            );
        }
        wrong
    }

    /// Checks every page; returns how many are wrong.
    pub(crate) fn verify(&mut self) -> u64 {
        (0..self.touched.len())
            .filter(|page| !self.check(*page))
            .count() as u64
    }

    fn check(&mut self, page: usize) -> bool {
        fill(page, self.touched[page], &mut self.scratch);
        let at = page * PAGE_BYTES;
        let is_right = self.pages[at..at + PAGE_BYTES] == self.scratch[..];
        if !is_right {
            println!(
                "BAD memory page {page} touched {} times",
                self.touched[page]
            );
        }
        is_right
    }
}

fn fill(page: usize, touched: u32, out: &mut [u8]) {
    fill_noise(
        mix3(page as u64, u64::from(touched), 1),
        &mut out[..NOISE_BYTES],
    );
    out.copy_within(..NOISE_BYTES, NOISE_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_is_found() {
        let mut ram = Ram::new(16);
        assert_eq!(ram.touch(100) + ram.verify(), 0);
        ram.pages[5 * PAGE_BYTES + 4000] ^= 1;
        assert_eq!(ram.verify(), 1);
        assert_eq!(Ram::new(0).touch(4), 0);
    }
}
