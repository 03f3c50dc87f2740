//! What goes into a source machine and what comes out of it.

use flimcd_core::{BlockRange, BlockSet, Epoch, MigrationId, Seq, VolumeSize};
use flimcd_wire::{
    ChunkPrefix, Content, Entry, Probed, Runs, SourceStage, TargetReport, VolumeOffer, WireError,
};

use crate::policy::Prediction;

/// What a migration is about.
pub struct SourceConfig {
    /// Its number.
    pub migration: MigrationId,
    /// The volumes that move together.
    pub volumes: Vec<VolumeOffer>,
    /// Size of their layout ([`flimcd_core::VolumeLayout::size`]); of the volume, if there is one.
    pub size: VolumeSize,
    /// The session of the machine that they belong to, if they move with one.
    pub session: Option<MigrationId>,
    /// The source's epoch when the migration began.
    pub epoch: Epoch,
    /// Random number of this run.
    pub incarnation: u64,
}

/// Where the machine begins.
#[derive(Clone, Debug)]
pub enum SourceStart {
    /// A new migration.
    Fresh {
        /// Blocks that are not holes: what a target with zeroes lacks.
        data: BlockSet,
        /// Blocks that were written since the copies that the offers name as their bases were made.
        changed: Option<BlockSet>,
    },
    /// The agent was restarted.
    Resume {
        /// What the durable record says.
        stage: SourceStage,
        /// Blocks that the target may lack, as the volume kept them.
        unacked: BlockSet,
    },
}

/// What the durable record of the volume must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceRecord {
    /// The source owns the volume with the epoch it had; the migration is over.
    Owner,
    /// The guest is stopped and the target is offered this epoch.
    Prepared(Epoch),
    /// The target owns this epoch; the source serves missing blocks.
    Released(Epoch),
    /// The target owns this epoch and needs nothing more.
    Retired(Epoch),
}

/// What the driver must do.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceAction {
    /// Clear the dirty marks of `range` and read it (in this order: `Volume::read_for_send`). The marks are cleared before the
    /// next action begins. Answer with `handle_read` and the packed content; or, where `probe` is set and something is neither
    /// zero nor the same, with `handle_probe`, and keep what was read until `Pack` or `Forget`.
    Read {
        /// Number of the message it will be.
        seq: Seq,
        /// The blocks, at most [`MAX_BLOCKS_PER_MESSAGE`](flimcd_core::limits::MAX_BLOCKS_PER_MESSAGE).
        range: BlockRange,
        /// Whether to compress.
        compress: bool,
        /// For each chunk of the range, if it is whole chunks and the target has a seed: how the fingerprint begins of what
        /// the seed has there. Those that are as the seed has them are packed as [`Content::Same`]. Otherwise empty.
        same: Vec<Option<ChunkPrefix>>,
        /// Ask the target before the rest is packed.
        probe: bool,
    },
    /// Pack what was read, with the blocks that the target has as [`Content::Copy`], and answer with `handle_read`.
    Pack {
        /// Which.
        seq: Seq,
        /// Blocks that the target has; some may be beside the rest.
        had: Runs,
    },
    /// What was read under this number is not needed.
    Forget(Seq),
    /// The target has these for good: clear them in the volume's record of unacknowledged blocks, except
    /// those that are marked dirty. Done before the next action and before dirty marks are drained again.
    MarkClean(Vec<BlockRange>),
    /// Let no new guest I/O in; when what is in flight is done, drain the dirty marks a last time and
    /// answer with `handle_frozen`.
    Freeze,
    /// Serve the guest again. Done at once.
    Thaw,
    /// Make the record say this, durably, and answer with `handle_persisted`. Before `Prepared` the image is
    /// synced: after the switch a power loss here must not take content that only this site has. Marks and the
    /// record of unacknowledged blocks are kept until `Owner` is durable.
    Persist(SourceRecord),
    /// Refuse guest I/O for good: the volume has moved. Done at once.
    Release,
    /// Whether guests can fault: bulk is paced then. Done at once.
    SetPacing(bool),
    /// Whether a guest's write to blocks that the target has is answered only after [`SourceAction::Acked`] names them
    /// (`Volume::set_mirroring`). Done at once. A guest that is stopped, a migration that ends, and a link that is away for long
    /// let all answers go.
    Mirror(bool),
    /// The target has the newest content of these, as far as it was handed to the link: writes to them may be answered. Done at once,
    /// and only while mirroring.
    Acked(Vec<BlockRange>),
    /// Bytes a second that the guest may write; `None` for as much as it wants. Done at once.
    LimitWrites(Option<u64>),
}

/// What the driver may want to tell somebody.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEvent {
    /// A new phase.
    Phase(SourcePhase),
    /// The policy would switch now; it waits for `handle_switchover`.
    ReadyForSwitchover,
    /// The target owns the volume.
    SwitchedOver,
    /// What the policy expects of the time after the switch, told when it is made.
    Predicted(Prediction),
    /// The target has everything; the source can be switched off.
    Completed,
    /// Ended before the switch, as asked.
    Cancelled,
    /// Ended before the switch, by an error. The guest is still served here.
    Failed(WireError),
    /// The target has an image of this name that has some of the volume at the same place.
    Seed(String),
    /// Something a person should know; the migration goes on.
    Note(String),
}

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "described in the module's documentation")]
pub enum SourcePhase {
    Connecting,
    PreCopy,
    Stopping,
    Draining,
    Preparing,
    Switching,
    PostCopy,
    Retiring,
    Returning,
    Completed,
    Cancelled,
    Failed,
}

impl SourcePhase {
    /// Whether guest writes at the source still matter: drain dirty marks in these phases.
    #[must_use]
    pub const fn wants_dirty(self) -> bool {
        matches!(self, Self::Connecting | Self::PreCopy)
    }

    /// Whether nothing more happens, once everything has been transmitted.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

/// When to switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Switchover {
    /// Not before it is granted.
    Wait,
    /// As soon as the policy is ready.
    WhenReady,
    /// At once, whatever the policy says.
    Now,
}

/// How content has travelled. Blocks that were sent several times count each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContentCount {
    /// Blocks of zeroes.
    pub zero_blocks: u64,
    /// Blocks that the target has at the same place.
    pub same_blocks: u64,
    /// Blocks that the target has elsewhere.
    pub elsewhere_blocks: u64,
    /// Blocks that had come before in this migration.
    pub repeated_blocks: u64,
    /// Blocks that were compressed.
    pub zstd_blocks: u64,
    /// And what they came to.
    pub zstd_bytes: u64,
    /// Blocks as they are.
    pub raw_blocks: u64,
}

impl ContentCount {
    /// Counts what a target said it has, which [`count`](Self::count) leaves out.
    pub fn count_probed(&mut self, probed: &Probed) {
        let (same, repeated) = (u64::from(probed.same_place), u64::from(probed.repeated));
        self.same_blocks += same;
        self.repeated_blocks += repeated;
        self.elsewhere_blocks += probed.had.blocks().saturating_sub(same + repeated);
    }

    /// Counts an entry of a message.
    pub fn count(&mut self, entry: Entry) {
        let blocks = entry.range.len();
        match entry.content {
            Content::Invalid => {}
            Content::Zero => self.zero_blocks += blocks,
            Content::Same => self.same_blocks += blocks,
            // By kind when the target's answer is known.
            Content::Copy => {}
            Content::Zstd { len } => {
                self.zstd_blocks += blocks;
                self.zstd_bytes += u64::from(len);
            }
            Content::Raw { .. } => self.raw_blocks += blocks,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceProgress {
    /// Blocks of the volume that had content when the migration began (or was resumed).
    pub blocks_total: u64,
    /// Blocks whose current content the target lacks, on their way or not.
    pub blocks_left: u64,
    /// Blocks whose content was handed to the link, counted each time.
    pub blocks_sent: u64,
    /// Bytes of messages with content that were handed to the link, without the link's own overhead.
    pub content_bytes_sent: u64,
    /// How content was handed to the link.
    pub content: ContentCount,
    /// Bytes a block costs on average, for estimates.
    pub bytes_per_block: f64,
    /// The policy would switch now.
    pub ready: bool,
    /// What the target last said of its guest.
    pub target: TargetReport,
}
