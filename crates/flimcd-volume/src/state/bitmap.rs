//! Bitmaps on disk, one bit per block, changed in place. The byte table and the argument why in place is fine stand in the
//! module above.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use flimcd_core::{BlockRange, BlockSet, Epoch, VolumeId, VolumeSize};
use rustix::{fs::FallocateFlags, io::Errno};

use super::StateError;

const MAGIC: &[u8; 8] = b"FLIMBITS";
const VERSION: u32 = 1;
const HEADER: usize = 4096;
const CHECKED: usize = 84;
/// Bytes of bits that are read or written at once.
const PIECE: u64 = 64 * 1024;

/// What a bitmap says of a block whose bit is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapKind {
    /// Its content is not here, in this epoch.
    Missing(Epoch),
    /// The same as of this moment, for as long as the machine runs.
    MissingNow(Epoch),
    /// The target of a migration may lack its content.
    Unacked,
}

/// An open bitmap. Changes go to the page cache; [`sync`](Self::sync) makes them durable.
#[derive(Debug)]
pub struct BitmapFile {
    file: File,
    path: PathBuf,
    blocks: u64,
}

impl BitmapFile {
    /// Writes a new bitmap with the bits of `set`, in place of one that may be there. `volume` and `size` say
    /// whose it is. Not durable before [`sync`](Self::sync) and a sync of the directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(
        path: &Path,
        kind: BitmapKind,
        volume: VolumeId,
        size: VolumeSize,
        set: &BlockSet,
    ) -> Result<Self, StateError> {
        let fail = || StateError::io("writing", path);
        // Another file than the one that may be there: what is half written must not look like something.
        let temporary = path.with_extension("tmp");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(fail())?;
        let blocks = size.blocks();
        let bitmap = Self {
            file,
            path: path.to_owned(),
            blocks,
        };
        let length = HEADER as u64 + blocks.div_ceil(8);
        bitmap.file.set_len(length).map_err(fail())?;
        // Room for every bit now, so that a full disk is met before a guest depends on the file and not by one of its writes.
        match rustix::fs::fallocate(&bitmap.file, FallocateFlags::empty(), 0, length) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(fail()(error.into())),
        }
        for run in set.runs() {
            bitmap.change(run, true)?;
        }
        let header = header(kind, volume, size).map_err(fail())?;
        bitmap.file.write_all_at(&header, 0).map_err(fail())?;
        if matches!(kind, BitmapKind::Missing(_)) {
            bitmap.sync()?;
        }
        std::fs::rename(&temporary, path).map_err(fail())?;
        Ok(bitmap)
    }

    /// Opens a bitmap; `None` when there is none, or only one of another boot, which is worth nothing.
    ///
    /// # Errors
    /// [`StateError::Damaged`] and [`StateError::TooNew`] when it is not of this volume, or not one at all.
    pub fn open(
        path: &Path,
        kind: BitmapKind,
        volume: VolumeId,
        size: VolumeSize,
    ) -> Result<Option<Self>, StateError> {
        let fail = || StateError::io("reading", path);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(fail())?,
        };
        let length = file.metadata().map_err(fail())?.len();
        let damaged = |why: &str| StateError::damaged(path, why);
        if length < HEADER as u64 {
            return Err(damaged("it is too short"));
        }
        let mut found = vec![0; HEADER];
        file.read_exact_at(&mut found, 0).map_err(fail())?;
        if &found[..8] != MAGIC {
            return Err(damaged("it does not begin as a bitmap does"));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| found[at + i]));
        if number(8) > VERSION {
            return Err(StateError::TooNew {
                path: path.to_owned(),
                version: number(8),
            });
        }
        if crc32c::crc32c(&found[..CHECKED]) != number(CHECKED) {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let expected = header(kind, volume, size).map_err(fail())?;
        if found[..48] != expected[..48] {
            return Err(damaged(
                "it belongs to another volume, size or epoch than the record",
            ));
        }
        if found[48..CHECKED] != expected[48..CHECKED] {
            return Ok(None);
        }
        let blocks = size.blocks();
        if length != HEADER as u64 + blocks.div_ceil(8) {
            return Err(damaged("its length is wrong"));
        }
        Ok(Some(Self {
            file,
            path: path.to_owned(),
            blocks,
        }))
    }

    /// All bits.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(&self) -> Result<BlockSet, StateError> {
        let mut set = BlockSet::new(self.blocks);
        let mut piece = vec![0; to_usize(PIECE)];
        let total = self.blocks.div_ceil(8);
        let mut at = 0;
        while at < total {
            let len = PIECE.min(total - at);
            let bytes = &mut piece[..to_usize(len)];
            self.file
                .read_exact_at(bytes, HEADER as u64 + at)
                .map_err(StateError::io("reading", &self.path))?;
            add_bits(&mut set, at * 8, bytes);
            at += len;
        }
        Ok(set)
    }

    /// The runs of set bits in `range`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn runs_in(&self, range: BlockRange) -> Result<Vec<BlockRange>, StateError> {
        let range = range.intersect(BlockRange::new(0, self.blocks));
        let first = range.start / 8;
        let mut bytes = vec![0; to_usize(range.end.div_ceil(8).saturating_sub(first))];
        self.file
            .read_exact_at(&mut bytes, HEADER as u64 + first)
            .map_err(StateError::io("reading", &self.path))?;
        let mut set = BlockSet::new(self.blocks);
        add_bits(&mut set, first * 8, &bytes);
        Ok(set.runs_in(range).collect())
    }

    /// Sets the bits of `range`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set(&self, range: BlockRange) -> Result<(), StateError> {
        self.change(range, true)
    }

    /// Clears the bits of `range`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn clear(&self, range: BlockRange) -> Result<(), StateError> {
        self.change(range, false)
    }

    /// Changes bits by reading and writing the bytes they are in. Callers do not do that at the same time: a bit
    /// that changed between the read and the write would change back.
    fn change(&self, range: BlockRange, value: bool) -> Result<(), StateError> {
        let range = range.intersect(BlockRange::new(0, self.blocks));
        let mut at = range.start;
        let mut piece = Vec::new();
        while at < range.end {
            let end = range.end.min((at / (PIECE * 8) + 1) * PIECE * 8);
            let (first, last) = (at / 8, (end - 1) / 8);
            let place = HEADER as u64 + first;
            piece.clear();
            piece.resize(to_usize(last - first + 1), if value { u8::MAX } else { 0 });
            // Only the bytes at the edges can have bits of others.
            let edges = [
                (first, !at.is_multiple_of(8)),
                (last, !end.is_multiple_of(8)),
            ];
            for (byte, _) in edges.iter().filter(|(_, shared)| *shared) {
                let index = to_usize(byte - first);
                self.file
                    .read_exact_at(&mut piece[index..=index], HEADER as u64 + byte)
                    .map_err(StateError::io("reading", &self.path))?;
            }
            for byte in [first, last] {
                let low = at.saturating_sub(byte * 8).min(8);
                let high = (end - byte * 8).min(8);
                let mask = bits(low, high);
                let slot = &mut piece[to_usize(byte - first)];
                *slot = if value { *slot | mask } else { *slot & !mask };
            }
            self.file
                .write_all_at(&piece, place)
                .map_err(StateError::io("writing", &self.path))?;
            at = end;
        }
        Ok(())
    }

    /// Another handle of the same file.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn try_clone(&self) -> Result<Self, StateError> {
        Ok(Self {
            file: self
                .file
                .try_clone()
                .map_err(StateError::io("opening", &self.path))?,
            path: self.path.clone(),
            blocks: self.blocks,
        })
    }

    /// Makes all changes durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<(), StateError> {
        self.file
            .sync_data()
            .map_err(StateError::io("syncing", &self.path))
    }
}

/// A byte with the bits `low..high` set.
fn bits(low: u64, high: u64) -> u8 {
    (low..high).fold(0, |byte, bit| byte | 1 << bit)
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Adds the set bits of `bytes`, the first of which is block `base`.
fn add_bits(set: &mut BlockSet, base: u64, bytes: &[u8]) {
    let end = set.capacity();
    let mut run: Option<BlockRange> = None;
    let mut put = |start: u64, stop: u64| {
        let next = BlockRange::new(start.min(end), stop.min(end));
        match &mut run {
            Some(run) if run.end == next.start => run.end = next.end,
            Some(done) => {
                set.insert_range(*done);
                run = Some(next);
            }
            None => run = Some(next),
        }
    };
    for (&byte, block) in bytes.iter().zip((base..).step_by(8)) {
        match byte {
            0 => {}
            u8::MAX => put(block, block + 8),
            _ => (0..8)
                .filter(|bit| byte >> bit & 1 == 1)
                .for_each(|bit| put(block + bit, block + bit + 1)),
        }
    }
    if let Some(run) = run {
        set.insert_range(run);
    }
}

fn header(kind: BitmapKind, volume: VolumeId, size: VolumeSize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEADER);
    let (number, epoch, boot) = match kind {
        BitmapKind::Missing(epoch) => (1u32, epoch.0, [0; 36]),
        BitmapKind::Unacked => (2, 0, boot_id()?),
        BitmapKind::MissingNow(epoch) => (3, epoch.0, boot_id()?),
    };
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&volume.0.to_le_bytes());
    bytes.extend_from_slice(&size.bytes().to_le_bytes());
    bytes.extend_from_slice(&epoch.to_le_bytes());
    bytes.extend_from_slice(&boot);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.resize(HEADER, 0);
    Ok(bytes)
}

/// The id that the kernel draws at each boot.
fn boot_id() -> io::Result<[u8; 36]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    text.get(..36)
        .and_then(|id| id.try_into().ok())
        .ok_or_else(|| io::Error::other("the kernel's boot id is not 36 characters long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: VolumeId = VolumeId(77);

    fn size(blocks: u64) -> VolumeSize {
        VolumeSize::new(blocks * 4096 - 5).unwrap()
    }

    fn missing(path: &Path, blocks: u64, set: &BlockSet) -> BitmapFile {
        BitmapFile::create(
            path,
            BitmapKind::Missing(Epoch(2)),
            VOLUME,
            size(blocks),
            set,
        )
        .unwrap()
    }

    #[test]
    fn bits_lie_as_in_the_table() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing");
        let mut set = BlockSet::new(20);
        set.insert_range(BlockRange::new(1, 3));
        set.insert_range(BlockRange::new(7, 19));
        let bitmap = missing(&path, 20, &set);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 4096 + 3);
        assert_eq!(bytes[4096..], [0b1000_0110, 0b1111_1111, 0b0000_0111]);
        assert_eq!(bytes[..16], *b"FLIMBITS\x01\0\0\0\x01\0\0\0");
        bitmap.clear(BlockRange::new(2, 18)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[4096..], [0b10, 0, 0b100]);
    }

    #[test]
    fn another_volume_epoch_or_size_is_refused_and_another_boot_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bits");
        let open = |kind, volume, blocks| BitmapFile::open(&path, kind, volume, size(blocks));
        let kind = BitmapKind::Missing(Epoch(2));
        assert!(open(kind, VOLUME, 20).unwrap().is_none());
        missing(&path, 20, &BlockSet::full(20));
        assert!(open(kind, VOLUME, 20).unwrap().is_some());
        for (kind, volume, blocks) in [
            (kind, VolumeId(78), 20),
            (kind, VOLUME, 21),
            (BitmapKind::Missing(Epoch(3)), VOLUME, 20),
            (BitmapKind::Unacked, VOLUME, 20),
        ] {
            let error = open(kind, volume, blocks).unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
        }
        let set = BlockSet::full(20);
        BitmapFile::create(&path, BitmapKind::Unacked, VOLUME, size(20), &set).unwrap();
        assert!(open(BitmapKind::Unacked, VOLUME, 20).unwrap().is_some());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[50] ^= 1;
        let crc = crc32c::crc32c(&bytes[..84]);
        bytes[84..88].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(open(BitmapKind::Unacked, VOLUME, 20).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn behaves_as_a_block_set(
            blocks in prop_oneof![1u64..200, Just(PIECE * 8 + 11)],
            ops in prop::collection::vec((any::<bool>(), any::<u64>(), 1u64..100), 1..20),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("missing");
            let mut want = BlockSet::new(blocks);
            let bitmap = missing(&path, blocks, &want);
            for (value, start, len) in ops {
                let start = start % blocks;
                // Some of them long enough to cross pieces.
                let len = if len > 90 { blocks } else { len };
                let range = BlockRange::new(start, (start + len).min(blocks));
                if value {
                    want.insert_range(range);
                    bitmap.set(range).unwrap();
                } else {
                    want.remove_range(range);
                    bitmap.clear(range).unwrap();
                }
            }
            prop_assert_eq!(bitmap.load().unwrap(), want);
        }

        #[test]
        fn damage_never_panics_and_never_gives_another_volume(
            cut in 0usize..4200, flip in 0usize..100, bit in 0u8..8,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("missing");
            missing(&path, 200, &BlockSet::full(200));
            let mut bytes = std::fs::read(&path).unwrap();
            let good = bytes.clone();
            bytes.truncate(cut);
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= 1 << bit;
            }
            std::fs::write(&path, &bytes).unwrap();
            let opened = BitmapFile::open(&path, BitmapKind::Missing(Epoch(2)), VOLUME, size(200));
            let header_intact = bytes.len() == good.len() && bytes[..88] == good[..88];
            prop_assert_eq!(opened.is_ok_and(|file| file.is_some()), header_intact);
        }
    }
}
