//! What stood in a replica before an increment that is under way wrote over it: a journal that leads back to the last consistent moment.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–7 | `FLIMUND` and a zero |
//! | 8–11 | version, 1 |
//! | 12–19 | the migration that left the copy of the moment that this leads back to |
//! | 20–27 | that moment, in milliseconds since 1970 |
//! | 28–35 | size of the volume in bytes |
//! | 36–39 | CRC-32C of bytes 0–35 |
//! | then, again and again | first block (8), number of blocks (4), bytes of content (4; 0 for zeroes), CRC-32C of these and of the content (4), content |
//!
//! All numbers are little-endian. A block is noted once, before it is first written over, and the note is durable before the write begins. Notes
//! are appended one at a time and synced together, so what is durable is always a whole beginning of the file, and a torn end is of
//! blocks that nobody has written over. The file is found again after any death; which moment it leads back to is checked against the record, so that one that
//! was left behind is never taken for the current one.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use flimcd_content::is_zero;
use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, Epoch, MigrationId, SiteName, VolumeSize};

use super::{ApplyData, Volume};
use crate::{
    device::BlockDevice,
    rules::{ApplyPlan, Mode},
    state::{Consistent, Ownership, StateDir, StateError, VolumeRecord},
};

const MAGIC: &[u8; 8] = b"FLIMUND\0";
const VERSION: u32 = 1;
const HEADER: usize = 40;
const HEAD: usize = 20;
/// Blocks of one note: bounds what is held in memory.
const NOTE_BLOCKS_MAX: u64 = 256;

/// An open journal. See the module.
#[derive(Debug)]
pub(super) struct Undo {
    file: File,
    size: VolumeSize,
    inner: Mutex<Inner>,
    /// So much of the file is durable.
    synced: Mutex<u64>,
}

#[derive(Debug)]
struct Inner {
    /// Blocks that were noted.
    covered: BlockSet,
    end: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn header(of: &Consistent, size: VolumeSize) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&of.migration.0.to_le_bytes());
    bytes.extend_from_slice(&of.as_of_unix_ms.to_le_bytes());
    bytes.extend_from_slice(&size.bytes().to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

impl Undo {
    /// Makes an empty journal in the place of any other, durably.
    pub(super) fn create(path: &Path, of: &Consistent, size: VolumeSize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all_at(&header(of, size), 0)?;
        file.sync_all()?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self::at(
            file,
            size,
            BlockSet::new(size.blocks()),
            HEADER as u64,
        ))
    }

    fn at(file: File, size: VolumeSize, covered: BlockSet, end: u64) -> Self {
        Self {
            file,
            size,
            inner: Mutex::new(Inner { covered, end }),
            synced: Mutex::new(end),
        }
    }

    /// Opens the journal that leads back to `of`; a torn end is cut off.
    pub(super) fn open(path: &Path, of: &Consistent, size: VolumeSize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut found = vec![0; HEADER];
        file.read_exact_at(&mut found, 0)?;
        if found != header(of, size) {
            return Err(io::Error::other(
                "it leads back to another moment, or is damaged",
            ));
        }
        let mut undo = Self::at(file, size, BlockSet::new(size.blocks()), HEADER as u64);
        let (mut covered, mut end) = (BlockSet::new(size.blocks()), HEADER as u64);
        undo.each_note(|range, content| {
            covered.insert_range(range);
            end += (HEAD + content.len()) as u64;
            Ok(())
        })?;
        undo.file.set_len(end)?;
        undo.file.sync_data()?;
        undo.inner = Mutex::new(Inner { covered, end });
        undo.synced = Mutex::new(end);
        Ok(undo)
    }

    /// Notes what stands in `runs`, durably, as far as that has not been done.
    pub(super) fn keep(&self, device: &dyn BlockDevice, runs: &[BlockRange]) -> io::Result<()> {
        let end = {
            let mut inner = lock(&self.inner);
            let mut new = Vec::new();
            for &run in runs {
                let mut start = run.start;
                for known in inner.covered.runs_in(run) {
                    new.push(BlockRange::new(start, known.start));
                    start = known.end;
                }
                new.push(BlockRange::new(start, run.end));
            }
            for run in new {
                let mut start = run.start;
                while start < run.end {
                    let part = BlockRange::new(start, run.end.min(start + NOTE_BLOCKS_MAX));
                    self.append(device, part, &mut inner)?;
                    start = part.end;
                }
            }
            inner.end
        };
        // Whoever waits here is served by the sync of another that came with it.
        let mut synced = lock(&self.synced);
        if *synced < end {
            let reached = lock(&self.inner).end;
            self.file.sync_data()?;
            *synced = reached;
        }
        Ok(())
    }

    fn append(
        &self,
        device: &dyn BlockDevice,
        range: BlockRange,
        inner: &mut Inner,
    ) -> io::Result<()> {
        let bytes = range.bytes(self.size);
        let length = usize::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut content = vec![0; length];
        device.read_at(bytes.start, &mut content)?;
        if is_zero(&content) {
            content.clear();
        }
        let count = |count: u64| u32::try_from(count).map_err(io::Error::other);
        let mut note = Vec::with_capacity(HEAD + content.len());
        note.extend_from_slice(&range.start.to_le_bytes());
        note.extend_from_slice(&count(range.len())?.to_le_bytes());
        note.extend_from_slice(&count(content.len() as u64)?.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&note), &content);
        note.extend_from_slice(&crc.to_le_bytes());
        note.extend_from_slice(&content);
        self.file.write_all_at(&note, inner.end)?;
        inner.end += note.len() as u64;
        inner.covered.insert_range(range);
        Ok(())
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> u64 {
        lock(&self.inner).end
    }

    /// Writes back what stood in the image. Not durable yet. Returns the number of blocks.
    pub(super) fn roll_back(&self, device: &dyn BlockDevice) -> io::Result<u64> {
        let mut blocks = 0;
        self.each_note(|range, content| {
            blocks += range.len();
            let bytes = range.bytes(self.size);
            if content.is_empty() {
                device.write_zeroes(bytes, true)
            } else {
                device.write_at(bytes.start, content)
            }
        })?;
        Ok(blocks)
    }

    /// Every whole note in its order, up to the first that is not.
    fn each_note(
        &self,
        mut each: impl FnMut(BlockRange, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let (mut at, mut content) = (HEADER as u64, Vec::new());
        while at + HEAD as u64 <= length {
            let mut head = [0; HEAD];
            self.file.read_exact_at(&mut head, at)?;
            let number = |from: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| head[from + i]));
            let start = u64::from(number(0)) | u64::from(number(4)) << 32;
            let (blocks, bytes) = (u64::from(number(8)), u64::from(number(12)));
            let is_sound = (1..=NOTE_BLOCKS_MAX).contains(&blocks)
                && bytes <= blocks * BLOCK_SIZE
                && start
                    .checked_add(blocks)
                    .is_some_and(|end| end <= self.size.blocks())
                && at + HEAD as u64 + bytes <= length;
            if !is_sound {
                return Ok(());
            }
            let range = BlockRange::new(start, start + blocks);
            content.resize(usize::try_from(bytes).map_err(io::Error::other)?, 0);
            self.file.read_exact_at(&mut content, at + HEAD as u64)?;
            let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..16]), &content);
            let is_whole = content.is_empty() || bytes == range.bytes(self.size).len();
            if crc != number(16) || !is_whole {
                return Ok(());
            }
            each(range, &content)?;
            at += HEAD as u64 + bytes;
        }
        Ok(())
    }
}

const FILE: &str = "undo";

/// The journal of a volume that is opened. Where the record speaks of one that is not there, the moment is lost, and the record says so.
pub(super) fn reopen(state: &mut StateDir) -> Result<Option<Arc<Undo>>, StateError> {
    let path = state.path().join(FILE);
    let Some(consistent) = state.record().consistent else {
        remove(&path);
        return Ok(None);
    };
    if !consistent.undo {
        remove(&path);
        return Ok(None);
    }
    match Undo::open(&path, &consistent, state.record().size) {
        Ok(undo) => Ok(Some(Arc::new(undo))),
        Err(error) => {
            let mut record = state.record().clone();
            tracing::error!(
                volume = %record.name, path = %path.display(), %error,
                "what leads back to the last consistent moment of this replica cannot be read: it has none until the next increment ends"
            );
            record.consistent = None;
            state.store(record)?;
            Ok(None)
        }
    }
}

/// A journal that is left over does no harm: it names its moment.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "an old undo journal cannot be removed");
    }
}

impl Volume {
    /// Content is about to arrive over a copy of one moment: from now on what stood there is kept, or the record says that the moment is lost.
    /// The caller stores the record.
    pub(super) fn begin_undo(&self, record: &mut VolumeRecord, dir: &Path) {
        let (Some(durable), Some(consistent)) = (&self.durable, &mut record.consistent) else {
            return;
        };
        let mut undo = lock(&durable.undo);
        if consistent.undo && undo.is_some() {
            return;
        }
        match Undo::create(&dir.join(FILE), consistent, record.size) {
            Ok(created) => {
                consistent.undo = true;
                *undo = Some(Arc::new(created));
            }
            Err(error) => {
                tracing::warn!(
                    volume = %record.name, %error,
                    "no undo journal can be made: while the replica is updated there is no consistent moment to go back to"
                );
                record.consistent = None;
            }
        }
    }

    /// Keeps what is about to be written over. Where that fails the record says first that the moment is lost.
    pub(super) fn keep_old(
        &self,
        mode: Mode,
        plan: &ApplyPlan,
        data: ApplyData<'_>,
    ) -> io::Result<()> {
        let Some(durable) = (self.durable.as_ref()).filter(|_| mode == Mode::Incoming) else {
            return Ok(());
        };
        if matches!(data, ApplyData::Kept) {
            return Ok(());
        }
        let Some(undo) = lock(&durable.undo).clone() else {
            return Ok(());
        };
        let Err(error) = undo.keep(&**self.device(), &plan.write) else {
            return Ok(());
        };
        tracing::warn!(
            volume = %self.name(), %error,
            "the undo journal cannot be written: until the increment ends the replica has no consistent moment to go back to"
        );
        let mut state = durable.state();
        let mut record = state.record().clone();
        if record.consistent.take().is_some() {
            state.store(record)?;
        }
        drop(state);
        self.drop_undo();
        Ok(())
    }

    /// The journal is not needed any more, as the record says already.
    pub(super) fn drop_undo(&self) {
        if let Some(durable) = &self.durable {
            let path = durable.state().path().join(FILE);
            *lock(&durable.undo) = None;
            remove(&path);
        }
    }

    /// Bytes of the undo journal, 0 without one.
    #[must_use]
    pub fn undo_bytes(&self) -> u64 {
        let undo = self
            .durable
            .as_ref()
            .and_then(|durable| lock(&durable.undo).clone());
        undo.map_or(0, |undo| undo.bytes())
    }

    /// An increment is whole: makes what arrived durable, then the record that says that this is a copy of that moment, owned by `peer`.
    /// Nothing may be written any more by whoever wrote what arrived.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a volume that nothing arrives at, or when the disk fails: what was there before can then still
    /// be gone back to.
    pub fn seal_arrival(
        &self,
        epoch: Epoch,
        migration: MigrationId,
        peer: &SiteName,
        as_of_unix_ms: u64,
    ) -> io::Result<()> {
        let refused = || io::Error::new(io::ErrorKind::InvalidInput, "nothing arrives here");
        if self.mode() != Mode::Incoming {
            return Err(refused());
        }
        self.sync()?;
        let durable = self.durable.as_ref().ok_or_else(refused)?;
        {
            let mut state = durable.state();
            let mut record = state.record().clone();
            if !matches!(record.ownership, Ownership::Incoming { .. }) {
                return Err(refused());
            }
            record.set_ownership(Ownership::Released {
                epoch,
                migration,
                peer: peer.clone(),
                complete: true,
            });
            let is_sure = self.came_in_place.swap(false, Ordering::AcqRel);
            let mut replica = super::replica::of(&record.image, is_sure);
            replica.since_unix_ms = as_of_unix_ms;
            record.replica = Some(replica);
            record.consistent = Some(Consistent {
                migration,
                as_of_unix_ms,
                undo: false,
            });
            state.store(record)?;
        }
        self.drop_undo();
        self.core().change(|core| core.rules.leave_incoming());
        Ok(())
    }

    /// Puts a replica that an increment was being written over back to its last consistent moment. Returns that moment, and how many
    /// blocks were put back. May be called again after any death.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for what is no replica of a moment, or when the disk fails.
    pub fn restore_replica(&self) -> io::Result<(Consistent, u64)> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let durable = self.durable.as_ref();
        let durable = durable.ok_or_else(|| refused("the volume has no record"))?;
        let mut state = durable.state();
        let mut record = state.record().clone();
        if !record.is_replica() {
            return Err(refused("it is not a replica that nothing arrives at"));
        }
        let Some(mut consistent) = record.consistent else {
            return Err(refused("no consistent moment is known of it"));
        };
        let undo = lock(&durable.undo).clone();
        let mut blocks = 0;
        if consistent.undo {
            let undo = undo.ok_or_else(|| refused("its undo journal is not there"))?;
            blocks = undo.roll_back(&**self.device())?;
            self.device().sync_data()?;
            consistent.undo = false;
            record.consistent = Some(consistent);
            // What the source knows of this copy is not true of it any more.
            if let Some(replica) = &mut record.replica {
                replica.identity = None;
            }
            state.store(record)?;
            drop(state);
            self.drop_undo();
        }
        Ok((consistent, blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{FileDevice, OpenOptions as ImageOptions};

    const BLOCKS: u64 = 64;
    const BYTES: usize = 64 * 4096 - 100;

    fn consistent(migration: u64) -> Consistent {
        Consistent {
            migration: MigrationId(migration),
            as_of_unix_ms: 77,
            undo: true,
        }
    }

    fn old() -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..BYTES)
            .map(|at| u8::try_from(at / 4096 + 1).unwrap())
            .collect();
        bytes[5 * 4096..9 * 4096].fill(0);
        bytes
    }

    fn device(path: &Path) -> FileDevice {
        FileDevice::open(path, &ImageOptions::default()).unwrap()
    }

    fn run(start: u64, end: u64) -> BlockRange {
        BlockRange::new(start, end)
    }

    /// Writes over some of an image, with what stood there kept; returns the journal's length after each step.
    fn write_over(dir: &Path) -> (Undo, Vec<u64>) {
        let image = dir.join("image");
        fs::write(&image, old()).unwrap();
        let device = device(&image);
        let undo = Undo::create(&dir.join(FILE), &consistent(3), device.size()).unwrap();
        let mut lengths = vec![undo.bytes()];
        for (number, range) in (200u8..).zip([
            run(4, 7),
            run(0, 10),
            run(60, BLOCKS),
            run(2, 3),
            run(30, 40),
        ]) {
            undo.keep(&device, &[range]).unwrap();
            let bytes = range.bytes(device.size());
            let new = vec![number; usize::try_from(bytes.len()).unwrap()];
            device.write_at(bytes.start, &new).unwrap();
            lengths.push(undo.bytes());
        }
        device.sync_data().unwrap();
        (undo, lengths)
    }

    #[test]
    fn what_stood_there_comes_back_as_often_as_it_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let (undo, _) = write_over(dir.path());
        let size = undo.size;
        drop(undo);
        for _ in 0..2 {
            let undo = Undo::open(&dir.path().join(FILE), &consistent(3), size).unwrap();
            let device = device(&dir.path().join("image"));
            assert_eq!(undo.roll_back(&device).unwrap(), 10 + 4 + 10);
            device.sync_data().unwrap();
            drop(device);
            assert_eq!(fs::read(dir.path().join("image")).unwrap(), old());
        }
    }

    #[test]
    fn a_journal_of_another_moment_or_with_a_damaged_header_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (undo, _) = write_over(dir.path());
        let path = dir.path().join(FILE);
        assert!(Undo::open(&path, &consistent(4), undo.size).is_err());
        let good = fs::read(&path).unwrap();
        for at in 0..HEADER {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            assert!(
                Undo::open(&path, &consistent(3), undo.size).is_err(),
                "{at}"
            );
        }
    }

    #[test]
    fn a_torn_end_is_of_blocks_that_nobody_has_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (undo, lengths) = write_over(dir.path());
        let size = undo.size;
        let good = fs::read(dir.path().join(FILE)).unwrap();
        let last = usize::try_from(lengths[lengths.len() - 2]).unwrap();
        // Power fails while the note of the last write is on its way: that write was not begun.
        let whole: Vec<u8> = old();
        for cut in (last..good.len()).step_by(997) {
            let path = dir.path().join(FILE);
            fs::write(&path, &good[..cut]).unwrap();
            let image = dir.path().join("image");
            let mut written = fs::read(&image).unwrap();
            written[30 * 4096..40 * 4096].copy_from_slice(&whole[30 * 4096..40 * 4096]);
            fs::write(&image, &written).unwrap();
            let undo = Undo::open(&path, &consistent(3), size).unwrap();
            let device = device(&image);
            undo.roll_back(&device).unwrap();
            device.sync_data().unwrap();
            drop(device);
            assert_eq!(fs::read(&image).unwrap(), whole, "cut at {cut}");
            // And it goes on from there.
            let device = self::device(&image);
            undo.keep(&device, &[run(30, 40)]).unwrap();
            assert_eq!(undo.bytes(), good.len() as u64);
        }
    }
}
