//! The servers under test: how each is started, and how it ends.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use flimcd_nbd::{Client, Server};
use flimcd_volume::{
    Volume,
    device::{DirectIo, FileDevice, OpenOptions},
    rules::Mode,
};
use serde::Serialize;

use super::{BenchError, system};

/// Tells [`serve`] to use the page cache.
const BUFFERED: &str = "FLIMCD_BENCH_BUFFERED";
/// How long a server may take to listen.
pub(super) const START_MAX: Duration = Duration::from_secs(10);

/// Whether the page cache is avoided. Servers are compared within a class, because the page cache
/// changes what is measured: it makes a write a copy to memory, and a second read of a block one
/// from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// O_DIRECT.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A server under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Own,
    QemuUring,
    QemuNative,
    OwnBuffered,
    QemuBuffered,
    Nbdkit,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Own,
        Self::QemuUring,
        Self::QemuNative,
        Self::OwnBuffered,
        Self::QemuBuffered,
        Self::Nbdkit,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Own => "flimcd",
            Self::QemuUring => "qemu-nbd io_uring",
            Self::QemuNative => "qemu-nbd native",
            Self::OwnBuffered => "flimcd buffered",
            Self::QemuBuffered => "qemu-nbd buffered",
            Self::Nbdkit => "nbdkit file",
        }
    }

    pub(super) fn class(self) -> Class {
        match self {
            Self::Own | Self::QemuUring | Self::QemuNative => Class::Direct,
            Self::OwnBuffered | Self::QemuBuffered | Self::Nbdkit => Class::Buffered,
        }
    }

    pub(super) fn is_own(self) -> bool {
        matches!(self, Self::Own | Self::OwnBuffered)
    }

    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Own | Self::OwnBuffered => "flimcd",
            Self::QemuUring | Self::QemuNative | Self::QemuBuffered => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
        }
    }

    pub(super) fn is_installed(self) -> bool {
        if self.is_own() {
            return true;
        }
        let found = Command::new(self.program())
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        found.is_ok_and(|status| status.success())
    }

    /// Starts it on `image` and waits until it listens on `socket`. `serve_command`: as in the
    /// options.
    pub(super) fn start(
        self,
        image: &Path,
        socket: &Path,
        serve_command: Option<&[String]>,
    ) -> Result<Running, BenchError> {
        // Until whoever had the image last is really gone.
        drop(FileDevice::open(image, &OpenOptions::default())?);
        let direct = match self.class() {
            Class::Direct => DirectIo::Auto,
            Class::Buffered => DirectIo::Off,
        };
        let mut command = match serve_command {
            None if self.is_own() => {
                return own_server(image, socket, direct).map(Running::Thread);
            }
            Some(words) if self.is_own() => {
                let mut command = Command::new(words.first().map_or("flimcd", String::as_str));
                command.args(words.iter().skip(1)).arg(image).arg(socket);
                if direct == DirectIo::Off {
                    command.env(BUFFERED, "1");
                }
                command
            }
            _ => self.command(image, socket),
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let started = command
            .spawn()
            .map_err(system(format!("start {}", self.program())))?;
        let mut process = Process {
            child: started,
            socket: socket.to_owned(),
            ends_by_itself: self.is_own(),
        };
        let begin = Instant::now();
        // It listens a moment before it has its export.
        while Client::list_unix(socket).map_or(true, |names| names.is_empty()) {
            let ended = process
                .child
                .try_wait()
                .is_ok_and(|status| status.is_some());
            if ended || begin.elapsed() > START_MAX {
                return Err(BenchError::NotListening {
                    name: self.name().to_owned(),
                    said: process.said(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Running::Process(process))
    }

    fn command(self, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Self::Own | Self::OwnBuffered => {}
            Self::QemuUring | Self::QemuNative | Self::QemuBuffered => {
                let how: &[&str] = match self {
                    Self::QemuUring => &["--cache=none", "--aio=io_uring"],
                    Self::QemuNative => &["--cache=none", "--aio=native"],
                    _ => &["--cache=writeback"],
                };
                command
                    .arg("--format=raw")
                    .args(how)
                    .args(["--persistent", "--socket"]);
                command.arg(socket).arg(image);
            }
            Self::Nbdkit => {
                command.args(["--foreground", "--exit-with-parent", "--unix"]);
                command.arg(socket).arg("file").arg(image);
            }
        }
        command
    }
}

/// Serves `image` on `socket` until the standard input ends: the process that
/// [`Options::serve_command`] starts. Through the page cache when `FLIMCD_BENCH_BUFFERED` is in the
/// environment.
///
/// # Errors
/// When the image or the socket cannot be used.
pub fn serve(image: &Path, socket: &Path) -> Result<(), BenchError> {
    let buffered = std::env::var_os(BUFFERED).is_some();
    let direct = if buffered {
        DirectIo::Off
    } else {
        DirectIo::Auto
    };
    let _server = own_server(image, socket, direct)?;
    let wait = io::stdin().lock().read_to_end(&mut Vec::new());
    wait.map(drop).map_err(system("read the standard input"))
}

fn own_server(image: &Path, socket: &Path, direct: DirectIo) -> Result<Server, BenchError> {
    let options = OpenOptions {
        direct,
        ..OpenOptions::default()
    };
    let device = FileDevice::open(image, &options)?;
    let server = Server::bind(socket)?;
    #[expect(clippy::expect_used, reason = "a constant that is a valid name")]
    let name = "bench".parse().expect("a valid name");
    server.export(
        "bench",
        Volume::ephemeral(name, Arc::new(device), Mode::Owner),
    );
    Ok(server)
}

/// A server that runs.
pub(super) enum Running {
    Thread(Server),
    Process(Process),
}

impl Running {
    pub(super) fn stop(self) {
        match self {
            Self::Thread(server) => server.shutdown(),
            Self::Process(process) => drop(process),
        }
    }
}

/// A server's process; ended when dropped.
pub(super) struct Process {
    child: Child,
    socket: PathBuf,
    /// At the end of its standard input.
    ends_by_itself: bool,
}

impl Process {
    /// Ends it and returns what it said.
    fn said(&mut self) -> String {
        let _ = self.child.kill();
        let mut said = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            let _ = pipe.read_to_string(&mut said);
        }
        said.trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Our own server ends by itself then, and in order; the image's locks are free when it has.
        drop(self.child.stdin.take());
        if !self.ends_by_itself {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}
