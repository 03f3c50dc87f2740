//! A running QEMU: its guest's serial lines, and its end.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use super::{LoadLine, QemuSpec};

/// A guest that is not up after this will never be, however busy the machine is.
const READY_MAX: Duration = Duration::from_secs(180);
/// Longest that a command may take the guest; `verify` of a large load is slow under emulation.
pub(super) const CONTROL_MAX: Duration = Duration::from_secs(180);
/// Between two looks at something that gives no notice.
const POLL: Duration = Duration::from_millis(20);
const LOG_TAIL_LINES: usize = 12;

/// What went wrong with a guest.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// It could not be started.
    #[error("QEMU cannot be started in {}: {source}", dir.display())]
    Start {
        /// Its directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// QEMU ended while something was expected of it.
    #[error("QEMU ended ({status}) while waiting for {what}: {log}")]
    Ended {
        /// What was waited for.
        what: String,
        /// How it ended.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// The guest said that it cannot boot or run its load.
    #[error("the guest does not come up; it said: {log}")]
    Boot {
        /// The end of what it printed.
        log: String,
    },
    /// Something did not happen in time.
    #[error("the guest's {what} did not happen within {seconds} s; it said: {log}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// The end of what the guest printed.
        log: String,
    },
    /// The guest refused a command or could not be asked.
    #[error("the guest was asked {command:?}: {text}")]
    Control {
        /// The command.
        command: String,
        /// What was wrong.
        text: String,
    },
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    spec: QemuSpec,
    child: Mutex<Child>,
    /// The control line takes one command at a time.
    control: Mutex<()>,
}

impl Qemu {
    pub(super) fn start(
        mut command: Command,
        spec: QemuSpec,
        prepare: impl FnOnce(&mut Command) -> io::Result<()>,
    ) -> Result<Self, QemuError> {
        let start = || -> io::Result<Child> {
            fs::create_dir_all(&spec.dir)?;
            for socket in [spec.qmp(), spec.lab_qmp(), spec.control_socket()] {
                // Left by one that ran here before.
                let _ = fs::remove_file(socket);
            }
            let log = File::create(spec.qemu_log())?;
            if !spec.has_shell {
                File::create(spec.serial_log())?;
                command
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log);
            }
            prepare(&mut command)?;
            command.spawn()
        };
        let child = start().map_err(|source| QemuError::Start {
            dir: spec.dir.clone(),
            source,
        })?;
        let qemu = Self {
            spec,
            child: Mutex::new(child),
            control: Mutex::new(()),
        };
        let sockets = [
            qemu.spec.qmp(),
            qemu.spec.lab_qmp(),
            qemu.spec.control_socket(),
        ];
        qemu.wait_for("its sockets", READY_MAX, || {
            sockets.iter().all(|path| path.exists()).then_some(())
        })?;
        Ok(qemu)
    }

    /// What it was started as.
    #[must_use]
    pub const fn spec(&self) -> &QemuSpec {
        &self.spec
    }

    /// The monitor for whoever is tested.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.spec.qmp()
    }

    /// The monitor for whoever tests.
    #[must_use]
    pub fn lab_qmp(&self) -> PathBuf {
        self.spec.lab_qmp()
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Whether the process is there.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// What the guest printed so far.
    #[must_use]
    pub fn serial(&self) -> String {
        read_lossy(&self.spec.serial_log())
    }

    /// The seconds of the load that the guest printed here so far, oldest first.
    #[must_use]
    pub fn load_lines(&self) -> Vec<LoadLine> {
        self.serial().lines().filter_map(LoadLine::parse).collect()
    }

    /// What the guest printed that says that something is wrong.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        complaints_in(&self.serial())
    }

    /// Waits until the guest has booted and its load has run for a second.
    ///
    /// # Errors
    /// QEMU ended, or the guest took too long.
    pub fn wait_ready(&self) -> Result<(), QemuError> {
        let is_up = self.wait_for("first second of load", READY_MAX, || {
            if !self.load_lines().is_empty() {
                return Some(true);
            }
            let serial = self.serial();
            let is_lost = serial.contains("BAD ") || serial.contains("Kernel panic");
            is_lost.then_some(false)
        })?;
        if is_up {
            return Ok(());
        }
        Err(QemuError::Boot {
            log: tail(&self.serial()),
        })
    }

    /// Waits until the load has printed `count` more seconds here.
    ///
    /// # Errors
    /// As [`Qemu::wait_ready`].
    pub fn wait_seconds(&self, count: usize) -> Result<(), QemuError> {
        let want = self.load_lines().len() + count;
        self.wait_for("next seconds of load", READY_MAX, || {
            (self.load_lines().len() >= want).then_some(())
        })
    }

    /// Polls `done` until it gives something.
    ///
    /// # Errors
    /// [`QemuError::Ended`] as soon as QEMU is gone, [`QemuError::Late`] after `longest`.
    pub fn wait_for<T>(
        &self,
        what: &str,
        longest: Duration,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<T, QemuError> {
        let end = Instant::now() + longest;
        loop {
            if let Some(value) = done() {
                return Ok(value);
            }
            if let Ok(Some(status)) = self.child().try_wait() {
                return Err(QemuError::Ended {
                    what: what.to_owned(),
                    status: status.to_string(),
                    log: tail(&read_lossy(&self.spec.qemu_log())),
                });
            }
            if Instant::now() > end {
                return Err(QemuError::Late {
                    what: what.to_owned(),
                    seconds: longest.as_secs(),
                    log: tail(&self.serial()),
                });
            }
            thread::sleep(POLL);
        }
    }

    /// Gives the guest's program a command (see `guest/services.rs`) over the second serial line and
    /// returns its answer, all lines. Works without a network; a guest that moves meanwhile answers at
    /// the other end, see [`Sites::ask_guest`](super::Sites::ask_guest).
    ///
    /// # Errors
    /// [`QemuError::Control`] with the guest's answer when that is an error.
    pub fn control(&self, command: &str) -> Result<String, QemuError> {
        let _turn = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let ask = || -> io::Result<String> {
            let stream = UnixStream::connect(self.spec.control_socket())?;
            stream.set_read_timeout(Some(CONTROL_MAX))?;
            converse(stream, command)
        };
        check_answer(command, ask())
    }

    /// Stops the load, puts everything on the disk and switches the guest off; returns when QEMU has
    /// ended.
    ///
    /// # Errors
    /// As [`Qemu::control`], or when QEMU does not end.
    pub fn power_off(self) -> Result<(), QemuError> {
        self.control("poweroff")?;
        let ended = self.wait_for("end", CONTROL_MAX, || None::<()>);
        match ended {
            Err(QemuError::Ended { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&self) -> io::Result<()> {
        self.child().wait().map(|_| ())
    }

    /// Ends QEMU at once, as a power failure would.
    pub fn kill(&self) {
        let mut child = self.child();
        // It may have ended already, then both do nothing.
        let _ = child.kill();
        let _ = child.wait();
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Lines of a serial console that say that something is wrong with the guest.
#[must_use]
pub fn complaints_in(serial: &str) -> Vec<String> {
    let words = [
        "BAD ",
        "Kernel panic",
        "I/O error",
        "EXT4-fs error",
        "Oops",
        "BUG:",
    ];
    let bad = |line: &&str| words.iter().any(|word| line.contains(word));
    serial.lines().filter(bad).map(str::to_owned).collect()
}

/// Sends a command and reads lines until the last one of the answer.
pub(super) fn converse(mut stream: impl Read + Write, command: &str) -> io::Result<String> {
    stream.write_all(format!("{command}\n").as_bytes())?;
    let mut lines = Vec::new();
    for line in BufReader::new(stream).lines() {
        let line = line?.trim_end().to_owned();
        let is_last = line.starts_with("OK") || line.starts_with("ERROR");
        lines.push(line);
        if is_last {
            return Ok(lines.join("\n"));
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Tells answers from refusals.
pub(super) fn check_answer(command: &str, answer: io::Result<String>) -> Result<String, QemuError> {
    let failed = |text| QemuError::Control {
        command: command.to_owned(),
        text,
    };
    let answer = answer.map_err(|error| failed(error.to_string()))?;
    match answer.lines().last() {
        Some(line) if line.starts_with("OK") => Ok(answer),
        _ => Err(failed(answer)),
    }
}

fn read_lossy(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join(" | ")
}
