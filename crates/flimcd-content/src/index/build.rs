//! Making an index, with bounded memory: sorted runs in files beside it, merged at the end.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Seek, Write},
    path::{Path, PathBuf},
};

use flimcd_core::BlockIndex;
use flimcd_wire::BlockPrefix;

use super::{ENTRY_BYTES, Entry, HEADER_BYTES, PAGE_ENTRIES, header};
use crate::Fingerprint;

/// Entries that are sorted in memory: 32 MiB, 8 GiB of content.
const RUN_ENTRIES: usize = 2 << 20;

/// Takes blocks in any order and makes an index of them. What it has written is removed when it is dropped before it was finished.
#[derive(Debug)]
pub struct IndexBuilder {
    path: PathBuf,
    entries: Vec<Entry>,
    runs: Vec<File>,
    run_entries: usize,
}

impl IndexBuilder {
    /// A builder of the index at `path`, which it replaces at the end.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self::with_runs_of(path, RUN_ENTRIES)
    }

    pub(super) fn with_runs_of(path: &Path, run_entries: usize) -> Self {
        Self {
            path: path.to_owned(),
            entries: Vec::new(),
            runs: Vec::new(),
            run_entries,
        }
    }

    /// Such a block is there.
    ///
    /// # Errors
    /// When a sorted run cannot be written.
    pub fn push(&mut self, prefix: BlockPrefix, block: BlockIndex) -> io::Result<()> {
        self.entries.push(Entry {
            prefix: prefix.0,
            block: block.0,
        });
        if self.entries.len() >= self.run_entries {
            self.spill()?;
        }
        Ok(())
    }

    fn beside(&self, what: &str) -> PathBuf {
        let mut name: OsString = self.path.clone().into();
        name.push(what);
        name.into()
    }

    fn spill(&mut self) -> io::Result<()> {
        self.entries.sort_unstable();
        let path = self.beside(".run");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        // Gone with the file, however this ends.
        fs::remove_file(&path)?;
        let mut out = BufWriter::new(file);
        for entry in self.entries.drain(..) {
            out.write_all(&entry.to_bytes())?;
        }
        let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        self.runs.push(file);
        Ok(())
    }

    /// Writes the index durably, under its name. It is of a content whose fingerprint tree has this root.
    ///
    /// # Errors
    /// When it cannot be written; what was there under the name is still there then.
    pub fn finish(mut self, root: Fingerprint) -> io::Result<()> {
        self.entries.sort_unstable();
        let last = std::mem::take(&mut self.entries);
        let mut sources: Vec<Box<dyn Iterator<Item = io::Result<Entry>>>> =
            vec![Box::new(last.into_iter().map(Ok))];
        for run in std::mem::take(&mut self.runs) {
            sources.push(Box::new(read_run(BufReader::new(run))));
        }
        let temporary = self.beside(".tmp");
        let written = write(&temporary, sources, root);
        if written.is_err() {
            // Only what is half written.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        fs::rename(&temporary, &self.path)
    }
}

fn read_run(mut run: BufReader<File>) -> impl Iterator<Item = io::Result<Entry>> {
    std::iter::from_fn(move || {
        let mut bytes = [0; ENTRY_BYTES];
        match run.read_exact(&mut bytes) {
            Ok(()) => Some(Ok(Entry::of_bytes(bytes))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => Some(Err(error)),
        }
    })
}

fn write(
    path: &Path,
    mut sources: Vec<Box<dyn Iterator<Item = io::Result<Entry>>>>,
    root: Fingerprint,
) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let header_bytes = usize::try_from(HEADER_BYTES).map_err(io::Error::other)?;
    out.write_all(&vec![0; header_bytes])?;
    let mut heap = BinaryHeap::new();
    for (number, source) in sources.iter_mut().enumerate() {
        if let Some(entry) = source.next() {
            heap.push(Reverse((entry?, number)));
        }
    }
    let (mut entries, mut fences) = (0usize, Vec::new());
    let mut last = None;
    while let Some(Reverse((entry, number))) = heap.pop() {
        if let Some(next) = sources[number].next() {
            heap.push(Reverse((next?, number)));
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
        out.write_all(&fence.to_le_bytes())?;
    }
    let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    file.write_all(&header(entries as u64, root))?;
    file.sync_all()
}
