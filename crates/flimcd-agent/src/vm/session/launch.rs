//! Starting and ending the machine of a VM that arrives, from the command in the configuration; or waiting for one that
//! somebody else starts.
//!
//! The command is a list of arguments. Some stand for what is only known when a VM arrives:
//!
//! | argument | becomes |
//! | --- | --- |
//! | `{control}` | `-S -incoming defer -qmp unix:…` : how the agent steers the machine |
//! | `{blockdevs}` | a `-blockdev` for each disk: nodes `disk0`, `disk1`, … with the source's options, on the agent's exports |
//! | `{name}`, `{memory_mib}` inside an argument | the VM's name, its memory in MiB |
//!
//! The process is not the agent's child to end: it runs on when the agent stops, and a restarted agent finds it by its
//! monitor. What it prints goes to a file in the state directory, and its last lines into the error if it ends at once.

use flimcd_core::VolumeName;
use flimcd_qemu::{DiskFormat, Export, Qmp};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use tokio::time::{Instant, sleep};

use super::record::{Description, Launched};

/// How long a machine may take to open its monitor.
const START: Duration = Duration::from_secs(60);
/// How long it may take to end when asked.
const END: Duration = Duration::from_secs(5);
/// How long somebody may take to start one.
const AWAITED: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(20);
/// What of its output is quoted.
const QUOTED_BYTES: u64 = 600;

/// What a machine is started with.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) attempt: u32,
    pub(crate) name: VolumeName,
    pub(crate) description: Description,
    /// In the order of the description's disks.
    pub(crate) exports: Vec<Export>,
    pub(crate) qmp: PathBuf,
    pub(crate) log: PathBuf,
}

impl Launch {
    /// Starts the machine and connects to its monitor.
    pub(crate) async fn start(&self, command: &[String]) -> Result<(Launched, Qmp), String> {
        remove_stale(&self.qmp).map_err(|error| {
            format!("a socket is in the way at {}: {error}", self.qmp.display())
        })?;
        let arguments = self.arguments(command);
        let [program, rest @ ..] = &arguments[..] else {
            return Err("the command in the configuration is empty".to_owned());
        };
        let output = |error| format!("{} cannot be written: {error}", self.log.display());
        let log = File::create(&self.log).map_err(output)?;
        let errors = log.try_clone().map_err(output)?;
        tracing::info!(vm = %self.name, command = %arguments.join(" "), "starting the machine");
        let mut child = Command::new(program)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Signals for the agent's group are not for it.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("{program} cannot be started: {error}"))?;
        let pid = child.id();
        let deadline = Instant::now() + START;
        loop {
            match child.try_wait() {
                // A command that leaves a daemon behind ends well.
                Ok(Some(status)) if !status.success() => {
                    return Err(format!(
                        "{program} ended at once ({status}): {}",
                        last_words(&self.log)
                    ));
                }
                Err(error) => return Err(format!("{program} cannot be waited for: {error}")),
                Ok(_) => {}
            }
            if self.qmp.exists()
                && let Ok(qmp) = Qmp::connect(&self.qmp).await
            {
                // Collected when it ends, as long as this agent lives.
                tokio::task::spawn_blocking(move || child.wait());
                let launched = Launched {
                    attempt: self.attempt,
                    qmp: self.qmp.clone(),
                    pid: qmp.pid().or(Some(pid)),
                };
                return Ok((launched, qmp));
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!(
                    "{program} did not open its monitor within {} s: {}",
                    START.as_secs(),
                    last_words(&self.log)
                ));
            }
            sleep(POLL).await;
        }
    }

    /// Waits for a machine that somebody else starts, as long as it is wanted, and says how, unless it is there already.
    pub(crate) async fn wait(
        &self,
        is_wanted: impl Fn() -> bool,
        note: impl Fn(String),
    ) -> Result<(Launched, Qmp), String> {
        let monitor = self.qmp.display();
        let deadline = Instant::now() + AWAITED;
        let mut is_said = false;
        loop {
            if let Ok(qmp) = Qmp::connect(&self.qmp).await {
                let launched = Launched {
                    attempt: self.attempt,
                    qmp: self.qmp.clone(),
                    pid: None,
                };
                return Ok((launched, qmp));
            }
            if !is_wanted() {
                return Err("the move has ended before a machine was started".to_owned());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "no machine was started with its monitor at {monitor} within {} minutes",
                    AWAITED.as_secs() / 60
                ));
            }
            if !std::mem::replace(&mut is_said, true) {
                let control = self.control().join(" ");
                let disks: Vec<_> = self
                    .nodes()
                    .iter()
                    .map(|n| format!("-blockdev '{n}'"))
                    .collect();
                note(format!(
                    "waiting for a machine with its monitor at {monitor}: start {} as at the source, with its disks on the \
                     nodes disk0, disk1, …, and with these arguments: {control} {}",
                    self.name,
                    disks.join(" ")
                ));
            }
            sleep(POLL).await;
        }
    }

    fn control(&self) -> [String; 5] {
        let monitor = format!("unix:{},server=on,wait=off", self.qmp.display());
        ["-S", "-incoming", "defer", "-qmp", &monitor].map(str::to_owned)
    }

    fn arguments(&self, command: &[String]) -> Vec<String> {
        let mut arguments = Vec::new();
        for argument in command {
            match argument.as_str() {
                "{control}" => arguments.extend(self.control()),
                "{blockdevs}" => {
                    for node in self.nodes() {
                        arguments.extend(["-blockdev".to_owned(), node.to_string()]);
                    }
                }
                other => {
                    let memory = self.description.memory_bytes >> 20;
                    let filled = other.replace("{name}", self.name.as_str());
                    arguments.push(filled.replace("{memory_mib}", &memory.to_string()));
                }
            }
        }
        arguments
    }

    /// The disks' nodes, with the options that they had at the source.
    fn nodes(&self) -> Vec<Value> {
        let mut nodes = Vec::new();
        let disks = self.description.disks.iter().zip(&self.exports);
        for (number, (disk, export)) in disks.enumerate() {
            let options = &disk.found.options;
            let protocol = &options.protocol;
            let export_node = format!("disk{number}-export");
            nodes.push(json!({
                "driver": "nbd",
                "node-name": export_node,
                "server": { "type": "unix", "path": export.socket },
                "export": export.name,
                "reconnect-delay": export.reconnect_delay_s,
                "discard": protocol.discard,
                "cache": { "direct": protocol.node.cache_direct, "no-flush": protocol.node.cache_no_flush },
            }));
            let node = options.format.as_ref().unwrap_or(&protocol.node);
            let driver = match &disk.found.format {
                DiskFormat::Qcow2 => "qcow2",
                DiskFormat::Raw | DiskFormat::Other(_) => "raw",
            };
            nodes.push(json!({
                "driver": driver,
                "node-name": format!("disk{number}"),
                "file": export_node,
                "discard": protocol.discard,
                "detect-zeroes": node.detect_zeroes,
                "cache": { "direct": node.cache_direct, "no-flush": node.cache_no_flush },
            }));
        }
        nodes
    }
}

/// The end of what a machine has printed.
pub(super) fn last_words(log: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(QUOTED_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(QUOTED_BYTES).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.trim().replace('\n', " / "))
    };
    match read() {
        Ok(text) if !text.is_empty() => format!("it said: {text}"),
        _ => "it said nothing".to_owned(),
    }
}

/// Ends a machine: asked over its monitor, and killed if it does not listen. None is fine.
pub(crate) async fn end(launched: &Launched, qmp: Option<&Qmp>) {
    let connected = match qmp {
        Some(qmp) if !qmp.is_closed() => Some(qmp.clone()),
        _ => Qmp::connect(&launched.qmp).await.ok(),
    };
    // One that has taken a VM in, or failed to, is of no use for another, whoever started it.
    if let Some(qmp) = connected {
        // It closes the monitor instead of answering, or does both.
        let _ = qmp.execute(flimcd_qemu::commands::Quit {}).await;
    }
    let Some(pid) = launched.pid else { return };
    let deadline = Instant::now() + END;
    while is_that_machine(pid, &launched.qmp) {
        if Instant::now() >= deadline {
            tracing::warn!(pid, "a machine that does not listen is killed");
            if let Some(pid) = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            return;
        }
        sleep(POLL).await;
    }
    let _ = remove_stale(&launched.qmp);
}

/// Whether the process of this number is still the one that was started with this monitor.
fn is_that_machine(pid: u32, qmp: &Path) -> bool {
    let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let needle = qmp.as_os_str().as_encoded_bytes();
    command.windows(needle.len()).any(|part| part == needle)
}

fn remove_stale(socket: &Path) -> io::Result<()> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
