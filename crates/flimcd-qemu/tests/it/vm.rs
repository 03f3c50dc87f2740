//! A QEMU without a guest behind it, and commands that only tests need.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    time::{Duration, Instant},
};

use flimcd_qemu::{
    Qmp,
    qmp::{Command, QmpError},
};
use serde::Serialize;
use serde_json::{Value, json};

/// The QEMU to test with: FLIMCD_TEST_QEMU, or the one that is installed.
fn qemu() -> String {
    std::env::var("FLIMCD_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Whether QEMU and its tools are there; says so loudly when not.
pub(crate) fn has_qemu() -> bool {
    for tool in [&qemu(), "qemu-img"] {
        if Process::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIPPED: needs {tool}: it is not installed");
            return false;
        }
    }
    true
}

/// Makes an image.
pub(crate) fn make_image(file: &Path, format: &str, more: &[&str]) {
    let mut command = Process::new("qemu-img");
    command.args(["create", "-q", "-f", format]).args(more);
    command.current_dir(file.parent().unwrap());
    let status = command.arg(file).arg("32M").status().unwrap();
    assert!(status.success());
}

/// Fails when a qcow2 image is damaged.
pub(crate) fn check_image(file: &Path) {
    let output = Process::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A QEMU, killed when dropped.
pub(crate) struct Vm {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Vm {
    pub(crate) fn start(dir: &Path, name: &str, args: &[String]) -> Self {
        let socket = dir.join(format!("{name}.qmp"));
        let child = Process::new(qemu())
            .args(["-name", name, "-M", "q35", "-accel", "tcg", "-m", "32"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    pub(crate) async fn connect(&mut self) -> Qmp {
        let end = Instant::now() + PATIENCE;
        loop {
            match Qmp::connect(&self.socket).await {
                Ok(qmp) => return qmp,
                Err(QmpError::Connect { .. }) if Instant::now() < end => {}
                Err(error) => panic!("{error}"),
            }
            assert!(self.child.try_wait().unwrap().is_none(), "QEMU ended");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it in order and waits until it is gone.
    pub(crate) async fn quit(mut self, qmp: &Qmp) {
        qmp.execute(flimcd_qemu::commands::Quit {}).await.unwrap();
        qmp.closed().await;
        self.child.wait().unwrap();
    }

    /// Whether it has the file open.
    pub(crate) fn has_open(&self, file: &Path) -> bool {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut links = fds
            .flatten()
            .filter_map(|e| std::fs::read_link(e.path()).ok());
        links.any(|link| link == file)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command that only tests use.
macro_rules! raw_command {
    ($name:ident, $qmp:literal) => {
        #[derive(Serialize)]
        #[serde(transparent)]
        pub(crate) struct $name(pub(crate) Value);
        impl Command for $name {
            const NAME: &'static str = $qmp;
            type Reply = Value;
        }
    };
}
raw_command!(NbdServerStart, "nbd-server-start");
raw_command!(BlockExportAdd, "block-export-add");
raw_command!(BitmapAdd, "block-dirty-bitmap-add");
raw_command!(Mirror, "blockdev-mirror");
raw_command!(BlockdevAddRaw, "blockdev-add");

/// Exports a node from QEMU, so that a test can write where a guest would.
pub(crate) async fn open_tap(qmp: &Qmp, socket: &Path, nodes: &[(&str, &str)]) {
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    qmp.execute(NbdServerStart(address)).await.unwrap();
    for (node, name) in nodes {
        let export =
            json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": true});
        qmp.execute(BlockExportAdd(export)).await.unwrap();
    }
}
