//! What goes into the rules and what comes out of them.

use super::Ticket;

/// What the volume does with guest requests; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The guest is served: no migration, or the source of one.
    Owner,
    /// The switch is prepared: admitted requests drain, new ones are parked.
    Frozen,
    /// The volume has moved away.
    Released,
    /// The target before the switch.
    Incoming,
    /// The target after the switch, while blocks are missing.
    PostCopy,
}

/// A guest request on a range of bytes. Flush has its own calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestOp {
    /// Reads bytes.
    Read,
    /// Replaces bytes.
    Write,
    /// Makes bytes zero.
    WriteZeroes,
    /// Says that the content is not needed any more.
    Trim,
}

/// Answer to a guest request.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The I/O may be submitted now; [`Rules::finish`](super::Rules::finish) must follow.
    Go {
        /// Name of the request from here on.
        ticket: Ticket,
        /// Whether the request marked a block dirty that was not.
        newly_dirty: bool,
    },
    /// The request waits; [`Rules::poll_woken`](super::Rules::poll_woken) will name the ticket, unless it is cancelled.
    Parked {
        /// Name of the request from here on.
        ticket: Ticket,
    },
    /// The request fails, and there is no ticket to finish.
    Refused(Refusal),
    /// The source has answered a read before the switch: there is no I/O, and no ticket to finish.
    Answered,
}

/// Why a guest request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The volume has another owner now.
    #[error("the volume has moved to another site")]
    Moved,
    /// The volume is still the source's, and nothing may change it here.
    #[error("the volume has not arrived: it can only be read before the switch")]
    NotHere,
    /// The source could not answer a read before the switch.
    #[error("the source could not read the blocks")]
    Unreadable,
}

/// How I/O ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Completed.
    Done,
    /// Failed, or was never submitted: the content of the range is unknown.
    Failed,
}

/// Counts since the rules were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Guest reads begun.
    pub guest_reads: u64,
    /// Of those, the ones that touched a block that was not there yet.
    pub guest_reads_missed: u64,
    /// Reads before the switch that were put to the source; not among the guest reads.
    pub peeks: u64,
    /// Blocks that missed reads waited for.
    pub blocks_missed: u64,
    /// Guest writes begun.
    pub guest_writes: u64,
    /// Guest zeroings begun.
    pub guest_zeroes: u64,
    /// Guest trims begun.
    pub guest_trims: u64,
    /// Flushes begun.
    pub flushes: u64,
    /// Bytes of guest reads begun.
    pub read_bytes: u64,
    /// Bytes of guest writes begun.
    pub written_bytes: u64,
    /// Fetched blocks that were written.
    pub blocks_applied: u64,
    /// Fetched blocks that were dropped because the guest's content is newer, or the block was there.
    pub blocks_dropped: u64,
}
