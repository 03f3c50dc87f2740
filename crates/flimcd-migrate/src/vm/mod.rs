//! Moving a running machine: what happens around the migration of its disks.
//!
//! Two more machines without I/O, [`VmSource`] and [`VmTarget`]. They bring together three things that know
//! nothing of each other: the hypervisors at both ends, the stream of running state (RAM and devices) between
//! them, and the migration of the disks, with which they only exchange [`DisksCommand`]s and `handle_disks_*`.
//!
//! ```text
//!  source                                                         target
//!   disks: pre-copy                                                start the machine, it waits
//!   disks ready, target listening: RAM pre-copy, guest runs ════►  loads pages
//!   converged: stop the guest ── disks: freeze, Prepared, Switch ► offer waits for the machine
//!              the rest of RAM, devices ════════════════════════►  loaded, stands still: the disks may be taken
//!                                                                  disks: Owner durable   ◄── the one moment that decides
//!   disks moved                    ◄───────────────── Running ──   guest runs
//!   source's machine is ended
//! ```
//! # Who may run the guest
//! Whoever durably owns the disks, and nobody else. So:
//! - The target takes the disks over only when its machine has everything that it needs to run. Before that
//!   every failure leads back to a guest that runs at the source.
//! - The source lets the guest go on only when its disks' migration has *ended* there, which means that the
//!   target has never owned them and never will. Until it knows, the guest stands.
//! - The guest is stopped by us and not by the hypervisor's own end of a migration: a hypervisor that stopped
//!   it by itself starts it by itself when the stream breaks, and then two would run.
//! - The source's machine is kept, standing, until the target says that the guest runs. Should the target's
//!   machine die between, the running state is sent again to a new one.
//!
//! With RAM post-copy the last point does not hold: pages are in two places until they have all followed.

mod source;
mod target;
mod types;

pub use source::VmSource;
pub use target::VmTarget;
pub use types::{
    DisksCommand, DisksEnd, RamMode, Transfer, TransferState, VmSourceAction, VmSourceConfig,
    VmSourceEvent, VmSourcePhase, VmSourceStart, VmTargetAction, VmTargetEvent, VmTargetPhase,
    VmTargetStart,
};
