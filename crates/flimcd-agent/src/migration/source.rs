//! Driver of a [`SourceMachine`].

use bytes::Bytes;
use flimcd_content::{Effort, Examined};
use flimcd_core::{BlockRange, Epoch, Seq, Time};
use flimcd_migrate::{
    DiskError, LinkEstimate, SourceAction, SourceEvent, SourceMachine, SourcePhase, SourceRecord,
    Switchover,
};
use flimcd_volume::Ownership;
use flimcd_wire::{ChunkPrefix, Entry, Message, Runs};
use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    base::{Base, Command, CommandAnswer, CommandError, Event, Outcome, Setup, disk_error},
    capture::Captured,
    hooks::DisksEvent,
    peeks::{Answering, Question},
    progress::{add_content, eta_s, unix_ms},
    store::MigrationRecord,
    workers::Tools,
    writes::GuestWrites,
};
use crate::{
    api::{self, ContentStats, Phase},
    links::LinkInput,
};

/// How often dirty marks are drained from the volume.
const DRAIN: Duration = Duration::from_millis(25);
/// The same while guests wait for the target to get what they write.
const DRAIN_HELD: Duration = Duration::from_millis(1);

/// What the workers answer.
pub(crate) enum Done {
    Read(Seq, Result<(Vec<Entry>, Bytes), DiskError>),
    /// Something of it may be at the target.
    Examined(Seq, Kept),
    Persisted(SourceRecord, Result<(), DiskError>),
    Peeked(Question, io::Result<Bytes>),
    /// Of an increment: what is left to send, as of that moment (milliseconds since 1970).
    Captured(u64, io::Result<Captured>),
}

/// What was read and waits for what the target says of it.
pub(crate) struct Kept {
    content: Vec<u8>,
    examined: Examined,
    compress: Option<Effort>,
}

/// What to do with what is read.
struct HowToRead {
    compress: Option<Effort>,
    /// What the target's seed has, chunk by chunk.
    same: Vec<Option<ChunkPrefix>>,
    /// Ask the target before the rest is packed.
    probe: bool,
}

impl HowToRead {
    fn examine_or_pack(self, seq: Seq, range: BlockRange, tools: &mut Tools) -> Done {
        let content = std::mem::take(&mut tools.buffer);
        let encoder = tools.encoder(self.compress);
        let encoded = if self.probe || !self.same.is_empty() {
            let examined = Examined::of(range, &content, &self.same);
            if self.probe && examined.needs_probe() {
                let kept = Kept {
                    content,
                    examined,
                    compress: self.compress,
                };
                return Done::Examined(seq, kept);
            }
            encoder.pack(&content, &examined, &Runs::default())
        } else {
            encoder.encode(range, &content)
        };
        tools.buffer = content;
        Done::Read(seq, Ok((encoded.entries, encoded.payload)))
    }
}

/// See the module.
pub(crate) struct SourceDriver {
    base: Base<Done>,
    machine: SourceMachine,
    drain_at: Time,
    drained_at: Time,
    /// Writes that the strategy lets wait.
    writes: GuestWrites,
    /// `Freeze` was begun, and the volumes are not drained.
    freezing: bool,
    stopped_at: Option<Instant>,
    /// Only once asked for, whoever is connected.
    is_manual: bool,
    /// The switch was granted; it is not taken back.
    granted: bool,
    /// The move of the machine was told that its disks are ready.
    told_ready: bool,
    /// Reads at the target before the switch.
    answering: Answering,
    /// What was read and waits for what the target says of it.
    kept: HashMap<Seq, Kept>,
    /// Of an increment: content that is read from here instead of from the volumes.
    captured: Option<Arc<Captured>>,
    /// What an agent that ran before had counted.
    content_before: ContentStats,
}

impl SourceDriver {
    /// A driver of `machine`, which has just been made.
    pub(crate) fn new(
        setup: Setup,
        make_machine: impl FnOnce(Time) -> SourceMachine,
    ) -> io::Result<Self> {
        let is_manual = setup
            .record
            .request
            .as_ref()
            .is_some_and(|request| request.switchover == api::Switchover::Manual);
        let base = Base::new(setup, "source")?;
        let mut driver = Self {
            machine: make_machine(base.now()),
            drain_at: base.now(),
            drained_at: base.now(),
            writes: GuestWrites::new(base.volumes.clone()),
            content_before: base.status.content,
            base,
            freezing: false,
            stopped_at: None,
            is_manual,
            granted: false,
            told_ready: false,
            answering: Answering::default(),
            kept: HashMap::new(),
            captured: None,
        };
        let now = driver.base.now();
        if driver.base.record.switchover_asked {
            driver.grant(now);
        }
        if driver.base.record.cancel_asked {
            driver.machine.handle_cancel(now);
        }
        driver.tell_standing();
        Ok(driver)
    }

    /// Drives the migration until it is over or the agent stops.
    pub(crate) async fn run(mut self) -> (MigrationRecord, Outcome) {
        self.act();
        loop {
            if self.machine.phase().is_final() && self.base.is_quiet() {
                return self.end().await;
            }
            let deadline = self.deadline();
            let event = self.base.next(deadline).await;
            if matches!(event, Event::Stop) {
                return self.base.close(Outcome::Paused).await;
            }
            self.apply(event).await;
            self.act();
        }
    }

    /// When something has to be done without an event.
    fn deadline(&self) -> Option<Time> {
        let drain = self.machine.phase().wants_dirty().then_some(self.drain_at);
        let timeout = self.machine.poll_timeout();
        drain.into_iter().chain(timeout).min()
    }

    async fn apply(&mut self, event: Event<Done>) {
        let now = self.base.now();
        match event {
            Event::Link(input) => {
                if let LinkInput::Up(_) = input {
                    self.answering.handle_link_up();
                }
                let said = self.base.take_link_input(&mut self.machine, input);
                if let Some(message) = said.and_then(|(message, _credit)| self.look_at(message)) {
                    self.machine.handle_message(now, message);
                }
            }
            Event::Done(Done::Read(seq, result)) => self.machine.handle_read(now, seq, result),
            Event::Done(Done::Examined(seq, kept)) => {
                let probe = kept.examined.probe(seq);
                self.kept.insert(seq, kept);
                self.machine.handle_examined(now, probe);
            }
            Event::Done(Done::Persisted(record, result)) => {
                self.machine.handle_persisted(now, record, result);
            }
            Event::Done(Done::Peeked(question, result)) => {
                if let Err(error) = &result {
                    let range = question.range;
                    self.base
                        .note(format!("reading blocks {range:?} for the target: {error}"));
                }
                self.answering.handle_read(&question, result.ok());
            }
            Event::Done(Done::Captured(as_of, result)) => self.captured(now, as_of, result),
            Event::Volume => {
                if self.writes.is_mirroring() {
                    self.drain_at = self.drain_at.min(self.drained_at + DRAIN_HELD);
                }
                self.tick(now);
            }
            Event::Command(command) => self.command(command).await,
            Event::Timer => self.tick(now),
            // What there is to do about these is done by `act` and by the caller.
            Event::Room | Event::Stop => {}
        }
    }

    /// What is not for the machine: returns the message if it is.
    fn look_at(&mut self, message: Message) -> Option<Message> {
        match message {
            Message::Demand { runs } if !runs.iter().all(|run| self.base.volumes.has(run)) => {
                self.base
                    .note("the target asks for blocks that belong to no volume".to_owned());
                None
            }
            Message::Peek { number, range } => {
                self.peek(number, range);
                None
            }
            message => Some(message),
        }
    }

    /// After a restart: tells the machine's move where its disks stand.
    fn tell_standing(&self) {
        match self.machine.phase() {
            SourcePhase::Switching => self.base.tell(DisksEvent::Prepared),
            SourcePhase::PostCopy | SourcePhase::Retiring => self.base.tell(DisksEvent::Moved),
            _ => {}
        }
    }

    fn tick(&mut self, now: Time) {
        if self.drain_at <= now {
            self.drain_at = now + DRAIN;
            self.drained_at = now;
            let news = self.writes.tick(now);
            self.note_writes(news);
            let estimate = self.base.port.link().handle().estimate();
            self.machine.handle_estimate(
                now,
                LinkEstimate {
                    rate_bytes_per_sec: estimate.rate_bytes_per_sec,
                    rtt: estimate.rtt_min,
                },
            );
            if self.machine.phase().wants_dirty() {
                self.take_reads(now);
                let dirty = self.base.volumes.take_dirty();
                if !dirty.is_empty() {
                    self.base.status.blocks_dirtied += dirty.count();
                    self.machine.handle_dirtied(now, &dirty);
                }
            }
        }
        if self.machine.poll_timeout().is_some_and(|at| at <= now) {
            self.machine.handle_timeout(now);
        }
        self.consider_guests(now);
    }

    /// Tells the machine what guests have read.
    fn take_reads(&mut self, now: Time) {
        let reads = self.base.volumes.take_reads();
        if !reads.is_empty() {
            self.machine.handle_reads(now, &reads);
        }
    }

    /// Automatic switchover: nobody is connected, and the machine would switch.
    fn consider_guests(&mut self, now: Time) {
        if !self.granted
            && !self.is_manual
            && !self.base.has_session()
            && self.machine.progress().ready
            && self.base.volumes.connections() == 0
        {
            self.grant(now);
        }
    }

    fn note_writes(&mut self, news: Option<String>) {
        if let Some(text) = news {
            self.base.note(text);
        }
    }

    fn grant(&mut self, now: Time) {
        self.granted = true;
        self.machine.handle_switchover(now, Switchover::WhenReady);
    }

    /// Syncs the images while the guest still runs, so that the sync before `Prepared` has little left to do.
    fn sync_ahead(&mut self) {
        let (volumes, names) = (self.base.volumes.clone(), self.base.record.names());
        self.base.workers.record(move || {
            if let Err(error) = volumes.sync() {
                // The one that counts will say so, too.
                tracing::warn!(volumes = %names, "syncing the images failed: {error}");
            }
        });
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Switchover(answer) if self.base.has_session() => {
                let _ = answer.send(Err(CommandError::WithMachine));
            }
            Command::VmReady(_, answer) => {
                let _ = answer.send(Err(CommandError::OtherSide));
            }
            Command::SwitchNow(answer) => {
                let now = self.base.now();
                self.granted = true;
                self.machine.handle_switchover(now, Switchover::Now);
                self.answer(answer);
            }
            Command::Switchover(answer) => self.on_record(answer, false).await,
            Command::Cancel(answer) => self.on_record(answer, true).await,
        }
    }

    /// What stays asked for over a restart.
    async fn on_record(&mut self, answer: CommandAnswer, is_cancel: bool) {
        let too_late = matches!(
            self.machine.phase(),
            SourcePhase::PostCopy | SourcePhase::Retiring | SourcePhase::Completed
        );
        if too_late && is_cancel {
            let _ = answer.send(Err(CommandError::TooLate));
            return;
        }
        // First on record, so that a restart does not forget what was asked for.
        if is_cancel {
            self.base.record.cancel_asked = true;
        } else {
            self.base.record.switchover_asked = true;
        }
        let saved = self.base.save_record().await;
        if let Err(error) = saved.unwrap_or_else(|gone| Err(io::Error::other(gone))) {
            let _ = answer.send(Err(CommandError::Io(error)));
            return;
        }
        let now = self.base.now();
        if is_cancel {
            self.machine.handle_cancel(now);
        } else {
            self.sync_ahead();
            self.grant(now);
        }
        self.answer(answer);
    }

    /// A command was passed on to the machine.
    fn answer(&mut self, answer: CommandAnswer) {
        self.act();
        self.publish();
        // Whoever asked may have gone away.
        let _ = answer.send(Ok(()));
    }

    /// Does everything that the machine has to do and to say.
    fn act(&mut self) {
        let mut is_news = false;
        loop {
            while let Some(action) = self.machine.poll_action() {
                self.start(action);
            }
            if self.freezing && self.base.volumes.is_drained() {
                self.freezing = false;
                let dirty = self.base.volumes.take_dirty();
                self.base.status.blocks_dirtied += dirty.count();
                let now = self.base.now();
                self.take_reads(now);
                self.machine.handle_frozen(now, &dirty);
                continue;
            }
            if let Some(wanted) = self.machine.poll_capture() {
                self.capture(wanted);
            }
            let (machine, answering) = (&mut self.machine, &mut self.answering);
            self.base.port.transmit(|has_room| {
                let answer = answering.poll(has_room);
                answer.or_else(|| machine.poll_transmit(has_room))
            });
            let mut again = false;
            while let Some(event) = self.machine.poll_event() {
                is_news = true;
                again |= event == SourceEvent::ReadyForSwitchover;
                self.report(event);
            }
            if !again {
                break;
            }
            let now = self.base.now();
            self.consider_guests(now);
        }
        let is_ready = self.is_ready();
        if self.base.has_session() && (is_ready || self.told_ready) {
            self.told_ready = is_ready;
            self.base.tell(DisksEvent::Ready(is_ready));
        }
        if is_news || self.base.publish_due() {
            self.publish();
        }
    }

    /// It would switch now, and waits until it may.
    fn is_ready(&self) -> bool {
        self.machine.progress().ready && self.machine.phase() == SourcePhase::PreCopy
    }

    fn start(&mut self, action: SourceAction) {
        match action {
            SourceAction::Read {
                seq,
                range,
                compress,
                same,
                probe,
            } => {
                let rate = self.base.port.link().handle().estimate().rate_bytes_per_sec;
                let how = HowToRead {
                    compress: compress.then(|| Effort::for_rate(rate)),
                    same,
                    probe,
                };
                self.read(seq, range, how);
            }
            SourceAction::Pack { seq, had } => self.pack(seq, had),
            SourceAction::Forget(seq) => {
                self.kept.remove(&seq);
            }
            SourceAction::MarkClean(ranges) => {
                if let Err(error) = self.base.volumes.mark_clean(&ranges) {
                    self.base.note(format!(
                        "cannot record what the target has, so a restart will send more than \
                         needed: {error}"
                    ));
                }
                // What it has for good counts as well: what stood there before the migration is only said like this.
                if self.writes.is_mirroring() {
                    self.base.volumes.acked(&ranges);
                }
            }
            SourceAction::Freeze => {
                self.stopped_at = Some(Instant::now());
                self.freezing = true;
                self.base.volumes.freeze();
            }
            SourceAction::Thaw => {
                self.freezing = false;
                self.base.volumes.thaw();
                let stood = self
                    .stopped_at
                    .take()
                    .map(|at| at.elapsed().as_secs_f64() * 1000.0);
                if self.machine.reads_capture() {
                    self.base.status.downtime_ms = stood;
                }
            }
            SourceAction::Persist(record) => self.persist(record),
            SourceAction::Release => self.base.volumes.release(),
            SourceAction::Mirror(is_on) => {
                let news = self.writes.mirror(is_on);
                self.note_writes(news);
            }
            SourceAction::Acked(ranges) => {
                let news = self.writes.acked(&ranges);
                self.note_writes(news);
            }
            SourceAction::LimitWrites(limit) => self.writes.limit(limit, self.base.now()),
            SourceAction::SetPacing(is_on) => {
                self.base.port.link().set_pacing(self.base.record.id, is_on);
            }
        }
    }

    /// Takes what is left of an increment into memory, while its guest stands.
    fn capture(&mut self, wanted: Vec<BlockRange>) {
        let (volumes, done) = (self.base.volumes.clone(), self.base.begin_job());
        let as_of = unix_ms();
        self.base.workers.any_order(move |_| {
            // The driver is gone when the agent stops.
            let _ = done.send(Done::Captured(as_of, Captured::take(&volumes, &wanted)));
        });
    }

    fn captured(&mut self, now: Time, as_of: u64, result: io::Result<Captured>) {
        let result = result.map(|captured| {
            self.captured = Some(Arc::new(captured));
            self.base.status.switched_unix_ms = Some(as_of);
        });
        let result = result.map_err(|error| disk_error("capturing what is left", &error));
        self.machine.handle_captured(now, as_of, result);
    }

    /// As [`read`](Self::read), of what was captured. The volumes' marks are of the next increment, and are left alone.
    fn read_captured(&mut self, seq: Seq, range: BlockRange, how: HowToRead) {
        let (captured, done) = (self.captured.clone(), self.base.begin_job());
        self.base.workers.any_order(move |tools| {
            let read = match captured {
                Some(captured) => captured.read(range, &mut tools.buffer),
                None => Err(io::Error::other("nothing was captured")),
            };
            let answer = match read {
                Ok(()) => how.examine_or_pack(seq, range, tools),
                Err(error) => {
                    let what = format!("reading blocks {range:?}");
                    Done::Read(seq, Err(disk_error(&what, &error)))
                }
            };
            // The driver is gone when the agent stops.
            let _ = done.send(answer);
        });
    }

    fn read(&mut self, seq: Seq, range: BlockRange, how: HowToRead) {
        if self.machine.reads_capture() {
            return self.read_captured(seq, range, how);
        }
        // The marks are cleared here and now, the content is read later.
        let begun = self.base.volumes.begin_send(range);
        let done = self.base.begin_job();
        self.base.workers.any_order(move |tools| {
            let read = begun.and_then(|(sending, bytes)| {
                let length = usize::try_from(bytes).map_err(io::Error::other)?;
                tools.buffer.resize(length, 0);
                sending.read(&mut tools.buffer)
            });
            let answer = match read {
                Ok(()) => how.examine_or_pack(seq, range, tools),
                Err(error) => {
                    let what = format!("reading blocks {range:?}");
                    Done::Read(seq, Err(disk_error(&what, &error)))
                }
            };
            // The driver is gone when the agent stops.
            let _ = done.send(answer);
        });
    }

    /// The target has said what it has of what was read.
    fn pack(&mut self, seq: Seq, had: Runs) {
        let Some(kept) = self.kept.remove(&seq) else {
            return;
        };
        let done = self.base.begin_job();
        self.base.workers.any_order(move |tools| {
            let encoded = tools
                .encoder(kept.compress)
                .pack(&kept.content, &kept.examined, &had);
            tools.buffer = kept.content;
            // The driver is gone when the agent stops.
            let _ = done.send(Done::Read(seq, Ok((encoded.entries, encoded.payload))));
        });
    }

    /// Something at the target reads before the switch.
    fn peek(&mut self, number: u64, range: BlockRange) {
        let Some(question) = self.answering.handle_peek(number, range) else {
            self.base
                .note("the target asks for more at once than it may".to_owned());
            return;
        };
        let (volumes, done) = (self.base.volumes.clone(), self.base.begin_job());
        self.base.workers.any_order(move |_| {
            let bytes = volumes.peek(question.range).map(Bytes::from);
            // The driver is gone when the agent stops.
            let _ = done.send(Done::Peeked(question, bytes));
        });
    }

    fn persist(&mut self, record: SourceRecord) {
        let (volumes, done) = (self.base.volumes.clone(), self.base.begin_job());
        let (migration, peer) = (self.base.record.id, self.base.record.peer.clone());
        // `own` is the volume's own epoch: the migration's is the highest of them.
        let ownership = move |own| match record {
            SourceRecord::Owner => Ownership::Owner { epoch: own },
            SourceRecord::Prepared(_) => Ownership::Prepared {
                epoch: own,
                migration,
                peer: peer.clone(),
            },
            SourceRecord::Released(epoch) => released(epoch, migration, peer.clone(), false),
            SourceRecord::Retired(epoch) => released(epoch, migration, peer.clone(), true),
        };
        self.base.workers.record(move || {
            let result = volumes
                .record(ownership)
                .map_err(|error| disk_error("writing the volume's record", &error));
            let _ = done.send(Done::Persisted(record, result));
        });
    }

    fn report(&mut self, event: SourceEvent) {
        match event {
            // Not a phase to people: what it returns from says more, and its end follows at once.
            SourceEvent::Phase(SourcePhase::Returning) => {}
            SourceEvent::Phase(phase) => {
                // Not what it has left again already.
                if phase == SourcePhase::Switching && self.machine.phase() == phase {
                    self.base.tell(DisksEvent::Prepared);
                }
                self.base.set_phase(api_phase(phase));
            }
            SourceEvent::ReadyForSwitchover => {
                tracing::info!(migration = %self.base.record.id, "ready for the switchover");
                self.sync_ahead();
            }
            SourceEvent::SwitchedOver => {
                let stopped = self.stopped_at.take();
                let downtime = stopped.map(|at| at.elapsed().as_secs_f64() * 1000.0);
                self.base.status.downtime_ms = downtime;
                self.base.status.switched_unix_ms = Some(unix_ms());
                self.base.status.missing_blocks_at_switch =
                    Some(self.machine.progress().blocks_left);
                tracing::info!(
                    migration = %self.base.record.id, volumes = %self.base.record.names(),
                    downtime_ms = downtime, "the target owns what moves"
                );
                drop(self.base.save_record());
                self.base.tell(DisksEvent::Moved);
            }
            SourceEvent::Completed => {
                self.publish();
                self.base.log_outcome();
                self.base.tell(DisksEvent::Completed);
            }
            SourceEvent::Cancelled => self.base.tell(DisksEvent::Ended(Ok(()))),
            SourceEvent::Failed(error) => {
                let text = error.text;
                tracing::error!(
                    migration = %self.base.record.id, volumes = %self.base.record.names(),
                    "the migration failed: {text}"
                );
                self.base.tell(DisksEvent::Ended(Err(text.clone())));
                self.base.status.error = Some(text);
            }
            SourceEvent::Predicted(prediction) => {
                self.publish();
                self.base.note_prediction(prediction);
            }
            SourceEvent::Seed(name) => {
                tracing::info!(
                    migration = %self.base.record.id, image = %name,
                    "the target has an image in its library that has some of this at the same place"
                );
                self.base.status.library_image = Some(name);
            }
            SourceEvent::Note(text) => self.base.note(text),
        }
    }

    fn publish(&mut self) {
        let progress = self.machine.progress();
        let phase = self.machine.phase();
        let is_ready = self.is_ready();
        let status = &mut self.base.status;
        status.ready_for_switchover = is_ready;
        status.bytes_sent = self.base.sent_before + progress.content_bytes_sent;
        status.content = add_content(self.content_before, progress.content);
        status.blocks_pending = progress.blocks_left;
        status.guest_reads = progress.target.guest_reads;
        status.guest_reads_missed = progress.target.guest_reads_missed;
        status.missing_blocks = match phase {
            SourcePhase::PostCopy => progress.target.missing_blocks.min(progress.blocks_left),
            _ => 0,
        };
        if !phase.is_final() {
            let rate = self.base.rate.update(Instant::now(), status.bytes_sent);
            status.rate_bytes_per_sec = rate;
            status.eta_s = eta_s(progress.blocks_left, progress.bytes_per_block, rate);
        }
        self.base.publish();
    }

    async fn end(mut self) -> (MigrationRecord, Outcome) {
        let ended_early = self.machine.phase() != SourcePhase::Completed;
        self.base.record.farewell_due = ended_early && !self.base.port.is_up();
        self.base.port.link().set_pacing(self.base.record.id, false);
        self.publish();
        self.base.close(Outcome::Ended).await
    }
}

fn released(
    epoch: Epoch,
    migration: flimcd_core::MigrationId,
    peer: flimcd_core::SiteName,
    complete: bool,
) -> Ownership {
    Ownership::Released {
        epoch,
        migration,
        peer,
        complete,
    }
}

const fn api_phase(phase: SourcePhase) -> Phase {
    match phase {
        SourcePhase::Connecting => Phase::Connecting,
        SourcePhase::PreCopy => Phase::Precopy,
        SourcePhase::Stopping
        | SourcePhase::Draining
        | SourcePhase::Preparing
        | SourcePhase::Switching
        | SourcePhase::Returning => Phase::Switchover,
        SourcePhase::PostCopy | SourcePhase::Retiring => Phase::Postcopy,
        SourcePhase::Completed => Phase::Completed,
        SourcePhase::Cancelled => Phase::Cancelled,
        SourcePhase::Failed => Phase::Failed,
    }
}
