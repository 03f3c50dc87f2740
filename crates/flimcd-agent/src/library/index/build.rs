//! Making an index, with bounded memory: what is found is kept in sorted pieces, which are merged at the end.
//!
//! The pieces are one after the other in a file beside the index. Each of them ascends, so that a piece begins where an entry is
//! less than the one before it; nothing else is recorded. A scan that is stopped, or killed, goes on behind the
//! entries that its checkpoint speaks of.

use flimcd_content::Fingerprint;
use flimcd_core::BlockIndex;
use flimcd_wire::BlockPrefix;
use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Seek, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{ENTRY_BYTES, Entry, HEADER_BYTES, PAGE_ENTRIES, PREFIX_BYTES, header};

/// Entries of each piece that are in memory while pieces are merged: 1,024 pieces, 1 TiB of content, take 13 MiB.
const BUFFER_ENTRIES: usize = 1024;

/// Takes blocks in any order and makes an index of them. What was kept stays when it is dropped, for one that goes on.
#[derive(Debug)]
pub(in super::super) struct IndexBuilder {
    path: PathBuf,
    log: File,
    /// Entries in the file.
    kept: u64,
    /// Those since then.
    entries: Vec<Entry>,
}

/// Where the entries are while an index is made.
fn log_path(index: &Path) -> PathBuf {
    beside(index, ".part")
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let mut name: OsString = path.to_owned().into();
    name.push(what);
    name.into()
}

/// Removes an index, and what there is of one that is being made.
pub(in super::super) fn remove(path: &Path) -> io::Result<()> {
    for path in [path.to_owned(), log_path(path), beside(path, ".tmp")] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl IndexBuilder {
    /// Begins an index that is to be at `path`, or goes on behind the first `kept` entries.
    ///
    /// [`io::ErrorKind::InvalidData`] when there are not so many.
    pub(in super::super) fn resume(path: &Path, kept: u64) -> io::Result<Self> {
        let log = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(log_path(path))?;
        let bytes = kept.checked_mul(ENTRY_BYTES as u64);
        let bytes = bytes.filter(|bytes| log.metadata().is_ok_and(|data| *bytes <= data.len()));
        let Some(bytes) = bytes else {
            let text = "what was found before is not all there";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        };
        log.set_len(bytes)?;
        Ok(Self {
            path: path.to_owned(),
            log,
            kept,
            entries: Vec::new(),
        })
    }

    /// Such a block is there.
    pub(in super::super) fn push(&mut self, prefix: BlockPrefix, block: BlockIndex) {
        self.entries.push(Entry {
            prefix: prefix.0,
            block: block.0,
        });
    }

    /// Makes what was pushed durable, and says how many entries there are.
    pub(in super::super) fn keep(&mut self) -> io::Result<u64> {
        self.entries.sort_unstable();
        self.log
            .seek(io::SeekFrom::Start(self.kept * ENTRY_BYTES as u64))?;
        let mut out = BufWriter::new(&self.log);
        for entry in &self.entries {
            out.write_all(&entry.to_bytes())?;
        }
        out.flush()?;
        drop(out);
        self.log.sync_data()?;
        self.kept += self.entries.len() as u64;
        self.entries.clear();
        Ok(self.kept)
    }

    /// Writes the index durably, under its name. It is of a content whose fingerprint tree has this root. With an error what
    /// was there under the name is still there.
    pub(in super::super) fn finish(mut self, root: Fingerprint) -> io::Result<()> {
        self.keep()?;
        let pieces = pieces(&self.log, self.kept)?;
        let temporary = beside(&self.path, ".tmp");
        let written = write(&temporary, pieces, root);
        if written.is_err() {
            // Only what is half written.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        fs::rename(&temporary, &self.path)?;
        fs::remove_file(log_path(&self.path))
    }
}

/// Entries that ascend, in a file.
struct Piece<'a> {
    log: &'a File,
    at: u64,
    end: u64,
    /// Those that were read, the last one first.
    read: Vec<Entry>,
}

impl Piece<'_> {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        if self.read.is_empty() {
            let count = (self.end - self.at).min(BUFFER_ENTRIES as u64);
            self.read = read(self.log, self.at, count)?;
            self.read.reverse();
            self.at += count;
        }
        Ok(self.read.pop())
    }
}

fn read(log: &File, at: u64, count: u64) -> io::Result<Vec<Entry>> {
    let count = usize::try_from(count).map_err(io::Error::other)?;
    let mut bytes = vec![0; count * ENTRY_BYTES];
    log.read_exact_at(&mut bytes, at * ENTRY_BYTES as u64)?;
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    Ok(entries
        .iter()
        .map(|bytes| Entry::of_bytes(*bytes))
        .collect())
}

/// Finds the pieces.
fn pieces(log: &File, entries: u64) -> io::Result<Vec<Piece<'_>>> {
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    let (mut at, mut last) = (0, None);
    while at < entries {
        let count = (entries - at).min(16 * BUFFER_ENTRIES as u64);
        for (at, entry) in (at..).zip(read(log, at, count)?) {
            match pieces.last_mut() {
                Some(piece) if last <= Some(entry) => piece.end = at + 1,
                _ => pieces.push(Piece {
                    log,
                    at,
                    end: at + 1,
                    read: Vec::new(),
                }),
            }
            last = Some(entry);
        }
        at += count;
    }
    Ok(pieces)
}

fn write(path: &Path, mut pieces: Vec<Piece<'_>>, root: Fingerprint) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let header_bytes = usize::try_from(HEADER_BYTES).map_err(io::Error::other)?;
    out.write_all(&vec![0; header_bytes])?;
    let mut heap = BinaryHeap::new();
    for (number, piece) in pieces.iter_mut().enumerate() {
        if let Some(entry) = piece.next()? {
            heap.push(Reverse((entry, number)));
        }
    }
    let (mut entries, mut fences) = (0usize, Vec::new());
    let mut last = None;
    while let Some(Reverse((entry, number))) = heap.pop() {
        if let Some(next) = pieces[number].next()? {
            heap.push(Reverse((next, number)));
        }
        // One place is enough.
        if last.replace(entry.prefix) == Some(entry.prefix) {
            continue;
        }
        if entries % PAGE_ENTRIES == 0 {
            fences.push(entry.prefix);
        }
        out.write_all(&entry.to_bytes())?;
        entries += 1;
    }
    for fence in fences {
        out.write_all(&fence.to_le_bytes()[..PREFIX_BYTES])?;
    }
    let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    file.write_all(&header(entries as u64, root))?;
    file.sync_all()
}
