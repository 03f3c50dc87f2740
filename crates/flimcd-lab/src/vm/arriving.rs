//! A machine that an agent starts when it arrives, from what its configuration says.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    net::sockopt::socket_peercred,
    process::{Signal, kill_process},
};

use super::{LoadLine, Place, QemuSpec, Sites, Stage, process::complaints_in};
use crate::wan::Side;

/// How long a guest may take to switch itself off.
const OFF_MAX: Duration = Duration::from_secs(60);

/// How long a machine may say nothing before it is killed.
const QUIT_MAX: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Arriving {
    spec: QemuSpec,
    qemu: PathBuf,
    disks: usize,
    side: Side,
    /// Where it was not the agent that started it.
    child: Mutex<Option<Child>>,
}

impl Drop for Arriving {
    /// Ends the machine, which is no child of ours. One that waits for its disks does not end when it is asked.
    fn drop(&mut self) {
        // It may have ended already.
        let Ok(monitor) = UnixStream::connect(self.spec.lab_qmp()) else {
            return;
        };
        let Ok(machine) = socket_peercred(&monitor) else {
            return;
        };
        if quit(monitor).is_err() {
            let _ = kill_process(machine.pid, Signal::KILL);
        }
        if let Some(mut child) = lock(&self.child).take() {
            let _ = child.wait();
        }
    }
}

fn lock(child: &Mutex<Option<Child>>) -> MutexGuard<'_, Option<Child>> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks a machine to end, and waits until it hangs up.
fn quit(mut monitor: UnixStream) -> io::Result<()> {
    monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")?;
    monitor.set_read_timeout(Some(QUIT_MAX))?;
    io::copy(&mut monitor, &mut io::sink()).map(drop)
}

impl Arriving {
    /// The same machine as the stage's.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn new(stage: &Stage) -> io::Result<Self> {
        Self::at(stage, Side::B, "target")
    }

    /// The machine that comes back to where the stage's stood.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn returning(stage: &Stage) -> io::Result<Self> {
        Self::at(stage, Side::A, "returned")
    }

    fn at(stage: &Stage, side: Side, dir: &str) -> io::Result<Self> {
        let mut spec = stage.target_spec(Vec::new());
        spec.dir.set_file_name(dir);
        // How it is steered comes from the agent.
        spec.is_incoming = false;
        spec.is_paused = false;
        fs::create_dir_all(&spec.dir)?;
        Ok(Self {
            spec,
            qemu: stage.tools().qemu.clone(),
            disks: stage.source.spec().disks.len(),
            side,
            child: Mutex::new(None),
        })
    }

    /// What the configuration of its site's agent says about it: a `[[machine]]` table.
    #[must_use]
    pub fn config(&self) -> String {
        // JSON's strings and lists are TOML's.
        let command = serde_json::to_string(&self.command()).unwrap_or_default();
        format!("[[machine]]\nvms = [\"*\"]\ncommand = {command}\n")
    }

    /// The same for a machine that [`start_as_told`](Self::start_as_told) starts.
    #[must_use]
    pub fn awaited_config(&self) -> String {
        let qmp = self.spec.dir.join("{name}.awaited");
        format!(
            "[[machine]]\nvms = [\"*\"]\nqmp = {:?}\n",
            qmp.display().to_string()
        )
    }

    /// Starts the machine at its site, with what an agent that waits for it says it needs: words, those with a space in them
    /// in single quotes.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start_as_told(&self, sites: &Sites, arguments: &str) -> io::Result<()> {
        let mut told = Vec::new();
        for (part, is_quoted) in arguments.split('\'').zip([false, true].into_iter().cycle()) {
            if is_quoted {
                told.push(part.to_owned());
            } else {
                told.extend(part.split_whitespace().map(str::to_owned));
            }
        }
        let mut words = Vec::new();
        for word in self.command() {
            match word.as_str() {
                "{blockdevs}" => words.append(&mut told),
                "{control}" => {}
                _ => words.push(word),
            }
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        sites.put_in(Place::Site(self.side), &mut command)?;
        *lock(&self.child) = Some(command.spawn()?);
        Ok(())
    }

    fn command(&self) -> Vec<String> {
        let mut command = vec![self.qemu.display().to_string()];
        command.extend(self.spec.arguments());
        command.push("{blockdevs}".to_owned());
        for disk in 0..self.disks {
            command.push("-device".to_owned());
            command.push(format!(
                "virtio-blk-pci,drive=disk{disk},id=disk{disk}-dev,write-cache=on"
            ));
        }
        command.push("{control}".to_owned());
        command
    }

    fn serial(&self) -> String {
        let bytes = fs::read(self.spec.serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The seconds of the load that the guest printed there.
    #[must_use]
    pub fn load_lines(&self) -> Vec<LoadLine> {
        self.serial().lines().filter_map(LoadLine::parse).collect()
    }

    /// What the guest printed there that says that something is wrong.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        complaints_in(&self.serial())
    }

    /// The second monitor of the machine, for whoever tests.
    #[must_use]
    pub fn lab_qmp(&self) -> PathBuf {
        self.spec.lab_qmp()
    }

    /// Waits until the machine has ended.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_gone(&self) -> io::Result<()> {
        let start = Instant::now();
        while UnixStream::connect(self.spec.lab_qmp()).is_ok() {
            if start.elapsed() > OFF_MAX {
                let text = "the guest at the target does not switch itself off";
                return Err(io::Error::other(text));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The images of the disks at the target, whose agent's directory is `agent`.
    ///
    /// # Errors
    /// They cannot be listed, or are not as many as the disks.
    pub fn images(&self, agent: &Path) -> io::Result<Vec<PathBuf>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(agent.join("images"))? {
            images.push(entry?.path());
        }
        images.sort();
        if images.len() == self.disks {
            return Ok(images);
        }
        let text = format!(
            "{} images at the target, {} disks",
            images.len(),
            self.disks
        );
        Err(io::Error::other(text))
    }
}
