//! What the source machine and the target machine say to each other.
//!
//! Messages on the control class arrive in the order they were sent; across classes, and on bulk,
//! there is no order. Each message states what it may meet.

use bytes::Bytes;
use flimcd_core::{
    BLOCKS_PER_CHUNK, BlockRange, Epoch, MigrationId, Seq, VolumeId, VolumeName, VolumeSize, limits,
};
use serde::{Deserialize, Serialize};

use crate::{
    CheckAsk, CheckOpen, CheckPart, DecodeError, HeatPart, MAX_TOUCHED, PlanOpen, Planned, Probe,
    Probed, Runs, SampleChunk, SeedId, SeedOffer, SeedPart, SeqRuns, SetPart, VmMessage,
};

/// Priority of a message on the link, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Demands of a waiting guest, and the answers to them.
    Fault = 1,
    /// Everything that moves the migration on: hand-over, acknowledgements.
    Control = 2,
    /// The running state of the machine.
    Ram = 3,
    /// Blocks that the guest will probably ask for soon.
    Prefetch = 4,
    /// Everything else.
    Bulk = 5,
}

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Self; 5] = [
        Self::Fault,
        Self::Control,
        Self::Ram,
        Self::Prefetch,
        Self::Bulk,
    ];

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&class| class as u8 == byte)
    }
}

/// One message of one migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Never sent; a decoder refuses it.
    Invalid,

    // Source to target.
    /// First message after every link-up: what the source wants to move and where it stands.
    Open(Open),
    /// Content of blocks.
    Blocks(Blocks),
    /// A part of the set of blocks that will be missing after the switch to `epoch`.
    MissingPart {
        /// Epoch that the target is offered.
        epoch: Epoch,
        /// Number of the part, from 0.
        part: u32,
        /// The blocks.
        set: SetPart,
    },
    /// The guest is stopped and the source refuses its I/O: take ownership with `epoch`. All
    /// parts were sent before it on the same class.
    Switch {
        /// Epoch that the target is offered.
        epoch: Epoch,
        /// How many `MissingPart`s belong to it.
        parts: u32,
        /// Blocks in them, as a check.
        missing_blocks: u64,
        /// Messages that carry outdated content: dropped if they arrive after this.
        stale: SeqRuns,
        /// Messages with current content whose blocks are in the missing set, because they are on their
        /// way or will be: what of them has arrived already is not missing.
        in_flight: SeqRuns,
    },
    /// The source wants `epoch` back, if the target has not become its owner.
    CancelSwitch {
        /// Epoch that was offered.
        epoch: Epoch,
    },
    /// The migration ends before the switch; the target forgets it.
    Cancel,
    /// Answer to `Complete`: the source keeps nothing that the target needs.
    Finished,
    /// Answer to `Peek`: the bytes as they were at some moment after the question; none if they could not be
    /// read.
    Peeked {
        /// Number of the question.
        number: u64,
        /// The blocks' bytes.
        #[serde(skip)]
        payload: Bytes,
    },

    /// Before content is sent: which of these blocks does the target have, anywhere? Answered with `Probed`.
    Probe(Probe),
    /// After `Open`: what the source would like to find in an image at the target. Answered with `SeedOffer`.
    SeedAsk {
        /// Chunks drawn at random, at most [`limits::MAX_SAMPLE_CHUNKS`].
        sample: Vec<SampleChunk>,
        /// The seed whose whole table the source has.
        have: Option<SeedId>,
    },

    // Target to source.
    /// Answer to `Open`.
    Accept(Accept),
    /// Content of these messages is on the target's disk (or was not needed), not yet durable.
    Ack {
        /// Sequence numbers of [`Blocks`].
        seqs: SeqRuns,
    },
    /// Content of these messages is durable at the target.
    Durable {
        /// Sequence numbers of [`Blocks`].
        seqs: SeqRuns,
    },
    /// The target is durably the owner.
    SwitchDone {
        /// The epoch it owns.
        epoch: Epoch,
    },
    /// The target has durably refused `epoch` and will never own it.
    SwitchRefused {
        /// The epoch refused.
        epoch: Epoch,
    },
    /// A guest waits for these blocks.
    Demand {
        /// The blocks.
        runs: Runs,
    },
    /// The guest at the target has overwritten these: they need not come.
    Unneeded {
        /// The blocks.
        runs: Runs,
    },
    /// Every block is present and durable at the target.
    Complete,
    /// How the guest at the target fares.
    Report(TargetReport),
    /// Something at the target reads before the switch, and is content with what stands there now. The
    /// answer changes nothing on either side.
    Peek {
        /// Number of the question.
        number: u64,
        /// At most [`limits::MAX_BLOCKS_PER_MESSAGE`] blocks.
        range: BlockRange,
    },

    /// Answer to `SeedAsk`: the image that `Content::Same` is about from now on, if there is one.
    SeedOffer(Option<SeedOffer>),
    /// A part of the table of the seed that was offered, after the offer on the same class.
    SeedPart(SeedPart),
    /// Answer to `Probe`: what of it the target had when it looked.
    Probed(Probed),
    /// The target does not hold what a message says it does. The message counts as not arrived.
    Lacking {
        /// Its number.
        seq: Seq,
        /// A guest waits for some of its blocks.
        is_waited_for: bool,
    },

    // Both ways.
    /// The migration cannot go on here; before the switch only.
    Failed(WireError),
    /// Of a running machine; the frame's number is then that of a session, see [`VmMessage`].
    Vm(VmMessage),

    /// Source to target: what a migration would cost; see [`PlanOpen`].
    PlanOpen(PlanOpen),
    /// Answer to `PlanOpen`; `Failed` if the volumes could not come.
    Planned(Planned),

    /// Target to source, after the switch: what the guest has read lately, whether it was there or not, in order of time.
    /// Advice for what to send next.
    Touched {
        /// At most [`MAX_TOUCHED`] reads, as runs of blocks.
        reads: Vec<BlockRange>,
    },
    /// Source to target, after the switch: what was hot at the source.
    Heat(HeatPart),

    /// Source to target, after a migration: whether the copies are equal; see [`CheckOpen`].
    CheckOpen(CheckOpen),
    /// Answer to `CheckOpen`; `Failed` if what the migration moved does not stand there any more.
    CheckReady,
    /// Asks for hashes.
    CheckAsk(CheckAsk),
    /// Answer to `CheckAsk`.
    CheckPart(CheckPart),
    /// Source → target: everything that the source had at that moment has been acknowledged. Keep it as a copy of that moment.
    Seal(crate::Seal),
    /// Target → source: done, durably.
    Sealed(crate::Seal),
}

/// See [`Message::Open`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The volumes that move together, in the order of the migration's [`flimcd_core::VolumeLayout`].
    pub volumes: Vec<VolumeOffer>,
    /// The session of the machine that they belong to. With one, the target takes them over only when the
    /// machine is ready to run there.
    pub session: Option<MigrationId>,
    /// The source's epoch when the migration began: the highest of the volumes'.
    pub epoch: Epoch,
    /// Random number of this run of the source machine; sequence numbers belong to it.
    pub incarnation: u64,
    /// Every lower sequence number is acknowledged and may be forgotten.
    pub oldest_unacked: Seq,
    /// Where the source stands.
    pub stage: SourceStage,
}

/// One of the volumes that a migration moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOffer {
    /// Its identity.
    pub id: VolumeId,
    /// Its name, the same on both sides.
    pub name: VolumeName,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// The source knows what has changed since this migration left a copy at the target.
    pub base: Option<MigrationId>,
}

/// What stands at the target where a volume is to arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Base {
    /// Never sent.
    Invalid,
    /// Zeroes.
    Zeroes,
    /// The copy that the migration named in [`VolumeOffer::base`] left, untouched since.
    Known,
    /// A copy of some time: any block may differ.
    Unknown,
}

/// Where a source stands, as its durable record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceStage {
    /// Never sent.
    Invalid,
    /// It owns the volume.
    Owner,
    /// It has stopped the guest and waits for the target to take this epoch.
    Prepared(Epoch),
    /// It knows that the target owns this epoch.
    Released(Epoch),
}

/// See [`Message::Accept`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accept {
    /// Random number of this run of the target machine. A new one means: what was acknowledged
    /// but not durable may be lost.
    pub incarnation: u64,
    /// Messages of the source's incarnation that have arrived here.
    pub received: SeqRuns,
    /// Where the target stands.
    pub stage: TargetStage,
    /// What stood there before the migration's first content arrived, for each volume in the order of `Open`; may be left
    /// out when the source offers ownership or has given it away.
    pub bases: Vec<Base>,
}

/// Where a target stands, as its durable record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetStage {
    /// Never sent.
    Invalid,
    /// It receives content and owns nothing.
    Incoming,
    /// It owns this epoch; blocks are missing.
    Owner(Epoch),
    /// It owns this epoch and has every block.
    Complete(Epoch),
}

/// Content of some blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Number of the message.
    pub seq: Seq,
    /// What the payload holds, in order; ranges ascend and do not overlap.
    pub entries: Vec<Entry>,
    /// The payloads of all entries, one after the other.
    #[serde(skip)]
    pub payload: Bytes,
}

/// A run of blocks and how its content travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The blocks, not empty.
    pub range: BlockRange,
    /// Their content.
    pub content: Content,
}

/// How the content of a run of blocks travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Never sent.
    Invalid,
    /// All zero; no payload.
    Zero,
    /// As it is; the payload is the run's bytes (a volume's last block may be short).
    Raw {
        /// Bytes of payload.
        len: u32,
    },
    /// One zstd frame that decompresses to the run's bytes.
    Zstd {
        /// Bytes of payload.
        len: u32,
    },
    /// Whole chunks that the target's seed has at the same place. The payload is the fingerprint of the run, which what the
    /// target reads there must have.
    Same,
    /// Blocks that the target said it has, in its answer to the probe of this message's number. The payload is the fingerprint
    /// of the run, which what the target reads at those places must have.
    Copy,
}

/// Bytes of a whole fingerprint.
const FINGERPRINT_BYTES: usize = 32;

impl Entry {
    /// Bytes of payload.
    #[must_use]
    pub fn payload_len(self) -> usize {
        match self.content {
            Content::Invalid | Content::Zero => 0,
            Content::Raw { len } | Content::Zstd { len } => len as usize,
            Content::Same | Content::Copy => FINGERPRINT_BYTES,
        }
    }

    /// Whether it begins and ends where chunks do.
    #[must_use]
    pub const fn is_whole_chunks(self) -> bool {
        self.range.start.is_multiple_of(BLOCKS_PER_CHUNK)
            && self.range.end.is_multiple_of(BLOCKS_PER_CHUNK)
    }
}

/// What the target's guest has seen since the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetReport {
    /// Reads that the guest made.
    pub guest_reads: u64,
    /// Reads that touched a missing block.
    pub guest_reads_missed: u64,
    /// Blocks still missing.
    pub missing_blocks: u64,
}

/// An error that crosses the wire: a number that programs act on and a text for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} (code {})", code.0)]
pub struct WireError {
    /// What went wrong.
    pub code: ErrorCode,
    /// The same for a person, with what to do next. At most `MAX_TEXT_BYTES` long.
    pub text: String,
}

impl WireError {
    /// An error with a text that is cut to what may be sent.
    #[must_use]
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > limits::MAX_TEXT_BYTES {
            let end = (0..=limits::MAX_TEXT_BYTES)
                .rev()
                .find(|&at| text.is_char_boundary(at));
            text.truncate(end.unwrap_or(0));
        }
        Self { code, text }
    }
}

/// Numbered errors. Unknown numbers from a newer peer are kept as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ErrorCode(pub u16);

impl ErrorCode {
    /// The peer may not send or take this volume.
    pub const NOT_ALLOWED: Self = Self(1);
    /// A different volume, or an owned one, stands at the target under this name or id.
    pub const VOLUME_EXISTS: Self = Self(2);
    /// The target's disk has too little room.
    pub const NO_SPACE: Self = Self(3);
    /// Reading or writing a disk failed.
    pub const DISK: Self = Self(4);
    /// A message made no sense in the state it met.
    pub const PROTOCOL: Self = Self(5);
    /// The operator ended it.
    pub const CANCELLED: Self = Self(6);
    /// The migration is not known here.
    pub const UNKNOWN_MIGRATION: Self = Self(7);
    /// Sizes differ.
    pub const SIZE: Self = Self(8);
    /// Something else; the text says what.
    pub const OTHER: Self = Self(9);
}

impl Message {
    /// What follows the message in its frame.
    pub(crate) fn payload(&self) -> Bytes {
        match self {
            Self::Blocks(blocks) => blocks.payload.clone(),
            Self::Peeked { payload, .. } => payload.clone(),
            Self::SeedPart(part) => part.payload.clone(),
            Self::Probe(probe) => probe.payload.clone(),
            Self::Heat(part) => part.payload.clone(),
            Self::CheckPart(part) => part.payload.clone(),
            Self::Vm(message) => message.payload(),
            _ => Bytes::new(),
        }
    }

    /// Takes what followed the message; false if nothing may.
    pub(crate) fn set_payload(&mut self, rest: Bytes) -> bool {
        match self {
            Self::Blocks(blocks) => blocks.payload = rest,
            Self::Peeked { payload, .. } => *payload = rest,
            Self::SeedPart(part) => part.payload = rest,
            Self::Probe(probe) => probe.payload = rest,
            Self::Heat(part) => part.payload = rest,
            Self::CheckPart(part) => part.payload = rest,
            Self::Vm(message) => return message.set_payload(rest),
            _ => return rest.is_empty(),
        }
        true
    }

    /// Checks everything that can be checked without knowing the volume.
    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        let sound = match self {
            Self::Invalid => false,
            Self::Open(open) => {
                open.stage != SourceStage::Invalid
                    && (1..=limits::MAX_VOLUMES_PER_MIGRATION).contains(&open.volumes.len())
            }
            Self::Accept(accept) => {
                accept.stage != TargetStage::Invalid
                    && accept.bases.len() <= limits::MAX_VOLUMES_PER_MIGRATION
                    && !accept.bases.contains(&Base::Invalid)
            }
            Self::Blocks(blocks) => return blocks.validate(),
            Self::MissingPart { set, .. } => set.is_sound(),
            Self::Failed(error) => error.text.len() <= limits::MAX_TEXT_BYTES,
            Self::Peek { range, .. } => {
                range.start < range.end && range.end - range.start <= limits::MAX_BLOCKS_PER_MESSAGE
            }
            Self::SeedAsk { sample, .. } => sample.len() <= limits::MAX_SAMPLE_CHUNKS,
            Self::SeedOffer(Some(offer)) => offer.name.len() <= limits::MAX_TEXT_BYTES,
            Self::SeedPart(part) => part.is_sound(),
            Self::Probe(probe) => probe.is_sound(),
            Self::Probed(probed) => probed.is_sound(),
            Self::Vm(message) => return message.validate(),
            Self::PlanOpen(open) => open.is_sound(),
            Self::Planned(planned) => planned.is_sound(),
            Self::Touched { reads } => {
                reads.len() <= MAX_TOUCHED
                    && reads.iter().all(|run| {
                        run.start < run.end
                            && run.end <= limits::MAX_VOLUME_BYTES / flimcd_core::BLOCK_SIZE
                    })
            }
            Self::Heat(part) => part.is_sound(),
            Self::CheckOpen(open) => open.is_sound(),
            Self::CheckAsk(ask) => ask.is_sound(),
            Self::CheckPart(part) => part.is_sound(),
            _ => true,
        };
        if sound {
            Ok(())
        } else {
            Err(DecodeError::Malformed("a field has no valid value"))
        }
    }
}

impl Blocks {
    fn validate(&self) -> Result<(), DecodeError> {
        let malformed = |what| Err(DecodeError::Malformed(what));
        let (mut at, mut payload, mut with_content) = (0, 0usize, 0u64);
        for entry in &self.entries {
            let BlockRange { start, end } = entry.range;
            if start >= end || start < at || end > limits::MAX_VOLUME_BYTES {
                return malformed("block ranges are empty, overlap or descend");
            }
            at = end;
            payload = payload.saturating_add(entry.payload_len());
            let raw_max = (end - start).saturating_mul(flimcd_core::BLOCK_SIZE);
            match entry.content {
                Content::Invalid => return malformed("block content of no kind"),
                Content::Zero => {}
                Content::Raw { len } if u64::from(len) > raw_max => {
                    return malformed("more payload than the blocks have bytes");
                }
                Content::Same if !entry.is_whole_chunks() => {
                    return malformed("parts of chunks are not the same as anything");
                }
                Content::Raw { .. } | Content::Zstd { .. } | Content::Same | Content::Copy => {
                    with_content += end - start;
                }
            }
        }
        if with_content > limits::MAX_BLOCKS_PER_MESSAGE {
            return malformed("too many blocks in one message");
        }
        if payload != self.payload.len() {
            return malformed("payload is not as long as its entries say");
        }
        Ok(())
    }

    /// All blocks in the message.
    pub fn ranges(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.entries.iter().map(|entry| entry.range)
    }

    /// Each entry with its part of the payload.
    pub fn parts(&self) -> impl Iterator<Item = (Entry, Bytes)> + '_ {
        let mut at = 0;
        self.entries.iter().map(move |&entry| {
            let end = at + entry.payload_len();
            let part = self.payload.slice(at..end);
            at = end;
            (entry, part)
        })
    }
}
