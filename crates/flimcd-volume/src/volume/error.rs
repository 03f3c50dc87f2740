//! Why a volume cannot be made, opened or removed.

use std::{io, path::PathBuf};

use flimcd_core::{VolumeName, VolumeSize};

use crate::{device::OpenError, state::StateError};

/// Why a volume cannot be made, opened or removed. Nothing was changed, unless the text says so.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The image.
    #[error(transparent)]
    Device(#[from] OpenError),
    /// There is a file where the image of a new volume should be.
    #[error(
        "there is already a file {}: import it with `flimcd volume import`, remove it, or choose another name",
        .0.display()
    )]
    ImageExists(PathBuf),
    /// The image of a new volume cannot be made.
    #[error("making the image {} of {size} bytes failed: {source}", path.display(), size = size.bytes())]
    ImageCreate {
        /// Where.
        path: PathBuf,
        /// How big.
        size: VolumeSize,
        /// What the system says.
        source: io::Error,
    },
    /// The path of an image to import leads nowhere.
    #[error("the image {} cannot be used: {source}; give the path of an existing raw disk image", path.display())]
    ImagePath {
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// An image to import is not raw.
    #[error(
        "{} is a {format} image, and volumes are raw: convert it first, `qemu-img convert -O raw {} NEW.raw`",
        path.display(), path.display()
    )]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
    /// The image has another size than the record says.
    #[error(
        "the image {} of volume {name} has {found} bytes now and had {recorded}: put the right image back, or remove the volume \
         (without its image) and import it again", path.display(), found = found.bytes(), recorded = recorded.bytes()
    )]
    SizeChanged {
        /// The volume.
        name: VolumeName,
        /// Its image.
        path: PathBuf,
        /// What the record says.
        recorded: VolumeSize,
        /// What it has.
        found: VolumeSize,
    },
    /// What an earlier agent wrote cannot be made durable.
    #[error("the image {} cannot be synced: {source}; put the disk in order and start the agent again", path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Guests are connected.
    #[error("{connections} guest connections to volume {name} are open: stop the guests first")]
    InUse {
        /// The volume.
        name: VolumeName,
        /// How many.
        connections: usize,
    },
    /// A volume without a state directory.
    #[error("volume {0} has no durable state")]
    Ephemeral(VolumeName),
}
