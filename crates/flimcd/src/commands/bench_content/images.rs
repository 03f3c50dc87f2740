//! Images of the benchmark: what differs between two, what that comes to when compressed, and whether two are
//! the same.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use anyhow::Context as _;
use flimcd_content::{Compression, Encoder, is_zero};
use flimcd_core::{BLOCKS_PER_CHUNK, BlockRange};
use serde::Serialize;

/// Bytes read at once: some chunks.
const STEP: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Bytes compressed at once.
const RUN: usize = 64 << 10;

/// Blocks of an image that are others than in an older one, and are not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Changed {
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    /// Each run of neighbours compressed on its own, at most 64 KiB at once: as they can be sent.
    pub(super) compressed_bytes: u64,
    /// 64 KiB of changed blocks compressed at once, wherever they lie.
    pub(super) gathered_bytes: u64,
}

/// Compares `now` with `before`; blocks beyond the end of `before` are new. Blocks.
pub(super) fn changed(before: &Path, now: &Path) -> io::Result<Changed> {
    let (old, new) = (File::open(before)?, File::open(now)?);
    let (old_size, size) = (old.metadata()?.len(), new.metadata()?.len());
    let mut found = Changed::default();
    let mut packer = Packer::default();
    let (mut old_bytes, mut new_bytes) = (Vec::new(), Vec::new());
    for at in (0..size).step_by(usize::try_from(STEP).unwrap_or(usize::MAX)) {
        read_at(&new, at, STEP.min(size - at), &mut new_bytes)?;
        read_at(
            &old,
            at,
            STEP.min(size - at).min(old_size.saturating_sub(at)),
            &mut old_bytes,
        )?;
        for (number, block) in new_bytes.chunks(BLOCK).enumerate() {
            let from = number * BLOCK;
            let is_same = old_bytes.get(from..from + block.len()) == Some(block);
            if is_same || is_zero(block) {
                packer.end_run();
                continue;
            }
            found.blocks += 1;
            found.bytes += block.len() as u64;
            packer.push(block);
        }
    }
    (found.compressed_bytes, found.gathered_bytes) = packer.finish();
    Ok(found)
}

/// Adds up compressed sizes.
#[derive(Default)]
struct Packer {
    encoder: Option<Encoder>,
    run: Vec<u8>,
    gathered: Vec<u8>,
    run_bytes: u64,
    gathered_bytes: u64,
}

impl Packer {
    fn push(&mut self, block: &[u8]) {
        self.run.extend_from_slice(block);
        self.gathered.extend_from_slice(block);
        if self.run.len() >= RUN {
            self.end_run();
        }
        if self.gathered.len() >= RUN {
            self.end_gathered();
        }
    }

    fn end_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        self.run_bytes += self.packed(&run);
        self.run = run;
        self.run.clear();
    }

    fn end_gathered(&mut self) {
        let gathered = std::mem::take(&mut self.gathered);
        self.gathered_bytes += self.packed(&gathered);
        self.gathered = gathered;
        self.gathered.clear();
    }

    /// None of the blocks is zero, so the encoder sees one run.
    fn packed(&mut self, bytes: &[u8]) -> u64 {
        if bytes.is_empty() {
            return 0;
        }
        let encoder = self
            .encoder
            .get_or_insert_with(|| Encoder::new(Compression::DEFAULT));
        let range = BlockRange::new(0, bytes.len().div_ceil(BLOCK) as u64);
        debug_assert!(range.len() <= BLOCKS_PER_CHUNK);
        encoder.encode(range, bytes).payload.len() as u64
    }

    fn finish(mut self) -> (u64, u64) {
        self.end_run();
        self.end_gathered();
        (self.run_bytes, self.gathered_bytes)
    }
}

fn read_at(file: &File, at: u64, length: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.resize(usize::try_from(length).unwrap_or(0), 0);
    file.read_exact_at(buffer, at)
}

/// Whether two files hold the same bytes. Blocks.
pub(super) fn is_same(one: &Path, other: &Path) -> anyhow::Result<bool> {
    let open = |path: &Path| {
        File::open(path).with_context(|| format!("{} cannot be compared", path.display()))
    };
    let (a, b) = (open(one)?, open(other)?);
    let size = a.metadata()?.len();
    if b.metadata()?.len() != size {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for at in (0..size).step_by(usize::try_from(STEP).unwrap_or(usize::MAX)) {
        read_at(&a, at, STEP.min(size - at), &mut left)?;
        read_at(&b, at, STEP.min(size - at), &mut right)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bytes in blocks that are not zero. Blocks.
pub(super) fn non_zero_bytes(path: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for_each_piece(path, |_, piece| {
        let data = piece.chunks(BLOCK).filter(|block| !is_zero(block));
        sum += data.map(|block| block.len() as u64).sum::<u64>();
        Ok(())
    })?;
    Ok(sum)
}

/// Calls `each` with offset and bytes of every 64 KiB of a file that are not all zero. Blocks.
pub(super) fn for_each_piece(
    path: &Path,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut piece = Vec::new();
    for at in (0..size).step_by(RUN) {
        read_at(&file, at, (RUN as u64).min(size - at), &mut piece)?;
        if !is_zero(&piece) {
            each(at, &piece)?;
        }
    }
    Ok(())
}

/// Share of the non-zero blocks of `image` that stand anywhere in `library`, by their fingerprints. Blocks.
pub(super) fn present_share(library: &Path, image: &Path) -> io::Result<f64> {
    let known: std::collections::HashSet<_> = prints(library)?.into_iter().collect();
    let wanted = prints(image)?;
    let found = wanted.iter().filter(|print| known.contains(*print)).count();
    #[expect(clippy::cast_precision_loss, reason = "blocks of an image")]
    let share = found as f64 / wanted.len().max(1) as f64;
    Ok(share)
}

/// Sixteen bytes of the fingerprint of each non-zero block: enough to count by.
fn prints(path: &Path) -> io::Result<Vec<[u8; 16]>> {
    let mut prints = Vec::new();
    for_each_piece(path, |_, piece| {
        for block in piece.chunks(BLOCK).filter(|block| !is_zero(block)) {
            let print = flimcd_content::Fingerprint::of(block);
            let mut head = [0; 16];
            head.copy_from_slice(&print.as_bytes()[..16]);
            prints.push(head);
        }
        Ok(())
    })?;
    Ok(prints)
}

/// Bytes that a file takes.
pub(super) fn allocated(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_counted_and_compressed_by_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let before = vec![7_u8; (2 << 20) + 100];
        let mut now = before.clone();
        // A run of two blocks, one alone, one that is zero now, and the short last one.
        now[..2 * BLOCK].fill(1);
        now[100 * BLOCK..101 * BLOCK].fill(2);
        now[200 * BLOCK..201 * BLOCK].fill(0);
        *now.last_mut().unwrap() = 9;
        fs::write(&a, &before).unwrap();
        fs::write(&b, &now).unwrap();
        let found = changed(&a, &b).unwrap();
        assert_eq!((found.blocks, found.bytes), (4, 3 * 4096 + 100));
        assert!(found.compressed_bytes > 0 && found.gathered_bytes < found.compressed_bytes);
        assert!(is_same(&a, &a).unwrap() && !is_same(&a, &b).unwrap());
        assert_eq!(changed(&a, &a).unwrap(), Changed::default());
        assert_eq!(non_zero_bytes(&b).unwrap(), now.len() as u64 - 4096);
        assert!((present_share(&a, &b).unwrap() - 508.0 / 512.0).abs() < 0.01);
    }
}
