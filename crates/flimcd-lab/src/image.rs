//! Disk images with realistic content, from a seed: holes, zeroes in data, text that compresses and
//! noise that does not, in extents as a used file system has them.
//!
//! The image is a run of extents with lengths from 4 KiB to 8 MiB (short ones are common, long
//! ones hold most bytes). What an extent holds is drawn by the shares asked for. Extents of data
//! have some zero blocks in them. The same options always give the same bytes; the kinds of
//! extents follow the shares closely, because each extent takes the kind that is furthest behind
//! its share, give or take a little chance.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

use flimcd_core::BLOCK_SIZE;
use serde::{Deserialize, Serialize};

use crate::{
    content::{fill_noise, fill_text},
    rng::{Rng, mix3, unit},
};

/// Bytes written at once.
const BUFFER_BYTES: u64 = 1 << 20;
/// Distinguishes the draws made for a block from those made for its content.
const ZERO_SALT: u64 = 0x7a65_726f;

/// What image to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageOptions {
    /// Decides every byte.
    pub seed: u64,
    /// Bytes of the image, any number.
    pub size_bytes: u64,
    /// Share of the image that is holes in the file.
    pub hole_share: f64,
    /// Share of the image's data that compresses about 2.5 times.
    pub text_share: f64,
    /// Share of the blocks in data extents that are zero.
    pub zero_share: f64,
}

impl Default for ImageOptions {
    /// 1 GiB, of which 30% holes; of the rest 5% zero blocks, and 60% of it text.
    fn default() -> Self {
        Self {
            seed: 1,
            size_bytes: 1 << 30,
            hole_share: 0.3,
            text_share: 0.6,
            zero_share: 0.05,
        }
    }
}

/// What an image is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// Bytes of the image.
    pub size_bytes: u64,
    /// Bytes in holes.
    pub hole_bytes: u64,
    /// Bytes of zero blocks that are written in data.
    pub zero_bytes: u64,
    /// Bytes of text.
    pub text_bytes: u64,
    /// Bytes of noise.
    pub noise_bytes: u64,
    /// Extents of data and holes.
    pub extents: u64,
}

impl ImageReport {
    /// Bytes in blocks that are not zero: what a copy has to carry before compression.
    #[must_use]
    pub const fn non_zero_bytes(&self) -> u64 {
        self.text_bytes + self.noise_bytes
    }
}

/// Kinds of extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hole,
    Text,
    Noise,
}

/// Writes an image to `path`, replacing what is there.
///
/// # Errors
/// Those of creating and writing the file.
pub fn create(path: &Path, options: &ImageOptions) -> io::Result<ImageReport> {
    let file = File::create(path)?;
    file.set_len(options.size_bytes)?;
    let mut report = ImageReport {
        size_bytes: options.size_bytes,
        ..ImageReport::default()
    };
    let mut buffer = Vec::new();
    let mut layout = Layout::new(options);
    while let Some((range, kind)) = layout.next_extent() {
        report.extents += 1;
        if kind == Kind::Hole {
            report.hole_bytes += range.end - range.start;
            continue;
        }
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + BUFFER_BYTES);
            buffer.resize(usize::try_from(end - at).unwrap_or(0), 0);
            fill(options, kind, at, &mut buffer, &mut report);
            file.write_all_at(&buffer, at)?;
            at = end;
        }
    }
    Ok(report)
}

/// Fills `out`, which lies at byte `start` of an extent of `kind`, block by block.
fn fill(options: &ImageOptions, kind: Kind, start: u64, out: &mut [u8], report: &mut ImageReport) {
    let mut at = start;
    for block in out.chunks_mut(usize::try_from(BLOCK_SIZE).unwrap_or(4096)) {
        let bytes = block.len() as u64;
        let seed = mix3(options.seed, at, 0);
        if unit(mix3(options.seed, at, ZERO_SALT)) < options.zero_share {
            block.fill(0);
            report.zero_bytes += bytes;
        } else if kind == Kind::Text {
            fill_text(seed, block);
            report.text_bytes += bytes;
        } else {
            fill_noise(seed, block);
            report.noise_bytes += bytes;
        }
        at += bytes;
    }
}

/// Divides the image into extents.
struct Layout {
    rng: Rng,
    size: u64,
    at: u64,
    /// Share of each kind, and the bytes it got so far.
    shares: [(Kind, f64, u64); 3],
}

impl Layout {
    fn new(options: &ImageOptions) -> Self {
        let hole = options.hole_share.clamp(0.0, 1.0);
        let text = options.text_share.clamp(0.0, 1.0) * (1.0 - hole);
        let shares = [
            (Kind::Hole, hole, 0),
            (Kind::Text, text, 0),
            (Kind::Noise, 1.0 - hole - text, 0),
        ];
        Self {
            rng: Rng::new(options.seed),
            size: options.size_bytes,
            at: 0,
            shares,
        }
    }

    fn next_extent(&mut self) -> Option<(Range<u64>, Kind)> {
        if self.at >= self.size {
            return None;
        }
        // 4 KiB times two to the power of 0 to 11.
        let length = BLOCK_SIZE << self.rng.below(12);
        let range = self.at..(self.at + length).min(self.size);
        self.at = range.end;
        let slack = self.rng.below(8 << 20);
        let wanted = self.at + slack;
        let behind = |&(_, share, got): &(Kind, f64, u64)| {
            #[expect(clippy::cast_precision_loss, reason = "sizes are below 2^53")]
            let lack = share.mul_add(wanted as f64, -(got as f64));
            if share > 0.0 { lack } else { f64::MIN }
        };
        let jitter: [f64; 3] = std::array::from_fn(|_| self.rng.unit() * 4e6);
        let most = (0..3).max_by(|&a, &b| {
            let lack = |i: usize| behind(&self.shares[i]) + jitter[i];
            lack(a).total_cmp(&lack(b))
        })?;
        self.shares[most].2 += range.end - range.start;
        Some((range, self.shares[most].0))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::load::Baseline;

    fn small() -> ImageOptions {
        ImageOptions {
            size_bytes: (64 << 20) + 1234,
            ..ImageOptions::default()
        }
    }

    #[test]
    fn the_report_is_what_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let report = create(&path, &small()).unwrap();
        let parts = report.hole_bytes + report.zero_bytes + report.non_zero_bytes();
        assert_eq!(parts, report.size_bytes);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), report.size_bytes);
        let found = Baseline::of_file(&path, 4096).unwrap().non_zero_bytes();
        assert!(
            found.abs_diff(report.non_zero_bytes()) < 4096,
            "{found} {report:?}"
        );
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(
            allocated < report.size_bytes - report.hole_bytes / 2,
            "{allocated} {report:?}"
        );
    }

    #[test]
    fn shares_are_kept_and_compress_as_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let report = create(&path, &small()).unwrap();
        let share = |bytes: u64, of: u64| bytes as f64 / of as f64;
        let holes = share(report.hole_bytes, report.size_bytes);
        assert!((0.2..0.4).contains(&holes), "{report:?}");
        let text = share(report.text_bytes, report.non_zero_bytes());
        assert!((0.5..0.7).contains(&text), "{report:?}");
        let zero = share(report.zero_bytes, report.size_bytes - report.hole_bytes);
        assert!((0.03..0.07).contains(&zero), "{report:?}");
    }

    #[test]
    fn a_seed_names_one_image() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, seed| {
            let path = dir.path().join(name);
            create(
                &path,
                &ImageOptions {
                    seed,
                    size_bytes: 5 << 20,
                    ..small()
                },
            )
            .unwrap();
            std::fs::read(path).unwrap()
        };
        let one = make("a", 1);
        assert!(one == make("b", 1) && one != make("c", 2));
    }

    #[test]
    fn extremes_work() {
        let dir = tempfile::tempdir().unwrap();
        for (hole_share, size_bytes) in [(0.0, 1), (1.0, 1 << 20), (0.5, 4097)] {
            let options = ImageOptions {
                hole_share,
                size_bytes,
                ..small()
            };
            let report = create(&dir.path().join("image"), &options).unwrap();
            assert_eq!(
                report.hole_bytes + report.zero_bytes + report.non_zero_bytes(),
                size_bytes
            );
            if hole_share == 1.0 {
                assert_eq!(report.hole_bytes, size_bytes);
            }
        }
    }
}
