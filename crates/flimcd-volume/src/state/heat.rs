//! What was hot, as a file. It is advice: whoever cannot read it begins cold.

use std::{
    fs::File,
    io::{self, Read},
    path::PathBuf,
    time::Duration,
};

use flimcd_core::{VolumeId, VolumeSize};

use super::counts::Counts;
use super::replace::{RealFiles, ReplaceError, replace};

const NAME: &str = "heat";
const MAGIC: &[u8; 8] = b"FLIMHEAT";
const VERSION: u32 = 1;
const HEAD: usize = 20;
/// Bytes of the payload before the counts.
const FIXED: usize = 16 + 8 * 8;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeatKind {
    /// Blocks that the guest reads.
    Read,
    /// Blocks that the guest writes or makes zero. Trims do not count.
    Write,
}

/// Decayed counts of one kind over the whole volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeatTotals {
    /// Guest requests.
    pub requests: u64,
    /// Blocks that they touched.
    pub blocks: u64,
}

/// The counts of a volume, as they are written down.
#[derive(Clone, Debug)]
pub(crate) struct HeatRecord {
    pub(crate) read: Counts,
    pub(crate) write: Counts,
    pub(crate) reads: HeatTotals,
    pub(crate) writes: HeatTotals,
    /// The time that counting took, decayed as the counts are.
    pub(crate) counted: Duration,
    /// The same of counts that were made elsewhere, beyond that.
    pub(crate) carried: Duration,
}

impl HeatRecord {
    pub(crate) fn cold(size: VolumeSize) -> Self {
        Self {
            read: Counts::new(size),
            write: Counts::new(size),
            reads: HeatTotals::default(),
            writes: HeatTotals::default(),
            counted: Duration::ZERO,
            carried: Duration::ZERO,
        }
    }

    pub(crate) fn of(&mut self, kind: HeatKind) -> (&mut Counts, &mut HeatTotals) {
        match kind {
            HeatKind::Read => (&mut self.read, &mut self.reads),
            HeatKind::Write => (&mut self.write, &mut self.writes),
        }
    }

    fn encode(&self, id: VolumeId, size: VolumeSize) -> Vec<u8> {
        let (read, write) = (self.read.encode(), self.write.encode());
        let mut payload = Vec::with_capacity(FIXED + read.len() + write.len());
        payload.extend_from_slice(&id.0.to_le_bytes());
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        for number in [
            size.bytes(),
            millis(self.counted),
            millis(self.carried),
            self.reads.requests,
            self.reads.blocks,
            self.writes.requests,
            self.writes.blocks,
            read.len() as u64,
        ] {
            payload.extend_from_slice(&number.to_le_bytes());
        }
        payload.extend_from_slice(&read);
        payload.extend_from_slice(&write);
        let mut bytes = Vec::with_capacity(HEAD + payload.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&length.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &payload);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&payload);
        bytes
    }

    /// Why not, in words, if these are no counts of this volume.
    fn decode(
        bytes: &[u8],
        id: VolumeId,
        size: VolumeSize,
        half_life: Duration,
    ) -> Result<Self, &'static str> {
        let (head, payload) = bytes.split_at_checked(HEAD).ok_or("it is too short")?;
        if &head[..8] != MAGIC {
            return Err("it does not begin as one");
        }
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| head[at + i]));
        if word(8) != VERSION {
            return Err("it is of another version");
        }
        if payload.len() as u64 != u64::from(word(12)) {
            return Err("its length is wrong");
        }
        if crc32c::crc32c_append(crc32c::crc32c(&head[..16]), payload) != word(16) {
            return Err("its checksum is wrong");
        }
        let (fixed, counts) = payload.split_at_checked(FIXED).ok_or("it is too short")?;
        let mut of = [0; 16];
        of.copy_from_slice(&fixed[..16]);
        let mut numbers = fixed[16..].chunks_exact(8).map(|bytes| {
            let mut number = [0; 8];
            number.copy_from_slice(bytes);
            u64::from_le_bytes(number)
        });
        let mut next = || numbers.next().unwrap_or(0);
        if u128::from_le_bytes(of) != id.0 || next() != size.bytes() {
            return Err("it is of another volume");
        }
        let counted = Duration::from_millis(next());
        let carried = Duration::from_millis(next());
        let mut totals = || HeatTotals {
            requests: next(),
            blocks: next(),
        };
        let (reads, writes) = (totals(), totals());
        let read_len = usize::try_from(next()).unwrap_or(usize::MAX);
        let (read, write) = counts.split_at_checked(read_len).ok_or("it is too short")?;
        let counts = |bytes| Counts::decode(size, bytes);
        let (Some(read), Some(write)) = (counts(read), counts(write)) else {
            return Err("its counts make no sense");
        };
        // More than this never settles, and would overflow some day.
        let most = half_life * 4;
        Ok(Self {
            read,
            write,
            reads,
            writes,
            counted: counted.min(most),
            carried: carried.min(most),
        })
    }
}

/// Where a volume's counts are written down.
#[derive(Clone, Debug)]
pub(crate) struct HeatFile {
    /// The volume's directory.
    pub(super) dir: PathBuf,
    pub(super) id: VolumeId,
    pub(super) size: VolumeSize,
}

impl HeatFile {
    /// Replaces the file.
    pub(crate) fn store(&self, record: &HeatRecord) -> io::Result<()> {
        let bytes = record.encode(self.id, self.size);
        let replaced = replace(&mut RealFiles::default(), &self.dir, NAME, &bytes);
        replaced.map_err(|error| match error {
            ReplaceError::Unchanged(error) | ReplaceError::Undecided(error) => error,
        })
    }

    /// What the file says; `None` if there is none.
    ///
    /// # Errors
    /// Also when it is damaged, or of another volume.
    pub(crate) fn load(&self, half_life: Duration) -> io::Result<Option<HeatRecord>> {
        let path = self.dir.join(NAME);
        let mut bytes = Vec::new();
        // Far more than the counts of such a volume take.
        let bytes_max = (HEAD + FIXED) as u64 + self.size.chunks().saturating_mul(8) + 4096;
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?.take(bytes_max).read_to_end(&mut bytes)?,
        };
        HeatRecord::decode(&bytes, self.id, self.size, half_life)
            .map(Some)
            .map_err(|why| {
                let text = format!("{} is damaged: {why}", path.display());
                io::Error::new(io::ErrorKind::InvalidData, text)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::{ChunkIndex, Heat};
    use proptest::prelude::*;

    const ID: VolumeId = VolumeId(7);
    const HALF_LIFE: Duration = Duration::from_secs(60);

    fn size() -> VolumeSize {
        VolumeSize::new(3 << 30).unwrap()
    }

    fn sample() -> HeatRecord {
        let mut record = HeatRecord::cold(size());
        record.read.add(ChunkIndex(3), 9);
        record.write.add(ChunkIndex(size().chunks() - 1), 1);
        record.reads.requests = 4;
        record.writes.blocks = 5;
        record.counted = Duration::from_secs(70);
        record.carried = Duration::from_secs(3);
        record
    }

    fn decode(bytes: &[u8]) -> Result<HeatRecord, &'static str> {
        HeatRecord::decode(bytes, ID, size(), HALF_LIFE)
    }

    fn assert_same(a: &HeatRecord, b: &HeatRecord) {
        let same = |a: Heat, b: Heat| a.chunks().eq(b.chunks());
        assert!(same(a.read.heat(HALF_LIFE), b.read.heat(HALF_LIFE)));
        assert!(same(a.write.heat(HALF_LIFE), b.write.heat(HALF_LIFE)));
        let rest = |r: &HeatRecord| (r.reads, r.writes, r.counted, r.carried);
        assert_eq!(rest(a), rest(b));
    }

    #[test]
    fn the_file_has_what_was_written_and_only_for_its_volume() {
        let dir = tempfile::tempdir().unwrap();
        let file = HeatFile {
            dir: dir.path().to_owned(),
            id: ID,
            size: size(),
        };
        assert!(file.load(HALF_LIFE).unwrap().is_none());
        file.store(&sample()).unwrap();
        assert_same(&file.load(HALF_LIFE).unwrap().unwrap(), &sample());
        let other = HeatFile {
            id: VolumeId(8),
            ..file.clone()
        };
        let error = other.load(HALF_LIFE).unwrap_err();
        assert!(error.to_string().contains("another volume"), "{error}");
        let mut later = sample().encode(ID, size());
        later[8] = 2;
        assert_eq!(decode(&later).unwrap_err(), "it is of another version");
    }

    #[test]
    fn a_record_of_everything_hot_fits_what_is_read() {
        let mut record = HeatRecord::cold(size());
        for chunk in (0..size().chunks()).step_by(6) {
            record.read.add(ChunkIndex(chunk), 4000);
        }
        record.write = record.read.clone();
        let bytes = record.encode(ID, size());
        assert!((bytes.len() as u64) < size().chunks() * 8);
        assert_same(&decode(&bytes).unwrap(), &record);
    }

    proptest! {
        #[test]
        fn damage_is_found(at in 0usize..1000, flip in 1u8.., cut in 0usize..1000) {
            let good = sample().encode(ID, size());
            let mut bytes = good.clone();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes).is_err());
            prop_assert!(decode(&good[..cut % good.len()]).is_err());
        }

        #[test]
        fn what_has_the_right_checksum_is_refused_or_bounded(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = sample().encode(ID, size());
            bytes.truncate(HEAD + 24);
            bytes.extend_from_slice(&payload);
            let length = u32::try_from(bytes.len() - HEAD).unwrap();
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..16]), &bytes[HEAD..]);
            bytes[16..20].copy_from_slice(&crc.to_le_bytes());
            if let Ok(record) = decode(&bytes) {
                prop_assert!(record.counted <= HALF_LIFE * 4);
            }
        }
    }
}
