//! Volumes: disk images under an agent's care.
//!
//! ```text
//!   guest connections ──► port::GuestPort ─┐             ┌─► device: the image
//!                                          ├─► Volume ───┤
//!   transfers (agent) ─────────────────────┘   rules     └─► state: record, missing and unacked sets
//! ```
//! - [`rules`]: what may happen when, as a state machine without I/O. Read this first.
//! - [`device`]: images on disk, buffers, locks, devices that fail on purpose.
//! - [`state`]: what survives a crash, and its formats.
//! - [`Volume`] and [`GuestPort`] put the rules over a device and its state.

pub mod device;
pub mod port;
pub mod rules;
pub mod state;
mod volume;

pub use port::{GuestError, GuestPort, GuestReply, GuestRequest, RequestKind};
pub use state::{
    Consistent, HeatKind, HeatTotals, Ownership, StateError, VolumeRecord, VolumesDir,
};
pub use volume::{
    Applied, ApplyData, Begun, HEAT_HALF_LIFE, HeatSnapshot, NewVolume, Sending, Standing, Volume,
    VolumeError, VolumeObserver,
};
