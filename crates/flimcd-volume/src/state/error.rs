//! What can be wrong with a state directory.

use std::{
    io,
    path::{Path, PathBuf},
};

use flimcd_core::VolumeName;

/// Why a volume's state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error("{what} {} failed: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another agent has the volume.
    #[error("the volume's directory {} is in use by another agent: stop that one first", .0.display())]
    InUse(PathBuf),
    /// There is a volume of this name.
    #[error("there is a volume named {0} already: choose another name, or remove that one first")]
    Exists(VolumeName),
    /// There is none.
    #[error("there is no volume named {0}: `flimcd volume list` shows those there are")]
    NotFound(VolumeName),
    /// The file is not what was written.
    #[error(
        "{} is damaged ({why}): nothing was changed; restore the file from a backup, or move the volume's directory away \
         and import the image again if this site owns it", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In which way.
        why: String,
    },
    /// Written by a later version.
    #[error(
        "{} has format {version}, which this version of flimcd does not know: start the version that wrote it, or a newer one",
        path.display()
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
}

impl StateError {
    /// A map for [`Result::map_err`].
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    pub(super) fn damaged(path: &Path, why: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            why: why.into(),
        }
    }
}

impl From<StateError> for io::Error {
    fn from(error: StateError) -> Self {
        let kind = match &error {
            StateError::Io { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
