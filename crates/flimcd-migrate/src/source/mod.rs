//! The source's side of a migration.
//!
//! ```text
//!  Connecting ─► PreCopy ─► Stopping ─► [Draining] ─► Preparing ─► Switching ─► PostCopy ─► Retiring ─► Completed
//!      │            │           │            │             │            │
//!      └────────────┴───────────┴────────────┴──── cancel or failure ───┴─► Returning ─► Cancelled / Failed
//! ```
//! * **Connecting**: the target has not answered yet. **PreCopy**: content goes over as the policy
//!   chooses, the guest runs. Ready when the policy says so; goes on when the switch is also granted.
//! * **Stopping**: the volume refuses new guest I/O and drains (`Freeze`). **Draining**: only for policies
//!   without post-copy, sends the rest while the guest stands.
//! * **Preparing**: `Prepared` is being made durable. **Switching**: the target was told to take over.
//!   From here on the guest comes back to the source only if the target durably refuses.
//! * **PostCopy**: the target owns the volume; the source pushes and answers demands from the frozen
//!   image. **Retiring**: the target has everything.
//! * **Returning**: the migration ends here, as soon as the record says so durably. A guest that was
//!   stopped for the switch runs again only then: otherwise a crash would bring the offer back, and with it
//!   a target that takes over without what the guest wrote since.
//!
//! With a sample of the volume's chunks ([`SourceMachine::set_sample`]) the machine asks what the target has at the same place;
//! see `seeding`.
//!
//! A link that breaks changes no phase. After `handle_link_up` the machine sends `Open` and nothing else until
//! the target's `Accept` says what it has.

mod base;
mod flights;
mod handover;
mod probing;
mod sealing;
mod seeding;
mod send;
mod types;

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use flimcd_core::{BlockRange, BlockSet, Epoch, Heat, Seq, Time};
use flimcd_wire::{
    Accept, Blocks, Class, Entry, ErrorCode, HeatPart, Message, Open, Probe, SampleChunk,
    SourceStage, TargetStage, WireError,
};

use crate::{
    DiskError, LinkEstimate,
    policy::{HeatMaps, Policy, View},
};
use base::Lacking;
use flights::Flights;
use probing::Probing;
pub use sealing::SealLimits;
use sealing::Sealing;
use seeding::Seeding;
pub use types::{
    ContentCount, SourceAction, SourceConfig, SourceEvent, SourcePhase, SourceProgress,
    SourceRecord, SourceStart, Switchover,
};

/// How often the policy is asked whether to switch while nothing else happens.
const TICK: Duration = Duration::from_millis(50);
/// Wait before something that failed after the switch is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The source machine. The contract of its driver stands in the crate's documentation.
pub struct SourceMachine {
    config: SourceConfig,
    /// Where each volume lies.
    places: Vec<BlockRange>,
    policy: Box<dyn Policy>,
    phase: SourcePhase,
    /// Lacking at the target, not in flight. Together with `flights` all that is left to send.
    pending: BlockSet,
    flights: Flights,
    seeding: Seeding,
    probing: Probing,
    /// Until the target has said what stands there.
    lacking: Option<Lacking>,
    heat: HeatMaps,
    /// What was hot, for the target.
    heat_parts: VecDeque<HeatPart>,
    /// Of the guest's writes, as the driver was last told.
    write_limit: Option<u64>,
    link: LinkState,
    estimate: LinkEstimate,
    target_incarnation: Option<u64>,
    switchover: Switchover,
    cancel: Cancel,
    /// Of an increment of a replica.
    sealing: Option<Sealing>,
    /// Content of flights that the link has not taken.
    urgent: VecDeque<Blocks>,
    prefetched: VecDeque<Blocks>,
    bulk: VecDeque<Blocks>,
    control: VecDeque<Message>,
    actions: VecDeque<SourceAction>,
    events: VecDeque<SourceEvent>,
    next_tick: Option<Time>,
    /// Reading failed; not before this time again.
    read_retry: Option<Time>,
    /// The guest is stopped, and has to be served again once the record allows it.
    thaw_due: bool,
    /// The record could not be written; not before this time again.
    persist_retry: Option<(Time, SourceRecord)>,
    progress: SourceProgress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    Down,
    /// `Open` was sent.
    Opening,
    Accepted,
}

/// Why the migration should end before the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cancel {
    No,
    Asked,
    Error(WireError),
}

impl SourceMachine {
    /// A machine at its beginning, with the link down.
    ///
    /// # Panics
    /// When the set of blocks is not of the volume's size.
    #[must_use]
    pub fn new(
        config: SourceConfig,
        policy: Box<dyn Policy>,
        start: SourceStart,
        now: Time,
    ) -> Self {
        let (stage, pending, lacking) = match start {
            SourceStart::Fresh { data, changed } => {
                let pending = data.clone();
                (SourceStage::Owner, pending, Some(Lacking { data, changed }))
            }
            SourceStart::Resume { stage, unacked } => (stage, unacked, None),
        };
        let blocks = config.size.blocks();
        assert_eq!(pending.capacity(), blocks, "the set is of another volume");
        let bytes_per_block = if policy.compress() { 2048.0 } else { 4096.0 };
        let mut machine = Self {
            progress: SourceProgress {
                blocks_total: pending.count(),
                bytes_per_block,
                ..SourceProgress::default()
            },
            phase: SourcePhase::Connecting,
            pending,
            flights: Flights::new(blocks),
            seeding: Seeding::new(),
            probing: Probing::default(),
            lacking,
            heat: HeatMaps::new(config.size, now),
            heat_parts: VecDeque::new(),
            write_limit: None,
            link: LinkState::Down,
            estimate: LinkEstimate::default(),
            target_incarnation: None,
            switchover: Switchover::Wait,
            cancel: Cancel::No,
            sealing: None,
            urgent: VecDeque::new(),
            prefetched: VecDeque::new(),
            bulk: VecDeque::new(),
            control: VecDeque::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
            next_tick: Some(now + TICK),
            read_retry: None,
            thaw_due: false,
            persist_retry: None,
            places: base::places(&config),
            config,
            policy,
        };
        match stage {
            SourceStage::Prepared(_) => machine.set_phase(SourcePhase::Switching),
            SourceStage::Released(_) => machine.enter_post_copy(now),
            SourceStage::Invalid | SourceStage::Owner => {}
        }
        machine
    }

    /// Chunks of the volume, drawn at random among those with data, by which the target recognises an image that has
    /// much of it at the same place. To be called before the first link-up, if at all; a policy that sends everything does not ask.
    pub fn set_sample(&mut self, sample: Vec<SampleChunk>) {
        if self.policy.uses_library() {
            self.seeding.set_sample(sample);
        }
    }

    /// What was hot before the migration, over minutes ([`LONG_HALF_LIFE`](crate::LONG_HALF_LIFE)). To be called before the first
    /// link-up, if at all.
    pub fn set_heat(&mut self, reads: &Heat, writes: &Heat) {
        self.heat.warm_up(reads, writes);
    }

    /// What is hot: reads and writes over minutes.
    #[must_use]
    pub fn heat(&self) -> &HeatMaps {
        &self.heat
    }

    /// The epoch that the target is to own.
    fn offered_epoch(&self) -> Epoch {
        self.config.epoch.next()
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        let blocks_left = self.pending.count() + self.flights.blocks().count();
        SourceProgress {
            blocks_left,
            ..self.progress
        }
    }

    /// Bytes of memory of all its sets.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.pending.memory_bytes()
            + self.flights.blocks().memory_bytes()
            + self.lacking.as_ref().map_or(0, Lacking::memory_bytes)
            + self.heat.memory_bytes()
            + self.seeding.memory_bytes()
    }

    /// Lets the policy look at the machine.
    fn with_policy<R>(
        &mut self,
        now: Time,
        ask: impl FnOnce(&mut dyn Policy, &View<'_>) -> R,
    ) -> R {
        let view = View {
            now,
            size: self.config.size,
            pending: &self.pending,
            in_flight_blocks: self.flights.blocks().count(),
            heat: &self.heat,
            link: self.estimate,
            bytes_per_block: self.progress.bytes_per_block,
        };
        ask(&mut *self.policy, &view)
    }

    fn set_phase(&mut self, phase: SourcePhase) {
        tracing::debug!(migration = %self.config.migration, from = ?self.phase, to = ?phase, "phase");
        self.phase = phase;
        self.events.push_back(SourceEvent::Phase(phase));
    }

    fn note(&mut self, text: impl Into<String>) {
        self.events.push_back(SourceEvent::Note(text.into()));
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// The link to the target is there.
    pub fn handle_link_up(&mut self, now: Time) {
        self.control.clear();
        self.link = LinkState::Opening;
        let stage = match self.phase {
            SourcePhase::Switching => SourceStage::Prepared(self.offered_epoch()),
            SourcePhase::PostCopy | SourcePhase::Retiring | SourcePhase::Completed => {
                SourceStage::Released(self.offered_epoch())
            }
            _ => SourceStage::Owner,
        };
        if matches!(self.phase, SourcePhase::Cancelled | SourcePhase::Failed) {
            self.control.push_back(Message::Cancel);
        } else if self.phase != SourcePhase::Returning {
            self.control.push_back(Message::Open(Open {
                volumes: self.config.volumes.clone(),
                session: self.config.session,
                epoch: self.config.epoch,
                incarnation: self.config.incarnation,
                oldest_unacked: self.flights.oldest_unacked(),
                stage,
            }));
            if !matches!(self.phase, SourcePhase::Retiring | SourcePhase::Completed) {
                self.control.extend(self.seeding.ask(now));
            }
        }
        self.advance(now);
    }

    /// The link to the target broke.
    pub fn handle_link_down(&mut self, _now: Time) {
        self.link = LinkState::Down;
        self.control.clear();
        self.give_probes_up();
        self.forget_ended();
    }

    /// A message of the target.
    pub fn handle_message(&mut self, now: Time, message: Message) {
        match message {
            Message::Accept(accept) => self.handle_accept(now, &accept),
            Message::Ack { seqs } => self.handle_ack(&seqs.0),
            Message::Durable { seqs } => self.handle_durable(&seqs.0),
            Message::Demand { runs } => self.handle_demand(now, runs.iter()),
            Message::Touched { reads } => self.handle_touched(now, &reads),
            Message::Unneeded { runs } => self.handle_unneeded(runs.iter()),
            Message::SwitchDone { epoch } => self.handle_switch_done(now, epoch),
            Message::SwitchRefused { epoch } => self.handle_switch_refused(epoch),
            Message::Complete => self.handle_complete(now),
            Message::SeedOffer(offer) => {
                let chunks = self.config.size.chunks();
                if let Some(name) = self.seeding.offered(now, offer, chunks) {
                    self.events.push_back(SourceEvent::Seed(name));
                }
            }
            Message::SeedPart(part) => {
                if !self.seeding.part(now, &part) {
                    self.protocol_error("a part of a table that is larger than the volume");
                }
            }
            Message::Sealed(seal) => self.handle_sealed(seal),
            Message::Probed(probed) => self.handle_probed(probed),
            Message::Lacking { seq, is_waited_for } => self.handle_lacking(seq, is_waited_for),
            Message::Report(report) => self.progress.target = report,
            Message::Failed(error) => self.handle_failed(error),
            other => self.protocol_error(&format!("{} is not for a source", name_of(&other))),
        }
        self.advance(now);
    }

    /// Dirty marks that the driver drained from the volume.
    pub fn handle_dirtied(&mut self, now: Time, dirty: &BlockSet) {
        for run in dirty.runs() {
            self.heat.written(run, now);
            self.policy.on_dirtied(run);
            // What is pending already the target has not had.
            let mut at = run.start;
            while at < run.end {
                let next = self.pending.next_run(at, run.end);
                let next = next.unwrap_or(BlockRange::new(run.end, run.end));
                if at < next.start {
                    self.policy.on_outdated(BlockRange::new(at, next.start));
                }
                at = next.end;
            }
        }
        if let Some(lacking) = &mut self.lacking {
            lacking.dirtied(dirty);
        }
        self.flights.dirtied(dirty, &mut self.pending);
        self.advance(now);
    }

    /// Reads of the guest at the source, in order of time. Advice: some may be left out.
    pub fn handle_reads(&mut self, now: Time, reads: &[BlockRange]) {
        for &run in reads {
            self.heat.read(run, now);
            self.policy.on_read(now, run);
        }
    }

    /// Answer to [`SourceAction::Read`] or [`SourceAction::Pack`]: the packed content, or why there is none.
    pub fn handle_read(
        &mut self,
        now: Time,
        seq: Seq,
        result: Result<(Vec<Entry>, Bytes), DiskError>,
    ) {
        match result {
            Ok((entries, payload)) => self.queue(Blocks {
                seq,
                entries,
                payload,
            }),
            Err(error) => self.handle_read_error(now, seq, &error),
        }
        self.advance(now);
    }

    /// Answer to [`SourceAction::Read`] that is to ask: the blocks that are neither zero nor the same as in the seed.
    pub fn handle_examined(&mut self, now: Time, probe: Probe) {
        self.handle_probe(probe);
        self.advance(now);
    }

    /// Answer to [`SourceAction::Freeze`]: no guest I/O is in flight or let in; the last dirty marks.
    pub fn handle_frozen(&mut self, now: Time, dirty: &BlockSet) {
        self.flights.dirtied(dirty, &mut self.pending);
        self.handle_stopped();
        self.advance(now);
    }

    /// Answer to [`SourceAction::Persist`].
    pub fn handle_persisted(
        &mut self,
        now: Time,
        record: SourceRecord,
        result: Result<(), DiskError>,
    ) {
        self.handle_record(now, record, result);
        self.advance(now);
    }

    /// What the link measures.
    pub fn handle_estimate(&mut self, now: Time, estimate: LinkEstimate) {
        self.estimate = estimate;
        self.advance(now);
    }

    /// The guest may be stopped: somebody asked, or no guest is connected.
    pub fn handle_switchover(&mut self, now: Time, when: Switchover) {
        self.switchover = self.switchover.max(when);
        self.advance(now);
    }

    /// Ends the migration if the switch has not been made.
    pub fn handle_cancel(&mut self, now: Time) {
        self.end_early(Cancel::Asked);
        self.advance(now);
    }

    /// The time of `poll_timeout` has come.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.next_tick.is_some_and(|at| at <= now) {
            self.next_tick = (!self.phase.is_final()).then(|| now + TICK);
            self.heat.decay(now);
            self.consider_writes(now);
        }
        if let Some((_, record)) = self.persist_retry.take_if(|(at, _)| *at <= now) {
            self.persist(record);
        }
        self.advance(now);
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// The most urgent message of a class that the link has room for.
    pub fn poll_transmit(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        if self.link == LinkState::Down {
            return None;
        }
        if has_room(Class::Control)
            && let Some(message) = self.control.pop_front()
        {
            return Some((Class::Control, message));
        }
        if self.link != LinkState::Accepted {
            return None;
        }
        let holds = self.seeding.holds();
        if !holds
            && has_room(Class::Bulk)
            && let Some(part) = self.heat_parts.pop_front()
        {
            return Some((Class::Bulk, Message::Heat(part)));
        }
        [Class::Fault, Class::Prefetch, Class::Bulk]
            .into_iter()
            .filter(|&class| class == Class::Fault || !holds)
            .filter(|&class| has_room(class))
            .find_map(|class| {
                self.next_content(class)
                    .map(|blocks| (class, Message::Blocks(blocks)))
            })
    }

    /// The next thing to tell.
    pub fn poll_event(&mut self) -> Option<SourceEvent> {
        self.events.pop_front()
    }

    /// When to call `handle_timeout`.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.next_tick
    }

    // ---- what follows from the inputs ---------------------------------------------------------

    /// Does what has become possible. Called at the end of every input.
    fn advance(&mut self, now: Time) {
        if self.link == LinkState::Accepted && self.seeding.expire(now) {
            self.note("the target did not say in time what its library has; everything is sent");
        }
        for run in self.flights.take_returned() {
            self.policy.on_outdated(run);
        }
        self.schedule(now);
        self.forget_ended();
        match self.phase {
            SourcePhase::PreCopy if self.sealing.is_some() => self.consider_seal(now),
            SourcePhase::PreCopy => self.consider_switch(now),
            SourcePhase::Draining if self.sealing.is_some() => self.consider_asking(),
            SourcePhase::Draining if self.pending.is_empty() && self.flights.is_empty() => {
                self.prepare();
            }
            _ => {}
        }
    }

    fn handle_accept(&mut self, now: Time, accept: &Accept) {
        if self.link != LinkState::Opening {
            return self.protocol_error("an Accept that nobody asked for");
        }
        self.link = LinkState::Accepted;
        self.seeding.accepted(now);
        let restarted = self
            .target_incarnation
            .is_some_and(|known| known != accept.incarnation);
        self.target_incarnation = Some(accept.incarnation);
        if restarted {
            self.note("the target's agent was restarted");
            self.flights.lost_undurable(&mut self.pending);
        } else {
            self.flights
                .lost_except(&accept.received.0, &mut self.pending);
        }
        if self.seal_accepted(accept.stage) {
            return;
        }
        if accept.stage == TargetStage::Incoming
            && let Some(lacking) = self.lacking.take()
        {
            self.begin_on(&lacking, &accept.bases);
        }
        self.handle_target_stage(now, accept.stage);
    }

    fn protocol_error(&mut self, what: &str) {
        let text = format!("the target sent something that makes no sense here: {what}");
        self.note(text.clone());
        if self.phase < SourcePhase::Preparing {
            self.end_early(Cancel::Error(WireError::new(ErrorCode::PROTOCOL, text)));
        }
    }
}

/// The name of a message without its content.
fn name_of(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}
