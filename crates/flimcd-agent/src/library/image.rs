//! An image file as the library knows it: which file it is, whether it is still the same, and its fingerprints.

use flimcd_content::{Fingerprint, is_zero};
use flimcd_core::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockIndex, CHUNK_SIZE, ChunkIndex, VolumeSize};
use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use super::{
    index::IndexBuilder,
    table::{Leaf, LeafTable},
};

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

    /// The same file, though it may have been written.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode, self.size_bytes) == (other.device, other.inode, other.size_bytes)
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
}

/// Opens a file that may become an image.
pub(super) fn open(path: &Path) -> Result<(File, Identity), ImageError> {
    let name = || path.display().to_string();
    let failed = |source| ImageError::Open {
        path: name(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ImageError::NotAFile { path: name() });
    }
    let identity = Identity::of(&file).map_err(failed)?;
    if VolumeSize::new(identity.size_bytes).is_err() {
        return Err(ImageError::Size { path: name() });
    }
    Ok((file, identity))
}

/// Whether a file begins as a qcow2 image does.
pub(super) fn is_qcow2(file: &File) -> io::Result<bool> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == *QCOW2),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// How reading an image ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scanned {
    /// All of it was read.
    Whole,
    /// Asked to stop; what was read is kept.
    Stopped,
}

/// Fills the table and the index from the image, from where the table is filled on. `go_on` is told how many chunks are done, and
/// says whether to go on.
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
            table.keep(at, index.keep()?)?;
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
        table.write(ChunkIndex(at), &leaves(bytes, at * BLOCKS_PER_CHUNK, index))?;
        at = end;
        if at - table.done() >= KEEP_CHUNKS {
            table.keep(at, index.keep()?)?;
        }
    }
    table.keep(at, index.keep()?)?;
    go_on(at);
    Ok(Scanned::Whole)
}

/// The fingerprint of each chunk of `bytes`, of which the first block is `first`. Those of its blocks go into the index.
fn leaves(bytes: &[u8], first: u64, index: &mut IndexBuilder) -> Vec<Leaf> {
    let length = |bytes: u64| usize::try_from(bytes).expect("at most 64 KiB");
    let mut blocks = Vec::new();
    let chunks = bytes.chunks(length(CHUNK_SIZE));
    let leaf = |(at, chunk): (u64, &[u8])| {
        if is_zero(chunk) {
            return None;
        }
        blocks.clear();
        for (at, block) in (at..).zip(chunk.chunks(length(BLOCK_SIZE))) {
            let fingerprint = Fingerprint::of_block(block);
            blocks.push(fingerprint);
            if fingerprint != Fingerprint::ZERO_BLOCK {
                index.push(fingerprint.block_prefix(), BlockIndex(at));
            }
        }
        Some(Fingerprint::over(&blocks))
    };
    let firsts = (first..).step_by(length(BLOCKS_PER_CHUNK));
    firsts.zip(chunks).map(leaf).collect()
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
    use super::{super::index::ContentIndex, *};

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
        let whole = dir.path().join("whole");
        let mut table = LeafTable::create(&whole, 101).unwrap();
        let index = dir.path().join("whole.index");
        let mut builder = IndexBuilder::resume(&index, 0).unwrap();
        let scanned = scan(&file, &mut table, &mut builder, |_| true);
        assert_eq!(scanned.unwrap(), Scanned::Whole);
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

        let root = expected.root().unwrap();
        builder.finish(root).unwrap();
        let found = ContentIndex::open(&index, root).unwrap();
        for (at, block) in (0..).zip(bytes.chunks(4096)) {
            let place = found.lookup(Fingerprint::of_block(block).block_prefix());
            assert_eq!(place.is_some(), !is_zero(block), "{at}");
            if let Some(place) = place {
                let place = usize::try_from(place.0).unwrap() * 4096;
                assert_eq!(&bytes[place..bytes.len().min(place + 4096)], block);
            }
        }

        let path = dir.path().join("resumed");
        let resumed = dir.path().join("resumed.index");
        let mut table = LeafTable::create(&path, 101).unwrap();
        for _ in 0..200 {
            let mut steps = 0;
            let mut builder = IndexBuilder::resume(&resumed, table.entries()).unwrap();
            let scanned = scan(&file, &mut table, &mut builder, |_| {
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
        let builder = IndexBuilder::resume(&resumed, table.entries()).unwrap();
        builder.finish(root).unwrap();
        assert_eq!(
            std::fs::read(&resumed).unwrap(),
            std::fs::read(&index).unwrap()
        );
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let check = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            open(&path).map(|_| ()).unwrap_err().to_string()
        };
        assert!(check(b"").contains("empty"));
        assert!(open(dir.path()).is_err() && open(&dir.path().join("none")).is_err());
        std::fs::write(&path, b"abc").unwrap();
        let (file, identity) = open(&path).unwrap();
        assert_eq!(identity.chunks(), 1);
        assert!(!is_qcow2(&file).unwrap());
        std::fs::write(&path, b"QFI\xfb and more").unwrap();
        assert!(is_qcow2(&open(&path).unwrap().0).unwrap());
    }
}
