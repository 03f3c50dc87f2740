//! Real guests for tests, the demo and benchmarks: a small Linux with a load that checks itself,
//! started in QEMU under TCG in a few seconds, without root.
//!
//! # How to
//! ```no_run
//! use flimcd_lab::vm::{DiskSpec, GuestImage, GuestSpec, QemuSpec, Requirements};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tools = Requirements::check()?; // or skip: the error says what to install
//! let dir = tempfile::tempdir()?;
//! let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default())?;
//! let mut spec = QemuSpec::new("vm1", &dir.path().join("run"), &image);
//! spec.disks = vec![DiskSpec::new("disk0", &image.disks[0])];
//! let qemu = spec.spawn(&tools)?;
//! qemu.wait_ready()?; // the load runs
//! qemu.control("mark before 64")?; // a file with a checksum that the guest keeps in memory
//! // … use qemu.qmp(): adopt, migrate; qemu.lab_qmp() is a second monitor …
//! let answer = qemu.control("verify")?; // files, every block of the load, memory
//! assert!(answer.ends_with("errors=0"), "{answer}");
//! qemu.power_off()?; // clean; or drop it: killed
//! # Ok(()) }
//! ```
//! By hand: `cargo run -p flimcd-lab --example guest` boots a guest and gives a shell in it.
//!
//! What the guest runs and what it answers is in `guest/main.rs` and `guest/services.rs` of this
//! package: the program is built by the build script and carried by this library. The guest's
//! kernel is the host's or an unpacked Debian package, see [`Requirements`].

mod agents;
pub mod baseline;
mod client;
mod cpio;
mod files;
mod image;
mod initramfs;
mod modules;
mod process;
mod qemu;
mod requirements;
mod seconds;
mod sites;
mod stage;
mod stamp;

pub use agents::{Agent, AgentError, Agents};
pub use client::{Client, ClientReport, ProbeReport, ProbeSecond};
pub use files::{copy_sparse, first_difference};
pub use image::{ExtraDisk, GuestImage, GuestSpec, ImageError};
pub use process::{Qemu, QemuError};
pub use qemu::{Bus, DiskFormat, DiskSpec, LoadSettings, Net, QemuSpec, Storage, Style};
pub use requirements::{Missing, Requirements, Tools};
pub use seconds::{LoadLine, LoadSummary};
pub use sites::{Place, Sites, SitesError};
pub use stage::{AtTarget, Layout, Stage, StageError, StageOptions};

/// The program that runs in the guest, a static executable; empty where it could not be built.
const GUEST_PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flimcd-guest"));
