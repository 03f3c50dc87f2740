//! Why an agent does not start, and how errors look in the API.

use flimcd_core::{SiteName, VolumeName};
use std::{io, path::PathBuf};

use crate::api::{ApiCode, ErrorBody};

/// Why an agent did not start. Nothing is left behind when it does not.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory cannot be made or used.
    #[error("the {what} {} cannot be used: {source}; check the path and its permissions", path.display())]
    Directory {
        /// Which one, as in the configuration.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another agent runs.
    #[error(
        "another agent (process {pid}) uses the state directory {}; stop it first, or give this one a \
         directory of its own", path.display()
    )]
    StateInUse {
        /// The directory.
        path: PathBuf,
        /// The other agent's process id, as it wrote it down; `?` if it has not.
        pid: String,
    },
    /// A certificate or the key cannot be read.
    #[error("tls.{key}: {} cannot be read: {source}; make it with `flimcd pki issue {site}`", path.display())]
    Certificate {
        /// The key in the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Name of this site.
        site: SiteName,
        /// What the system said.
        source: io::Error,
    },
    /// The link's settings are wrong.
    #[error(transparent)]
    Link(#[from] flimcd_link::ConfigError),
    /// The address to listen on cannot be used.
    #[error("listen: {0}")]
    Listen(#[from] flimcd_link::ListenError),
    /// The volumes cannot be opened.
    #[error("the volume in {} cannot be opened: {problem}", path.display())]
    Volume {
        /// Its directory.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A volume's export cannot be served.
    #[error("the export of volume {name} cannot be served: {problem}")]
    Export {
        /// The volume.
        name: VolumeName,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The socket of the API is in use.
    #[error(
        "the API's socket {} is in use by another process; stop that agent, or choose another runtime_dir",
        path.display()
    )]
    ApiInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket of the API cannot be made.
    #[error("the API's socket {} cannot be made: {source}; check runtime_dir and its permissions", path.display())]
    Api {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Signals cannot be caught.
    #[error("signals cannot be caught: {0}")]
    Signals(#[source] io::Error),
}

/// An error of the API.
pub(crate) fn refuse(
    code: ApiCode,
    message: impl Into<String>,
    hint: impl Into<String>,
) -> ErrorBody {
    let hint = hint.into();
    ErrorBody {
        code,
        message: message.into(),
        hint: (!hint.is_empty()).then_some(hint),
    }
}

/// An error of the operating system in the API.
pub(crate) fn io_error(what: &str, error: &io::Error) -> ErrorBody {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull => "make room on the file system",
        io::ErrorKind::PermissionDenied => {
            "check the permissions of the user that the agent runs as"
        }
        _ => "the agent's log may say more",
    };
    refuse(ApiCode::Io, format!("{what} failed: {error}"), hint)
}
