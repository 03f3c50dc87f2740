//! The two machines of a migration, without I/O.
//!
//! ```text
//!   guest writes          Read / read done                Apply / applied         guest faults
//!        │                     │  ▲                           │  ▲                     │
//!        ▼                     ▼  │                           ▼  │                     ▼
//!   ┌───────────────────────────────────┐   messages   ┌───────────────────────────────────┐
//!   │           SourceMachine           │ ◄══════════► │           TargetMachine           │
//!   │ pending · in flight · undurable   │              │ received · applying · demanded    │
//!   └───────────────────────────────────┘              └───────────────────────────────────┘
//! ```
//! Neither machine owns a socket, a file, a clock or a task. What happens outside comes in through
//! `handle_*`, what should happen goes out through `poll_*`. The agent drives them over real files and
//! sockets, the simulator over simulated ones; both run this very code.
//!
//! # The contract of a driver
//! After every `handle_*` call, poll in this order until each answers `None`:
//! 1. `poll_action`, and start each action **in the order given**. Actions that say so are done before the
//!    next one begins and before the machine is called again; the others answer later through
//!    `handle_*`, in any order.
//! 2. `poll_transmit`, as long as the link has room. A message that was taken is the link's: when the
//!    link breaks before it arrived the machine finds out by itself and sends its content again.
//! 3. `poll_event`.
//! 4. `poll_timeout`: call `handle_timeout` when that time has come. It may change with every call.
//!
//! Time never goes backwards. `handle_link_up` and `handle_link_down` alternate, and no message of an
//! earlier link may be passed in after `handle_link_up`.
//!
//! # Who owns what
//! An obligation to send a block is in exactly one place: the volume's dirty marks → (drained into)
//! `pending` → (read) in flight → (acknowledged) gone, and remembered as undurable until the target
//! says that it is on its disk. Ownership of the volume is in the durable records that `Persist` and
//! `BecomeOwner` write; the machines only ask for them to be written.

mod estimate;
pub mod policy;
mod prefetch;
mod source;
pub mod stream;
mod target;
pub mod vm;

use std::time::Duration;

pub use estimate::LinkEstimate;
pub use source::{
    ContentCount, SealLimits, SourceAction, SourceConfig, SourceEvent, SourceMachine, SourcePhase,
    SourceProgress, SourceRecord, SourceStart, Switchover,
};
pub use target::{
    ApplyId, SeedChoice, SyncId, TargetAction, TargetConfig, TargetEvent, TargetMachine,
    TargetPhase, TargetStart,
};

/// Time after which a write weighs half in the heat of its chunk.
pub const HEAT_HALF_LIFE: Duration = Duration::from_secs(5);
/// Half-life of the heat that volumes keep, that migrations begin with, and that travels with a volume.
pub const LONG_HALF_LIFE: Duration = Duration::from_secs(60);

/// A disk that could not be read or written, as the driver saw it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct DiskError {
    /// No room left, rather than a broken disk.
    pub no_space: bool,
    /// What was tried and what the system said.
    pub text: String,
}
