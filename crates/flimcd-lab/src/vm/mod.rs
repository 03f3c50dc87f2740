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
//! A move (root needed, because of the namespaces): two sites, a guest under load at A, a client that
//! records gaps, and agents of the real program at either site.
//! ```no_run
//! use flimcd_lab::{vm::*, wan::Side};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (tools, dir) = (Requirements::check()?, tempfile::tempdir()?);
//! # let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default())?;
//! let options = StageOptions {
//!     link: "100mbit,40ms,loss=0.1%".parse()?,
//!     seed: 1,
//!     memory_mib: 192,
//!     load: LoadSettings::default(),
//!     layout: Layout::Raw,
//!     warm_up_s: 3,
//! };
//! let stage = Stage::start(&tools, dir.path(), &image, &options)?;
//! let flimcd = std::path::Path::new("target/debug/flimcd"); // env!("CARGO_BIN_EXE_flimcd") in its tests
//! let agents = Agents::start(&stage.sites, dir.path(), flimcd, ["", ""])?; // more configuration
//! let start = std::time::Instant::now();
//! stage.sites.ask_guest("mark before 64")?; // wherever the guest runs
//! // … agents.at(Side::A).api_socket(), stage.source.qmp(), stage.target_disks(AtTarget::Nothing)?,
//! //   stage.target_spec(…).arguments() for a template or stage.spawn_target(…)? for `-incoming` …
//! stage.sites.wan().cut(); // and restore(), set_model()
//! agents.at(Side::B).kill(); // and restart()
//! let seen = stage.client.report(start, std::time::Instant::now()); // JSON-able
//! # Ok(()) }
//! ```
//! QEMU's own migration of the same stage is [`baseline`].
//!
//! By hand: `cargo run -p flimcd-lab --example guest` boots a guest and gives a shell in it.
//!
//! What the guest runs and what it answers is in `guest/main.rs` and `guest/services.rs` of this
//! package: the program is built by the build script and carried by this library. The guest's
//! kernel is the host's or an unpacked Debian package, see [`Requirements`].

mod agents;
mod arriving;
pub mod baseline;
mod client;
mod cpio;
mod image;
mod initramfs;
mod modules;
mod process;
mod qemu;
pub(crate) mod requirements;
mod seconds;
mod sites;
mod stage;
mod stamp;

pub use agents::{Agent, AgentError, Agents};
pub use arriving::Arriving;
pub use client::{Client, ClientReport, ProbeReport, ProbeSecond};
pub use image::{ExtraDisk, GuestImage, GuestSpec, ImageError};
pub use process::{Qemu, QemuError, complaints_in};
pub use qemu::{Bus, DiskFormat, DiskSpec, LoadSettings, Net, QemuSpec, Storage, Style};
pub use requirements::{Missing, Requirements, Tools};
pub use seconds::{LoadLine, LoadSummary};
pub use sites::{Place, Sites, SitesError};
pub use stage::{AtTarget, Layout, Stage, StageError, StageOptions};

/// The program that runs in the guest, a static executable; empty where it could not be built.
const GUEST_PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flimcd-guest"));
