//! Ways to bring a stopped image to another site that need no flimcd: rsync onto what the target has, and
//! `qemu-img convert` to an NBD server there. Both between the two ends of a [`Wan`].

use std::{
    fs,
    io::{self, Read as _},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::wan::{Side, Wan, WanBytes, WanError};

/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// Ports of the servers in a namespace of their own.
const PORT: u16 = 7873;

/// A program that copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copier {
    /// `rsync --inplace -z`, with a daemon at the target that has an older copy.
    Rsync,
    /// `qemu-img convert` to a `qemu-nbd` at the target, onto an empty file.
    QemuImg,
}

/// What a copy took.
#[derive(Clone, Debug)]
pub struct Copied {
    /// From the start of the program to its end.
    pub seconds: f64,
    /// On the link, handshakes included.
    pub bytes: WanBytes,
}

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Not installed.
    #[error("{program} is not installed (Debian: apt install {package})")]
    Missing {
        /// The program.
        program: &'static str,
        /// Its package.
        package: &'static str,
    },
    /// It cannot be started, or files for it not be made.
    #[error("{what} cannot be started: {source}")]
    Start {
        /// The program.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The WAN.
    #[error(transparent)]
    Wan(#[from] WanError),
    /// It ended with an error, or its server never listened.
    #[error("{what} failed: {said}")]
    Failed {
        /// The program.
        what: &'static str,
        /// What it said.
        said: String,
    },
}

impl Copier {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Rsync, Self::QemuImg];

    /// What it is called in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rsync => "rsync --inplace -z",
            Self::QemuImg => "qemu-img over NBD",
        }
    }

    const fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Rsync => &[("rsync", "rsync")],
            Self::QemuImg => &[("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils")],
        }
    }

    /// Whether it can run here.
    ///
    /// # Errors
    /// [`CopyError::Missing`] says what to install.
    pub fn check(self) -> Result<(), CopyError> {
        for &(program, package) in self.programs() {
            let found = Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            if !found.is_ok_and(|status| status.success()) {
                return Err(CopyError::Missing { program, package });
            }
        }
        Ok(())
    }

    /// Whether it makes use of what `target` holds already. If not, that has to be an empty file.
    #[must_use]
    pub const fn uses_older_copy(self) -> bool {
        matches!(self, Self::Rsync)
    }

    /// Copies `source`, at site A, to `target`, at site B, which exists and has the same size. `dir` is for
    /// files of the servers. Blocks.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn copy(
        self,
        wan: &Wan,
        dir: &Path,
        source: &Path,
        target: &Path,
    ) -> Result<Copied, CopyError> {
        self.check()?;
        let listen = free_address(wan).map_err(start("a server"))?;
        let _server = match self {
            Self::Rsync => rsync_daemon(wan, dir, target, listen)?,
            Self::QemuImg => qemu_nbd(wan, target, listen)?,
        };
        let reach = wan.reach(Side::A, listen)?;
        let mut command = match self {
            Self::Rsync => {
                let name = target.file_name().unwrap_or_default().to_string_lossy();
                let mut command = Command::new("rsync");
                command
                    .args(["--inplace", "-z", "--ignore-times"])
                    .arg(source)
                    .arg(format!("rsync://{reach}/images/{name}"));
                command
            }
            Self::QemuImg => {
                let mut command = Command::new("qemu-img");
                command
                    .args(["convert", "-n", "--target-is-zero", "-W", "-m", "16"])
                    .args(["-f", "raw", "-O", "raw"])
                    .arg(source)
                    .arg(format!("nbd://{reach}/"));
                command
            }
        };
        let what = self.name();
        wan.put_in(Side::A, &mut command)?;
        let (began, before) = (Instant::now(), wan.bytes());
        let output = command
            .stdin(Stdio::null())
            .output()
            .map_err(start(self.name()))?;
        let seconds = began.elapsed().as_secs_f64();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(CopyError::Failed { what, said });
        }
        Ok(Copied {
            seconds,
            bytes: wan.bytes().since(&before),
        })
    }
}

const fn start(what: &'static str) -> impl Fn(io::Error) -> CopyError {
    move |source| CopyError::Start { what, source }
}

/// Where a server at the target can listen. On the loopback others may be quicker to take the port; then the
/// server says so.
fn free_address(wan: &Wan) -> io::Result<SocketAddr> {
    let address = wan.address(Side::B);
    if address.is_loopback() {
        return TcpListener::bind((address, 0))?.local_addr();
    }
    Ok((address, PORT).into())
}

fn rsync_daemon(
    wan: &Wan,
    dir: &Path,
    target: &Path,
    listen: SocketAddr,
) -> Result<Server, CopyError> {
    let images = target.parent().unwrap_or(Path::new("/"));
    let owner = if rustix::process::geteuid().is_root() {
        "uid = 0\ngid = 0\n"
    } else {
        ""
    };
    let config = dir.join("rsyncd.conf");
    let text = format!(
        "use chroot = no\n{owner}[images]\npath = {}\nread only = no\n",
        images.display()
    );
    fs::write(&config, text).map_err(start("rsync's daemon"))?;
    let mut command = Command::new("rsync");
    command
        .args(["--daemon", "--no-detach", "--config"])
        .arg(&config)
        .args(["--address", &listen.ip().to_string()])
        .args(["--port", &listen.port().to_string()]);
    Server::start(wan, "rsync's daemon", command, dir, listen)
}

fn qemu_nbd(wan: &Wan, target: &Path, listen: SocketAddr) -> Result<Server, CopyError> {
    let mut command = Command::new("qemu-nbd");
    command
        .args(["--persistent", "--shared", "0", "--format", "raw"])
        .args(["--discard", "unmap", "--cache", "writeback"])
        .args(["--bind", &listen.ip().to_string()])
        .args(["--port", &listen.port().to_string()])
        .arg(target);
    let dir = target.parent().unwrap_or(Path::new("/"));
    Server::start(wan, "qemu-nbd", command, dir, listen)
}

/// A server at the target; killed when dropped.
struct Server(Child);

impl Server {
    fn start(
        wan: &Wan,
        what: &'static str,
        mut command: Command,
        dir: &Path,
        listen: SocketAddr,
    ) -> Result<Self, CopyError> {
        let log: PathBuf = dir.join("server.log");
        let file = fs::File::create(&log).map_err(start(what))?;
        wan.put_in(Side::B, &mut command)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(start(what))?)
            .stderr(file)
            .spawn()
            .map_err(start(what))?;
        let mut server = Self(child);
        let began = Instant::now();
        while !wan.is_listening(Side::B, listen)? {
            let has_ended = server.0.try_wait().is_ok_and(|status| status.is_some());
            if has_ended || began.elapsed() > START_MAX {
                let mut said = String::new();
                // Whatever can be had of it.
                let _ = fs::File::open(&log).and_then(|mut log| log.read_to_string(&mut said));
                return Err(CopyError::Failed { what, said });
            }
            thread::sleep(POLL);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, then both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
