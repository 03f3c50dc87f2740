//! Driver of a [`TargetMachine`].

use flimcd_content::Decoded;
use flimcd_core::{BlockRange, BlockSet, Epoch, Time};
use flimcd_link::Credit;
use flimcd_migrate::{
    ApplyId, DiskError, SyncId, TargetAction, TargetConfig, TargetEvent, TargetMachine,
    TargetPhase, TargetStart,
};
use flimcd_volume::{ApplyData, Ownership, Volume};
use flimcd_wire::Blocks;
use std::{
    io,
    time::{Duration, Instant},
};

use super::{
    base::{Base, Command, CommandError, Event, Outcome, Setup, disk_error},
    progress::unix_ms,
    store::MigrationRecord,
    workers::Tools,
};
use crate::{api::Phase, links::LinkInput};

/// How often it is looked at what the guest has done.
const LOOK: Duration = Duration::from_millis(50);

/// What the workers answer.
pub(crate) enum Done {
    Applied(ApplyId, Result<(), DiskError>),
    Synced(SyncId, Result<(), DiskError>),
    Owner(Epoch, Result<(), DiskError>),
    Refused(Epoch, Result<(), DiskError>),
    Completed(Result<(), DiskError>),
}

/// How a driver begins.
pub(crate) struct TargetBegin {
    /// What the machine is about.
    pub(crate) config: TargetConfig,
    /// Where it stands.
    pub(crate) start: TargetStart,
}

/// See the module.
pub(crate) struct TargetDriver {
    base: Base<Done>,
    machine: TargetMachine,
    look_at: Time,
    /// What arrived must be removed at the end.
    discard: bool,
    /// What an agent that ran before had counted.
    reads_before: u64,
    reads_missed_before: u64,
    /// The credit of the message that the machine is looking at.
    credit: Option<Credit>,
}

impl TargetDriver {
    pub(crate) fn new(setup: Setup, begin: &TargetBegin) -> io::Result<Self> {
        let base = Base::new(setup, "target")?;
        Ok(Self {
            machine: TargetMachine::new(begin.config, begin.start, base.now()),
            look_at: base.now(),
            reads_before: base.status.guest_reads,
            reads_missed_before: base.status.guest_reads_missed,
            base,
            discard: false,
            credit: None,
        })
    }

    /// Drives the migration until it is over or the agent stops. Also says whether what arrived
    /// must be removed.
    pub(crate) async fn run(mut self) -> (MigrationRecord, Outcome, bool) {
        // The machine tells of changes only.
        self.base.set_phase(api_phase(self.machine.phase()));
        self.act();
        self.publish();
        loop {
            let is_over = match self.machine.phase() {
                // The source may not know yet; should the link break now, it asks again and is
                // answered from the record.
                TargetPhase::Complete | TargetPhase::Cancelled | TargetPhase::Failed => true,
                _ => false,
            };
            if is_over && self.base.is_quiet() {
                self.publish();
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
        look.into_iter().chain(self.machine.poll_timeout()).min()
    }

    fn apply(&mut self, event: Event<Done>) {
        let now = self.base.now();
        match event {
            Event::Link(LinkInput::Up(generation)) => {
                self.base.port.set_up(generation);
                self.base.status.error = None;
                self.machine.handle_link_up(now);
            }
            Event::Link(LinkInput::Down) => {
                self.base.port.set_down();
                self.machine.handle_link_down(now);
            }
            Event::Link(LinkInput::Message(message, credit)) => {
                self.credit = Some(credit);
                self.machine.handle_message(now, message);
            }
            Event::Done(done) => self.answer(now, done),
            Event::Volume => self.take_faults(now),
            Event::Command(command) => self.command(now, command),
            Event::Timer => {
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

    fn answer(&mut self, now: Time, done: Done) {
        match done {
            Done::Applied(id, result) => {
                self.machine.handle_applied(now, id, result);
                if self.machine.phase().owns() {
                    let missing = self.base.volume.missing_count();
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
        }
    }

    /// Tells the machine what the guest needs.
    fn take_faults(&mut self, now: Time) {
        while let Some(range) = self.base.volume.poll_fault() {
            self.machine.handle_fault(now, range);
        }
    }

    /// Tells the machine what the guest has done.
    fn look(&mut self, now: Time) {
        if self.machine.phase() != TargetPhase::PostCopy {
            return;
        }
        let overwritten = self.base.volume.take_overwritten();
        if !overwritten.is_empty() {
            self.machine.handle_overwritten(now, &overwritten);
        }
        let stats = self.base.volume.stats();
        self.machine.handle_guest_stats(
            now,
            self.reads_before + stats.guest_reads,
            self.reads_missed_before + stats.guest_reads_missed,
        );
        let missing = self.base.volume.missing_count();
        self.machine.handle_missing(now, missing);
    }

    fn command(&mut self, now: Time, command: Command) {
        let (answer, result) = match command {
            Command::Switchover(answer) => (answer, Err(CommandError::OtherSide)),
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
        // Not passed on to a job: the content is held or was dropped by the machine.
        self.credit = None;
        let machine = &mut self.machine;
        self.base
            .port
            .transmit(|has_room| machine.poll_transmit(has_room));
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
                self.record(move |volume| Done::Synced(id, sync(volume)));
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
                self.base.volume.requeue_faults();
                let now = self.base.now();
                self.take_faults(now);
            }
            TargetAction::AskForMissing { blocks } => {
                let now = self.base.now();
                for range in self.base.volume.first_missing(blocks) {
                    self.machine.handle_fault(now, range);
                }
            }
            TargetAction::Complete { epoch } => {
                self.record(move |volume| Done::Completed(complete(volume, epoch)));
            }
            TargetAction::Discard => self.discard = true,
        }
    }

    fn write(&mut self, id: ApplyId, blocks: Blocks) {
        let ranges: Vec<BlockRange> = blocks.ranges().collect();
        self.base.status.bytes_sent += blocks.payload.len() as u64;
        let (volume, done) = (self.base.volume.clone(), self.base.begin_job());
        let credit = self.credit.take();
        self.base
            .workers
            .in_order(ranges.into_iter(), move |tools| {
                let result = write_blocks(&volume, tools, &blocks);
                drop(credit);
                // The driver is gone when the agent stops.
                let _ = done.send(Done::Applied(id, result));
            });
    }

    fn become_owner(&mut self, epoch: Epoch, missing: BlockSet) {
        let (migration, peer) = (self.base.record.id, self.base.record.peer.clone());
        self.base.status.missing_blocks_at_switch = Some(missing.count());
        self.record(move |volume| {
            let ownership = Ownership::Arriving {
                epoch,
                migration,
                peer,
            };
            let result = volume.take_over(missing, ownership);
            let what = "taking the volume over";
            Done::Owner(epoch, result.map_err(|error| disk_error(what, &error)))
        });
    }

    fn record(&mut self, job: impl FnOnce(&Volume) -> Done + Send + 'static) {
        let (volume, done) = (self.base.volume.clone(), self.base.begin_job());
        self.base.workers.record(move || {
            let _ = done.send(job(&volume));
        });
    }

    fn report(&mut self, event: TargetEvent) {
        match event {
            TargetEvent::Phase(phase) => self.base.set_phase(api_phase(phase)),
            TargetEvent::Arrived(epoch) => {
                self.base.status.switched_unix_ms = Some(unix_ms());
                tracing::info!(
                    migration = %self.base.record.id, volume = %self.base.record.volume, %epoch,
                    "the volume is owned here"
                );
                drop(self.base.save_record());
            }
            TargetEvent::Completed | TargetEvent::Cancelled => {}
            TargetEvent::Failed(error) => {
                tracing::error!(
                    migration = %self.base.record.id, volume = %self.base.record.volume,
                    "the migration failed: {}", error.text
                );
                self.base.status.error = Some(error.text);
            }
            TargetEvent::Note(text) => self.base.note(text),
        }
    }

    fn publish(&mut self) {
        let report = self.machine.report();
        let status = &mut self.base.status;
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

/// Unpacks and writes one message.
fn write_blocks(volume: &Volume, tools: &mut Tools, blocks: &Blocks) -> Result<(), DiskError> {
    for (entry, payload) in blocks.parts() {
        let decoded = tools
            .unpack
            .decode(&entry, &payload, volume.size())
            .map_err(|error| DiskError {
                no_space: false,
                text: error.to_string(),
            })?;
        let data = match decoded {
            Decoded::Zeroes => ApplyData::Zeroes,
            Decoded::Bytes(bytes) => ApplyData::Bytes(bytes),
        };
        volume
            .apply(entry.range, data)
            .map_err(|error| disk_error(&format!("writing blocks {:?}", entry.range), &error))?;
    }
    Ok(())
}

fn sync(volume: &Volume) -> Result<(), DiskError> {
    volume
        .sync()
        .map_err(|error| disk_error("making content durable", &error))
}

fn complete(volume: &Volume, epoch: Epoch) -> Result<(), DiskError> {
    sync(volume)?;
    volume
        .set_ownership(Ownership::Owner { epoch })
        .map_err(|error| disk_error("writing the volume's record", &error))?;
    volume
        .finish_postcopy()
        .map_err(|error| disk_error("ending post-copy", &error))
}

const fn api_phase(phase: TargetPhase) -> Phase {
    match phase {
        TargetPhase::Incoming => Phase::Precopy,
        TargetPhase::Switching | TargetPhase::Refusing => Phase::Switchover,
        TargetPhase::PostCopy | TargetPhase::Completing => Phase::Postcopy,
        TargetPhase::Complete => Phase::Completed,
        TargetPhase::Cancelled => Phase::Cancelled,
        TargetPhase::Failed => Phase::Failed,
    }
}
