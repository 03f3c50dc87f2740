//! Making, opening and removing volumes, and the record of who owns them.

use std::{
    fs::{self, File, OpenOptions as FileOptions},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize},
    },
    thread,
    time::{Duration, Instant},
};

use flimcd_core::{Epoch, VolumeId, VolumeName, VolumeSize};

use super::{
    SharedCore, Volume, VolumeError,
    flusher::Flusher,
    replica::unseal,
    source::Unacked,
    target::{MissingFiles, SyncHealth},
    undo::{self, Undo},
};
use crate::{
    device::{BlockDevice, FileDevice, OpenError, OpenOptions, lock::LockError},
    rules::{Mode, Rules},
    state::{Ownership, StateDir, VolumeRecord, VolumesDir},
};

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its identity: random for a new one, the source's for one that arrives.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Whose it is.
    pub tenant: String,
    /// Where the image is, or will be. Made absolute.
    pub image: PathBuf,
    /// The highest epoch known.
    pub epoch: Epoch,
    /// Who owns it.
    pub ownership: Ownership,
}

/// The files of a volume that has durable state.
pub(super) struct Durable {
    state: Mutex<StateDir>,
    pub(super) missing: Mutex<Option<MissingFiles>>,
    pub(super) unacked: Unacked,
    pub(super) undo: Mutex<Option<Arc<Undo>>>,
}

impl Durable {
    pub(super) fn state(&self) -> MutexGuard<'_, StateDir> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn missing(&self) -> MutexGuard<'_, Option<MissingFiles>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    /// Makes a volume with a new, sparse image of `size` bytes, all zero.
    ///
    /// # Errors
    /// When the image or the volume exists, or cannot be made. What was made until then is removed.
    pub fn create(
        dir: &VolumesDir,
        new: NewVolume,
        size: VolumeSize,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        if dir.contains(&new.name) {
            return Err(crate::state::StateError::Exists(new.name).into());
        }
        let path = absolute(&new.image)?;
        let failed = |source| VolumeError::ImageCreate {
            path: path.clone(),
            size,
            source,
        };
        let file = FileOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => VolumeError::ImageExists(path.clone()),
                _ => failed(error),
            })?;
        let made = file
            .set_len(size.bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| sync_parent(&path))
            .map_err(failed)
            .and_then(|()| Self::adopt(dir, new, path.clone(), false, options));
        if made.is_err() {
            // Ours, since it was made with `create_new` just above.
            let _ = fs::remove_file(&path);
        }
        made
    }

    /// Makes a volume of an image that exists, which is not changed.
    ///
    /// # Errors
    /// When the path leads to no image, to one that is not raw or that something else uses, or when the volume exists.
    pub fn import(
        dir: &VolumesDir,
        new: NewVolume,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let path = image_to_import(dir, &new)?;
        let format = format_of(&path).map_err(|source| VolumeError::ImagePath {
            path: new.image.clone(),
            source,
        })?;
        if let Some(format) = format {
            return Err(VolumeError::NotRaw { path, format });
        }
        Self::adopt(dir, new, path, true, options)
    }

    /// Makes a volume of an image that a hypervisor has open and is about to hand over. The image is not locked: see
    /// [`take_image_locks`](Self::take_image_locks) for when it has let go. Its format is the hypervisor's affair: the
    /// volume is the bytes of the file. A format that grows its file has to find it long enough, since a volume never grows.
    ///
    /// # Errors
    /// As [`import`](Self::import), but for formats and locks.
    pub fn import_in_use(
        dir: &VolumesDir,
        new: NewVolume,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let path = image_to_import(dir, &new)?;
        let options = OpenOptions {
            lock: false,
            ..*options
        };
        Self::adopt(dir, new, path, true, &options)
    }

    fn adopt(
        dir: &VolumesDir,
        new: NewVolume,
        image: PathBuf,
        imported: bool,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let device = FileDevice::open(&image, options)?;
        let record = VolumeRecord {
            id: new.id,
            name: new.name,
            tenant: new.tenant,
            size: device.size(),
            epoch: new
                .ownership
                .epoch()
                .map_or(new.epoch, |e| e.max(new.epoch)),
            last_migration: new.ownership.migration(),
            ownership: new.ownership,
            image,
            imported,
            baseline: None,
            replica: None,
            in_place: false,
            sealed: None,
            consistent: None,
        };
        let is_new = !imported;
        Self::assemble_on_image(dir.create(record)?, device, is_new)
    }

    /// Opens a volume, as its record says: an owner serves, a prepared one is frozen, and so on. Where a migration had begun,
    /// guest writes are marked from the first one on.
    ///
    /// # Errors
    /// When the volume or its image is not there, damaged, in use, or changed.
    pub fn open(
        dir: &VolumesDir,
        name: &VolumeName,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let state = dir.open_volume(name)?;
        let device = open_image(&state.record().image, options)?;
        check_size(state.record(), device.size())?;
        Self::assemble_on_image(state, device, false)
    }

    /// As [`open`](Self::open), on a device that the caller made, for instance one that fails on purpose. `backend` names it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(
        state: StateDir,
        device: Arc<dyn BlockDevice>,
        backend: String,
    ) -> Result<Arc<Self>, VolumeError> {
        check_size(state.record(), device.size())?;
        Self::assemble(state, device, None, backend, false)
    }

    fn assemble_on_image(
        state: StateDir,
        image: FileDevice,
        is_new: bool,
    ) -> Result<Arc<Self>, VolumeError> {
        let backend = image.backend().to_string();
        Self::assemble(state, Arc::new(image.clone()), Some(image), backend, is_new)
    }

    fn assemble(
        state: StateDir,
        device: Arc<dyn BlockDevice>,
        image: Option<FileDevice>,
        backend: String,
        is_new: bool,
    ) -> Result<Arc<Self>, VolumeError> {
        let mut state = state;
        unseal(&mut state)?;
        let undo = undo::reopen(&mut state)?;
        let record = state.record();
        let (mut rules, mut missing) = (Rules::new(record.size, mode_of(&record.ownership)), None);
        if let Ownership::Arriving { epoch, .. } = record.ownership {
            let (files, set) = MissingFiles::open(&state, epoch, || device.sync_data())?;
            rules.start_postcopy(set);
            missing = Some(files);
        }
        let unacked = match record.ownership {
            Ownership::Owner { .. } | Ownership::Prepared { .. } | Ownership::Arriving { .. } => {
                let unacked = state.open_unacked()?;
                if unacked.is_some() {
                    rules.start_tracking();
                }
                unacked
            }
            Ownership::Released {
                complete: false, ..
            } => state.open_unacked()?,
            _ => None,
        };
        let name = record.name.clone();
        // A new image has only been seen by this process.
        let is_new = is_new && matches!(record.ownership, Ownership::Incoming { .. });
        let heat = super::heat::load(&state.heat_file(), record.size);
        let durable = Durable {
            state: Mutex::new(state),
            missing: Mutex::new(missing),
            unacked: Unacked::new(unacked),
            undo: Mutex::new(undo),
        };
        Ok(Arc::new(Self {
            name,
            backend,
            device,
            image,
            core: SharedCore::new(rules),
            ports: AtomicUsize::new(0),
            syncs: SyncHealth::default(),
            durable: Some(durable),
            flusher: Flusher::default(),
            heat,
            came_in_place: AtomicBool::new(is_new),
        }))
    }

    /// Removes the volume, and its image if asked. The caller sees to it that nobody uses the volume any more.
    ///
    /// # Errors
    /// [`VolumeError::InUse`] while guests are connected, or what the system says.
    pub fn remove(&self, dir: &VolumesDir, with_image: bool) -> Result<(), VolumeError> {
        let connections = self.connections();
        if connections > 0 {
            return Err(VolumeError::InUse {
                name: self.name.clone(),
                connections,
            });
        }
        let durable = self.durable.as_ref();
        let durable = durable.ok_or_else(|| VolumeError::Ephemeral(self.name.clone()))?;
        Ok(dir.remove(&durable.state(), with_image)?)
    }

    /// What is durably known of the volume; `None` for one without durable state.
    #[must_use]
    pub fn record(&self) -> Option<VolumeRecord> {
        let durable = self.durable.as_ref()?;
        Some(durable.state().record().clone())
    }

    /// The volume's identity; zero for a volume without durable state.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.record().map_or(VolumeId(0), |record| record.id)
    }

    /// Makes the record say who owns the volume, durably. Nothing else follows from it: see [`freeze`](Self::freeze),
    /// [`release`](Self::release), [`take_over`](Self::take_over), [`finish_postcopy`](Self::finish_postcopy) for what the
    /// guest notices.
    ///
    /// The image is made durable before the record says `Prepared` or `Released`, since the peer builds on content
    /// that only this image has; and before it says `Owner` after `Arriving`, since nothing will be fetched again then.
    ///
    /// # Errors
    /// When the disk fails: the record is as it was. [`io::ErrorKind::InvalidInput`] for `Owner` while blocks are missing, and for
    /// `Arriving`, which [`take_over`](Self::take_over) makes.
    pub fn set_ownership(&self, ownership: Ownership) -> io::Result<()> {
        match &ownership {
            Ownership::Owner { .. } if self.missing_count() > 0 => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{} blocks are still missing", self.missing_count()),
                ));
            }
            Ownership::Arriving { .. } => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the missing set has to be recorded with it",
                ));
            }
            Ownership::Owner { .. } if self.mode() == Mode::PostCopy => self.sync()?,
            Ownership::Prepared { .. } | Ownership::Released { .. } => self.sync()?,
            Ownership::Owner { .. } | Ownership::Incoming { .. } => {}
        }
        let complete = matches!(ownership, Ownership::Released { complete: true, .. });
        self.store_ownership(ownership)?;
        if complete {
            // Not before: while the guest waits for the switch nothing else is written.
            self.try_store_heat();
        }
        if complete {
            self.drop_unacked()?;
        }
        Ok(())
    }

    /// The durable half of a change of owner.
    pub(super) fn store_ownership(&self, ownership: Ownership) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let mut state = durable.state();
        let mut record = state.record().clone();
        if record.ownership == ownership {
            return Ok(());
        }
        let was_released = matches!(record.ownership, Ownership::Released { .. });
        record.set_ownership(ownership);
        let is_released = matches!(record.ownership, Ownership::Released { .. });
        if is_released && record.replica.is_none() {
            // Taken when the volume is given away, with everything synced; later it would be too late.
            record.replica = Some(super::replica::of(&record.image, !was_released));
        }
        Ok(state.store(record)?)
    }
}

/// The path of an image that exists and can be one.
fn image_to_import(dir: &VolumesDir, new: &NewVolume) -> Result<PathBuf, VolumeError> {
    if dir.contains(&new.name) {
        return Err(crate::state::StateError::Exists(new.name.clone()).into());
    }
    let failed = |source| VolumeError::ImagePath {
        path: new.image.clone(),
        source,
    };
    let path = fs::canonicalize(&new.image).map_err(failed)?;
    let kind = fs::metadata(&path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::NotAnImage { path }.into());
    }
    Ok(path)
}

fn check_size(record: &VolumeRecord, found: VolumeSize) -> Result<(), VolumeError> {
    if record.size == found {
        return Ok(());
    }
    Err(VolumeError::SizeChanged {
        name: record.name.clone(),
        path: record.image.clone(),
        recorded: record.size,
        found,
    })
}

/// Opens the image of a volume whose directory is locked, so that no other agent has it.
///
/// Its locks may still be there for a while: the kernel takes down the rings of a killed process after the process is
/// gone, and until then I/O that it began may still reach the image. So an image in use is waited for before that is
/// believed.
fn open_image(path: &Path, options: &OpenOptions) -> Result<FileDevice, OpenError> {
    const PATIENCE: Duration = Duration::from_secs(30);
    const STEP: Duration = Duration::from_millis(10);
    let begin = Instant::now();
    let mut is_said = false;
    loop {
        match FileDevice::open(path, options) {
            Err(OpenError::Locked(LockError::InUse { .. })) if begin.elapsed() < PATIENCE => {
                if !is_said {
                    is_said = true;
                    tracing::info!(
                        image = %path.display(),
                        "the image is in use, perhaps by what is left of an agent that was killed: waiting for up to {} s",
                        PATIENCE.as_secs()
                    );
                }
                thread::sleep(STEP);
            }
            result => return result,
        }
    }
}

fn mode_of(ownership: &Ownership) -> Mode {
    match ownership {
        Ownership::Owner { .. } => Mode::Owner,
        Ownership::Prepared { .. } => Mode::Frozen,
        Ownership::Released { .. } => Mode::Released,
        Ownership::Incoming { .. } | Ownership::Arriving { .. } => Mode::Incoming,
    }
}

fn absolute(path: &Path) -> Result<PathBuf, VolumeError> {
    std::path::absolute(path).map_err(|source| VolumeError::ImagePath {
        path: path.to_owned(),
        source,
    })
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// The format of an image that is not raw, by its first bytes.
fn format_of(path: &Path) -> io::Result<Option<&'static str>> {
    const FORMATS: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "qcow"),
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"<<< ", "VDI"),
    ];
    let mut head = Vec::new();
    File::open(path)?.take(8).read_to_end(&mut head)?;
    let found = FORMATS.iter().find(|(magic, _)| head.starts_with(magic));
    Ok(found.map(|(_, name)| *name))
}
