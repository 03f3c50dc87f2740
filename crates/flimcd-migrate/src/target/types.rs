//! What goes into a target machine and what comes out of it.

use flimcd_core::{BlockSet, Epoch, MigrationId, VolumeSize};
use flimcd_wire::{
    Base, Blocks, HeatPart, Probe, SampleChunk, SeedId, SeedTable, TargetStage, WireError,
};
use std::sync::Arc;

/// What a migration is about.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Its number.
    pub migration: MigrationId,
    /// Size of the volume, or of the layout of all that move together.
    pub size: VolumeSize,
    /// Take the volume over only while the machine that it belongs to is ready to run here, as
    /// [`TargetMachine::handle_vm_ready`](crate::TargetMachine::handle_vm_ready) says.
    pub waits_for_vm: bool,
    /// Random number of this run.
    pub incarnation: u64,
    /// What stood there, for each volume, before anything arrived.
    pub bases: Vec<Base>,
}

/// Where the machine begins.
#[derive(Clone, Copy, Debug)]
pub enum TargetStart {
    /// A new migration onto a volume of zeroes.
    Fresh,
    /// The agent was restarted.
    Resume {
        /// What the durable record says.
        stage: TargetStage,
        /// The epoch that was durably refused, if any.
        refused: Option<Epoch>,
        /// Blocks that the durable missing set still has.
        missing_blocks: u64,
    },
}

/// Number of a request to write content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApplyId(pub u64);

/// Number of a request to make data durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SyncId(pub u64);

/// What the driver must do.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetAction {
    /// Write this content (`Volume::apply` for each entry) and answer with `handle_applied`; or with `handle_lacking`, if
    /// the seed, or a place that a probe found, does not hold what an entry says (nothing of that entry is written then).
    Apply {
        /// Number of the request.
        id: ApplyId,
        /// The content.
        blocks: Blocks,
    },
    /// Make everything durable whose `Apply` was answered before this action (`Volume::sync`), and
    /// answer with `handle_synced`.
    Sync(SyncId),
    /// Take the volume over. In this order: data durable, `missing` durable, the record durable, guest I/O
    /// admitted. Answer with `handle_owner`; an error must mean that the record does not say owner.
    BecomeOwner {
        /// The epoch to own.
        epoch: Epoch,
        /// Blocks that are not here.
        missing: BlockSet,
    },
    /// Record durably that `epoch` will never be owned here, and answer with `handle_refused`. After
    /// `Discard` the note that it leaves says so already.
    Refuse {
        /// The epoch.
        epoch: Epoch,
    },
    /// Report every block again that a guest waits for (`Rules::requeue_faults`). Done at once.
    RequeueFaults,
    /// Report up to so many missing blocks through `handle_fault`, whether a guest waits or not.
    AskForMissing {
        /// How many.
        blocks: u64,
    },
    /// Every block is present: make all of it durable, then the record that says so, and answer with
    /// `handle_completed`.
    Complete {
        /// The epoch owned.
        epoch: Epoch,
    },
    /// Choose the image that has most of these chunks at the same place, among those that the volume may share content
    /// with, and answer with `handle_seed`. What refers to the one that was chosen before is then lacking, if it is another.
    ChooseSeed {
        /// Chunks of the layout.
        sample: Vec<SampleChunk>,
    },
    /// Find out which of these blocks are here, remember where under the probe's number, and answer with `handle_probed`.
    Probe(Probe),
    /// How hot a part of the layout was at the source: the volumes keep it with their own heat. Done at once, and without an
    /// answer: it is advice.
    KeepHeat(HeatPart),
    /// The migration ended before the switch: leave a durable note that it is over here, so that a
    /// source that asks after a restart can be refused, then remove what arrived. Writes that were begun
    /// are waited for.
    Discard,
}

/// An image, or one for each of several volumes, that the target can read chunks from.
#[derive(Clone, Debug, PartialEq)]
pub struct SeedChoice {
    /// Names its content.
    pub id: SeedId,
    /// How people call it.
    pub name: String,
    /// It is what the content is written over.
    pub in_place: bool,
    /// What it has where, over the migration's layout.
    pub table: Arc<SeedTable>,
}

/// What the driver may want to tell somebody.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetEvent {
    /// A new phase.
    Phase(TargetPhase),
    /// The volume is owned here.
    Arrived(Epoch),
    /// Every block is here; the source is not needed any more.
    Completed,
    /// Ended before the switch by the source.
    Cancelled,
    /// Ended before the switch by an error here.
    Failed(WireError),
    /// Something a person should know; the migration goes on.
    Note(String),
}

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "described in the module's documentation")]
pub enum TargetPhase {
    Incoming,
    Switching,
    Refusing,
    PostCopy,
    Completing,
    Complete,
    Cancelled,
    Failed,
    Sealed,
}

impl TargetPhase {
    /// Whether the volume is owned here.
    #[must_use]
    pub const fn owns(self) -> bool {
        matches!(self, Self::PostCopy | Self::Completing | Self::Complete)
    }
}
