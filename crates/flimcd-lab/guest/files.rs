//! The files that the load writes to, and memory to read them past the page cache with.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::stamp::{self, BLOCK_BYTES, Stamp};

/// As on x86-64; std has no name for it.
pub(crate) const O_DIRECT: i32 = 0x4000;
/// Blocks of a [`Run`].
pub(crate) const RUN_BLOCKS: usize = 256;

/// A block's memory as `O_DIRECT` wants it.
#[repr(align(4096))]
pub(crate) struct Page(pub(crate) [u8; BLOCK_BYTES]);

impl Page {
    pub(crate) fn boxed() -> Box<Self> {
        Box::new(Self([0; BLOCK_BYTES]))
    }
}

/// Many blocks, aligned likewise: what `verify` reads at once.
pub(crate) struct Run {
    bytes: Vec<u8>,
    at: usize,
}

impl Run {
    pub(crate) fn new() -> Self {
        let bytes = vec![0; (RUN_BLOCKS + 1) * BLOCK_BYTES];
        let at = bytes.as_ptr().align_offset(BLOCK_BYTES).min(BLOCK_BYTES);
        Self { bytes, at }
    }

    pub(crate) fn blocks(&mut self, count: usize) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + count * BLOCK_BYTES]
    }
}

/// A file that the load writes to.
pub(crate) struct DataFile {
    pub(crate) path: PathBuf,
    /// As the stamps in it say.
    pub(crate) id: u64,
    pub(crate) buffered: File,
    pub(crate) direct: File,
    pub(crate) blocks: u64,
}

/// What is known of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) seq: u64,
    pub(crate) is_being_written: bool,
}

impl DataFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let buffered = options.open(path)?;
        // Not every file system has it; then reads may come from the page cache.
        let direct = options
            .custom_flags(O_DIRECT)
            .open(path)
            .or_else(|_| File::open(path))?;
        let blocks = buffered.metadata()?.len() / BLOCK_BYTES as u64;
        let mut page = Page::boxed();
        buffered.read_exact_at(&mut page.0, 0)?;
        let id = stamp::read(&page.0).map(|stamp| stamp.file);
        let no_stamp =
            || io::Error::other(format!("{} holds no blocks of the load", path.display()));
        Ok(Self {
            path: path.to_owned(),
            id: id.ok_or_else(no_stamp)?,
            buffered,
            direct,
            blocks,
        })
    }

    /// The versions of all blocks: all 0, or as found if the file has been in use.
    pub(crate) fn scan(&self, is_used: bool) -> io::Result<Vec<Known>> {
        let mut known = Vec::new();
        let mut run = Run::new();
        for block in 0..self.blocks {
            let offset = usize::try_from(block).map_err(io::Error::other)? % RUN_BLOCKS;
            let mut seq = 0;
            if is_used {
                if offset == 0 {
                    let count = (self.blocks - block).min(RUN_BLOCKS as u64);
                    let bytes = run.blocks(usize::try_from(count).map_err(io::Error::other)?);
                    self.direct
                        .read_exact_at(bytes, block * BLOCK_BYTES as u64)?;
                }
                let got = &run.blocks(RUN_BLOCKS)[offset * BLOCK_BYTES..][..BLOCK_BYTES];
                seq = stamp::read(got).map_or(0, |stamp| stamp.seq);
                if !self.is_right(
                    Stamp {
                        file: self.id,
                        block,
                        seq,
                    },
                    got,
                ) {
                    return Err(io::Error::other("the disk is not as the load left it"));
                }
            }
            known.push(Known {
                seq,
                is_being_written: false,
            });
        }
        Ok(known)
    }

    pub(crate) fn is_right(&self, want: Stamp, got: &[u8]) -> bool {
        if is_filled(want, got) {
            return true;
        }
        let path = self.path.display();
        match stamp::read(got) {
            Some(found) if found == want => println!("BAD {path}: {want:?} with other bytes"),
            found => println!("BAD {path}: {want:?} expected, found {found:?}"),
        }
        false
    }
}

pub(crate) fn is_filled(want: Stamp, got: &[u8]) -> bool {
    let mut expected = [0; BLOCK_BYTES];
    stamp::fill(want, &mut expected);
    expected == got
}
