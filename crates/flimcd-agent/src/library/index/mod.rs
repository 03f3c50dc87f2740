//! The content index of a file: from a block's prefix to a place where such a block is.
//!
//! ```text
//! offset  size
//!      0     8  "FLIMINDX"
//!      8     4  version, 1
//!     12     4  zero
//!     16     8  entries
//!     24    32  what it is the index of: the root of the file's fingerprint tree
//!     56     4  CRC-32C of bytes 0 to 56
//!     60  4036  zero
//!   4096  4095  page of 315 entries, 13 bytes each: prefix (8), block (5); ascending; the last page may be short
//!      …
//!      …   8×p  the first prefix of each page
//! ```
//! All numbers are little-endian. An image of n blocks that are not zero takes 13 n bytes and 0.2% of that: 0.32% of its size. Resident are
//! the first prefixes of the pages, 7 MiB per TiB; a look-up reads one page.
//!
//! What it says is a hint. Content that was found by it is read and compared before it is used, so that entries that are damaged
//! or old are misses and nothing worse; that is why they have no checksums. Only a file that cannot be an
//! index at all, or is of another content, is refused.

mod build;

use flimcd_content::Fingerprint;
use flimcd_core::BlockIndex;
use flimcd_wire::BlockPrefix;
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

pub(super) use build::{IndexBuilder, remove};

const MAGIC: &[u8; 8] = b"FLIMINDX";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
/// Bytes of the header that say something.
const HEAD: usize = 60;
const ENTRY_BYTES: usize = 13;
const PREFIX_BYTES: usize = 8;
const PAGE_ENTRIES: usize = 315;
const PAGE_BYTES: usize = PAGE_ENTRIES * ENTRY_BYTES;

/// One block of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    prefix: u64,
    /// Five bytes of it are kept.
    block: u64,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..PREFIX_BYTES].copy_from_slice(&self.prefix.to_le_bytes());
        bytes[PREFIX_BYTES..]
            .copy_from_slice(&self.block.to_le_bytes()[..ENTRY_BYTES - PREFIX_BYTES]);
        bytes
    }

    fn of_bytes(bytes: [u8; ENTRY_BYTES]) -> Self {
        let (mut prefix, mut block) = ([0; 8], [0; 8]);
        prefix.copy_from_slice(&bytes[..PREFIX_BYTES]);
        block[..ENTRY_BYTES - PREFIX_BYTES].copy_from_slice(&bytes[PREFIX_BYTES..]);
        Self {
            prefix: u64::from_le_bytes(prefix),
            block: u64::from_le_bytes(block),
        }
    }
}

fn header(entries: u64, root: Fingerprint) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&entries.to_le_bytes());
    bytes[24..56].copy_from_slice(root.as_bytes());
    let crc = crc32c::crc32c(&bytes[..56]);
    bytes[56..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Bytes of a whole file.
fn length(entries: u64) -> Option<u64> {
    let pages = entries.div_ceil(PAGE_ENTRIES as u64);
    let fences = pages.checked_mul(PREFIX_BYTES as u64)?;
    HEADER_BYTES
        .checked_add(entries.checked_mul(ENTRY_BYTES as u64)?)?
        .checked_add(fences)
}

/// See the module.
#[derive(Debug)]
pub(super) struct ContentIndex {
    file: File,
    entries: u64,
    /// The first prefix of each page.
    fences: Vec<u64>,
}

impl ContentIndex {
    /// Opens the index of a file whose fingerprint tree has this root.
    /// [`io::ErrorKind::InvalidData`] when it is damaged, or of another content.
    pub(super) fn open(path: &Path, root: Fingerprint) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidData, text);
        let file = File::open(path)?;
        let mut found = [0; HEAD];
        file.read_exact_at(&mut found, 0)?;
        let mut entries = [0; 8];
        entries.copy_from_slice(&found[16..24]);
        let entries = u64::from_le_bytes(entries);
        if found != header(entries, root) {
            return Err(invalid("it is damaged, or the index of another content"));
        }
        if Some(file.metadata()?.len()) != length(entries) {
            return Err(invalid("its length is wrong"));
        }
        let pages = entries.div_ceil(PAGE_ENTRIES as u64);
        let pages = usize::try_from(pages).map_err(io::Error::other)?;
        let mut bytes = vec![0; pages * PREFIX_BYTES];
        file.read_exact_at(&mut bytes, HEADER_BYTES + entries * ENTRY_BYTES as u64)?;
        let (fences, _) = bytes.as_chunks::<PREFIX_BYTES>();
        Ok(Self {
            file,
            entries,
            fences: fences
                .iter()
                .map(|&bytes| u64::from_le_bytes(bytes))
                .collect(),
        })
    }

    /// A place where such a block is; the lowest one, if there are several. None when there is none, or the index cannot be read.
    pub(super) fn lookup(&self, prefix: BlockPrefix) -> Option<BlockIndex> {
        // The last page that begins below it, and the next, where equal ones go on.
        let page = self.fences.partition_point(|&first| first < prefix.0);
        (page.saturating_sub(1)..=page).find_map(|page| self.lookup_in(page, prefix))
    }

    fn lookup_in(&self, page: usize, prefix: BlockPrefix) -> Option<BlockIndex> {
        let first = (page * PAGE_ENTRIES) as u64;
        let count = self.entries.checked_sub(first)?.min(PAGE_ENTRIES as u64);
        let mut bytes = [0; PAGE_BYTES];
        let bytes = &mut bytes[..usize::try_from(count).ok()? * ENTRY_BYTES];
        let at = HEADER_BYTES + first * ENTRY_BYTES as u64;
        self.file.read_exact_at(bytes, at).ok()?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let at = entries.partition_point(|&entry| Entry::of_bytes(entry).prefix < prefix.0);
        let entry = Entry::of_bytes(*entries.get(at)?);
        (entry.prefix == prefix.0).then_some(BlockIndex(entry.block))
    }

    /// Blocks in it.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        self.fences.capacity() * PREFIX_BYTES
    }
}

#[cfg(test)]
mod tests;
