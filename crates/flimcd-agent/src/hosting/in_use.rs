//! Volumes whose image a hypervisor has open, or is to get back.

use flimcd_core::VolumeName;
use flimcd_volume::{
    Volume, VolumeError,
    device::{OpenError, OpenOptions, lock::LockError},
};
use std::{path::Path, sync::Arc};

use super::{Hosted, Hosting, cannot_make};
use crate::api::ErrorBody;

/// What is done about an image's locks when its volume is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ImageLocks {
    /// Taken; the agent does not start without.
    Take,
    /// Taken; the volume is not served without, because a machine that is gone from here may use the image.
    TakeOrDoNotServe,
    /// Left alone: a hypervisor may have them, on its way here or back.
    Leave,
}

impl Hosting {
    /// Opens a volume; the second part of the answer says whether it may be served. Blocks.
    pub(super) fn open_volume(
        &self,
        name: &VolumeName,
        locks: ImageLocks,
    ) -> Result<(Arc<Volume>, bool), VolumeError> {
        let unlocked = OpenOptions {
            lock: false,
            ..self.options
        };
        let open = |options| Volume::open(&self.volumes, name, options);
        match locks {
            ImageLocks::Leave => Ok((open(&unlocked)?, true)),
            ImageLocks::Take => Ok((open(&self.options)?, true)),
            ImageLocks::TakeOrDoNotServe => match open(&self.options) {
                Err(VolumeError::Device(OpenError::Locked(error @ LockError::InUse { .. }))) => {
                    tracing::error!(volume = %name, "the volume is not served: {error}");
                    Ok((open(&unlocked)?, false))
                }
                opened => Ok((opened?, true)),
            },
        }
    }

    /// Makes a volume of an image that a hypervisor has open, and serves it without locks. Blocks.
    pub(crate) fn import_in_use(
        &self,
        name: &VolumeName,
        image: &Path,
        tenant: Option<&str>,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        let reservation = self.reserve(name)?;
        self.check_not_taken(image)?;
        let new = self.new_volume(name, tenant, image.to_owned());
        let volume = Volume::import_in_use(&self.volumes, new, &self.options)
            .map_err(|error| cannot_make(&error))?;
        self.put(reservation, &volume, false)
    }
}
