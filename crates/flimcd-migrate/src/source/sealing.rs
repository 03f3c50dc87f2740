//! An increment of a replica: a migration that never switches, and ends with a copy of one moment at the target.
//!
//! ```text
//!  Copying ─► Closing ─► (Freeze) ─► Capturing ─► (Thaw) ─► Draining ─► Asked ─► Sealed
//!     ▲          │                       │
//!     └──────────┴── too much was written meanwhile
//! ```
//! * **Copying**: pre-copy. Once little is left, no new read begins (**Closing**), until everything on its way is durable at the
//!   target. So what is pending is all that the target lacks, and all that can ever have to be sent again.
//! * The guest stands while its I/O drains and the driver takes what is pending into memory (**Capturing**). What it writes afterwards
//!   is marked in the volume and belongs to the next increment: nobody drains those marks any more.
//! * **Draining** sends what was captured. **Asked**: all of it is durable at the target, which is to keep it as a copy of that moment.
//!
//! A source that is restarted has lost what it captured and begins to copy again from its record of unacknowledged blocks.

use std::time::Duration;

use flimcd_core::{BLOCK_SIZE, BlockRange, Time};
use flimcd_wire::{ErrorCode, Message, Seal, TargetStage, WireError};

use super::{
    Cancel, LinkState, SourceAction, SourceEvent, SourceMachine, SourcePhase, SourceRecord,
};
use crate::DiskError;

/// When an increment is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealLimits {
    /// Bytes left at which the guest may be stopped to capture them.
    pub bytes: u64,
    /// The same, at most, for a guest that writes as fast as the link carries: `bytes` is doubled up to here.
    pub bytes_max: u64,
    /// For so long what is left has to have stopped shrinking before it is doubled.
    pub patience: Duration,
}

impl Default for SealLimits {
    fn default() -> Self {
        Self {
            bytes: 16 << 20,
            bytes_max: 256 << 20,
            patience: Duration::from_secs(10),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Copying,
    Closing,
    Freezing,
    Capturing,
    Draining(Seal),
    Asked(Seal),
    Sealed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Sealing {
    limits: SealLimits,
    /// Blocks left at which it closes.
    blocks: u64,
    /// The least that was left, and since when.
    least: Option<(u64, Time)>,
    stage: Stage,
    wanted: Option<Vec<BlockRange>>,
}

impl Sealing {
    /// Nothing more is read from the volume.
    pub(super) fn is_closing(&self) -> bool {
        matches!(
            self.stage,
            Stage::Closing | Stage::Freezing | Stage::Capturing
        )
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.stage == Stage::Sealed
    }
}

impl SourceMachine {
    /// Makes this an increment of a replica: it ends with [`SourceEvent::Completed`] when the target has a copy of one moment, and the
    /// volume stays here. To be called before the first link-up. The driver then also polls [`poll_capture`](Self::poll_capture).
    pub fn replicate(&mut self, limits: SealLimits) {
        self.sealing = Some(Sealing {
            limits,
            blocks: limits.bytes / BLOCK_SIZE,
            least: None,
            stage: Stage::Copying,
            wanted: None,
        });
    }

    /// Blocks whose content is to be taken into memory at once, while the guest stands; answer with
    /// [`handle_captured`](Self::handle_captured). Every [`SourceAction::Read`] that follows while
    /// [`reads_capture`](Self::reads_capture) is to be answered from there, and no dirty mark is cleared for it.
    pub fn poll_capture(&mut self) -> Option<Vec<BlockRange>> {
        self.sealing.as_mut()?.wanted.take()
    }

    /// Whether content is read from what was captured.
    #[must_use]
    pub fn reads_capture(&self) -> bool {
        self.phase == SourcePhase::Draining && self.sealing.is_some()
    }

    /// Whether the target has a copy of one moment now.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealing.as_ref().is_some_and(Sealing::is_sealed)
    }

    /// Answer to [`poll_capture`](Self::poll_capture): captured, with the moment it is of, or why not.
    pub fn handle_captured(
        &mut self,
        now: Time,
        as_of_unix_ms: u64,
        result: Result<(), DiskError>,
    ) {
        let is_waited_for = self.phase == SourcePhase::Stopping
            && self.sealing.as_ref().map(|sealing| sealing.stage) == Some(Stage::Capturing);
        if is_waited_for {
            match result {
                Ok(()) => {
                    self.set_stage(Stage::Draining(Seal { as_of_unix_ms }));
                    self.actions.push_back(SourceAction::Thaw);
                    self.set_phase(SourcePhase::Draining);
                }
                Err(error) => {
                    let text = format!("cannot read the image at the source: {error}");
                    self.end_early(Cancel::Error(WireError::new(ErrorCode::DISK, text)));
                }
            }
        }
        self.advance(now);
    }

    fn set_stage(&mut self, stage: Stage) {
        if let Some(sealing) = &mut self.sealing {
            sealing.stage = stage;
        }
    }

    /// In pre-copy: closes the increment when little is left.
    pub(super) fn consider_seal(&mut self, now: Time) {
        let left = self.pending.count() + self.flights.blocks().count();
        let is_settled = self.flights.is_settled();
        let Some(sealing) = &mut self.sealing else {
            return;
        };
        if self.link != LinkState::Accepted || self.lacking.is_some() {
            sealing.least = None;
            return;
        }
        match sealing.stage {
            Stage::Copying if left <= sealing.blocks => sealing.stage = Stage::Closing,
            Stage::Copying => {
                let (least, since) = *sealing.least.get_or_insert((left, now));
                let max = sealing.limits.bytes_max / BLOCK_SIZE;
                if left < least {
                    sealing.least = Some((left, now));
                } else if now.since(since) >= sealing.limits.patience && sealing.blocks < max {
                    sealing.blocks = (sealing.blocks * 2).clamp(1, max);
                    sealing.least = None;
                    let mib = (sealing.blocks * BLOCK_SIZE) >> 20;
                    self.note(format!(
                        "the guest writes as fast as the link carries: the increment is closed with up to {mib} MiB left, \
                         for which the guest waits a moment longer"
                    ));
                }
            }
            Stage::Closing if is_settled => {
                sealing.stage = Stage::Freezing;
                self.set_phase(SourcePhase::Stopping);
                self.actions.push_back(SourceAction::Freeze);
            }
            _ => {}
        }
    }

    /// The guest stands.
    pub(super) fn capture(&mut self) {
        let Some(sealing) = &mut self.sealing else {
            return;
        };
        let blocks_max = 2 * sealing.limits.bytes_max / BLOCK_SIZE;
        if self.pending.count() > blocks_max {
            sealing.stage = Stage::Copying;
            sealing.least = None;
            self.actions.push_back(SourceAction::Thaw);
            self.set_phase(SourcePhase::PreCopy);
            return self.note(
                "the guest wrote too much while the increment was being closed; going on copying",
            );
        }
        sealing.stage = Stage::Capturing;
        sealing.wanted = Some(self.pending.runs().collect());
    }

    /// The guest runs, and what was captured is being sent.
    pub(super) fn consider_asking(&mut self) {
        let Some(sealing) = &mut self.sealing else {
            return;
        };
        if let Stage::Draining(seal) = sealing.stage
            && self.link == LinkState::Accepted
            && self.pending.is_empty()
            && self.flights.is_settled()
        {
            sealing.stage = Stage::Asked(seal);
            self.control_message(Message::Seal(seal));
        }
    }

    /// The target has accepted this link. True if it has a copy of one moment of this increment already.
    pub(super) fn seal_accepted(&mut self, stage: TargetStage) -> bool {
        let Some(sealing) = &mut self.sealing else {
            return false;
        };
        if let Stage::Asked(seal) = sealing.stage {
            sealing.stage = Stage::Draining(seal);
        }
        if !matches!(stage, TargetStage::Complete(_)) || self.phase >= SourcePhase::Preparing {
            return false;
        }
        // What changed since is in the record of unacknowledged blocks: only what was durable there was taken out of it.
        self.finish_seal();
        true
    }

    pub(super) fn handle_sealed(&mut self, seal: Seal) {
        match self.sealing.as_ref().map(|sealing| sealing.stage) {
            Some(Stage::Asked(asked)) if asked == seal => self.finish_seal(),
            _ if self.phase > SourcePhase::Draining => {}
            _ => self.protocol_error("a copy of a moment that nobody asked for"),
        }
    }

    fn finish_seal(&mut self) {
        if self.phase == SourcePhase::Stopping {
            self.actions.push_back(SourceAction::Thaw);
        }
        self.set_stage(Stage::Sealed);
        self.bulk.clear();
        self.set_phase(SourcePhase::Returning);
        self.persist(SourceRecord::Owner);
    }

    /// The record says that the increment is over.
    pub(super) fn end_sealed(&mut self) {
        self.set_phase(SourcePhase::Completed);
        self.events.push_back(SourceEvent::Completed);
    }
}
