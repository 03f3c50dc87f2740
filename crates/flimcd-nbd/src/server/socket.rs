//! The listening socket: private from its first moment, and never taken from a server that lives.

use std::{
    fs, io,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another server is there.
    #[error("another server listens on {path}: stop it or choose another socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket.
    #[error("{path} exists and is no socket: choose another path, it was not touched")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// Everything else.
    #[error("cannot listen on {path}: {source}")]
    System {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

pub(super) fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let system = |source| BindError::System {
        path: path.to_owned(),
        source,
    };
    remove_stale(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| system(e.into()))?;
    let bind = || -> rustix::io::Result<_> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Linux gives the file the mode that the socket has, so there is no moment in which others
        // may connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    bind().map(UnixListener::from).map_err(|e| system(e.into()))
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let system = |source| BindError::System {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(system)
        }
        // Refusing to talk to us is a sign of life too.
        _ => Err(BindError::InUse {
            path: path.to_owned(),
        }),
    }
}
