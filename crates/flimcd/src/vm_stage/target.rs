//! The machine that the target's agent starts.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use flimcd_lab::vm::{LoadLine, QemuSpec, Stage};

/// How long a guest may take to switch itself off.
const OFF_MAX: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct TargetMachine {
    spec: QemuSpec,
    qemu: PathBuf,
    disks: usize,
}

impl TargetMachine {
    pub(super) fn new(stage: &Stage) -> anyhow::Result<Self> {
        let mut spec = stage.target_spec(Vec::new());
        // How it is steered comes from the agent.
        spec.is_incoming = false;
        spec.is_paused = false;
        fs::create_dir_all(&spec.dir).context("the target's directory")?;
        Ok(Self {
            spec,
            qemu: stage.tools().qemu.clone(),
            disks: stage.source.spec().disks.len(),
        })
    }

    /// What the target agent's configuration says about it.
    pub(super) fn config(&self) -> String {
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
        // JSON's strings and lists are TOML's.
        let command = serde_json::to_string(&command).unwrap_or_default();
        format!("[[machine]]\nvms = [\"*\"]\ncommand = {command}\n")
    }

    fn serial(&self) -> String {
        let bytes = fs::read(self.spec.serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(super) fn load_lines(&self) -> Vec<LoadLine> {
        self.serial().lines().filter_map(LoadLine::parse).collect()
    }

    /// Lines that should not be there.
    pub(super) fn complaints(&self) -> Vec<String> {
        flimcd_lab::vm::complaints_in(&self.serial())
    }

    /// Waits until the machine has ended.
    pub(super) fn wait_gone(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.spec.lab_qmp()).is_ok() {
            if start.elapsed() > OFF_MAX {
                bail!("the guest at the target does not switch itself off");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The images of the disks at the target.
    pub(super) fn images(&self, agent: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(agent.join("images")).context("the target's images")? {
            images.push(entry?.path());
        }
        images.sort();
        if images.len() != self.disks {
            bail!(
                "{} images at the target, {} disks",
                images.len(),
                self.disks
            );
        }
        Ok(images)
    }
}
