//! Packing of a stream of bytes that is sent in parts: the running state of a machine.
//!
//! One zstd stream per direction, flushed at the end of each part, so that every part can be unpacked as soon as it
//! is there, and refers to what came before. Memory has the same pages in many places (page cache, copies of a
//! library, a page sent again with a few bytes changed), often far apart: hence a wide window and
//! long-distance matching. A page of zeroes is nine bytes in a hypervisor's stream already, and a small part of one byte here.
//!
//! Measured on the RAM stream of a booted Linux guest of 512 MiB with a page cache full of programs and libraries
//! (QEMU 10.0, 549 MB with four later rounds), one core of a busy machine, parts of 128 KiB:
//!
//! | packing | MB | ratio | pack MB/s | unpack MB/s |
//! | --- | --- | --- | --- | --- |
//! | level 1, each 512 KiB for itself (as QEMU's multifd with zstd at best) | 201.7 | 2.72 | 304 | |
//! | level 3, the same | 186.4 | 2.95 | 166 | |
//! | level 1, stream, 512 KiB window | 199.4 | 2.76 | 308 | 1274 |
//! | level 1, stream, 128 MiB window, long distance ([`Effort::Fast`]) | 176.5 | 3.11 | 231 | 580 |
//! | level 3, stream, 2 MiB window | 178.6 | 3.08 | 98 | 547 |
//! | level 3, stream, 8 MiB window, long distance | 174.1 | 3.16 | 154 | 1255 |
//! | level 3, stream, 128 MiB window, long distance ([`Effort::Thorough`]) | 161.9 | 3.39 | 102 | 566 |
//! | level 5, stream, 128 MiB window, long distance | 156.4 | 3.51 | 41 | 662 |
//!
//! `Thorough` carries as much of a guest as its link allows up to about 30 MB/s on the wire. Beyond, `Fast` does more.
//! (The test `ram_sample` repeats this for a stream in a file.)
//!
//! # Memory
//! A packer takes the window of its effort and some tables, an unpacker the window that the stream names,
//! at most [`WINDOW_LOG_MAX`]; what a part unpacks to is bounded by the caller's buffer.

use std::io;

use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

/// Largest window that is used and accepted, as a power of two: 128 MiB.
const WINDOW_LOG_MAX: u32 = 27;
/// Bytes that are packed before they are appended to the result.
const SCRATCH_BYTES: usize = 64 * 1024;

/// How hard to pack a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Little memory (about 2 MiB), for a direction that says little.
    Small,
    /// For links that carry more than [`Effort::Thorough`] packs.
    Fast,
    /// For links of up to about 300 Mbit/s.
    Thorough,
}

impl Effort {
    /// Bytes per second on the wire from which on packing thoroughly would hold the link up.
    const THOROUGH_BYTES_PER_SEC_MAX: u64 = 30_000_000;

    /// For a large stream over a link that carries so many bytes per second, if that is known.
    #[must_use]
    pub fn for_rate(bytes_per_sec: Option<u64>) -> Self {
        match bytes_per_sec {
            Some(rate) if rate > Self::THOROUGH_BYTES_PER_SEC_MAX => Self::Fast,
            _ => Self::Thorough,
        }
    }
}

/// Packs a stream, part by part.
pub struct StreamPacker {
    encoder: Encoder<'static>,
    scratch: Vec<u8>,
}

impl StreamPacker {
    /// A packer at the beginning of a stream.
    ///
    /// # Errors
    /// When there is no memory for zstd's state.
    pub fn new(effort: Effort) -> io::Result<Self> {
        let (level, window_log) = match effort {
            Effort::Small => (1, None),
            Effort::Fast => (1, Some(WINDOW_LOG_MAX)),
            Effort::Thorough => (3, Some(WINDOW_LOG_MAX)),
        };
        let mut encoder = Encoder::new(level)?;
        if let Some(window_log) = window_log {
            encoder.set_parameter(CParameter::WindowLog(window_log))?;
            encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        }
        Ok(Self {
            encoder,
            scratch: vec![0; SCRATCH_BYTES],
        })
    }

    /// Packs the next bytes of the stream, at least one. The result is at most a little longer than they are, and
    /// has to be unpacked after all that came before it.
    ///
    /// # Errors
    /// When zstd has no memory; the stream cannot go on.
    pub fn pack(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut packed = Vec::with_capacity(bytes.len() / 2);
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            let mut output = OutBuffer::around(&mut self.scratch[..]);
            self.encoder.run(&mut input, &mut output)?;
            packed.extend_from_slice(output.as_slice());
        }
        loop {
            let mut output = OutBuffer::around(&mut self.scratch[..]);
            let left = self.encoder.flush(&mut output)?;
            packed.extend_from_slice(output.as_slice());
            if left == 0 {
                return Ok(packed);
            }
        }
    }
}

/// Why a part cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is not what a packer makes.
    #[error("a part of the stream is damaged: {0}")]
    Damaged(#[source] io::Error),
    /// It unpacks to more than a part may have.
    #[error("a part of the stream unpacks to more than {0} bytes")]
    TooLong(usize),
}

/// Unpacks a stream, part by part.
pub struct StreamUnpacker {
    decoder: Decoder<'static>,
}

impl StreamUnpacker {
    /// An unpacker at the beginning of a stream.
    ///
    /// # Errors
    /// When there is no memory for zstd's state.
    pub fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
        Ok(Self { decoder })
    }

    /// Unpacks the next part into `out`, in place of what is there, and at most `bytes_max` bytes.
    ///
    /// # Errors
    /// When the part is not what a packer makes, or too long; the stream cannot go on.
    pub fn unpack(
        &mut self,
        part: &[u8],
        out: &mut Vec<u8>,
        bytes_max: usize,
    ) -> Result<(), UnpackError> {
        // One more than allowed, so that more is noticed.
        out.resize(bytes_max + 1, 0);
        let mut input = InBuffer::around(part);
        let mut output = OutBuffer::around(&mut out[..]);
        loop {
            let (read, written) = (input.pos(), output.pos());
            self.decoder
                .run(&mut input, &mut output)
                .map_err(UnpackError::Damaged)?;
            if output.pos() > bytes_max {
                return Err(UnpackError::TooLong(bytes_max));
            }
            if (input.pos(), output.pos()) == (read, written) {
                break;
            }
        }
        let (read, written) = (input.pos(), output.pos());
        if read < part.len() {
            let problem = io::Error::other("it does not end where it should");
            return Err(UnpackError::Damaged(problem));
        }
        out.truncate(written);
        Ok(())
    }
}

impl std::fmt::Debug for StreamPacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamPacker").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for StreamUnpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamUnpacker").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    const PART_MAX: usize = 128 * 1024;

    fn noise(len: usize, mut seed: u32) -> Vec<u8> {
        let next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed.to_le_bytes()[3]
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    proptest! {
        #[test]
        fn what_is_packed_unpacks_part_by_part(
            parts in prop::collection::vec((1usize..PART_MAX, 0u32..3), 1..12), thorough in any::<bool>(),
        ) {
            let effort = if thorough { Effort::Thorough } else { Effort::Small };
            let mut packer = StreamPacker::new(effort).unwrap();
            let mut unpacker = StreamUnpacker::new().unwrap();
            let mut out = Vec::new();
            for (len, seed) in parts {
                let bytes = if seed == 0 { vec![0; len] } else { noise(len, seed) };
                let part = packer.pack(&bytes).unwrap();
                prop_assert!(part.len() <= len + 512);
                unpacker.unpack(&part, &mut out, PART_MAX).unwrap();
                prop_assert!(out == bytes);
            }
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_and_never_a_panic(
            at in 0usize..2000, with in 1u8.., extra in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut part = StreamPacker::new(Effort::Fast).unwrap().pack(&noise(2000, 1)).unwrap();
            part[at] ^= with;
            part.extend(extra);
            let mut out = Vec::new();
            let _ = StreamUnpacker::new().unwrap().unpack(&part, &mut out, PART_MAX);
            prop_assert!(out.len() <= PART_MAX + 1);
        }
    }

    #[test]
    fn later_parts_profit_from_earlier_ones_far_back() {
        let mut packer = StreamPacker::new(Effort::Fast).unwrap();
        let page = noise(PART_MAX, 9);
        packer.pack(&page).unwrap();
        for seed in 10..90 {
            packer.pack(&noise(PART_MAX, seed)).unwrap();
        }
        assert!(packer.pack(&page).unwrap().len() < PART_MAX / 100);
        assert!(packer.pack(&vec![0; PART_MAX]).unwrap().len() < 100);
    }

    #[test]
    fn a_part_that_would_become_too_long_is_refused() {
        let bomb = StreamPacker::new(Effort::Small)
            .unwrap()
            .pack(&vec![0; 64 << 20])
            .unwrap();
        assert!(bomb.len() < 256 * 1024);
        let mut out = Vec::new();
        let refused = StreamUnpacker::new()
            .unwrap()
            .unpack(&bomb, &mut out, PART_MAX);
        assert!(
            matches!(refused, Err(UnpackError::TooLong(_))),
            "{refused:?}"
        );
        assert!(out.capacity() <= 2 * PART_MAX);
    }

    /// The table above, for the stream in the file that `FLIMCD_RAM_SAMPLE` names: QEMU writes one with
    /// `migrate exec:cat>FILE`.
    #[test]
    #[ignore = "a measurement; needs a sample"]
    #[expect(
        clippy::disallowed_methods,
        clippy::print_stderr,
        reason = "a measurement for people, not a part of the crate"
    )]
    fn ram_sample() {
        let Some(path) = std::env::var_os("FLIMCD_RAM_SAMPLE") else {
            eprintln!("SKIPPED: needs FLIMCD_RAM_SAMPLE: the path of a stream");
            return;
        };
        let sample = std::fs::read(path).unwrap();
        for effort in [Effort::Small, Effort::Fast, Effort::Thorough] {
            let mut packer = StreamPacker::new(effort).unwrap();
            let begin = Instant::now();
            let parts: Vec<_> = sample
                .chunks(PART_MAX)
                .map(|part| packer.pack(part).unwrap())
                .collect();
            let packing = begin.elapsed().as_micros();
            let packed: usize = parts.iter().map(Vec::len).sum();
            let (mut unpacker, mut out) = (StreamUnpacker::new().unwrap(), Vec::new());
            let begin = Instant::now();
            for part in &parts {
                unpacker.unpack(part, &mut out, PART_MAX).unwrap();
            }
            let unpacking = begin.elapsed().as_micros();
            let bytes = sample.len() as u128;
            eprintln!(
                "{effort:?}: {bytes} → {packed} bytes, {} MB/s packed, {} MB/s unpacked",
                bytes / packing,
                bytes / unpacking
            );
        }
    }
}
