//! The volumes of an agent and the sockets on which guests find them.
//!
//! Every volume has its own NBD server as long as it is under care: guests of an arriving volume
//! wait in it, those of a volume that has moved are refused by it. A name is *reserved* while a
//! volume of that name is made or removed, so that nothing happens to it twice at once.

mod arrival;
mod hosted;
mod in_use;

use flimcd_core::{Epoch, VolumeId, VolumeName, VolumeSize};
use flimcd_volume::{
    NewVolume, Ownership, StateError, Volume, VolumeError, VolumesDir,
    device::{OpenError, OpenOptions},
};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    Config,
    api::{ApiCode, ErrorBody, OwnershipState, RemovedVolume},
    error::{StartError, refuse},
    heat,
    ops::not_owner,
};
use hosted::state_of;
pub(crate) use hosted::{Hosted, allocated};
pub(crate) use in_use::ImageLocks;

/// A volume's name that would make its export's socket that of the API.
const RESERVED: &str = "api";
/// Tenant of volumes that name none.
pub(crate) const DEFAULT_TENANT: &str = "default";

enum Slot {
    Reserved,
    Ready(Arc<Hosted>),
}

/// See the module.
pub(crate) struct Hosting {
    slots: Mutex<BTreeMap<VolumeName, Slot>>,
    volumes: VolumesDir,
    options: OpenOptions,
    images_dir: PathBuf,
    runtime_dir: PathBuf,
}

impl Hosting {
    /// Opens all volumes and serves their exports; `locks` says what is done about the locks of a volume's image. Blocks.
    pub(crate) fn open(
        config: &Config,
        locks: impl Fn(&VolumeName) -> ImageLocks,
    ) -> Result<Self, StartError> {
        let path = config.state_dir.join("volumes");
        let failed = |path: &Path, error: VolumeError| StartError::Volume {
            path: path.to_owned(),
            problem: error.to_string(),
        };
        let volumes =
            VolumesDir::open(&path).map_err(|error| failed(&path, VolumeError::State(error)))?;
        let names = volumes.list();
        let names = names.map_err(|error| failed(&path, VolumeError::State(error)))?;
        let hosting = Self {
            slots: Mutex::default(),
            volumes,
            options: OpenOptions::default(),
            images_dir: config.images_dir(),
            runtime_dir: config.runtime_dir.clone(),
        };
        for name in names {
            let hosted = match hosting.open_volume(&name, locks(&name)) {
                Ok((volume, true)) => Hosted::serve(volume, &hosting.runtime_dir),
                Ok((volume, false)) => Ok(Hosted::unserved(volume, &hosting.runtime_dir)),
                Err(error) if hosting.forget_lost_copy(&name, &error) => continue,
                Err(error) => return Err(failed(&hosting.volumes.path_of(&name), error)),
            };
            let hosted = hosted.map_err(|error| StartError::Export {
                name: name.clone(),
                problem: error.to_string(),
            })?;
            hosting.slots().insert(name, Slot::Ready(hosted));
        }
        Ok(hosting)
    }

    /// A volume that cannot be opened: if it is only the copy of one that has moved away, and its image is not what it was, the
    /// volume is forgotten and nothing is deleted. An agent has to start without it.
    fn forget_lost_copy(&self, name: &VolumeName, error: &VolumeError) -> bool {
        let is_lost = match error {
            VolumeError::SizeChanged { .. }
            | VolumeError::Device(OpenError::NotAnImage { .. } | OpenError::Size { .. }) => true,
            VolumeError::Device(OpenError::Open { source, .. }) => {
                source.kind() == io::ErrorKind::NotFound
            }
            _ => false,
        };
        let Ok(state) = self.volumes.open_volume(name) else {
            return false;
        };
        if !is_lost || !state.record().is_replica() {
            return false;
        }
        tracing::error!(volume = %name, "forgets the copy of a volume that has moved away: {error}");
        self.volumes.remove(&state, false).is_ok()
    }

    /// Stops serving and closes all volumes. Blocks until guests are gone and data is durable.
    pub(crate) fn close(&self) {
        let slots = std::mem::take(&mut *self.slots());
        for slot in slots.into_values() {
            if let Slot::Ready(hosted) = slot {
                hosted.stop_serving();
                let closed = hosted.volume.sync().and_then(|()| hosted.volume.seal());
                if let Err(error) = closed {
                    tracing::error!(volume = %hosted.name(), "making data durable failed: {error}");
                }
                heat::store(&hosted.volume);
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All volumes, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Hosted>> {
        let slots = self.slots();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(hosted) => Some(hosted.clone()),
            Slot::Reserved => None,
        });
        ready.collect()
    }

    /// The volume of this id.
    pub(crate) fn by_id(&self, id: VolumeId) -> Option<Arc<Hosted>> {
        self.all()
            .into_iter()
            .find(|hosted| hosted.volume.id() == id)
    }

    /// The volume of this name.
    pub(crate) fn get(&self, name: &VolumeName) -> Result<Arc<Hosted>, ErrorBody> {
        match self.slots().get(name) {
            Some(Slot::Ready(hosted)) => Ok(hosted.clone()),
            Some(Slot::Reserved) => Err(being_changed(name)),
            None => Err(refuse(
                ApiCode::UnknownVolume,
                format!("there is no volume {name}"),
                "`flimcd volume list` shows what there is",
            )),
        }
    }

    /// Whether there is a volume of this name, or one is made now.
    pub(crate) fn has(&self, name: &VolumeName) -> bool {
        self.slots().contains_key(name)
    }

    /// Makes a name ours until the guard is filled or dropped.
    fn reserve(&self, name: &VolumeName) -> Result<Reservation<'_>, ErrorBody> {
        if name.as_str() == RESERVED {
            let message =
                format!("a volume cannot be called {RESERVED}: its socket would be the API's");
            return Err(refuse(ApiCode::BadRequest, message, "choose another name"));
        }
        match self.slots().entry(name.clone()) {
            std::collections::btree_map::Entry::Occupied(_) => Err(refuse(
                ApiCode::Exists,
                format!("there is a volume {name} already"),
                "choose another name, or remove that one",
            )),
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(Slot::Reserved);
                Ok(Reservation {
                    hosting: self,
                    name: name.clone(),
                    is_filled: false,
                })
            }
        }
    }

    /// Makes an empty volume. Blocks.
    pub(crate) fn create(
        &self,
        name: &VolumeName,
        size: VolumeSize,
        tenant: Option<&str>,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        let reservation = self.reserve(name)?;
        let new = self.new_volume(name, tenant, self.image_path(name));
        let volume = Volume::create(&self.volumes, new, size, &self.options)
            .map_err(|error| cannot_make(&error))?;
        self.put(reservation, &volume, true)
    }

    /// Takes an image under care. Blocks.
    pub(crate) fn import(
        &self,
        name: &VolumeName,
        image: &Path,
        tenant: Option<&str>,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        let reservation = self.reserve(name)?;
        self.check_not_taken(image)?;
        let new = self.new_volume(name, tenant, image.to_owned());
        let volume = Volume::import(&self.volumes, new, &self.options)
            .map_err(|error| cannot_make(&error))?;
        self.put(reservation, &volume, false)
    }

    fn check_not_taken(&self, image: &Path) -> Result<(), ErrorBody> {
        let taken = self
            .all()
            .into_iter()
            .find(|hosted| same_file(&hosted.record().image, image));
        let Some(other) = taken else { return Ok(()) };
        let message = format!(
            "{} is the image of volume {} already",
            image.display(),
            other.name()
        );
        Err(refuse(ApiCode::Exists, message, "one image is one volume"))
    }

    /// A volume that begins its life here.
    fn new_volume(&self, name: &VolumeName, tenant: Option<&str>, image: PathBuf) -> NewVolume {
        NewVolume {
            id: VolumeId(rand::random()),
            name: name.clone(),
            tenant: tenant.unwrap_or(DEFAULT_TENANT).to_owned(),
            image,
            epoch: Epoch::FIRST,
            ownership: Ownership::Owner {
                epoch: Epoch::FIRST,
            },
        }
    }

    /// Serves a volume that was just made, or unmakes it.
    fn put(
        &self,
        reservation: Reservation<'_>,
        volume: &Arc<Volume>,
        image_is_new: bool,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        match Hosted::serve(volume.clone(), &self.runtime_dir) {
            Ok(hosted) => {
                reservation.fill(hosted.clone());
                Ok(hosted)
            }
            Err(error) => {
                let message = format!("the export cannot be served: {error}");
                let refusal = refuse(ApiCode::Io, message, "");
                if let Err(error) = volume.remove(&self.volumes, image_is_new) {
                    tracing::error!(volume = %volume.name(), "cleaning up failed: {error}");
                }
                Err(refusal)
            }
        }
    }

    /// Gives a volume up, if `check` allows it. With `only_replica` nothing but a copy that stayed is given up, and an image that was
    /// imported is left alone. Blocks.
    pub(crate) fn remove(
        &self,
        name: &VolumeName,
        delete_image: bool,
        only_replica: bool,
        check: impl FnOnce() -> Result<(), ErrorBody>,
    ) -> Result<RemovedVolume, ErrorBody> {
        let hosted = self.get(name)?;
        check()?;
        let guests = hosted.volume.connections();
        if guests > 0 {
            let message = format!("{name} has {guests} guest connections");
            return Err(refuse(ApiCode::Busy, message, "stop the guest first"));
        }
        let reservation = self.withdraw(name)?;
        // Only now, since it may have begun to come back just before.
        let record = hosted.record();
        match &record.ownership {
            Ownership::Owner { .. } if !only_replica => {}
            Ownership::Released { complete: true, .. } => {}
            other => {
                reservation.fill(hosted);
                let (state, peer) = state_of(other);
                return Err(not_owner(name, state, peer));
            }
        }
        let delete_image = delete_image && !(only_replica && record.imported);
        hosted.stop_serving();
        hosted
            .volume
            .remove(&self.volumes, delete_image)
            .map_err(|error| refuse(ApiCode::Io, format!("removing {name} failed: {error}"), ""))?;
        drop(reservation);
        Ok(RemovedVolume {
            name: name.clone(),
            image: record.image.clone(),
            image_deleted: delete_image,
        })
    }

    /// Removes a volume whose arrival was cut short, with its image; what came over a copy is a copy again. Blocks.
    pub(crate) fn discard(&self, name: &VolumeName) -> io::Result<()> {
        let Ok(hosted) = self.get(name) else {
            return Ok(());
        };
        if hosted.state() != OwnershipState::Incoming {
            return Err(io::Error::other("it is not an arriving volume"));
        }
        let Ok(reservation) = self.withdraw(name) else {
            return Ok(());
        };
        if hosted.record().in_place {
            let left = hosted.volume.leave_incoming();
            reservation.fill(hosted);
            return left;
        }
        hosted.stop_serving();
        let removed = hosted.volume.remove(&self.volumes, true);
        drop(reservation);
        removed.map_err(io::Error::other)
    }

    /// Removes the image of an arrival that was never made a volume of. Blocks. What has content was not made by us,
    /// and stays.
    pub(crate) fn remove_unborn(&self, name: &VolumeName) -> io::Result<()> {
        let image = self.image_path(name);
        if self.slots().contains_key(name) {
            return Ok(());
        }
        match fs::symlink_metadata(&image) {
            Ok(found) if found.is_file() && found.blocks() == 0 => fs::remove_file(&image),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes a volume out, with its name still reserved.
    fn withdraw(&self, name: &VolumeName) -> Result<Reservation<'_>, ErrorBody> {
        match self.slots().get_mut(name) {
            Some(slot @ Slot::Ready(_)) => {
                *slot = Slot::Reserved;
                Ok(Reservation {
                    hosting: self,
                    name: name.clone(),
                    is_filled: false,
                })
            }
            _ => Err(being_changed(name)),
        }
    }

    fn image_path(&self, name: &VolumeName) -> PathBuf {
        self.images_dir.join(format!("{name}.raw"))
    }
}

/// Why a volume was not made, for the API.
fn cannot_make(error: &VolumeError) -> ErrorBody {
    let code = match error {
        VolumeError::State(StateError::Exists(_)) => ApiCode::Exists,
        VolumeError::State(_) | VolumeError::ImageCreate { .. } => ApiCode::Io,
        _ => ApiCode::Image,
    };
    refuse(code, error.to_string(), "")
}

fn being_changed(name: &VolumeName) -> ErrorBody {
    let message = format!("volume {name} is being made or removed");
    refuse(ApiCode::Busy, message, "try again in a moment")
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// A name that is reserved; free again when this is dropped without a volume.
struct Reservation<'a> {
    hosting: &'a Hosting,
    name: VolumeName,
    is_filled: bool,
}

impl Reservation<'_> {
    fn fill(mut self, hosted: Arc<Hosted>) {
        self.is_filled = true;
        self.hosting
            .slots()
            .insert(self.name.clone(), Slot::Ready(hosted));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.is_filled {
            self.hosting.slots().remove(&self.name);
        }
    }
}
