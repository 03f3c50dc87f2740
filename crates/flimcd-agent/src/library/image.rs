//! An image file as the library knows it: which file it is, whether it is still the same, and its fingerprints.

use flimcd_content::{Fingerprint, IndexBuilder, is_zero};
use flimcd_core::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, VolumeSize};
use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use super::table::{Leaf, LeafTable};

/// Read at once: 1 MiB.
const PIECE_CHUNKS: u64 = 16;
/// What was found is made durable after so many chunks: 1 GiB.
const KEEP_CHUNKS: u64 = 16 * 1024;
/// First bytes of a qcow2 image.
const QCOW2: &[u8; 4] = b"QFI\xfb";

/// Tells that a file is the one it was, and was not written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) size_bytes: u64,
    device: u64,
    inode: u64,
    modified_s: i64,
    modified_ns: i64,
    changed_s: i64,
    changed_ns: i64,
}

impl Identity {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let data = file.metadata()?;
        Ok(Self {
            size_bytes: data.len(),
            device: data.dev(),
            inode: data.ino(),
            modified_s: data.mtime(),
            modified_ns: data.mtime_nsec(),
            changed_s: data.ctime(),
            changed_ns: data.ctime_nsec(),
        })
    }

    pub(super) fn chunks(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_SIZE)
    }
}

/// Why a file cannot be an image of the library.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    #[error("{path} cannot be read: {source}")]
    Open { path: String, source: io::Error },
    #[error("{path} is not a regular file")]
    NotAFile { path: String },
    #[error("{path} is empty or too large for an image")]
    Size { path: String },
    #[error("{path} is a qcow2 image, and the library compares what guests see")]
    Qcow2 { path: String },
}

/// Opens a file that may become an image.
pub(super) fn open(path: &Path) -> Result<(File, Identity), ImageError> {
    let name = || path.display().to_string();
    let failed = |source| ImageError::Open {
        path: name(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ImageError::NotAFile { path: name() });
    }
    let identity = Identity::of(&file).map_err(failed)?;
    if VolumeSize::new(identity.size_bytes).is_err() {
        return Err(ImageError::Size { path: name() });
    }
    let mut magic = [0; 4];
    if identity.size_bytes >= 4 {
        file.read_exact(&mut magic).map_err(failed)?;
    }
    if magic == *QCOW2 {
        return Err(ImageError::Qcow2 { path: name() });
    }
    Ok((file, identity))
}

/// How reading an image ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scanned {
    /// All of it was read.
    Whole,
    /// Asked to stop; what was read is kept.
    Stopped,
}

/// Fills the table from the image, from where it is filled on, and tells the index of all blocks on the way. `go_on` is told how
/// many chunks are done, and says whether to go on.
pub(super) fn scan(
    image: &File,
    table: &mut LeafTable,
    index: &mut IndexBuilder,
    mut go_on: impl FnMut(u64) -> bool,
) -> io::Result<Scanned> {
    let size = image.metadata()?.len();
    // Only a hint to the system.
    let _ = fadvise(image, 0, None, Advice::Sequential);
    let mut buffer = vec![0; usize::try_from(PIECE_CHUNKS * CHUNK_SIZE).map_err(io::Error::other)?];
    let mut at = table.done();
    while at < table.chunks() {
        if !go_on(at) {
            table.keep(at)?;
            return Ok(Scanned::Stopped);
        }
        let next = next_data(image, at * CHUNK_SIZE, size)? / CHUNK_SIZE;
        if next > at {
            at = next.min(table.chunks());
            continue;
        }
        // Kept at round numbers.
        let end = (at / PIECE_CHUNKS + 1) * PIECE_CHUNKS;
        let end = end.min(table.chunks());
        let (from, to) = (at * CHUNK_SIZE, (end * CHUNK_SIZE).min(size));
        let bytes = &mut buffer[..usize::try_from(to - from).map_err(io::Error::other)?];
        image.read_exact_at(bytes, from)?;
        table.write(ChunkIndex(at), &leaves(ChunkIndex(at), bytes, index)?)?;
        at = end;
        if at - table.done() >= KEEP_CHUNKS {
            table.keep(at)?;
        }
    }
    table.keep(at)?;
    go_on(at);
    Ok(Scanned::Whole)
}

/// Tells the index of the blocks of a whole image, whose table is made already.
pub(super) fn index(
    image: &File,
    index: &mut IndexBuilder,
    mut go_on: impl FnMut() -> bool,
) -> io::Result<Scanned> {
    let size = image.metadata()?.len();
    let mut buffer = vec![0; usize::try_from(PIECE_CHUNKS * CHUNK_SIZE).map_err(io::Error::other)?];
    let mut at = 0;
    while at < size {
        if !go_on() {
            return Ok(Scanned::Stopped);
        }
        at = at.max(next_data(image, at, size)? / CHUNK_SIZE * CHUNK_SIZE);
        let length = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX);
        let length = length.min(buffer.len());
        let bytes = &mut buffer[..length];
        image.read_exact_at(bytes, at)?;
        leaves(ChunkIndex(at / CHUNK_SIZE), bytes, index)?;
        at += (length as u64).max(1);
    }
    Ok(Scanned::Whole)
}

/// The fingerprint of each chunk of `bytes`, which begin with the chunk `first`; the index is told of the blocks.
fn leaves(first: ChunkIndex, bytes: &[u8], index: &mut IndexBuilder) -> io::Result<Vec<Leaf>> {
    let chunk_bytes = usize::try_from(CHUNK_SIZE).expect("64 KiB");
    let block_bytes = usize::try_from(BLOCK_SIZE).expect("4 KiB");
    let mut leaves = Vec::new();
    for (chunk, bytes) in (first.0..).map(ChunkIndex).zip(bytes.chunks(chunk_bytes)) {
        let mut blocks = Vec::with_capacity(bytes.len().div_ceil(block_bytes));
        let mut is_all_zero = true;
        for (block, bytes) in chunk.blocks().iter().zip(bytes.chunks(block_bytes)) {
            let fingerprint = Fingerprint::of_block(bytes);
            if !is_zero(bytes) {
                is_all_zero = false;
                index.push(fingerprint.block_prefix(), block)?;
            }
            blocks.push(fingerprint);
        }
        leaves.push((!is_all_zero).then(|| Fingerprint::over(&blocks)));
    }
    Ok(leaves)
}

/// Where data begins, at or after `at`. File systems that cannot tell say that it is all data.
pub(super) fn next_data(image: &File, at: u64, size: u64) -> io::Result<u64> {
    match seek(image, SeekFrom::Data(at)) {
        Ok(data) => Ok(data),
        Err(rustix::io::Errno::NXIO) => Ok(size.next_multiple_of(CHUNK_SIZE)),
        Err(_) => Ok(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = vec![0u8; 100 * 65536 + 1000];
        for chunk in [0usize, 7, 30, 31, 99] {
            let first = chunk * 65536;
            for (at, byte) in (0u8..=255).cycle().zip(&mut bytes[first..first + 5000]) {
                *byte = at ^ u8::try_from(chunk).unwrap();
            }
        }
        bytes[100 * 65536 + 999] = 9;
        bytes
    }

    #[test]
    fn a_scan_can_be_stopped_and_goes_on_and_finds_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = sample();
        std::fs::write(&path, &bytes).unwrap();
        let (file, identity) = open(&path).unwrap();
        assert_eq!(identity.chunks(), 101);
        let index = || IndexBuilder::new(&dir.path().join("index"));
        let whole = dir.path().join("whole");
        let mut table = LeafTable::create(&whole, 101).unwrap();
        assert_eq!(
            scan(&file, &mut table, &mut index(), |_| true).unwrap(),
            Scanned::Whole
        );
        let expected = table.read_all(|_, _| {}).unwrap();
        for chunk in 0..101 {
            let start = chunk * 65536;
            let content = &bytes[start..bytes.len().min(start + 65536)];
            let leaf = (!is_zero(content)).then(|| Fingerprint::of_run(content));
            assert_eq!(
                table.leaf(ChunkIndex(chunk as u64)).unwrap(),
                leaf,
                "{chunk}"
            );
        }

        let path = dir.path().join("resumed");
        let mut table = LeafTable::create(&path, 101).unwrap();
        for _ in 0..200 {
            let mut steps = 0;
            let scanned = scan(&file, &mut table, &mut index(), |_| {
                steps += 1;
                steps <= 2
            });
            table = LeafTable::open(&path, 101).unwrap();
            if scanned.unwrap() == Scanned::Whole {
                break;
            }
        }
        assert_eq!(table.done(), 101);
        assert_eq!(table.read_all(|_, _| {}).unwrap(), expected);
        assert_eq!(Identity::of(&file).unwrap(), identity);
    }

    #[test]
    fn what_is_no_raw_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let check = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            open(&path).map(|_| ()).unwrap_err().to_string()
        };
        assert!(check(b"QFI\xfb and more").contains("qcow2"));
        assert!(check(b"").contains("empty"));
        assert!(open(dir.path()).is_err() && open(&dir.path().join("none")).is_err());
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(open(&path).unwrap().1.chunks(), 1);
    }
}
