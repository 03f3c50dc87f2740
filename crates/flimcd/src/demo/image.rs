//! The demo's image: made from a seed or copied from a file, surveyed, and copied for each strategy.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use flimcd_content::{Compression, Encoder, is_zero};
use flimcd_core::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockRange, CHUNK_SIZE, VolumeSize};
use flimcd_lab::{
    image::{self, ImageOptions},
    load::Baseline,
    sparse::{copy_sparse, for_each_extent},
};
use serde::Serialize;

use super::args::{DemoArgs, LoadArg};
use crate::outcome::advise;

/// The image and what is known of it.
pub(crate) struct DemoImage {
    pub(crate) path: PathBuf,
    pub(crate) baseline: Baseline,
    pub(crate) facts: ImageFacts,
}

/// The base image in the target's library, for those strategies that use it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BaseFacts {
    /// Share of the image's chunks with data that are others there, in percent, as it came out.
    pub(crate) differs_percent: f64,
    /// Bytes of those chunks, non-zero blocks only, as the agents encode them.
    pub(crate) encoded_bytes: u64,
}

/// What of the image differs is drawn for runs of so many chunks: 1 MiB.
const RUN_CHUNKS: u64 = 16;

/// Makes a base image like `image` at `to`, of which about so many percent are another content. Blocks.
pub(crate) fn make_base(
    image: &Path,
    to: &Path,
    percent: u8,
    seed: u64,
) -> anyhow::Result<BaseFacts> {
    copy_sparse(image, to).context("the base image cannot be made")?;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(to)?;
    let size = VolumeSize::new(file.metadata()?.len())?;
    let mut encoder = Encoder::new(Compression::DEFAULT);
    let (mut with_data, mut differing, mut encoded) = (0u64, 0u64, 0u64);
    let mut buffer = Vec::new();
    for chunk in (0..size.chunks()).map(flimcd_core::ChunkIndex) {
        let blocks = BlockRange::new(chunk.blocks().start, chunk.blocks().end.min(size.blocks()));
        let bytes = blocks.bytes(size);
        buffer.resize(usize::try_from(bytes.len())?, 0);
        file.read_exact_at(&mut buffer, bytes.start)?;
        if is_zero(&buffer) {
            continue;
        }
        with_data += 1;
        let draw = flimcd_content::Fingerprint::of(
            &[seed, chunk.0 / RUN_CHUNKS].map(u64::to_le_bytes).concat(),
        );
        if u32::from(draw.as_bytes()[0]) * 100 < u32::from(percent) * 256 {
            differing += 1;
            encoded += encoder.encode(blocks, &buffer).payload.len() as u64;
            buffer.iter_mut().for_each(|byte| *byte ^= 0x5a);
            file.write_all_at(&buffer, bytes.start)?;
        }
    }
    file.sync_all()?;
    Ok(BaseFacts {
        differs_percent: differing as f64 * 100.0 / with_data.max(1) as f64,
        encoded_bytes: encoded,
    })
}

/// What the report says of the image.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ImageFacts {
    pub(crate) from: String,
    pub(crate) size_bytes: u64,
    /// Bytes in blocks that are not zero.
    pub(crate) non_zero_bytes: u64,
    /// The same after the agents' compression, chunk by chunk.
    pub(crate) encoded_bytes: u64,
}

/// Makes the image in `dir` and surveys it. Reads every byte; blocks.
pub(crate) fn prepare(dir: &Path, args: &DemoArgs) -> anyhow::Result<DemoImage> {
    let path = dir.join("image.raw");
    let from = match &args.image {
        Some(file) => {
            let size = check_image(file)?;
            copy_sparse(file, &path)
                .with_context(|| format!("{} ({size} bytes) cannot be copied", file.display()))?;
            file.display().to_string()
        }
        None => {
            let options = ImageOptions {
                seed: args.seed,
                size_bytes: VolumeSize::new(args.size)?.bytes(),
                ..ImageOptions::default()
            };
            image::create(&path, &options).with_context(|| {
                format!(
                    "the image cannot be made in {}; is there room?",
                    dir.display()
                )
            })?;
            format!("seed {}", args.seed)
        }
    };
    let granule = match args.load {
        LoadArg::Synthetic => 4096,
        // A recorded guest addresses sectors.
        LoadArg::Trace(_) => 512,
    };
    survey(path, from, granule)
}

/// Looks at every byte of an image; `granule` is the unit in which a guest addresses it. Blocks.
pub(crate) fn survey(path: PathBuf, from: String, granule: u32) -> anyhow::Result<DemoImage> {
    let (baseline, encoded) = std::thread::scope(|scope| {
        let survey = scope.spawn(|| Baseline::of_file(&path, granule));
        let encoded = encoded(&path);
        (survey.join(), encoded)
    });
    let baseline = baseline
        .map_err(|_| anyhow::anyhow!("the survey of the image panicked"))?
        .context("the image cannot be surveyed")?;
    let (non_zero_bytes, encoded_bytes) = encoded.context("the image cannot be read")?;
    let facts = ImageFacts {
        from,
        size_bytes: baseline.size(),
        non_zero_bytes,
        encoded_bytes,
    };
    Ok(DemoImage {
        path,
        baseline,
        facts,
    })
}

fn check_image(file: &Path) -> anyhow::Result<u64> {
    let data = std::fs::metadata(file)
        .with_context(|| format!("the image {} cannot be opened", file.display()))?;
    if !data.is_file() {
        return Err(advise(
            format!("{} is not a regular file", file.display()),
            "--image takes a raw disk image",
        ));
    }
    VolumeSize::new(data.len())
        .with_context(|| format!("{} cannot be a volume", file.display()))?;
    Ok(data.len())
}

/// Bytes in non-zero blocks, and how many they are once encoded as the agents do it.
fn encoded(path: &Path) -> io::Result<(u64, u64)> {
    let file = File::open(path)?;
    let size = VolumeSize::new(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut encoder = Encoder::new(Compression::DEFAULT);
    let (mut non_zero, mut encoded) = (0, 0);
    let mut buffer = Vec::new();
    let mut next = 0;
    for_each_extent(&file, size.bytes(), |start, end| {
        // An extent may begin or end inside a chunk; each chunk is looked at once.
        for chunk in (start / CHUNK_SIZE).max(next)..end.div_ceil(CHUNK_SIZE) {
            let blocks = BlockRange::new(
                chunk * BLOCKS_PER_CHUNK,
                ((chunk + 1) * BLOCKS_PER_CHUNK).min(size.blocks()),
            );
            let bytes = blocks.bytes(size);
            buffer.resize(usize::try_from(bytes.len()).unwrap_or(0), 0);
            file.read_exact_at(&mut buffer, bytes.start)?;
            encoded += encoder.encode(blocks, &buffer).payload.len() as u64;
            let block_bytes = usize::try_from(BLOCK_SIZE).unwrap_or(4096);
            let data = buffer.chunks(block_bytes).filter(|block| !is_zero(block));
            non_zero += data.map(|block| block.len() as u64).sum::<u64>();
            next = chunk + 1;
        }
        Ok(())
    })?;
    Ok((non_zero, encoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_cost_nothing_and_repetition_little() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = File::create(&path).unwrap();
        file.set_len((1 << 20) + 1).unwrap();
        file.write_all_at(&[7; 8192], 4096).unwrap();
        file.write_all_at(&[0; 8192], 65536).unwrap();
        file.write_all_at(&[1], 1 << 20).unwrap();
        let (non_zero, encoded) = encoded(&path).unwrap();
        assert_eq!(non_zero, 8192 + 1);
        assert!(encoded > 0 && encoded < 200, "{encoded}");
    }
}
