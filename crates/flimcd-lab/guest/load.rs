//! The load: stamped random writes with a journal, as a database makes them, and checked reads.
//!
//! The writer fills a random block of a random file through the page cache, and after every
//! `sync_every` writes it appends to the journal and waits for journal and data to be on the disk.
//! The reader reads random blocks past the page cache (`O_DIRECT`), so that every read is one of the
//! disk, and compares them with the last write. Which write that was is kept in memory alone: it
//! has to be right after a move just as the disk has.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    files::{DataFile, Known, Page, RUN_BLOCKS, Run, is_filled},
    ram::Ram,
    rng::Rng,
    settings::Settings,
    stamp::{self, BLOCK_BYTES, Stamp},
};

/// The journal is written round and round.
const JOURNAL_BLOCKS: u64 = 256;
const JOURNAL_FILE: u64 = u64::MAX;
/// A load that is so late starts afresh, instead of catching up for ever.
const BEHIND_MAX: Duration = Duration::from_secs(1);

/// What writer, reader and commands share.
struct State {
    known: Vec<Vec<Known>>,
    is_running: bool,
    writes_per_sec: f64,
    reads_per_sec: f64,
    seq: u64,
    reads: u64,
    errors: u64,
    /// Threads in the middle of an operation.
    busy: u32,
    /// Since the line before.
    lap: Lap,
}

#[derive(Clone, Copy, Default)]
struct Lap {
    seq: u64,
    reads: u64,
    worst_write: Duration,
    worst_read: Duration,
}

/// The load and everything it knows.
pub(crate) struct Load {
    files: Vec<DataFile>,
    journal: File,
    state: Mutex<State>,
    changed: Condvar,
    ram: Mutex<Ram>,
    settings: Settings,
}

impl Load {
    /// Opens `/data/load.bin` and `/disks/*/load.bin`. Where a load has run before, reads all of it to
    /// know the blocks' versions again.
    pub(crate) fn open(settings: &Settings) -> io::Result<Arc<Self>> {
        let mut paths = vec![PathBuf::from("/data/load.bin")];
        if let Ok(disks) = fs::read_dir("/disks") {
            let mut more: Vec<PathBuf> = disks
                .filter_map(|disk| Some(disk.ok()?.path().join("load.bin")))
                .filter(|path| path.exists())
                .collect();
            more.sort();
            paths.extend(more);
        }
        Self::open_files(&paths, Path::new("/data/journal.bin"), settings)
    }

    fn open_files(paths: &[PathBuf], journal: &Path, settings: &Settings) -> io::Result<Arc<Self>> {
        let files: Vec<DataFile> = paths
            .iter()
            .map(|path| DataFile::open(path))
            .collect::<io::Result<_>>()?;
        let journal = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(journal)?;
        let is_used = journal.metadata()?.len() > 0;
        if !is_used {
            for block in 0..JOURNAL_BLOCKS {
                journal.write_all_at(&[0; BLOCK_BYTES], block * BLOCK_BYTES as u64)?;
            }
            journal.sync_all()?;
        }
        let mut known = Vec::new();
        for file in &files {
            known.push(file.scan(is_used)?);
        }
        let seq = known.iter().flatten().map(|k| k.seq).max().unwrap_or(0);
        let state = State {
            known,
            is_running: false,
            writes_per_sec: settings.writes_per_sec,
            reads_per_sec: settings.reads_per_sec,
            seq,
            reads: 0,
            errors: 0,
            busy: 0,
            lap: Lap {
                seq,
                ..Lap::default()
            },
        };
        Ok(Arc::new(Self {
            files,
            journal,
            state: Mutex::new(state),
            changed: Condvar::new(),
            ram: Mutex::new(Ram::new(settings.ram_pages)),
            settings: *settings,
        }))
    }

    pub(crate) fn files(&self) -> usize {
        self.files.len()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.files.iter().map(|file| file.blocks).sum()
    }

    /// Starts both threads; they do something once the load runs.
    pub(crate) fn start(self: &Arc<Self>) {
        self.set_running(self.settings.is_started);
        let (writer, reader) = (Arc::clone(self), Arc::clone(self));
        thread::spawn(move || writer.run_writer());
        thread::spawn(move || reader.run_reader());
    }

    /// Runs or stops the load; once stopped, returns when nothing is under way and all is on the disk.
    pub(crate) fn set_running(&self, is_running: bool) {
        let mut state = self.lock();
        state.is_running = is_running;
        self.changed.notify_all();
        if is_running {
            return;
        }
        while state.busy > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.sync_all();
    }

    /// Changes the rates, in operations per second.
    pub(crate) fn set_rates(&self, writes: f64, reads: f64) {
        let mut state = self.lock();
        (state.writes_per_sec, state.reads_per_sec) = (writes, reads);
        self.changed.notify_all();
    }

    /// The line of this second; starts the next.
    pub(crate) fn line(&self, t: Duration) -> String {
        let mut state = self.lock();
        let (seq, reads, lap) = (state.seq, state.reads, state.lap);
        state.lap = Lap {
            seq,
            reads,
            ..Lap::default()
        };
        format!(
            "LOAD t={:.1} seq={seq} iops={} reads={} worst_write_ms={:.1} worst_read_ms={:.1} errors={}",
            t.as_secs_f64(),
            seq - lap.seq,
            reads - lap.reads,
            lap.worst_write.as_secs_f64() * 1e3,
            lap.worst_read.as_secs_f64() * 1e3,
            state.errors
        )
    }

    /// The totals, without starting a new second.
    pub(crate) fn totals(&self) -> String {
        let state = self.lock();
        format!(
            "seq={} reads={} errors={}",
            state.seq, state.reads, state.errors
        )
    }

    /// Counts errors that others found.
    pub(crate) fn add_errors(&self, count: u64) {
        self.lock().errors += count;
    }

    /// Errors so far.
    pub(crate) fn errors(&self) -> u64 {
        self.lock().errors
    }

    /// Reads every block from the disk and checks it, and all memory; the load goes on meanwhile.
    /// Returns blocks and pages checked, and how many were wrong.
    pub(crate) fn verify(&self) -> (u64, u64, u64) {
        let (mut blocks, mut wrong) = (0, 0);
        let mut run = Run::new();
        for file in 0..self.files.len() {
            let all = self.files[file].blocks;
            let mut at = 0;
            while at < all {
                let count = (all - at).min(RUN_BLOCKS as u64);
                wrong += self.check_run(file, at, run.blocks(usize::try_from(count).unwrap_or(0)));
                blocks += count;
                at += count;
            }
        }
        let mut ram = self.lock_ram();
        wrong += ram.verify();
        let pages = ram.pages() as u64;
        drop(ram);
        self.add_errors(wrong);
        (blocks, pages, wrong)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_ram(&self) -> MutexGuard<'_, Ram> {
        self.ram.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sync_all(&self) {
        let failed = std::iter::once(&self.journal)
            .chain(self.files.iter().map(|file| &file.buffered))
            .filter_map(|file| file.sync_all().err());
        for error in failed {
            println!("BAD sync: {error}");
            self.add_errors(1);
        }
    }

    /// Waits until the next operation is due and the load runs; marks this thread as busy.
    fn next_turn(&self, next: &mut Instant, rate: impl Fn(&State) -> f64) {
        let mut state = self.lock();
        loop {
            let per_sec = rate(&state);
            let now = Instant::now();
            if !state.is_running || per_sec <= 0.0 {
                *next = now;
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            } else if now < *next {
                let wait = *next - now;
                state = self
                    .changed
                    .wait_timeout(state, wait)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            } else {
                if now - *next > BEHIND_MAX {
                    *next = now;
                }
                *next += Duration::from_secs_f64(1.0 / per_sec);
                state.busy += 1;
                return;
            }
        }
    }

    fn end_turn(&self, update: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        update(&mut state);
        state.busy -= 1;
        self.changed.notify_all();
    }

    fn run_writer(&self) {
        let mut rng = Rng::new(1);
        let mut page = Page::boxed();
        let mut next = Instant::now();
        loop {
            self.next_turn(&mut next, |state| state.writes_per_sec);
            let start = Instant::now();
            let file = usize::try_from(rng.below(self.files.len() as u64)).unwrap_or(0);
            let block = rng.below(self.files[file].blocks);
            let result = self.write(file, block, &mut page);
            let took = start.elapsed();
            let wrong = self.lock_ram().touch(self.settings.ram_pages_per_write);
            self.end_turn(|state| {
                state.lap.worst_write = state.lap.worst_write.max(took);
                state.errors += wrong;
                if let Err(error) = result {
                    println!("BAD write of block {block}: {error}");
                    state.errors += 1;
                }
            });
        }
    }

    /// Writes the next version of a block, and waits for the disk if it is time to.
    fn write(&self, file: usize, block: u64, page: &mut Page) -> io::Result<()> {
        let at = usize::try_from(block).map_err(io::Error::other)?;
        let seq = {
            let mut state = self.lock();
            state.seq += 1;
            let seq = state.seq;
            state.known[file][at] = Known {
                seq,
                is_being_written: true,
            };
            seq
        };
        let target = &self.files[file];
        stamp::fill(
            Stamp {
                file: target.id,
                block,
                seq,
            },
            &mut page.0,
        );
        let result = target
            .buffered
            .write_all_at(&page.0, block * BLOCK_BYTES as u64);
        self.lock().known[file][at].is_being_written = false;
        result?;
        if seq.is_multiple_of(self.settings.sync_every) {
            let entry = Stamp {
                file: JOURNAL_FILE,
                block,
                seq,
            };
            stamp::fill(entry, &mut page.0);
            let slot = seq / self.settings.sync_every % JOURNAL_BLOCKS;
            self.journal
                .write_all_at(&page.0, slot * BLOCK_BYTES as u64)?;
            self.journal.sync_data()?;
            for file in &self.files {
                file.buffered.sync_data()?;
            }
        }
        Ok(())
    }

    fn run_reader(&self) {
        let mut rng = Rng::new(2);
        let mut page = Page::boxed();
        let mut next = Instant::now();
        loop {
            self.next_turn(&mut next, |state| state.reads_per_sec);
            let start = Instant::now();
            let file = usize::try_from(rng.below(self.files.len() as u64)).unwrap_or(0);
            let block = rng.below(self.files[file].blocks);
            let found = self.check_block(file, block, &mut page);
            let took = start.elapsed();
            self.end_turn(|state| {
                state.reads += 1;
                state.lap.worst_read = state.lap.worst_read.max(took);
                state.errors += u64::from(found == Some(false));
            });
        }
    }

    /// Reads blocks from `start` on at once and compares them; those written meanwhile are looked at
    /// again one by one. Returns how many are wrong.
    fn check_run(&self, file: usize, start: u64, bytes: &mut [u8]) -> u64 {
        let target = &self.files[file];
        let first = usize::try_from(start).unwrap_or(usize::MAX);
        let range = first..first + bytes.len() / BLOCK_BYTES;
        let before = self.lock().known[file][range.clone()].to_vec();
        if target
            .direct
            .read_exact_at(bytes, start * BLOCK_BYTES as u64)
            .is_err()
        {
            // Each block says for itself what is wrong.
            bytes.fill(0);
        }
        let after = self.lock().known[file][range].to_vec();
        let mut page = Page::boxed();
        let mut wrong = 0;
        for (offset, got) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let block = start + offset as u64;
            let want = Stamp {
                file: target.id,
                block,
                seq: before[offset].seq,
            };
            let is_still = before[offset] == after[offset] && !before[offset].is_being_written;
            if is_still && is_filled(want, got) {
                continue;
            }
            let is_right = loop {
                if let Some(is_right) = self.check_block(file, block, &mut page) {
                    break is_right;
                }
            };
            if is_still && is_right {
                println!(
                    "BAD {}: {want:?} was read wrongly at first",
                    target.path.display()
                );
            }
            wrong += u64::from(is_still || !is_right);
        }
        wrong
    }

    /// Reads a block from the disk and compares it; `None` when it was written meanwhile.
    fn check_block(&self, file: usize, block: u64, page: &mut Page) -> Option<bool> {
        let at = usize::try_from(block).ok()?;
        let target = &self.files[file];
        let before = self.lock().known[file][at];
        let result = target
            .direct
            .read_exact_at(&mut page.0, block * BLOCK_BYTES as u64);
        let after = self.lock().known[file][at];
        if let Err(error) = result {
            println!(
                "BAD read of {} block {block}: {error}",
                target.path.display()
            );
            return Some(false);
        }
        if before != after || before.is_being_written {
            return None;
        }
        let want = Stamp {
            file: target.id,
            block,
            seq: before.seq,
        };
        Some(target.is_right(want, &page.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_finds_what_it_did_not_write() {
        let dir = std::env::temp_dir().join(format!("flimcd-load-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("load.bin");
        let mut bytes = vec![0; 64 * BLOCK_BYTES];
        for (block, out) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            stamp::fill(
                Stamp {
                    file: 3,
                    block: block as u64,
                    seq: 0,
                },
                out,
            );
        }
        fs::write(&path, bytes).unwrap();
        let settings = Settings {
            ram_pages: 8,
            ..Settings::default()
        };
        let open =
            || Load::open_files(std::slice::from_ref(&path), &dir.join("journal"), &settings);
        let load = open().unwrap();
        assert_eq!(load.verify(), (64, 8, 0));
        let mut page = Page::boxed();
        for block in [1, 5, 5, 9] {
            load.write(0, block, &mut page).unwrap();
        }
        assert_eq!(load.verify(), (64, 8, 0));
        assert_eq!(load.totals(), "seq=4 reads=0 errors=0");
        // Another start knows the versions from the disk.
        let again = open().unwrap();
        assert_eq!(
            (again.verify(), again.totals()),
            ((64, 8, 0), "seq=4 reads=0 errors=0".into())
        );
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[1], 5 * BLOCK_BYTES as u64 + 100)
            .unwrap();
        assert_eq!(load.verify(), (64, 8, 1));
        assert!(open().is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
