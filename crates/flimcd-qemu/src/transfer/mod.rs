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
//!   continue_switchover                               resume_guest, as soon as the target owns the disks
//!     device, completed ─────────────────────────────► completed (or postcopy-active)
//! ```
//! Nothing here decides who owns the guest: that is the caller's, with the disks' epochs. These are the
//! primitives, and below is what was found by trying them on QEMU 10.0.2 (the tests do it again).
//!
//! # The disks
//! - *At the guest's stop*, before `pre-switchover`, QEMU writes what qcow2 has in memory and flushes. After
//!   that, `migrate-continue` sends nothing to a raw image's node and two FLUSH to a qcow2 image's: an export
//!   that is frozen from `pre-switchover` on must answer FLUSH, and nothing else comes. This does not hold for
//!   `lazy_refcounts` and for persistent bitmaps, which are written during `migrate-continue` and would wait for
//!   ever: [`inspect`](crate::inspect()) refuses both.
//! - *The target* reads when it starts: of a raw image the first sector (virtio-blk guesses a geometry), of
//!   a qcow2 image the header, an entry of the reference table, the mapping's first level and a table of its second. QEMU
//!   does not start when the header is none, so these reads need the source's content. Then nothing
//!   until `cont`, when qcow2 reads header and first level anew. It writes nothing before `cont`.
//!
//! # Ways back
//! | the source is | the way back |
//! | --- | --- |
//! | active | [`cancel`]; the guest never stopped |
//! | pre-switchover, also with a broken stream | [`cancel`]: the guest runs again within 2 ms; one that was paused stays so |
//! | told to go on, pre-copy, the stream breaks | `failed`, and QEMU *lets the guest run by itself* |
//! | told to go on, post-copy, the stream breaks before `postcopy-active` | none in QEMU 10.0: [`rescue_guest`] |
//! | completed, the target not resumed | [`resume_guest`] at the source; qcow2 then reads from its export |
//! | postcopy-active, the stream breaks | `postcopy-paused` on both sides; the guest is the target's |
//!
//! So the source's stream stays open from `migrate-continue` until `completed` or `postcopy-active`, whatever
//! becomes of link and target; [`continue_switchover`] refuses a stream that is broken already.
//!
//! A source that has completed cannot migrate again as it is ("Can't migrate the vm that was paused due to
//! previous migration"): its guest has to run first. A target takes in one migration in its life; with
//! `exit-on-error=false` (from 9.1) it stays to be asked why it failed, and a new attempt needs a new QEMU.
//!
//! [`resume_guest`] at a target that still takes the guest in is remembered, and the guest runs by itself as
//! soon as it can, in pre-copy and in post-copy.
//!
//! # QEMU 7.2
//! Pre-copy, post-copy, cancelling, resuming at either side and the requests to the disks are the same. In
//! `pre-switchover` it does not say that the stream is broken; a post-copy that then goes on fails and leaves the guest
//! in `postmigrate`, from where it can be resumed; it exits when an incoming migration fails; and it says `postmigrate` of a guest that was paused before a cancelled migration.

mod incoming;
mod outgoing;
mod rescue;
mod status;

pub use incoming::{IncomingSettings, listen_incoming};
pub use outgoing::{
    OutgoingSettings, cancel, continue_switchover, finish, resume_guest, start_outgoing,
    start_postcopy,
};
pub use rescue::rescue_guest;
pub use status::{
    RamStatus, TransferError, TransferState, TransferStatus, run_state, status, wait_for,
};
