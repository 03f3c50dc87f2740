//! A guest load that knows what every byte it reads must be.
//!
//! ```text
//!  source of requests ─► pacing ─► engine (one thread) ⇄ GuestDisk (NBD, file, memory)
//!   synthetic | trace               │ each read is compared with the Oracle,
//!                                   ▼ each write makes content nobody wrote before
//!                                 statistics
//! ```
//! **What is exact.** The engine never has a write in flight that overlaps any other request, so
//! at every moment there is exactly one right answer to a read: the [`Baseline`] (fingerprints of
//! the image as it was), or the content of the last acknowledged write, which is a function of
//! seed, position and version. The exception is a write whose answer never came, or came as an
//! error: old and new are right until a read shows which, and from then on only that.
//!
//! **What is repeatable.** The stream of requests depends on the seed alone. When they are issued
//! depends on pacing and on the disk; requests that conflict wait, others pass them, and two
//! requests for the same place are never swapped.
//!
//! **Moving.** [`LoadHandle::pause`] stops issuing, waits for everything in flight and gives the
//! disk back; [`LoadHandle::resume_on`] goes on with another disk and says how long the guest
//! stood still: from its last completed request to its first completed one.

mod access;
mod arrivals;
mod baseline;
pub mod catalog;
mod disk;
mod engine;
mod handle;
mod inflight;
mod mail;
mod nbd;
mod options;
mod oracle;
mod pace;
mod source;
mod stamp;
mod stats;

pub use access::{AccessLine, AccessSpec};
pub use baseline::Baseline;
pub use disk::{DiskOp, DiskReply, DiskRequest, FileDisk, GuestDisk, MemoryDisk};
pub use engine::LoadPhase;
pub use handle::{FinalCheck, Load, LoadError, LoadHandle, Paused, Resumed};
pub use mail::Mail;
pub use nbd::{NbdDisk, NbdDiskError};
pub use options::{Duplicates, LoadOptions, Synthetic};
pub use oracle::{Content, WrongRead};
pub use source::{PlannedOp, RequestSource, ZERO_CONTENT};
pub use stamp::{BlockContent, Stamp};
pub use stats::{Interval, Latency, LoadStats, OpStats};
