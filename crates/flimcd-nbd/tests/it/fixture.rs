//! A server over an image file in a temporary directory.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    sync::Arc,
};

use flimcd_nbd::{Client, Server};
use flimcd_volume::{
    Volume,
    device::{BlockDevice, FileDevice, OpenOptions},
    rules::Mode,
};
use tempfile::TempDir;

pub(crate) struct Fixture {
    pub(crate) dir: TempDir,
    pub(crate) image: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) server: Server,
    pub(crate) volume: Arc<Volume>,
}

impl Fixture {
    /// The image holds `content` and is exported as "disk".
    pub(crate) fn new(content: &[u8]) -> Self {
        Self::on(content, |device| device)
    }

    /// As `new`, with a layer on the image.
    pub(crate) fn on(
        content: &[u8],
        layer: impl FnOnce(Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice>,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("disk.img");
        fs::write(&image, content).unwrap();
        let device = FileDevice::open(&image, &OpenOptions::default()).unwrap();
        let socket = dir.path().join("nbd.sock");
        let server = Server::bind(&socket).unwrap();
        let name = "disk".parse().unwrap();
        let volume = Volume::ephemeral(name, layer(Arc::new(device)), Mode::Owner);
        server.export("disk", Arc::clone(&volume));
        Self {
            dir,
            image,
            socket,
            server,
            volume,
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect_unix(&self.socket, "disk").unwrap()
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        fs::read(&self.image).unwrap()
    }
}

/// Bytes that differ from place to place and are never zero.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i / 512 * 7 + i) % 255).unwrap() + 1)
        .collect()
}

/// Whether the tool is there; says so loudly when not.
pub(crate) fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: needs {tool}: it is not installed");
    }
    found
}

/// Runs a tool that must succeed.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let output = output(tool, args);
    assert!(
        output.status.success(),
        "{tool} {args:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn output(tool: &str, args: &[&str]) -> Output {
    // Some tools leave files where they are.
    let scratch = TempDir::new().unwrap();
    Command::new(tool)
        .args(args)
        .current_dir(scratch.path())
        .output()
        .unwrap()
}
