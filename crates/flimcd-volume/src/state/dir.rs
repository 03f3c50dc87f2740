//! The directory of volumes, and that of one volume.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use flimcd_core::{BlockSet, VolumeName};
use rustix::fs::{FlockOperation, flock};

use super::{
    BitmapFile, BitmapKind, HeatFile, StateError, VolumeRecord,
    record::RECORD_BYTES_MAX,
    replace::{RealFiles, ReplaceError, replace},
};

const NEW: &str = ".new-";
const DELETE: &str = ".delete-";
const FORGET: &str = ".forget-";

/// The directory that all volumes of an agent are in.
#[derive(Clone, Debug)]
pub struct VolumesDir {
    path: PathBuf,
}

impl VolumesDir {
    /// Opens the directory, makes it if it is not there, and finishes what was interrupted.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(StateError::io("making", &path))?;
        let this = Self { path };
        for name in this.entries()? {
            let dir = this.path.join(&name);
            if name.starts_with(DELETE) {
                if let Ok(record) = read_record(&dir) {
                    remove_image(&record.image)?;
                }
                remove_dir(&dir)?;
            } else if name.starts_with(FORGET) || name.starts_with(NEW) {
                remove_dir(&dir)?;
            }
        }
        Ok(this)
    }

    fn entries(&self) -> Result<Vec<String>, StateError> {
        let fail = || StateError::io("reading", &self.path);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(fail())? {
            names.extend(entry.map_err(fail())?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    /// The names of all volumes, sorted.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<VolumeName>, StateError> {
        let names = self.entries()?;
        Ok(names.into_iter().filter_map(|n| n.parse().ok()).collect())
    }

    /// The directory of a volume, whether there or not.
    #[must_use]
    pub fn path_of(&self, name: &VolumeName) -> PathBuf {
        self.path.join(name.as_str())
    }

    /// Whether there is a volume of this name.
    #[must_use]
    pub fn contains(&self, name: &VolumeName) -> bool {
        self.path_of(name).exists()
    }

    /// Makes the directory of a new volume and locks it. It is there, whole and durably, or not at all.
    ///
    /// # Errors
    /// [`StateError::Exists`], or when it cannot be made.
    pub fn create(&self, record: VolumeRecord) -> Result<StateDir, StateError> {
        let path = self.path_of(&record.name);
        if self.contains(&record.name) {
            return Err(StateError::Exists(record.name));
        }
        let new = self.path.join(format!("{NEW}{}", record.name));
        remove_dir(&new)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&new)
            .map_err(StateError::io("making", &new))?;
        let lock = take_lock(&new)?;
        let mut state = StateDir {
            path: new.clone(),
            _lock: lock,
            record,
        };
        state.store(state.record.clone())?;
        // Fails when somebody else made the volume meanwhile: a directory with files is not replaced.
        fs::rename(&new, &path).map_err(StateError::io("making", &path))?;
        sync_dir(&self.path)?;
        state.path = path;
        Ok(state)
    }

    /// Opens and locks the directory of a volume.
    ///
    /// # Errors
    /// [`StateError::NotFound`], [`StateError::InUse`], [`StateError::Damaged`], [`StateError::TooNew`], or what the system says.
    pub fn open_volume(&self, name: &VolumeName) -> Result<StateDir, StateError> {
        let path = self.path_of(name);
        if !path.is_dir() {
            return Err(StateError::NotFound(name.clone()));
        }
        let lock = take_lock(&path)?;
        let record = read_record(&path)?;
        // An agent that was killed may have got as far as the rename: what is read here may not be durable yet, and
        // whoever acts on it must not find the older record after a power loss.
        sync_file(&path.join(RECORD))?;
        sync_dir(&path)?;
        if record.name != *name {
            let why = format!("it is the record of {}", record.name);
            return Err(StateError::damaged(&path.join(RECORD), why));
        }
        Ok(StateDir {
            path,
            _lock: lock,
            record,
        })
    }

    /// Removes a volume, with or without its image. From the first step on the volume is gone; what is
    /// interrupted then is finished at the next [`open`](Self::open).
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove(&self, state: &StateDir, with_image: bool) -> Result<(), StateError> {
        let prefix = if with_image { DELETE } else { FORGET };
        let gone = self.path.join(format!("{prefix}{}", state.record.name));
        remove_dir(&gone)?;
        fs::rename(&state.path, &gone).map_err(StateError::io("removing", &state.path))?;
        sync_dir(&self.path)?;
        if with_image {
            remove_image(&state.record.image)?;
        }
        remove_dir(&gone)
    }
}

const RECORD: &str = "record";
const LOCK: &str = "lock";
const MISSING: &str = "missing";
const MISSING_NOW: &str = "missing-now";
const UNACKED: &str = "unacked";

/// The directory of one volume, locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
    record: VolumeRecord,
}

impl StateDir {
    /// The record as it is on disk.
    #[must_use]
    pub fn record(&self) -> &VolumeRecord {
        &self.record
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the record, durably.
    ///
    /// # Errors
    /// When the disk fails; the record is then the old one. Where even that cannot be had the process ends, because
    /// a volume whose owner is not known must not run: the next start finds either record.
    pub fn store(&mut self, record: VolumeRecord) -> Result<(), StateError> {
        let path = self.path.join(RECORD);
        let encode = |record: &VolumeRecord| {
            record
                .encode()
                .map_err(io::Error::other)
                .map_err(StateError::io("encoding", &path))
        };
        let bytes = encode(&record)?;
        match replace(&mut RealFiles::default(), &self.path, RECORD, &bytes) {
            Ok(()) => {
                self.record = record;
                Ok(())
            }
            Err(ReplaceError::Unchanged(error)) => Err(StateError::io("writing", &path)(error)),
            Err(ReplaceError::Undecided(error)) => {
                let old = encode(&self.record)?;
                let back = replace(&mut RealFiles::default(), &self.path, RECORD, &old);
                if matches!(back, Err(ReplaceError::Unchanged(_))) {
                    tracing::error!(
                        path = %path.display(), %error,
                        "the record of a volume may say either of two things and cannot be put back: giving up"
                    );
                    std::process::abort();
                }
                Err(StateError::io("writing", &path)(error))
            }
        }
    }

    /// Writes the missing set that the record's next epoch belongs to, durably.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn create_missing(
        &self,
        epoch: flimcd_core::Epoch,
        set: &BlockSet,
    ) -> Result<BitmapFile, StateError> {
        let bitmap = self.create_bitmap(MISSING, BitmapKind::Missing(epoch), set)?;
        sync_dir(&self.path)?;
        Ok(bitmap)
    }

    /// The missing set of `epoch`.
    ///
    /// # Errors
    /// Also when there is none: the record says that there is one.
    pub fn open_missing(&self, epoch: flimcd_core::Epoch) -> Result<BitmapFile, StateError> {
        let path = self.path.join(MISSING);
        self.open_bitmap(MISSING, BitmapKind::Missing(epoch))?
            .ok_or_else(|| StateError::damaged(&path, "it is not there"))
    }

    /// Starts the missing set as of each moment, beside the durable one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create_missing_now(
        &self,
        epoch: flimcd_core::Epoch,
        set: &BlockSet,
    ) -> Result<BitmapFile, StateError> {
        self.create_bitmap(MISSING_NOW, BitmapKind::MissingNow(epoch), set)
    }

    /// The missing set as an agent of this boot left it; `None` when there was none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_missing_now(
        &self,
        epoch: flimcd_core::Epoch,
    ) -> Result<Option<BitmapFile>, StateError> {
        self.open_bitmap(MISSING_NOW, BitmapKind::MissingNow(epoch))
    }

    /// Starts a record of unacknowledged blocks.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create_unacked(&self, set: &BlockSet) -> Result<BitmapFile, StateError> {
        self.create_bitmap(UNACKED, BitmapKind::Unacked, set)
    }

    /// The record of unacknowledged blocks; `None` when there is none of this boot.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_unacked(&self) -> Result<Option<BitmapFile>, StateError> {
        self.open_bitmap(UNACKED, BitmapKind::Unacked)
    }

    /// Removes the missing set in both forms.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove_missing(&self) -> Result<(), StateError> {
        remove_file(&self.path.join(MISSING_NOW))?;
        remove_file(&self.path.join(MISSING))
    }

    /// Removes the record of unacknowledged blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove_unacked(&self) -> Result<(), StateError> {
        remove_file(&self.path.join(UNACKED))
    }

    /// Where it is written down what is hot.
    pub(crate) fn heat_file(&self) -> HeatFile {
        HeatFile {
            dir: self.path.clone(),
            id: self.record.id,
            size: self.record.size,
        }
    }

    fn create_bitmap(
        &self,
        name: &str,
        kind: BitmapKind,
        set: &BlockSet,
    ) -> Result<BitmapFile, StateError> {
        let record = &self.record;
        BitmapFile::create(&self.path.join(name), kind, record.id, record.size, set)
    }

    fn open_bitmap(&self, name: &str, kind: BitmapKind) -> Result<Option<BitmapFile>, StateError> {
        let record = &self.record;
        BitmapFile::open(&self.path.join(name), kind, record.id, record.size)
    }
}

fn take_lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join(LOCK);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(StateError::io("opening", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::InUse(dir.to_owned())),
        Err(error) => Err(StateError::io("locking", &path)(error.into())),
    }
}

fn read_record(dir: &Path) -> Result<VolumeRecord, StateError> {
    let path = dir.join(RECORD);
    let fail = || StateError::io("reading", &path);
    let length = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StateError::damaged(&path, "it is not there"));
        }
        found => found.map_err(fail())?.len(),
    };
    if length > RECORD_BYTES_MAX as u64 {
        return Err(StateError::damaged(&path, "it is too long"));
    }
    VolumeRecord::decode(&fs::read(&path).map_err(fail())?, &path)
}

fn sync_file(path: &Path) -> Result<(), StateError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(StateError::io("syncing", path))
}

fn sync_dir(path: &Path) -> Result<(), StateError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(StateError::io("syncing", path))
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove_file(path: &Path) -> Result<(), StateError> {
    gone_is_fine(fs::remove_file(path)).map_err(StateError::io("removing", path))
}

fn remove_dir(path: &Path) -> Result<(), StateError> {
    gone_is_fine(fs::remove_dir_all(path)).map_err(StateError::io("removing", path))
}

fn remove_image(path: &Path) -> Result<(), StateError> {
    remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::record::tests::sample;

    fn here() -> (tempfile::TempDir, VolumesDir) {
        let dir = tempfile::tempdir().unwrap();
        let volumes = VolumesDir::open(dir.path().join("volumes")).unwrap();
        (dir, volumes)
    }

    #[test]
    fn a_volume_is_made_opened_by_one_and_removed() {
        let (dir, volumes) = here();
        let name: VolumeName = "vm-1".parse().unwrap();
        let mut state = volumes.create(sample(1)).unwrap();
        assert!(matches!(
            volumes.create(sample(1)),
            Err(StateError::Exists(_))
        ));
        assert!(matches!(
            volumes.open_volume(&name),
            Err(StateError::InUse(_))
        ));
        state.store(sample(2)).unwrap();
        drop(state);
        assert_eq!(volumes.open_volume(&name).unwrap().record(), &sample(2));
        assert_eq!(volumes.list().unwrap(), std::slice::from_ref(&name));
        let image = dir.path().join("image");
        fs::write(&image, "x").unwrap();
        let mut state = volumes.open_volume(&name).unwrap();
        let mut record = sample(3);
        record.image.clone_from(&image);
        state.store(record.clone()).unwrap();
        volumes.remove(&state, false).unwrap();
        assert!(image.exists());
        let state = volumes.create(record).unwrap();
        volumes.remove(&state, true).unwrap();
        assert!(!image.exists());
        assert!(matches!(
            volumes.open_volume(&name),
            Err(StateError::NotFound(_))
        ));
        assert!(volumes.entries().unwrap().is_empty());
    }

    #[test]
    fn what_was_interrupted_is_finished() {
        let (dir, volumes) = here();
        let image = dir.path().join("image");
        fs::write(&image, "x").unwrap();
        let mut record = sample(1);
        record.image.clone_from(&image);
        drop(volumes.create(record).unwrap());
        fs::create_dir(volumes.path.join(".new-other")).unwrap();
        fs::rename(volumes.path.join("vm-1"), volumes.path.join(".forget-vm-1")).unwrap();
        let volumes = VolumesDir::open(volumes.path.clone()).unwrap();
        assert!(volumes.entries().unwrap().is_empty());
        assert!(image.exists());

        let mut record = sample(1);
        record.image.clone_from(&image);
        drop(volumes.create(record).unwrap());
        fs::rename(volumes.path.join("vm-1"), volumes.path.join(".delete-vm-1")).unwrap();
        let volumes = VolumesDir::open(volumes.path.clone()).unwrap();
        assert!(volumes.entries().unwrap().is_empty());
        assert!(!image.exists());
    }

    #[test]
    fn a_directory_without_its_record_or_with_anothers_is_damaged() {
        let (_dir, volumes) = here();
        drop(volumes.create(sample(1)).unwrap());
        fs::rename(volumes.path.join("vm-1"), volumes.path.join("vm-2")).unwrap();
        let name: VolumeName = "vm-2".parse().unwrap();
        let error = volumes.open_volume(&name).unwrap_err();
        assert!(error.to_string().contains("record of vm-1"), "{error}");
        fs::remove_file(volumes.path.join("vm-2/record")).unwrap();
        let error = volumes.open_volume(&name).unwrap_err();
        assert!(error.to_string().contains("not there"), "{error}");
    }
}
