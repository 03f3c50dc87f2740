//! Moving the guest's memory: QEMU's own migration, step by step.
//!
//! ```text
//!   source QEMU                                       target QEMU (-incoming defer -S)
//!                                                     listen_incoming
//!   start_outgoing ──── unix:… ─ agents' link ─ … ──►
//!     active … active
//!     [start_postcopy]
//!     guest stops, flushes
//!     pre-switchover      the agent hands the disks over here
//!   continue_switchover
//!     device, completed ─────────────────────────────► completed (or postcopy-active)
//!                                                      resume (cont)
//! ```
//! Nothing here decides who owns the guest: that is the caller's, with the disks' epochs. These are the
//! primitives and what was found out about them.

mod incoming;
mod outgoing;
mod rescue;
mod status;

pub use incoming::{IncomingSettings, listen_incoming};
pub use outgoing::{
    OutgoingSettings, cancel, continue_switchover, resume_guest, start_outgoing, start_postcopy,
};
pub use rescue::rescue_guest;
pub use status::{
    RamStatus, TransferError, TransferState, TransferStatus, run_state, status, wait_for,
};
