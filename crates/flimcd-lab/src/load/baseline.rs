//! What a disk held before the load: a fingerprint of each granule.

use std::{io, path::Path, sync::Arc};

use rustix::fs::{SeekFrom, seek};

use super::{DiskOp, DiskRequest, GuestDisk, disk::FileDisk};

/// Bytes read at once. A multiple of every granule.
const STEP: usize = 1 << 20;
/// Fingerprint of zeroes.
const ZEROES: u64 = 0;

/// Fingerprints of a disk's content, 8 bytes for each granule. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Baseline {
    size: u64,
    granule: u32,
    prints: Arc<Vec<u64>>,
}

impl Baseline {
    /// Surveys an image file; holes are not read. `granule` is the unit in which the load can
    /// address the disk: 4096 for synthetic loads, 512 for traces.
    ///
    /// # Errors
    /// Those of reading the file.
    ///
    /// # Panics
    /// When `granule` is not a power of two from 512 to 65536.
    pub fn of_file(path: &Path, granule: u32) -> io::Result<Self> {
        let file = std::fs::File::open(path)?;
        let mut disk = FileDisk::open(path, false)?;
        let mut survey = Survey::new(disk.size(), granule);
        let mut at = 0;
        while at < survey.size {
            let data = match seek(&file, SeekFrom::Data(at)) {
                Ok(data) => data,
                // No data from here on.
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let end = seek(&file, SeekFrom::Hole(data))?;
            let mut from = data - data % STEP as u64;
            while from < end {
                survey.read(&mut disk, from)?;
                from += STEP as u64;
            }
            at = from;
        }
        Ok(survey.finish())
    }

    /// Surveys a disk by reading all of it. To the disk these are reads like a guest's.
    ///
    /// # Errors
    /// Those of the disk.
    ///
    /// # Panics
    /// When `granule` is not a power of two from 512 to 65536.
    pub fn of_disk(disk: &mut dyn GuestDisk, granule: u32) -> io::Result<Self> {
        let mut survey = Survey::new(disk.size(), granule);
        for at in (0..survey.size).step_by(STEP) {
            survey.read(disk, at)?;
        }
        Ok(survey.finish())
    }

    /// Bytes of the disk.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a granule; the last one of a disk may be shorter.
    #[must_use]
    pub const fn granule(&self) -> u32 {
        self.granule
    }

    /// Bytes that are not in a granule of zeroes.
    #[must_use]
    pub fn non_zero_bytes(&self) -> u64 {
        let count = self.prints.iter().filter(|print| **print != ZEROES).count();
        count as u64 * u64::from(self.granule)
    }

    /// Whether granule number `index` held `data`.
    pub(super) fn matches(&self, index: usize, data: &[u8]) -> bool {
        self.prints[index] == fingerprint(data)
    }
}

struct Survey {
    size: u64,
    granule: u32,
    prints: Vec<u64>,
    buffer: Vec<u8>,
}

impl Survey {
    fn new(size: u64, granule: u32) -> Self {
        assert!(
            granule.is_power_of_two() && (512..=65536).contains(&granule),
            "a granule of {granule} bytes is not possible"
        );
        let granules = usize::try_from(size.div_ceil(u64::from(granule))).unwrap_or(usize::MAX);
        Self {
            size,
            granule,
            prints: vec![ZEROES; granules],
            buffer: Vec::new(),
        }
    }

    /// Reads one step from `at`.
    fn read(&mut self, disk: &mut dyn GuestDisk, at: u64) -> io::Result<()> {
        let length = (self.size - at).min(STEP as u64);
        let data = std::mem::take(&mut self.buffer);
        self.buffer = read_blocking(disk, at, length, data)?;
        let granule = self.granule as usize;
        let first = usize::try_from(at).unwrap_or(usize::MAX) / granule;
        for (print, data) in self.prints[first..]
            .iter_mut()
            .zip(self.buffer.chunks(granule))
        {
            *print = fingerprint(data);
        }
        Ok(())
    }

    fn finish(self) -> Baseline {
        Baseline {
            size: self.size,
            granule: self.granule,
            prints: Arc::new(self.prints),
        }
    }
}

/// One read, waited for. `data` is a buffer to use.
pub(super) fn read_blocking(
    disk: &mut dyn GuestDisk,
    offset: u64,
    length: u64,
    mut data: Vec<u8>,
) -> io::Result<Vec<u8>> {
    let length = u32::try_from(length).map_err(io::Error::other)?;
    data.resize(length as usize, 0);
    disk.submit(DiskRequest {
        id: offset,
        op: DiskOp::Read,
        offset,
        length,
        data,
    })?;
    loop {
        if let Some(reply) = disk.receive(std::time::Duration::from_secs(1))? {
            return reply.result.map(|()| reply.data);
        }
    }
}

/// 63 bits of BLAKE3, never [`ZEROES`] but for zeroes.
fn fingerprint(data: &[u8]) -> u64 {
    if is_zero(data) {
        return ZEROES;
    }
    let hash = blake3::hash(data);
    let (first, _) = hash
        .as_bytes()
        .split_first_chunk::<8>()
        .expect("a hash has 32 bytes");
    u64::from_le_bytes(*first) | 1
}

/// Whether there are only zeroes.
pub(super) fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::load::MemoryDisk;

    #[test]
    fn file_and_disk_surveys_agree_and_find_content() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = 3 * STEP + 777;
        file.as_file().set_len(size as u64).unwrap();
        file.as_file()
            .write_all_at(&[5; 700], 2 * STEP as u64 + 100)
            .unwrap();
        file.as_file()
            .write_all_at(b"tail", size as u64 - 4)
            .unwrap();
        let of_file = Baseline::of_file(file.path(), 512).unwrap();
        let mut disk = MemoryDisk::new(std::fs::read(file.path()).unwrap());
        let of_disk = Baseline::of_disk(&mut disk, 512).unwrap();
        assert_eq!(of_file.prints, of_disk.prints);
        assert_eq!(of_file.non_zero_bytes(), 3 * 512);
        assert!(of_file.matches(0, &[0; 512]));
        assert!(!of_file.matches(2 * STEP / 512 + 1, &[0; 512]));
        assert!(of_file.matches(2 * STEP / 512, &disk.bytes_mut()[2 * STEP..][..512]));
    }
}
