//! Content from a seed: text-like bytes that compress about 2.5 times, and noise that does not.
//!
//! Both are functions of one 64-bit seed, so that any part of an image or any version of a block
//! can be made again to compare with. They run at memory speed, because every byte that a load
//! reads is compared with such content.

use std::sync::LazyLock;

use crate::rng::{Rng, mix};

/// Words of the text. More words compress less.
const WORDS: usize = 1024;
/// Every word is copied as this many bytes, of which those that belong to it count.
const WORD_SLOT: usize = 16;

struct Word {
    bytes: [u8; WORD_SLOT],
    len: usize,
}

/// A made-up vocabulary, always the same, with word lengths as in natural text.
static VOCABULARY: LazyLock<Vec<Word>> = LazyLock::new(|| {
    let mut rng = Rng::new(0x0066_6c69_6d63_6421);
    let letters = b"etaoinshrdlucmfwypvbgkjqxz";
    let word = |rng: &mut Rng| {
        let mut bytes = [b' '; WORD_SLOT];
        #[expect(clippy::cast_possible_truncation, reason = "below WORD_SLOT")]
        let len = 3 + rng.below(5) as usize + rng.below(5) as usize;
        for byte in &mut bytes[..len - 1] {
            // Frequent letters come first: the smaller of two draws.
            let letter = rng.below(26).min(rng.below(26));
            #[expect(clippy::cast_possible_truncation, reason = "below 26")]
            let letter = letter as usize;
            *byte = letters[letter];
        }
        Word { bytes, len }
    };
    (0..WORDS).map(|_| word(&mut rng)).collect()
});

/// Fills `out` with text of `seed`.
pub(crate) fn fill_text(seed: u64, out: &mut [u8]) {
    let words = VOCABULARY.as_slice();
    let mut rng = Rng::new(seed);
    let mut at = 0;
    while at < out.len() {
        let mut bits = rng.next_u64();
        for _ in 0..6 {
            #[expect(clippy::cast_possible_truncation, reason = "masked to ten bits")]
            let index = (bits & (WORDS as u64 - 1)) as usize;
            bits >>= 10;
            let word = &words[index];
            if let Some(slot) = out.get_mut(at..at + WORD_SLOT) {
                slot.copy_from_slice(&word.bytes);
            } else {
                let start = at.min(out.len());
                let rest = &mut out[start..];
                let len = rest.len().min(WORD_SLOT);
                rest[..len].copy_from_slice(&word.bytes[..len]);
            }
            at += word.len;
        }
    }
}

/// Fills `out` with noise of `seed`.
pub(crate) fn fill_noise(seed: u64, out: &mut [u8]) {
    let mut counter = mix(seed);
    let mut next = || {
        counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(counter).to_le_bytes()
    };
    let (words, rest) = out.as_chunks_mut::<8>();
    for word in words {
        *word = next();
    }
    let last = next();
    rest.copy_from_slice(&last[..rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(bytes: &[u8]) -> f64 {
        bytes.len() as f64 / zstd::bulk::compress(bytes, 1).unwrap().len() as f64
    }

    #[test]
    fn text_compresses_about_two_and_a_half_times_and_noise_does_not() {
        let mut buffer = vec![0; 64 << 10];
        fill_text(3, &mut buffer);
        let text = ratio(&buffer);
        assert!((2.2..2.8).contains(&text), "{text}");
        fill_noise(3, &mut buffer);
        let noise = ratio(&buffer);
        assert!(noise < 1.01, "{noise}");
        let mut block = vec![0; 4096];
        fill_text(4, &mut block);
        let small = ratio(&block);
        assert!(small > 1.6, "{small}");
    }

    #[test]
    fn any_length_is_filled_and_seeds_differ() {
        for len in [0, 1, 7, 8, 15, 16, 17, 512, 4095] {
            for fill in [fill_text, fill_noise] {
                let (mut one, mut same, mut other) = (vec![0; len], vec![0; len], vec![0; len]);
                fill(1, &mut one);
                fill(1, &mut same);
                fill(2, &mut other);
                assert_eq!(one, same);
                assert!(len < 7 || one != other, "{len}");
            }
        }
    }
}
