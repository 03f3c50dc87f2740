//! The agent's directories, the lock on its state, and the socket of its API.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tokio::net::UnixListener;

use crate::{Config, error::StartError};

/// Makes the directories that are not there, for the agent's user alone.
pub(crate) fn make(config: &Config) -> Result<(), StartError> {
    let images = config.images_dir();
    for (what, path) in [
        ("state_dir", &config.state_dir),
        ("images_dir", &images),
        ("runtime_dir", &config.runtime_dir),
    ] {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| StartError::Directory {
                what,
                path: path.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Holds the state directory for one agent; the kernel lets it go when the process ends.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the directory.
    pub(crate) fn take(state_dir: &Path) -> Result<Self, StartError> {
        let unusable = |source| StartError::Directory {
            what: "state_dir",
            path: state_dir.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(state_dir.join("agent.lock"))
            .map_err(unusable)?;
        if let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(unusable(error.into()));
            }
            let mut pid = String::new();
            // For the message only.
            let _ = file.read_to_string(&mut pid);
            let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
            return Err(StartError::StateInUse {
                path: state_dir.to_owned(),
                pid: pid.unwrap_or_else(|| "?".to_owned()),
            });
        }
        let write = || -> io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        let mut write = write;
        write().map_err(unusable)?;
        Ok(Self { _file: file })
    }
}

/// The socket of the API, which is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct ApiSocket {
    path: PathBuf,
}

impl ApiSocket {
    /// Binds the socket, for the agent's user alone. One that nobody listens on is replaced.
    pub(crate) fn bind(path: PathBuf) -> Result<(Self, UnixListener), StartError> {
        let failed = |source| StartError::Api {
            path: path.clone(),
            source,
        };
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(found) if !found.file_type().is_socket() => {
                let problem = "there is something that is no socket";
                return Err(failed(io::Error::other(problem)));
            }
            Ok(_) => match UnixStream::connect(&path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(StartError::ApiInUse { path }),
            },
        }
        // Private before anybody can find it, and in its place at once.
        let hidden = path.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(failed)?;
        fs::set_permissions(&hidden, Permissions::from_mode(0o600)).map_err(failed)?;
        fs::rename(&hidden, &path).map_err(failed)?;
        Ok((Self { path }, listener))
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_and_names_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::take(dir.path()).unwrap();
        let message = StateLock::take(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(&std::process::id().to_string()),
            "{message}"
        );
        drop(first);
        StateLock::take(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (socket, listener) = ApiSocket::bind(path.clone()).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(
            ApiSocket::bind(path.clone()),
            Err(StartError::ApiInUse { .. })
        ));
        drop((socket, listener));
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert!(
            ApiSocket::bind(path.clone())
                .unwrap_err()
                .to_string()
                .contains("no socket")
        );
    }
}
