//! The target's side of a migration.
//!
//! ```text
//!  Incoming ─► Switching ─► PostCopy ─► Completing ─► Complete
//!      │           │
//!      └───────────┴─► Refusing ─► Cancelled / Failed
//! ```
//! * **Incoming**: content is written as it arrives; the target owns nothing.
//! * **Switching**: the source offered ownership. When everything that had arrived is written, the driver
//!   makes data, missing set and the new owner durable, in that order. Content that arrives meanwhile is
//!   held back. **Refusing**: it could not, or the source asked for the volume back in time.
//! * **PostCopy**: the guest runs here. Faults are demanded from the source, arriving content is written
//!   where the guest has not written itself (the volume decides). Nothing ends it but the last block.
//! * **Completing**: all is present, and being made durable.
//!
//! Every message with content is acknowledged twice: when it is written, and when it is durable.

mod arrivals;

use std::{collections::VecDeque, time::Duration};

use flimcd_core::{
    BlockRange, BlockSet, Epoch, MigrationId, Time, VolumeSize, limits,
};
use flimcd_wire::{
    Accept, Blocks, Class, ErrorCode, Message, Open, Runs, SeqRuns, SetPart, SourceStage,
    TargetReport, TargetStage, WireError,
};

use crate::DiskError;
use arrivals::Arrivals;

/// Content that is written is made durable at least this often.
const SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// And after this much of it.
const SYNC_BYTES: u64 = 32 << 20;
/// How often the source hears how the guest fares, and whether anything got lost is looked at.
const TICK: Duration = Duration::from_millis(250);
/// Nothing has arrived for so long although blocks are missing: ask for some.
const IDLE_BEFORE_ASKING: Duration = Duration::from_secs(2);
/// How many blocks are asked for then.
const IDLE_ASK_BLOCKS: u64 = 256;

/// What a migration is about.
#[derive(Clone, Copy, Debug)]
pub struct TargetConfig {
    /// Its number.
    pub migration: MigrationId,
    /// Size of the volume.
    pub size: VolumeSize,
    /// Random number of this run.
    pub incarnation: u64,
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
    /// Write this content (`Volume::apply` for each entry) and answer with `handle_applied`.
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
    /// Record durably that `epoch` will never be owned here, and answer with `handle_refused`.
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
    /// The migration ended before the switch: remove what arrived.
    Discard,
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
}

impl TargetPhase {
    /// Whether the volume is owned here.
    #[must_use]
    pub const fn owns(self) -> bool {
        matches!(self, Self::PostCopy | Self::Completing | Self::Complete)
    }
}

/// An offer of ownership that is being received.
#[derive(Debug)]
struct Offer {
    epoch: Epoch,
    parts: u32,
    missing: BlockSet,
    /// `Switch` has come, all parts are there.
    whole: bool,
}

/// The target machine. The contract of its driver stands in the crate's documentation.
pub struct TargetMachine {
    config: TargetConfig,
    phase: TargetPhase,
    epoch: Option<Epoch>,
    refused: Option<Epoch>,
    /// The source has confirmed that it needs nothing more.
    finished: bool,
    link_up: bool,
    /// `Accept` was sent on this link.
    accepted: bool,
    arrivals: Arrivals,
    /// Content that came while the volume was being taken over.
    held: Vec<Blocks>,
    offer: Option<Offer>,
    /// Faults that were sent to the source and whose blocks are not here.
    demanded: BlockSet,
    demands: VecDeque<BlockRange>,
    control: VecDeque<Message>,
    report: TargetReport,
    reported: TargetReport,
    last_arrival: Time,
    actions: VecDeque<TargetAction>,
    events: VecDeque<TargetEvent>,
    next_tick: Time,
}

impl TargetMachine {
    /// A machine at its beginning, with the link down.
    #[must_use]
    pub fn new(config: TargetConfig, start: TargetStart, now: Time) -> Self {
        let mut machine = Self {
            config,
            phase: TargetPhase::Incoming,
            epoch: None,
            refused: None,
            finished: false,
            link_up: false,
            accepted: false,
            arrivals: Arrivals::default(),
            held: Vec::new(),
            offer: None,
            demanded: BlockSet::new(config.size.blocks()),
            demands: VecDeque::new(),
            control: VecDeque::new(),
            report: TargetReport::default(),
            reported: TargetReport::default(),
            last_arrival: now,
            actions: VecDeque::new(),
            events: VecDeque::new(),
            next_tick: now + TICK,
        };
        if let TargetStart::Resume {
            stage,
            refused,
            missing_blocks,
        } = start
        {
            machine.refused = refused;
            machine.report.missing_blocks = missing_blocks;
            match stage {
                TargetStage::Owner(epoch) => {
                    machine.epoch = Some(epoch);
                    machine.phase = TargetPhase::PostCopy;
                }
                TargetStage::Complete(epoch) => {
                    machine.epoch = Some(epoch);
                    machine.phase = TargetPhase::Complete;
                }
                TargetStage::Invalid | TargetStage::Incoming => {}
            }
            machine.consider_complete();
        }
        machine
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> TargetPhase {
        self.phase
    }

    /// Whether nothing more happens, once everything has been transmitted.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self.phase {
            TargetPhase::Complete => self.finished,
            TargetPhase::Cancelled | TargetPhase::Failed => true,
            _ => false,
        }
    }

    /// How the guest fares, and how many blocks are missing.
    #[must_use]
    pub fn report(&self) -> TargetReport {
        self.report
    }

    fn set_phase(&mut self, phase: TargetPhase) {
        tracing::debug!(migration = %self.config.migration, from = ?self.phase, to = ?phase, "phase");
        self.phase = phase;
        self.events.push_back(TargetEvent::Phase(phase));
    }

    fn note(&mut self, text: impl Into<String>) {
        self.events.push_back(TargetEvent::Note(text.into()));
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// The link to the source is there.
    pub fn handle_link_up(&mut self, _now: Time) {
        self.link_up = true;
        self.accepted = false;
        self.control.clear();
        self.demands.clear();
        self.demanded.clear();
        if self.phase == TargetPhase::Incoming {
            self.offer = None;
        }
    }

    /// The link to the source broke.
    pub fn handle_link_down(&mut self, _now: Time) {
        self.link_up = false;
        self.accepted = false;
        self.control.clear();
        self.demands.clear();
        if self.phase == TargetPhase::Incoming {
            self.offer = None;
        }
    }

    /// A message of the source.
    pub fn handle_message(&mut self, now: Time, message: Message) {
        match message {
            Message::Open(open) => self.handle_open(&open),
            Message::Cancel => self.handle_cancelled(),
            Message::Finished => self.handle_finished(),
            _ if !self.accepted => self.protocol_error("a message before Open"),
            Message::Blocks(blocks) => self.handle_blocks(now, blocks),
            Message::MissingPart { epoch, part, set } => self.handle_part(epoch, part, &set),
            Message::Switch {
                epoch,
                parts,
                missing_blocks,
                stale,
            } => {
                self.arrivals.drop_stale(&stale.0);
                self.handle_switch(epoch, parts, missing_blocks);
            }
            Message::CancelSwitch { epoch } => self.handle_cancel_switch(epoch),
            Message::Failed(error) => self.note(format!("the source reports: {error}")),
            _ => self.protocol_error("a message that is not for a target"),
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Apply`]: written, or why not.
    pub fn handle_applied(&mut self, now: Time, id: ApplyId, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                for range in self.arrivals.applied(now, id) {
                    self.demanded.remove_range(range);
                }
            }
            Err(error) if self.phase.owns() => {
                self.note(format!(
                    "cannot write fetched blocks, trying again: {error}"
                ));
                self.arrivals.retry_later(id);
            }
            Err(error) => {
                self.arrivals.forget(id);
                self.fail_disk("write", &error);
            }
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Sync`].
    pub fn handle_synced(&mut self, now: Time, id: SyncId, result: Result<(), DiskError>) {
        match (self.arrivals.synced(now, id, result.is_ok()), result) {
            (Some(seqs), Ok(())) => self.to_source(Message::Durable {
                seqs: SeqRuns(seqs),
            }),
            (_, Err(error)) if self.phase.owns() => {
                self.note(format!(
                    "cannot make fetched blocks durable, trying again: {error}"
                ));
            }
            (_, Err(error)) => self.fail_disk("sync", &error),
            (None, Ok(())) => {}
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::BecomeOwner`].
    pub fn handle_owner(&mut self, now: Time, epoch: Epoch, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                self.epoch = Some(epoch);
                self.last_arrival = now;
                self.offer = None;
                self.set_phase(TargetPhase::PostCopy);
                self.events.push_back(TargetEvent::Arrived(epoch));
                self.to_source(Message::SwitchDone { epoch });
                for blocks in std::mem::take(&mut self.held) {
                    self.apply(blocks);
                }
            }
            Err(error) => {
                self.note(format!("cannot take the volume over: {error}"));
                self.refuse(epoch);
            }
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Refuse`].
    pub fn handle_refused(&mut self, now: Time, epoch: Epoch, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                self.refused = self.refused.max(Some(epoch));
                self.set_phase(TargetPhase::Incoming);
                self.held.clear();
                self.to_source(Message::SwitchRefused { epoch });
            }
            // Without a durable refusal nothing may be said; the source waits and a person sees why.
            Err(error) => self.note(format!("cannot record the refusal: {error}")),
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Complete`].
    pub fn handle_completed(&mut self, now: Time, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                self.set_phase(TargetPhase::Complete);
                self.events.push_back(TargetEvent::Completed);
                self.to_source(Message::Report(self.report));
                self.to_source(Message::Complete);
            }
            Err(error) => {
                self.note(format!("cannot record completion, trying again: {error}"));
                self.set_phase(TargetPhase::PostCopy);
                // Tried again at the next tick.
                self.next_tick = self.next_tick.max(now + TICK);
                return;
            }
        }
        self.advance(now);
    }

    /// A guest waits for these blocks, or they were asked for by `AskForMissing`.
    pub fn handle_fault(&mut self, now: Time, range: BlockRange) {
        for block in range.intersect(self.config.size.all_blocks()).iter() {
            if self.demanded.insert(block) {
                match self.demands.back_mut() {
                    Some(last) if last.end == block.0 => last.end += 1,
                    _ => self.demands.push_back(BlockRange::single(block)),
                }
            }
        }
        self.advance(now);
    }

    /// How many blocks are missing now; call it after every change that an `Apply` or a guest made.
    pub fn handle_missing(&mut self, now: Time, blocks: u64) {
        self.report.missing_blocks = blocks;
        self.advance(now);
    }

    /// Blocks that the guest has overwritten before they came.
    pub fn handle_overwritten(&mut self, now: Time, blocks: &BlockSet) {
        for run in blocks.runs() {
            self.demanded.remove_range(run);
        }
        let runs: Vec<_> = blocks.runs().collect();
        for part in runs.chunks(limits::MAX_RUNS_PER_MESSAGE / 4) {
            self.to_source(Message::Unneeded {
                runs: Runs::new(part.iter().copied()),
            });
        }
        self.advance(now);
    }

    /// What the guest has read here since the switch, and how many of the reads touched a missing block.
    pub fn handle_guest_stats(&mut self, now: Time, reads: u64, reads_missed: u64) {
        self.report.guest_reads = reads;
        self.report.guest_reads_missed = reads_missed;
        self.advance(now);
    }

    /// Ends the migration from this side, if the volume is not owned here.
    pub fn handle_cancel(&mut self, now: Time) {
        match self.phase {
            TargetPhase::Incoming => {
                self.fail(WireError::new(
                    ErrorCode::CANCELLED,
                    "cancelled at the target",
                ));
            }
            TargetPhase::Switching | TargetPhase::Refusing => {
                self.note("the hand-over is under way; cancel at the source");
            }
            _ => self.note("the volume is owned here; there is nothing to cancel"),
        }
        self.advance(now);
    }

    /// The time of `poll_timeout` has come.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.tick(now);
        }
        self.advance(now);
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// The most urgent message of a class that the link has room for.
    pub fn poll_transmit(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        if !self.link_up {
            return None;
        }
        if has_room(Class::Fault) && self.accepted && !self.demands.is_empty() {
            let mut runs: Vec<_> = self.demands.drain(..self.demands.len().min(64)).collect();
            runs.sort_unstable();
            return Some((
                Class::Fault,
                Message::Demand {
                    runs: Runs::new(runs),
                },
            ));
        }
        if !has_room(Class::Control) {
            return None;
        }
        // What is durable must be acknowledged first, and `Accept` comes before everything.
        if self.accepted
            && !matches!(self.control.front(), Some(Message::Accept(_)))
            && let Some(seqs) = self.arrivals.take_acks()
        {
            return Some((
                Class::Control,
                Message::Ack {
                    seqs: SeqRuns(seqs),
                },
            ));
        }
        Some((Class::Control, self.control.pop_front()?))
    }

    /// The next thing to tell.
    pub fn poll_event(&mut self) -> Option<TargetEvent> {
        self.events.pop_front()
    }

    /// When to call `handle_timeout`.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if self.is_final() {
            return None;
        }
        Some(
            self.arrivals
                .sync_due()
                .map_or(self.next_tick, |due| due.min(self.next_tick)),
        )
    }

    // ---- what follows from the inputs ---------------------------------------------------------

    fn advance(&mut self, now: Time) {
        if self.phase == TargetPhase::Switching
            && self.arrivals.is_idle()
            && let Some(offer) = self.offer.take_if(|offer| offer.whole)
        {
            let missing = offer.missing;
            self.report.missing_blocks = missing.count();
            self.actions.push_back(TargetAction::BecomeOwner {
                epoch: offer.epoch,
                missing,
            });
        }
        self.consider_complete();
        if let Some(id) = self.arrivals.begin_sync(now) {
            self.actions.push_back(TargetAction::Sync(id));
        }
    }

    fn consider_complete(&mut self) {
        if self.phase == TargetPhase::PostCopy
            && self.report.missing_blocks == 0
            && self.arrivals.is_idle()
            && let Some(epoch) = self.epoch
        {
            self.set_phase(TargetPhase::Completing);
            self.actions.push_back(TargetAction::Complete { epoch });
        }
    }

    fn tick(&mut self, now: Time) {
        for (id, blocks) in self.arrivals.take_retries() {
            self.actions.push_back(TargetAction::Apply { id, blocks });
        }
        if self.phase != TargetPhase::PostCopy || !self.accepted {
            return;
        }
        if self.report != self.reported {
            self.reported = self.report;
            self.to_source(Message::Report(self.report));
        }
        if self.report.missing_blocks > 0 && now.since(self.last_arrival) >= IDLE_BEFORE_ASKING {
            self.last_arrival = now;
            self.demanded.clear();
            self.actions.push_back(TargetAction::AskForMissing {
                blocks: IDLE_ASK_BLOCKS,
            });
        }
    }

    /// Queues a message; without a link it is made again from the phase once there is one.
    fn to_source(&mut self, message: Message) {
        if self.accepted {
            self.control.push_back(message);
        }
    }

    fn stage(&self) -> TargetStage {
        match (self.phase, self.epoch) {
            (TargetPhase::PostCopy | TargetPhase::Completing, Some(epoch)) => {
                TargetStage::Owner(epoch)
            }
            (TargetPhase::Complete, Some(epoch)) => TargetStage::Complete(epoch),
            _ => TargetStage::Incoming,
        }
    }

    fn handle_open(&mut self, open: &Open) {
        if open.size != self.config.size {
            return self.protocol_error("the size of the volume has changed");
        }
        self.arrivals.open(open.incarnation, open.oldest_unacked);
        self.accepted = true;
        self.control.push_back(Message::Accept(Accept {
            incarnation: self.config.incarnation,
            received: SeqRuns(self.arrivals.received().clone()),
            stage: self.stage(),
        }));
        let durable = self.arrivals.durable().clone();
        if !durable.is_empty() {
            self.control.push_back(Message::Durable {
                seqs: SeqRuns(durable),
            });
        }
        if self.phase.owns() {
            self.actions.push_back(TargetAction::RequeueFaults);
        } else if matches!(open.stage, SourceStage::Released(_)) {
            self.note(
                "the source says that this site owns the volume, but the record here does not",
            );
        }
    }

    fn handle_blocks(&mut self, now: Time, blocks: Blocks) {
        if blocks
            .ranges()
            .any(|range| range.end > self.config.size.blocks())
        {
            return self.protocol_error("blocks beyond the volume");
        }
        self.last_arrival = now;
        match self.phase {
            TargetPhase::Incoming | TargetPhase::PostCopy => {
                if self.arrivals.receive(blocks.seq) {
                    self.apply(blocks);
                }
            }
            TargetPhase::Switching | TargetPhase::Refusing => {
                if self.arrivals.receive(blocks.seq) {
                    self.held.push(blocks);
                }
            }
            // Nothing is missing, so nothing is needed.
            TargetPhase::Completing | TargetPhase::Complete => {}
            TargetPhase::Cancelled | TargetPhase::Failed => {}
        }
    }

    fn apply(&mut self, blocks: Blocks) {
        let id = self.arrivals.begin(blocks.clone());
        self.actions.push_back(TargetAction::Apply { id, blocks });
    }

    fn offer_of(&mut self, epoch: Epoch) -> &mut Offer {
        let blocks = self.config.size.blocks();
        let fresh = || Offer {
            epoch,
            parts: 0,
            missing: BlockSet::new(blocks),
            whole: false,
        };
        let offer = self.offer.get_or_insert_with(fresh);
        if offer.epoch != epoch {
            *offer = fresh();
        }
        offer
    }

    fn handle_part(&mut self, epoch: Epoch, part: u32, set: &SetPart) {
        if self.phase != TargetPhase::Incoming {
            return;
        }
        let offer = self.offer_of(epoch);
        let fits = offer.parts == part && set.add_to(&mut offer.missing);
        offer.parts += 1;
        if !fits {
            self.offer = None;
            self.protocol_error("parts of the missing set out of order or beyond the volume");
        }
    }

    fn handle_switch(&mut self, epoch: Epoch, parts: u32, missing_blocks: u64) {
        if self.phase.owns() {
            if self.epoch == Some(epoch) {
                self.to_source(Message::SwitchDone { epoch });
            }
            return;
        }
        if self.refused >= Some(epoch) {
            return self.to_source(Message::SwitchRefused { epoch });
        }
        if self.phase != TargetPhase::Incoming {
            // Taking over already; the answer comes when it is done.
            return;
        }
        let offer = self.offer_of(epoch);
        if offer.parts != parts || offer.missing.count() != missing_blocks {
            self.offer = None;
            self.protocol_error("an incomplete set of missing blocks");
            return;
        }
        offer.whole = true;
        self.set_phase(TargetPhase::Switching);
    }

    fn handle_cancel_switch(&mut self, epoch: Epoch) {
        match self.phase {
            TargetPhase::PostCopy | TargetPhase::Completing | TargetPhase::Complete => {
                self.to_source(Message::SwitchDone { epoch });
            }
            TargetPhase::Switching if self.offer.is_none() => {
                // The driver is making it durable; whichever way that ends is the answer.
            }
            TargetPhase::Incoming | TargetPhase::Switching => self.refuse(epoch),
            TargetPhase::Refusing | TargetPhase::Cancelled | TargetPhase::Failed => {}
        }
    }

    fn refuse(&mut self, epoch: Epoch) {
        self.offer = None;
        self.set_phase(TargetPhase::Refusing);
        self.actions.push_back(TargetAction::Refuse { epoch });
    }

    fn handle_cancelled(&mut self) {
        match self.phase {
            TargetPhase::Incoming => {
                self.set_phase(TargetPhase::Cancelled);
                self.events.push_back(TargetEvent::Cancelled);
                self.actions.push_back(TargetAction::Discard);
            }
            TargetPhase::Cancelled | TargetPhase::Failed => {}
            // A source that offered ownership has to ask with CancelSwitch first.
            _ => self.protocol_error("a cancellation after the offer of ownership"),
        }
    }

    fn handle_finished(&mut self) {
        if self.phase == TargetPhase::Complete {
            self.finished = true;
        }
    }

    fn fail_disk(&mut self, what: &str, error: &DiskError) {
        let code = if error.no_space {
            ErrorCode::NO_SPACE
        } else {
            ErrorCode::DISK
        };
        self.fail(WireError::new(
            code,
            format!("the target cannot {what} the image: {error}"),
        ));
    }

    /// Ends the migration, which must not own the volume.
    fn fail(&mut self, error: WireError) {
        match self.phase {
            TargetPhase::Incoming => {
                self.to_source(Message::Failed(error.clone()));
                self.set_phase(TargetPhase::Failed);
                self.events.push_back(TargetEvent::Failed(error));
                self.actions.push_back(TargetAction::Discard);
            }
            TargetPhase::Switching => {
                self.note(format!("refusing to take the volume over: {error}"));
                if let Some(offer) = self.offer.take() {
                    self.refuse(offer.epoch);
                }
            }
            _ => self.note(format!("{error}")),
        }
    }

    fn protocol_error(&mut self, what: &str) {
        let text = format!("the source sent something that makes no sense here: {what}");
        if self.phase == TargetPhase::Incoming && self.accepted {
            self.fail(WireError::new(ErrorCode::PROTOCOL, text));
        } else {
            self.note(text);
        }
    }
}
