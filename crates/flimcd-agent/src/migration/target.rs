//! Driver of a [`TargetMachine`].

use flimcd_core::{BlockRange, BlockSet, Epoch, Time};
use flimcd_link::Credit;
use flimcd_migrate::{
    ApplyId, ContentCount, DiskError, SyncId, TargetAction, TargetConfig, TargetEvent,
    TargetMachine, TargetPhase, TargetStart,
};
use flimcd_wire::{self as wire, Blocks, Message, Probe, Probed, SampleChunk};
use std::{
    io,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{
    arrive::{Sources, Written, tenants},
    base::{Base, Command, CommandError, Event, Outcome, Setup, disk_error},
    heat::READS_DELAY,
    hooks::DisksEvent,
    peeks::Asking,
    progress::{add_content, unix_ms},
    store::MigrationRecord,
    volumes::VolumeSet,
};
use crate::{
    api::{ContentStats, Phase},
    library::{Chosen, Finder, Library, Seeds},
    links::LinkInput,
};

/// How often it is looked at what the guest has done.
const LOOK: Duration = Duration::from_millis(50);

/// What the workers answer.
pub(crate) enum Done {
    Applied(ApplyId, Result<Written, DiskError>),
    Seed(Option<Chosen>),
    Probed(Probed),
    Synced(SyncId, Result<(), DiskError>),
    Owner(Epoch, Result<(), DiskError>),
    Refused(Epoch, Result<(), DiskError>),
    Completed(Result<(), DiskError>),
    Sealed(wire::Seal, Result<(), DiskError>),
}

/// How a driver begins.
pub(crate) struct TargetBegin {
    /// What the machine is about.
    pub(crate) config: TargetConfig,
    /// Where it stands.
    pub(crate) start: TargetStart,
    /// Where seeds come from.
    pub(crate) library: Arc<Library>,
}

/// See the module.
pub(crate) struct TargetDriver {
    base: Base<Done>,
    machine: TargetMachine,
    look_at: Time,
    /// When the machine is told what the guest has read, if it has.
    reads_at: Option<Time>,
    /// What arrived must be removed at the end.
    discard: bool,
    /// What an agent that ran before had counted.
    reads_before: u64,
    reads_missed_before: u64,
    /// Reads before the switch.
    asking: Asking,
    /// The credit of the message that the machine is looking at.
    credit: Option<Credit>,
    library: Arc<Library>,
    /// What the source may refer to. Its table is dropped once the source was told of it.
    seeds: Option<Arc<Seeds>>,
    /// What stood in the volumes before.
    bases: Vec<wire::Base>,
    /// Where blocks are looked for, once the source has asked for some.
    finder: Arc<OnceLock<Finder>>,
    content: ContentCount,
    content_before: ContentStats,
}

impl TargetDriver {
    pub(crate) fn new(setup: Setup, begin: &TargetBegin) -> io::Result<Self> {
        let base = Base::new(setup, "target")?;
        // A guest that is not moved by us is let in after the switch only.
        base.volumes.set_peeking(begin.config.waits_for_vm);
        Ok(Self {
            machine: TargetMachine::new(begin.config.clone(), begin.start, base.now()),
            look_at: base.now(),
            reads_at: None,
            reads_before: base.status.guest_reads,
            reads_missed_before: base.status.guest_reads_missed,
            content: ContentCount::default(),
            content_before: base.status.content,
            base,
            discard: false,
            asking: Asking::default(),
            credit: None,
            library: begin.library.clone(),
            seeds: None,
            bases: begin.config.bases.clone(),
            finder: Arc::default(),
        })
    }

    /// Drives the migration until it is over or the agent stops. Also says whether what arrived
    /// must be removed.
    pub(crate) async fn run(mut self) -> (MigrationRecord, Outcome, bool) {
        // The machine tells of changes only.
        self.base.set_phase(api_phase(self.machine.phase()));
        if self.machine.phase().owns() {
            self.base.tell(DisksEvent::Owned);
        }
        self.act();
        self.publish();
        loop {
            let is_over = match self.machine.phase() {
                // The source may not know yet; should the link break now, it asks again and is
                // answered from the record.
                TargetPhase::Complete
                | TargetPhase::Cancelled
                | TargetPhase::Failed
                | TargetPhase::Sealed => true,
                _ => false,
            };
            if is_over && self.base.is_quiet() {
                self.publish();
                // Nobody would answer.
                self.base.volumes.set_peeking(false);
                let (record, outcome) = self.base.close(Outcome::Ended).await;
                return (record, outcome, self.discard);
            }
            let deadline = self.deadline();
            let event = self.base.next(deadline).await;
            if matches!(event, Event::Stop) {
                let (record, outcome) = self.base.close(Outcome::Paused).await;
                return (record, outcome, false);
            }
            self.apply(event);
            self.act();
        }
    }

    fn deadline(&self) -> Option<Time> {
        let look = self.machine.phase().owns().then_some(self.look_at);
        let timeout = self.machine.poll_timeout();
        [look, self.reads_at, timeout].into_iter().flatten().min()
    }

    fn apply(&mut self, event: Event<Done>) {
        let now = self.base.now();
        match event {
            Event::Link(input) => {
                if let LinkInput::Up(_) = input {
                    self.asking.handle_link_up(&self.base.volumes);
                }
                let said = self.base.take_link_input(&mut self.machine, input);
                if let Some((message, credit)) = said
                    && let Some(message) = self.look_at(message)
                {
                    self.credit = Some(credit);
                    self.machine.handle_message(now, message);
                }
            }
            Event::Done(done) => self.answer(now, done),
            Event::Volume => {
                self.take_faults(now);
                if self.base.has_read() {
                    self.reads_at.get_or_insert(now + READS_DELAY);
                }
                self.asking.take(&self.base.volumes);
            }
            Event::Command(command) => self.command(now, command),
            Event::Timer => {
                if self.reads_at.is_some_and(|at| at <= now) {
                    self.reads_at = None;
                    let reads = self.base.volumes.take_reads();
                    self.machine.handle_reads(now, &reads);
                }
                if self.look_at <= now {
                    self.look_at = now + LOOK;
                    self.look(now);
                }
                if self.machine.poll_timeout().is_some_and(|at| at <= now) {
                    self.machine.handle_timeout(now);
                }
            }
            // What there is to do about these is done by `act` and by the caller.
            Event::Room | Event::Stop => {}
        }
    }

    /// What is not for the machine: returns the message if it is.
    fn look_at(&mut self, message: Message) -> Option<Message> {
        match message {
            Message::Open(open)
                if !open.volumes.iter().map(|volume| volume.id).eq(self
                    .base
                    .record
                    .volumes
                    .iter()
                    .map(|volume| volume.id)) =>
            {
                self.base
                    .note("the source speaks of other volumes than it did before".to_owned());
                None
            }
            // Before the switch it is not written, and ends the migration; later nothing may end it.
            Message::Blocks(blocks)
                if self.machine.phase().owns()
                    && !blocks.ranges().all(|run| self.base.volumes.has(run)) =>
            {
                self.base
                    .note("the source sent blocks that belong to no volume".to_owned());
                None
            }
            Message::Peeked { number, payload } => {
                let volumes = &self.base.volumes;
                self.asking.handle_peeked(volumes, number, &payload);
                None
            }
            message => Some(message),
        }
    }

    fn answer(&mut self, now: Time, done: Done) {
        match done {
            Done::Seed(chosen) => self.answer_seed(now, chosen),
            Done::Probed(probed) => {
                self.content.count_probed(&probed);
                self.machine.handle_probed(now, probed);
            }
            Done::Applied(id, Ok(Written::Lacking)) => self.machine.handle_lacking(now, id),
            Done::Applied(id, result) => {
                self.machine.handle_applied(now, id, result.map(|_| ()));
                if self.machine.phase().owns() {
                    let missing = self.base.volumes.missing_count();
                    self.machine.handle_missing(now, missing);
                }
            }
            Done::Synced(id, result) => self.machine.handle_synced(now, id, result),
            Done::Owner(epoch, result) => {
                self.machine.handle_owner(now, epoch, result);
                self.look(now);
                self.take_faults(now);
            }
            Done::Refused(epoch, result) => {
                if result.is_ok() {
                    self.base.record.refused = self.base.record.refused.max(Some(epoch));
                }
                self.machine.handle_refused(now, epoch, result);
            }
            Done::Completed(result) => self.machine.handle_completed(now, result),
            Done::Sealed(seal, result) => self.machine.handle_sealed(now, seal, result),
        }
    }

    /// Tells the machine what the guest needs.
    fn take_faults(&mut self, now: Time) {
        while let Some(range) = self.base.volumes.poll_fault() {
            self.machine.handle_fault(now, range);
        }
    }

    /// Tells the machine what the guest has done.
    fn look(&mut self, now: Time) {
        if self.machine.phase() != TargetPhase::PostCopy {
            return;
        }
        let overwritten = self.base.volumes.take_overwritten();
        if !overwritten.is_empty() {
            self.machine.handle_overwritten(now, &overwritten);
        }
        let guest = self.base.volumes.guest_reads();
        self.machine.handle_guest_stats(
            now,
            self.reads_before + guest.reads,
            self.reads_missed_before + guest.missed,
        );
        let missing = self.base.volumes.missing_count();
        self.machine.handle_missing(now, missing);
    }

    fn command(&mut self, now: Time, command: Command) {
        let (answer, result) = match command {
            Command::Switchover(answer) | Command::SwitchNow(answer) => {
                (answer, Err(CommandError::OtherSide))
            }
            Command::VmReady(is_ready, answer) => {
                self.machine.handle_vm_ready(now, is_ready);
                (answer, Ok(()))
            }
            Command::Cancel(answer) if self.machine.phase() == TargetPhase::Incoming => {
                self.machine.handle_cancel(now);
                (answer, Ok(()))
            }
            Command::Cancel(answer) if self.machine.phase().owns() => {
                (answer, Err(CommandError::TooLate))
            }
            Command::Cancel(answer) => (answer, Err(CommandError::OtherSide)),
        };
        self.act();
        self.publish();
        // Whoever asked may have gone away.
        let _ = answer.send(result);
    }

    /// Does everything that the machine has to do and to say.
    fn act(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.start(action);
        }
        if let Some(seal) = self.machine.poll_seal() {
            self.seal(seal);
        }
        // Not passed on to a job: the content is held or was dropped by the machine.
        self.credit = None;
        let (machine, asking) = (&mut self.machine, &mut self.asking);
        self.base.port.transmit(|has_room| {
            let asked = asking.poll(has_room);
            asked.or_else(|| machine.poll_transmit(has_room))
        });
        let mut is_news = false;
        while let Some(event) = self.machine.poll_event() {
            is_news = true;
            self.report(event);
        }
        if is_news || self.base.publish_due() {
            self.publish();
        }
    }

    fn start(&mut self, action: TargetAction) {
        match action {
            TargetAction::Apply { id, blocks } => self.write(id, blocks),
            TargetAction::Sync(id) => {
                self.record(move |volumes| Done::Synced(id, sync(volumes)));
            }
            TargetAction::BecomeOwner { epoch, missing } => self.become_owner(epoch, missing),
            TargetAction::Refuse { epoch } => {
                let mut record = self.base.record.clone();
                record.refused = record.refused.max(Some(epoch));
                let store = self.base.store.clone();
                self.record(move |_| {
                    let result = store.save(&record);
                    let what = "recording the refusal";
                    Done::Refused(epoch, result.map_err(|error| disk_error(what, &error)))
                });
            }
            TargetAction::RequeueFaults => {
                self.base.volumes.requeue_faults();
                let now = self.base.now();
                self.take_faults(now);
            }
            TargetAction::AskForMissing { blocks } => {
                let now = self.base.now();
                for range in self.base.volumes.first_missing(blocks) {
                    self.machine.handle_fault(now, range);
                }
            }
            TargetAction::Complete { epoch } => {
                self.record(move |volumes| {
                    let result = volumes.complete(epoch);
                    let what = "recording that everything is here";
                    Done::Completed(result.map_err(|error| disk_error(what, &error)))
                });
            }
            TargetAction::ChooseSeed { sample } => self.choose_seed(sample),
            TargetAction::Probe(probe) => self.probe(probe),
            TargetAction::KeepHeat(part) => {
                let volumes = self.base.volumes.clone();
                self.base.workers.record(move || {
                    if !volumes.keep_heat(&part) {
                        tracing::warn!("what was hot at the source makes no sense here");
                    }
                });
            }
            TargetAction::Discard => self.discard = true,
        }
    }

    /// Looks for images of the library that resemble what arrives.
    fn choose_seed(&mut self, sample: Vec<SampleChunk>) {
        let (volumes, library) = (self.base.volumes.clone(), self.library.clone());
        let (bases, done) = (self.bases.clone(), self.base.begin_job());
        self.base.workers.record(move || {
            let chosen = library.choose(&volumes, &bases, &tenants(&volumes), &sample);
            let _ = done.send(Done::Seed(chosen));
        });
    }

    /// Looks for blocks that the source is about to send.
    fn probe(&mut self, probe: Probe) {
        let (library, sources, done) =
            (self.library.clone(), self.sources(), self.base.begin_job());
        self.base.workers.any_order(move |_| {
            let probed = sources.probe(&library, &probe);
            // The driver is gone when the agent stops.
            let _ = done.send(Done::Probed(probed));
        });
    }

    fn sources(&self) -> Sources {
        Sources {
            volumes: self.base.volumes.clone(),
            seeds: self.seeds.clone(),
            finder: self.finder.clone(),
        }
    }

    fn answer_seed(&mut self, now: Time, chosen: Option<Chosen>) {
        let choice = chosen.map(|chosen| {
            self.seeds = Some(chosen.seeds);
            self.base.status.library_image = Some(chosen.choice.name.clone());
            chosen.choice
        });
        self.machine.handle_seed(now, choice);
    }

    fn write(&mut self, id: ApplyId, blocks: Blocks) {
        let ranges: Vec<BlockRange> = blocks.ranges().collect();
        for entry in &blocks.entries {
            self.content.count(*entry);
        }
        self.base.status.bytes_sent += blocks.payload.len() as u64;
        let (sources, done) = (self.sources(), self.base.begin_job());
        let credit = self.credit.take();
        self.base
            .workers
            .in_order(ranges.into_iter(), move |tools| {
                let result = sources.write_blocks(tools, &blocks);
                drop(credit);
                // The driver is gone when the agent stops.
                let _ = done.send(Done::Applied(id, result));
            });
    }

    /// Everything of one moment is here.
    fn seal(&mut self, seal: wire::Seal) {
        let (migration, peer) = (self.base.record.id, self.base.record.peer.clone());
        let epoch = self.base.record.epoch;
        self.base.status.switched_unix_ms = Some(seal.as_of_unix_ms);
        self.record(move |volumes| {
            let result = volumes.seal(epoch, migration, &peer, seal.as_of_unix_ms);
            let what = "recording that the copy is whole";
            Done::Sealed(seal, result.map_err(|error| disk_error(what, &error)))
        });
    }

    fn become_owner(&mut self, epoch: Epoch, missing: BlockSet) {
        let (migration, peer) = (self.base.record.id, self.base.record.peer.clone());
        self.base.status.missing_blocks_at_switch = Some(missing.count());
        self.record(move |volumes| {
            let result = volumes.take_over(missing, epoch, migration, &peer);
            let what = "taking over what moves";
            Done::Owner(epoch, result.map_err(|error| disk_error(what, &error)))
        });
    }

    fn record(&mut self, job: impl FnOnce(&VolumeSet) -> Done + Send + 'static) {
        let (volumes, done) = (self.base.volumes.clone(), self.base.begin_job());
        self.base.workers.record(move || {
            let _ = done.send(job(&volumes));
        });
    }

    fn report(&mut self, event: TargetEvent) {
        match event {
            TargetEvent::Phase(phase) => self.base.set_phase(api_phase(phase)),
            TargetEvent::Arrived(epoch) => {
                self.base.status.switched_unix_ms = Some(unix_ms());
                tracing::info!(
                    migration = %self.base.record.id, volumes = %self.base.record.names(), %epoch,
                    "what moves is owned here"
                );
                drop(self.base.save_record());
                self.base.tell(DisksEvent::Owned);
            }
            TargetEvent::Completed => self.base.tell(DisksEvent::Completed),
            TargetEvent::Cancelled => self.base.tell(DisksEvent::Ended(Ok(()))),
            TargetEvent::Failed(error) => {
                tracing::error!(
                    migration = %self.base.record.id, volumes = %self.base.record.names(),
                    "the migration failed: {}", error.text
                );
                self.base.tell(DisksEvent::Ended(Err(error.text.clone())));
                self.base.status.error = Some(error.text);
            }
            TargetEvent::Note(text) => self.base.note(text),
        }
    }

    fn publish(&mut self) {
        let report = self.machine.report();
        let status = &mut self.base.status;
        status.content = add_content(self.content_before, self.content);
        status.guest_reads = report.guest_reads;
        status.guest_reads_missed = report.guest_reads_missed;
        status.missing_blocks = if self.machine.phase().owns() {
            report.missing_blocks
        } else {
            0
        };
        status.blocks_pending = status.missing_blocks;
        if !status.phase.has_ended() {
            status.rate_bytes_per_sec = self.base.rate.update(Instant::now(), status.bytes_sent);
        }
        self.base.publish();
    }
}

fn sync(volumes: &VolumeSet) -> Result<(), DiskError> {
    volumes
        .sync()
        .map_err(|error| disk_error("making content durable", &error))
}

const fn api_phase(phase: TargetPhase) -> Phase {
    match phase {
        TargetPhase::Incoming => Phase::Precopy,
        TargetPhase::Switching | TargetPhase::Refusing => Phase::Switchover,
        TargetPhase::PostCopy | TargetPhase::Completing => Phase::Postcopy,
        TargetPhase::Complete | TargetPhase::Sealed => Phase::Completed,
        TargetPhase::Cancelled => Phase::Cancelled,
        TargetPhase::Failed => Phase::Failed,
    }
}
