//! The file with the fingerprints of an image's chunks.
//!
//! ```text
//! offset  size
//!      0     8  "FLIMLEAF"
//!      8     4  version, 2
//!     12     4  zero
//!     16     8  chunks of the image
//!     24     8  chunks whose fingerprints are here for good
//!     32     8  entries of the content index that were kept then, while it is made
//!     40  4056  zero
//!   4096  32×n  fingerprint of each chunk of 64 KiB (the last may be shorter); zeroes for a chunk of zeroes
//! ```
//! All numbers are little-endian. Runs of zeroes are holes. The file is written in place while an image is read: fingerprints first,
//! durably, then how many there are, so that a restart goes on where it was. Whether the fingerprints are what they
//! were is known by their root, which is in the image's record. Even a wrong one could do no harm: content is only
//! taken after it matched the fingerprint that the source made.

use flimcd_content::{Fingerprint, FingerprintTree, TreeBuilder};
use flimcd_core::ChunkIndex;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

const MAGIC: &[u8; 8] = b"FLIMLEAF";
const VERSION: u32 = 2;
const HEADER_BYTES: u64 = 4096;
/// Bytes of it that say something.
const HEAD: usize = 40;
const LEAF_BYTES: u64 = 32;
/// Fingerprints read at once.
const PIECE: u64 = 8192;

/// See the module.
#[derive(Debug)]
pub(super) struct LeafTable {
    file: File,
    chunks: u64,
    done: u64,
    entries: u64,
}

/// A fingerprint, or none for zeroes.
pub(super) type Leaf = Option<Fingerprint>;

impl LeafTable {
    /// A new file with nothing in it, in the place of what may be there.
    pub(super) fn create(path: &Path, chunks: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len(HEADER_BYTES + chunks * LEAF_BYTES)?;
        let mut table = Self {
            file,
            chunks,
            done: 0,
            entries: 0,
        };
        table.keep(0, 0)?;
        Ok(table)
    }

    /// The file that there is, which must be for so many chunks.
    pub(super) fn open(path: &Path, chunks: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut header = [0; HEAD];
        file.read_exact_at(&mut header, 0)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let fits = header[..8] == MAGIC[..]
            && number(8) == u64::from(VERSION)
            && number(16) == chunks
            && number(24) <= chunks
            && file.metadata()?.len() == HEADER_BYTES + chunks * LEAF_BYTES;
        if !fits {
            let text = "it is not the table of this image, or damaged";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self {
            file,
            chunks,
            done: number(24),
            entries: number(32),
        })
    }

    /// Chunks whose fingerprints are here.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// Entries of the content index that were kept when so many chunks were done.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Chunks of the image.
    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Writes fingerprints; not durable before [`keep`](Self::keep). Zeroes are not written where nothing was.
    pub(super) fn write(&self, first: ChunkIndex, leaves: &[Leaf]) -> io::Result<()> {
        if leaves.iter().all(Option::is_none) {
            return Ok(());
        }
        let zero = [0; Fingerprint::BYTES];
        let bytes: Vec<u8> = leaves
            .iter()
            .flat_map(|leaf| leaf.as_ref().map_or(&zero, Fingerprint::as_bytes))
            .copied()
            .collect();
        self.file
            .write_all_at(&bytes, HEADER_BYTES + first.0 * LEAF_BYTES)
    }

    /// Makes what was written durable, and then that it is there up to `done`.
    pub(super) fn keep(&mut self, done: u64, entries: u64) -> io::Result<()> {
        self.file.sync_data()?;
        let mut header = [0; HEAD];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.chunks.to_le_bytes());
        header[24..32].copy_from_slice(&done.to_le_bytes());
        header[32..].copy_from_slice(&entries.to_le_bytes());
        self.file.write_all_at(&header, 0)?;
        self.file.sync_data()?;
        (self.done, self.entries) = (done, entries);
        Ok(())
    }

    /// One fingerprint.
    pub(super) fn leaf(&self, chunk: ChunkIndex) -> io::Result<Leaf> {
        if chunk.0 >= self.chunks {
            return Ok(None);
        }
        let mut bytes = [0; Fingerprint::BYTES];
        self.file
            .read_exact_at(&mut bytes, HEADER_BYTES + chunk.0 * LEAF_BYTES)?;
        Ok(leaf_of(bytes))
    }

    /// Reads all fingerprints in order, and returns their tree.
    pub(super) fn read_all(
        &self,
        each: impl FnMut(ChunkIndex, Leaf),
    ) -> io::Result<FingerprintTree> {
        self.read_first(self.chunks, each)
    }

    /// Reads the first fingerprints in order, and returns their tree.
    pub(super) fn read_first(
        &self,
        chunks: u64,
        mut each: impl FnMut(ChunkIndex, Leaf),
    ) -> io::Result<FingerprintTree> {
        let mut tree = TreeBuilder::default();
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < chunks {
            let count = PIECE.min(chunks - at);
            buffer.resize(
                usize::try_from(count * LEAF_BYTES).map_err(io::Error::other)?,
                0,
            );
            self.file
                .read_exact_at(&mut buffer, HEADER_BYTES + at * LEAF_BYTES)?;
            let (leaves, _) = buffer.as_chunks::<{ Fingerprint::BYTES }>();
            for (chunk, bytes) in (at..).zip(leaves) {
                let leaf = leaf_of(*bytes);
                tree.push(leaf);
                each(ChunkIndex(chunk), leaf);
            }
            at += count;
        }
        Ok(tree.finish())
    }
}

fn leaf_of(bytes: [u8; Fingerprint::BYTES]) -> Leaf {
    (bytes != [0; Fingerprint::BYTES]).then(|| Fingerprint::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_there_again_and_other_tables_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let leaf = |n: u8| Some(Fingerprint::of(&[n]));
        let mut table = LeafTable::create(&path, 100).unwrap();
        table
            .write(ChunkIndex(3), &[leaf(1), None, leaf(2)])
            .unwrap();
        table.keep(50, 7).unwrap();
        let table = LeafTable::open(&path, 100).unwrap();
        assert_eq!(
            (table.done(), table.chunks(), table.entries()),
            (50, 100, 7)
        );
        assert_eq!(table.leaf(ChunkIndex(5)).unwrap(), leaf(2));
        assert_eq!(table.leaf(ChunkIndex(100)).unwrap(), None);
        let mut found = Vec::new();
        let tree = table
            .read_all(|chunk, leaf| found.extend(leaf.map(|leaf| (chunk.0, leaf))))
            .unwrap();
        assert_eq!(found, [(3, leaf(1).unwrap()), (5, leaf(2).unwrap())]);
        assert!(tree.root().is_some());
        assert!(LeafTable::open(&path, 101).is_err());
        std::fs::write(&path, b"short").unwrap();
        assert!(LeafTable::open(&path, 100).is_err());
    }
}
