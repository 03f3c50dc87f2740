//! Boots a guest of the VM lab by hand, with a shell on this terminal and its monitors as sockets.
//!
//! `cargo run -p flimcd-lab --example guest [DIRECTORY]`; Ctrl-A X ends QEMU.
#![allow(clippy::print_stdout, reason = "talks to a terminal")]

use std::path::PathBuf;

use flimcd_lab::vm::{DiskSpec, GuestImage, GuestSpec, QemuSpec, Requirements};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tools = Requirements::check()?;
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&dir)?;
    let image = GuestImage::build(&tools, &dir, &GuestSpec::default())?;
    let mut spec = QemuSpec::new("by-hand", &dir.join("run"), &image);
    spec.disks = vec![DiskSpec::new("disk0", &image.disks[0])];
    spec.has_shell = true;
    println!(
        "QEMU {}; monitor: {}",
        tools.qemu_version,
        spec.qmp().display()
    );
    println!(
        "commands for the guest: {}",
        spec.control_socket().display()
    );
    spec.spawn(&tools)?.wait()?;
    Ok(())
}
