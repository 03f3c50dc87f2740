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
//! * **Sealed**: an increment of a replica ended here, see `sealing`; nothing was handed over.
//! * **PostCopy**: the guest runs here. Faults are demanded from the source, arriving content is written
//!   where the guest has not written itself (the volume decides). Nothing ends it but the last block.
//! * **Completing**: all is present, and being made durable.
//!
//! Every message with content is acknowledged twice: when it is written, and when it is durable.

mod arrivals;
mod handover;
mod sealing;
mod seeding;
mod types;

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use flimcd_core::{BlockRange, BlockSet, Epoch, Seq, SeqSet, Time, VolumeLayout, limits};
use flimcd_wire::{
    Accept, Blocks, Class, ErrorCode, MAX_TOUCHED, Message, Open, Probe, Probed, Runs, SeqRuns,
    SourceStage, TargetReport, TargetStage, WireError,
};

use crate::DiskError;
use arrivals::Arrivals;
use handover::Offer;
use sealing::Sealing;
use seeding::Seeding;
pub use types::{
    ApplyId, SeedChoice, SyncId, TargetAction, TargetConfig, TargetEvent, TargetPhase, TargetStart,
};

/// Content that is written is made durable at least this often.
const SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// And after this much of it.
const SYNC_BYTES: u64 = 32 << 20;
/// How often the source hears how the guest fares, and whether anything got lost is looked at.
const TICK: Duration = Duration::from_millis(250);
/// Nothing has arrived for so long although blocks are missing: ask for some.
const IDLE_BEFORE_ASKING: Duration = Duration::from_secs(2);
/// Probes that are looked into at once; a source has far fewer.
const PROBES_MAX: usize = 8192;
/// What the guest reads is told after so long: a stream of reads is one message then, and its next steps still come in time.
const TOUCHED_INTERVAL: Duration = Duration::from_millis(10);
/// How many blocks are asked for then.
const IDLE_ASK_BLOCKS: u64 = 256;

/// The target machine. The contract of its driver stands in the crate's documentation.
pub struct TargetMachine {
    config: TargetConfig,
    phase: TargetPhase,
    epoch: Option<Epoch>,
    refused: Option<Epoch>,
    /// Could not be recorded as refused; tried again at the next tick.
    refuse_again: Option<Epoch>,
    /// The source has confirmed that it needs nothing more.
    finished: bool,
    link_up: bool,
    /// `Accept` was sent on this link.
    accepted: bool,
    arrivals: Arrivals,
    /// Content that came while the volume was being taken over.
    held: Vec<Blocks>,
    offer: Option<Offer>,
    sealing: Sealing,
    seeding: Seeding,
    /// Probes of this link that are not answered.
    probes: BTreeSet<Seq>,
    vm_is_ready: bool,
    /// The source was restarted; it is answered when nothing of its last run is being written.
    waiting_open: Option<Open>,
    /// Faults that were sent to the source and whose blocks are not here.
    demanded: BlockSet,
    demands: VecDeque<BlockRange>,
    /// What the guest has read and the source has not been told, and when it is to be.
    touched: Vec<BlockRange>,
    touched_due: Option<Time>,
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
            demanded: BlockSet::new(config.size.blocks()),
            config,
            phase: TargetPhase::Incoming,
            epoch: None,
            refused: None,
            refuse_again: None,
            finished: false,
            link_up: false,
            accepted: false,
            arrivals: Arrivals::default(),
            held: Vec::new(),
            offer: None,
            sealing: Sealing::default(),
            seeding: Seeding::default(),
            probes: BTreeSet::new(),
            vm_is_ready: false,
            waiting_open: None,
            demands: VecDeque::new(),
            touched: Vec::new(),
            touched_due: None,
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
            TargetPhase::Sealed => true,
            TargetPhase::Cancelled | TargetPhase::Failed => self.refuse_again.is_none(),
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
        self.seeding.reset();
        self.probes.clear();
        self.touched.clear();
        self.touched_due = None;
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
        self.waiting_open = None;
        self.control.clear();
        self.seeding.reset();
        self.probes.clear();
        self.touched.clear();
        self.touched_due = None;
        self.demands.clear();
        if self.phase == TargetPhase::Incoming {
            self.offer = None;
        }
    }

    /// A message of the source.
    pub fn handle_message(&mut self, now: Time, message: Message) {
        match message {
            Message::Open(open) => self.handle_open(open),
            Message::Cancel => self.handle_cancelled(),
            Message::Finished => self.handle_finished(),
            // Follows an Open that may not be answered yet.
            Message::SeedAsk { sample, have } => self.handle_ask(sample, have),
            _ if !self.accepted => self.protocol_error("a message before Open"),
            Message::Blocks(blocks) => self.handle_blocks(now, blocks),
            Message::Probe(probe) => self.handle_probe(probe),
            Message::Seal(seal) => self.handle_seal(seal),
            Message::MissingPart { epoch, part, set } => self.handle_part(epoch, part, &set),
            Message::Switch {
                epoch,
                parts,
                missing_blocks,
                stale,
                in_flight,
            } => {
                self.arrivals.drop_stale(&stale.0);
                self.handle_switch(epoch, parts, missing_blocks, &in_flight.0);
            }
            Message::Heat(part) => self.actions.push_back(TargetAction::KeepHeat(part)),
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

    /// Answer to [`TargetAction::Apply`]: the seed does not hold what the message says. The source is asked for all of
    /// its blocks again, in full.
    pub fn handle_lacking(&mut self, now: Time, id: ApplyId) {
        if let Some((seq, ranges)) = self.arrivals.lacking(id) {
            let is_waited_for = ranges.iter().any(|range| self.demanded.intersects(*range));
            // The offer was made as if they had arrived.
            if let Some(offer) = self.offer.as_mut().filter(|offer| offer.whole) {
                for range in ranges {
                    offer.missing.insert_range(range);
                }
            }
            self.tell_source(Message::Lacking { seq, is_waited_for });
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::ChooseSeed`]: what was chosen, if anything.
    pub fn handle_seed(&mut self, now: Time, choice: Option<SeedChoice>) {
        self.answer_ask(choice);
        self.advance(now);
    }

    /// Answer to [`TargetAction::Probe`].
    pub fn handle_probed(&mut self, now: Time, probed: Probed) {
        if self.probes.remove(&probed.seq) {
            self.tell_source(Message::Probed(probed));
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Sync`].
    pub fn handle_synced(&mut self, now: Time, id: SyncId, result: Result<(), DiskError>) {
        match (self.arrivals.synced(now, id, result.is_ok()), result) {
            (Some(seqs), Ok(())) => self.tell_source(Message::Durable {
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

    /// Whether the machine that the volume belongs to has its running state and could go on here. Matters with
    /// [`TargetConfig::waits_for_vm`] only, and only until the volume is owned: an offer waits for it, and
    /// may be taken back while it does.
    pub fn handle_vm_ready(&mut self, now: Time, is_ready: bool) {
        self.vm_is_ready = is_ready;
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
                self.tell_source(Message::SwitchDone { epoch });
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
                if self.phase == TargetPhase::Refusing {
                    self.set_phase(TargetPhase::Incoming);
                    self.held.clear();
                }
                self.tell_source(Message::SwitchRefused { epoch });
            }
            // Without a durable refusal nothing may be said; the source waits and a person sees why.
            Err(error) => {
                self.note(format!("cannot record the refusal, trying again: {error}"));
                self.refuse_again = Some(epoch);
            }
        }
        self.advance(now);
    }

    /// Answer to [`TargetAction::Complete`].
    pub fn handle_completed(&mut self, now: Time, result: Result<(), DiskError>) {
        match result {
            Ok(()) => {
                self.set_phase(TargetPhase::Complete);
                self.events.push_back(TargetEvent::Completed);
                self.tell_source(Message::Report(self.report));
                self.tell_source(Message::Complete);
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

    /// What the guest has read since the switch, whether it was there or not, in order of time. Advice: some may be left out,
    /// and some are not passed on.
    pub fn handle_reads(&mut self, now: Time, reads: &[BlockRange]) {
        if self.phase != TargetPhase::PostCopy || !self.accepted {
            return;
        }
        for &read in reads {
            let is_full = self.touched.len() >= MAX_TOUCHED;
            match self.touched.last_mut() {
                Some(last) if last.end == read.start => last.end = read.end,
                _ if is_full => {}
                _ => self.touched.push(read),
            }
        }
        if !self.touched.is_empty() {
            self.touched_due.get_or_insert(now + TOUCHED_INTERVAL);
        }
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
            self.tell_source(Message::Unneeded {
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
        if self.touched_due.is_some_and(|due| due <= now) {
            self.touched_due = None;
            let reads = std::mem::take(&mut self.touched);
            self.tell_source(Message::Touched { reads });
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
        match self.control.pop_front() {
            Some(message) => Some((Class::Control, message)),
            // On the class of the offer, which it must not overtake.
            None => self.seeding.next_part().map(|part| (Class::Control, part)),
        }
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
        [self.arrivals.sync_due(), self.touched_due]
            .into_iter()
            .flatten()
            .chain([self.next_tick])
            .min()
    }

    // ---- what follows from the inputs ---------------------------------------------------------

    fn advance(&mut self, now: Time) {
        if self.arrivals.is_idle()
            && !self.sealing.is_busy
            && let Some(open) = self.waiting_open.take()
        {
            self.handle_open(open);
        }
        if self.phase == TargetPhase::Switching
            && self.arrivals.is_idle()
            && (self.vm_is_ready || !self.config.waits_for_vm)
            && let Some(offer) = self.offer.take_if(|offer| offer.whole)
        {
            let missing = offer.missing;
            self.report.missing_blocks = missing.count();
            self.actions.push_back(TargetAction::BecomeOwner {
                epoch: offer.epoch,
                missing,
            });
        }
        self.consider_seal();
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
        for blocks in self.arrivals.take_retries() {
            self.apply(blocks);
        }
        if let Some(epoch) = self.refuse_again.take() {
            self.actions.push_back(TargetAction::Refuse { epoch });
        }
        if self.phase != TargetPhase::PostCopy || !self.accepted {
            return;
        }
        if self.report != self.reported {
            self.reported = self.report;
            self.tell_source(Message::Report(self.report));
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
    fn tell_source(&mut self, message: Message) {
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
            // Of an increment only that it is complete matters.
            (TargetPhase::Sealed, _) => TargetStage::Complete(Epoch::FIRST),
            _ => TargetStage::Incoming,
        }
    }

    fn handle_open(&mut self, open: Open) {
        if matches!(self.phase, TargetPhase::Cancelled | TargetPhase::Failed) {
            let text = "this migration has ended at the target; start a new one";
            let error = WireError::new(ErrorCode::CANCELLED, text);
            // A source that has offered the volume needs more than words: it may ask for it back now.
            if matches!(open.stage, SourceStage::Prepared(_)) {
                self.accept(SeqSet::new());
            }
            return self.control.push_back(Message::Failed(error));
        }
        let layout = VolumeLayout::new(open.volumes.iter().map(|volume| volume.size));
        if layout.map(|layout| layout.size()) != Ok(self.config.size) {
            return self.protocol_error("the size of the volume has changed");
        }
        // Nor may anything of another run arrive while a copy of this one is made durable.
        if self.sealing.is_busy || self.arrivals.must_wait_for(open.incarnation) {
            self.waiting_open = Some(open);
            return;
        }
        if self.arrivals.open(open.incarnation, open.oldest_unacked) {
            // Numbers of the source's last run mean nothing any more, and it sends their content again.
            self.held.clear();
        }
        for blocks in &self.held {
            self.arrivals.not_yet(blocks.seq);
        }
        self.accept(self.arrivals.received().clone());
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

    fn accept(&mut self, received: SeqSet) {
        self.accepted = true;
        self.control.push_back(Message::Accept(Accept {
            incarnation: self.config.incarnation,
            received: SeqRuns(received),
            stage: self.stage(),
            bases: self.config.bases.clone(),
        }));
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
                if self.arrivals.receive(&blocks) {
                    self.apply(blocks);
                }
            }
            TargetPhase::Switching | TargetPhase::Refusing => {
                if self.arrivals.receive(&blocks) {
                    self.held.push(blocks);
                }
            }
            // Nothing is missing, so nothing is needed.
            TargetPhase::Completing | TargetPhase::Complete => {}
            TargetPhase::Cancelled | TargetPhase::Failed | TargetPhase::Sealed => {}
        }
    }

    fn handle_probe(&mut self, probe: Probe) {
        if probe
            .blocks
            .iter()
            .any(|run| run.end > self.config.size.blocks())
        {
            return self.protocol_error("a question about blocks beyond the volume");
        }
        let is_wanted = matches!(
            self.phase,
            TargetPhase::Incoming | TargetPhase::Switching | TargetPhase::PostCopy
        );
        if is_wanted && self.probes.len() < PROBES_MAX {
            self.probes.insert(probe.seq);
            self.actions.push_back(TargetAction::Probe(probe));
        } else {
            self.tell_source(Message::Probed(Probed {
                seq: probe.seq,
                had: Runs::default(),
                same_place: 0,
                repeated: 0,
            }));
        }
    }

    fn apply(&mut self, blocks: Blocks) {
        let id = self.arrivals.begin(blocks.clone());
        self.actions.push_back(TargetAction::Apply { id, blocks });
    }

    fn handle_finished(&mut self) {
        if self.phase == TargetPhase::Complete {
            self.finished = true;
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
