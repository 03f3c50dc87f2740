//! What goes into the machines of a running machine's move, and what comes out.

use std::time::Duration;

use flimcd_wire::{VmOpen, WireError};

/// How the guest's memory goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamMode {
    /// All of it before the switch; goes on until it fits the downtime.
    Precopy,
    /// What is left after one pass follows the switch.
    Postcopy,
    /// Pre-copy, and post-copy when that does not converge.
    Auto,
}

/// What a move is about.
#[derive(Clone, Debug)]
pub struct VmSourceConfig {
    /// Said to the target after every link-up.
    pub open: VmOpen,
    /// How the memory goes.
    pub ram: RamMode,
    /// How long the guest may stand, as a goal: RAM is left for the stop only as far as it fits in.
    pub downtime_max: Duration,
    /// Whether the guest runs, so that it has to be started again; else it is moved as it stands.
    pub was_running: bool,
}

/// Where a source begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmSourceStart {
    /// A new move.
    Fresh,
    /// The agent was restarted. `handle_disks_*` will say what the disks come to; this is where their record
    /// stands now.
    Resume {
        /// The target was offered the disks and may own them.
        offered: bool,
    },
}

/// What is known of a transfer of running state at the source.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transfer {
    /// Where the hypervisor says that it stands.
    pub state: TransferState,
    /// Bytes of memory that it still has to send, as far as it knows.
    pub remaining_bytes: u64,
    /// How often it has looked for pages that were written since.
    pub syncs: u64,
    /// Bytes per second that it can send, before packing; 0 while unknown.
    pub rate_bytes_per_sec: u64,
}

/// Where a transfer of running state stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TransferState {
    /// There is none, or it was cancelled.
    #[default]
    None,
    /// It is being set up, or pages go over.
    Active,
    /// The guest stands; it waits for `Continue`.
    PreSwitchover,
    /// The last part goes over.
    Device,
    /// The target has what it needs to run; pages follow.
    Postcopy,
    /// The same, but its stream broke.
    PostcopyBroken,
    /// All of it is there.
    Completed,
    /// It did not work.
    Failed(String),
}

impl TransferState {
    /// Whether something has to be ended before a new one can begin.
    #[must_use]
    pub const fn is_under_way(&self) -> bool {
        matches!(
            self,
            Self::Active | Self::PreSwitchover | Self::Device | Self::Postcopy
        )
    }
}

/// What the move asks of the disks' migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DisksCommand {
    /// Source: switch now; the guest stands.
    Switch,
    /// Source: end before the switch.
    Cancel,
    /// Target: whether the machine is ready to run ([`crate::TargetMachine::handle_vm_ready`]).
    VmReady(bool),
}

/// How the disks' migration ended without having moved them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DisksEnd {
    /// As asked.
    Cancelled,
    /// By an error.
    Failed(String),
}

/// What a source's driver must do. Those for the hypervisor are done one after the other, in the order
/// given; the result of each is told by `handle_done` or `handle_refused`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmSourceAction {
    /// Tell the disks' migration.
    Disks(DisksCommand),
    /// Start a transfer of the running state, with the stream of this attempt.
    Start {
        /// Which attempt.
        attempt: u32,
        /// Whether post-copy may be asked for.
        postcopy: bool,
    },
    /// Stop the guest. Refused when the hypervisor has stopped it by itself: then it would start it by itself, too.
    Stop,
    /// Finish the transfer as soon as possible, whatever is left of it.
    Finish,
    /// Go on after `PreSwitchover`.
    Continue,
    /// Let the pages that are left follow the guest.
    StartPostcopy,
    /// End the transfer and wait for its end, then the stream of the attempt. The guest does not start
    /// through this. Also when there is none.
    EndTransfer,
    /// Let the guest run.
    Resume,
    /// End the source's machine: the guest runs at the target.
    Quit,
}

/// What a source's driver may want to tell somebody.
#[derive(Clone, Debug, PartialEq)]
pub enum VmSourceEvent {
    /// A new phase.
    Phase(VmSourcePhase),
    /// The guest runs at the target.
    Running,
    /// Something a person should know.
    Note(String),
}

/// Where a source stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmSourcePhase {
    /// The disks go over; the target's machine is being started.
    Disks,
    /// Memory goes over; the guest runs.
    Ram,
    /// The guest is being stopped, the rest of its state and the disks' ownership go over.
    Switching,
    /// Back to a guest that runs here, as soon as the disks are surely not the target's.
    Returning,
    /// The target owns the disks; its guest has not said that it runs.
    Moved,
    /// The guest runs at the target; pages may still follow it.
    Following,
    /// The guest runs at the target, which needs nothing more of the machine here.
    Completed,
    /// Ended as asked; the guest is here, in the state it had.
    Cancelled,
    /// Ended by an error; the same.
    Failed(WireError),
}

impl VmSourcePhase {
    /// Whether the target does not own the disks, as far as is known.
    #[must_use]
    pub const fn is_before_move(&self) -> bool {
        matches!(
            self,
            Self::Disks | Self::Ram | Self::Switching | Self::Returning
        )
    }

    /// Whether nothing more happens, once everything has been sent.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed(_))
    }
}

/// Where a target begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmTargetStart {
    /// A new move.
    Fresh,
    /// The agent was restarted.
    Resume {
        /// The last attempt that was begun.
        attempt: u32,
        /// The disks are owned here.
        owned: bool,
        /// The machine has its running state and stands.
        loaded: bool,
        /// The guest runs already.
        running: bool,
    },
}

/// What a target's driver must do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmTargetAction {
    /// Tell the disks' migration.
    Disks(DisksCommand),
    /// End the machine of an earlier attempt if there is one, start a new one, and have it listen. Answered by
    /// `handle_listening` or `handle_broken`.
    Start {
        /// Which attempt.
        attempt: u32,
    },
    /// End the machine.
    Kill,
    /// Let the guest run. Answered by `handle_running` or `handle_broken`.
    Run,
}

/// What a target's driver may want to tell somebody.
#[derive(Clone, Debug, PartialEq)]
pub enum VmTargetEvent {
    /// A new phase.
    Phase(VmTargetPhase),
    /// Something a person should know.
    Note(String),
}

/// Where a target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmTargetPhase {
    /// No machine is wanted yet, or the last one broke.
    Idle,
    /// It is being started.
    Starting,
    /// It receives its running state.
    Receiving,
    /// It has it and stands still.
    Loaded,
    /// The disks are owned here; the guest is being let run.
    Going,
    /// The guest runs.
    Running,
    /// The source knows that.
    Completed,
    /// It ended before the switch.
    Ended,
}

impl VmTargetPhase {
    /// Whether nothing more happens, once everything has been sent.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Ended)
    }
}
