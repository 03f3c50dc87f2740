//! What both drivers are made of: the sources of events, the record, and the published status.

use flimcd_core::Time;
use flimcd_link::Credit;
use flimcd_migrate::{DiskError, SourceMachine, TargetMachine};
use flimcd_volume::VolumeObserver;
use flimcd_wire::Message;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::{
    hooks::{DisksEvent, DisksHook},
    port::LinkPort,
    progress::{RateWindow, add_note, unix_ms},
    store::{MigrationRecord, Store},
    volumes::VolumeSet,
    workers::Workers,
};
use crate::{
    api::{MigrationStatus, Phase},
    links::{Inbox, LinkInput, PeerLink},
};

/// How often the status is published while nothing special happens.
const PUBLISH: Duration = Duration::from_millis(100);

/// Turns what the volumes notice into one wake-up of its driver.
#[derive(Default)]
pub(crate) struct Wake {
    notify: Notify,
    /// A guest has read, and nobody has looked since.
    has_read: AtomicBool,
}

impl VolumeObserver for Wake {
    fn on_fault(&self) {
        self.notify.notify_one();
    }

    fn on_reads(&self) {
        self.has_read.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    fn on_peek(&self) {
        self.notify.notify_one();
    }

    fn on_drained(&self) {
        self.notify.notify_one();
    }

    fn on_guests_gone(&self) {
        self.notify.notify_one();
    }

    fn on_held(&self) {
        self.notify.notify_one();
    }
}

/// Where the answer to a command goes.
pub(crate) type CommandAnswer = oneshot::Sender<Result<(), CommandError>>;

/// What an operator asks of a running migration. The answer comes when it has been passed on.
#[derive(Debug)]
pub(crate) enum Command {
    /// Switch as soon as it is ready.
    Switchover(CommandAnswer),
    /// End it before the switch.
    Cancel(CommandAnswer),
    /// Source, of a machine's disks: the machine has stopped, switch now. Not remembered across a restart.
    #[allow(dead_code, reason = "asked for by the move of a machine")]
    SwitchNow(CommandAnswer),
    /// Target, of a machine's disks: whether the machine could run here now.
    #[allow(dead_code, reason = "asked for by the move of a machine")]
    VmReady(bool, CommandAnswer),
}

/// Why a command was not taken.
#[derive(Debug)]
pub(crate) enum CommandError {
    /// The other side has to be asked.
    OtherSide,
    /// The disks switch with the machine they belong to.
    WithMachine,
    /// The target owns the volume, or is about to.
    TooLate,
    /// It could not be recorded.
    Io(io::Error),
}

/// Everything that can happen to a driver. `D` is what its workers answer.
pub(crate) enum Event<D> {
    Link(LinkInput),
    Done(D),
    /// A volume has faults or questions, is drained, holds a write, or lost its last guest.
    Volume,
    Command(Command),
    /// The link has room again.
    Room,
    Timer,
    /// The agent stops.
    Stop,
}

/// How a driver ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The migration is over.
    Ended,
    /// The agent stops; a restart goes on with it.
    Paused,
}

/// What a driver is made from.
pub(crate) struct Setup {
    pub(crate) volumes: Arc<VolumeSet>,
    pub(crate) link: Arc<PeerLink>,
    pub(crate) inbox: Inbox,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) record: MigrationRecord,
    pub(crate) store: Store,
    pub(crate) status: watch::Sender<MigrationStatus>,
    /// Of a machine's disks.
    pub(crate) hook: Option<DisksHook>,
}

/// The machines of both sides, as far as they hear the same of their link.
pub(crate) trait LinkedMachine {
    fn link_up(&mut self, now: Time);
    fn link_down(&mut self, now: Time);
}

impl LinkedMachine for SourceMachine {
    fn link_up(&mut self, now: Time) {
        self.handle_link_up(now);
    }

    fn link_down(&mut self, now: Time) {
        self.handle_link_down(now);
    }
}

impl LinkedMachine for TargetMachine {
    fn link_up(&mut self, now: Time) {
        self.handle_link_up(now);
    }

    fn link_down(&mut self, now: Time) {
        self.handle_link_down(now);
    }
}

/// See the module.
pub(crate) struct Base<D> {
    pub(crate) volumes: Arc<VolumeSet>,
    pub(crate) port: LinkPort,
    pub(crate) record: MigrationRecord,
    pub(crate) status: MigrationStatus,
    pub(crate) workers: Workers,
    pub(crate) store: Store,
    /// Jobs given to workers and not heard of again.
    pub(crate) jobs: usize,
    pub(crate) rate: RateWindow,
    pub(crate) done: mpsc::UnboundedSender<D>,
    answers: mpsc::UnboundedReceiver<D>,
    inbox: Inbox,
    commands: mpsc::Receiver<Command>,
    stop: watch::Receiver<bool>,
    wake: Arc<Wake>,
    published: watch::Sender<MigrationStatus>,
    hook: Option<DisksHook>,
    published_at: Instant,
    begin: Instant,
    /// Bytes that the link's sockets had carried when this driver began.
    link_bytes_before: u64,
    /// What an agent that ran before had counted of this migration.
    on_link_before: u64,
    /// The same for `bytes_sent`.
    pub(crate) sent_before: u64,
}

impl<D> Base<D> {
    /// Starts the workers, and begins to observe the volumes and what their guests read.
    pub(crate) fn new(setup: Setup, label: &str) -> io::Result<Self> {
        let (done, answers) = mpsc::unbounded_channel();
        let wake = Arc::<Wake>::default();
        setup.volumes.set_observer(&wake);
        setup.volumes.set_read_log(true);
        let handle = setup.link.handle();
        Ok(Self {
            link_bytes_before: handle.bytes_sent() + handle.bytes_received(),
            on_link_before: setup.record.status.bytes_on_link,
            sent_before: setup.record.status.bytes_sent,
            workers: Workers::start(label)?,
            port: LinkPort::new(setup.link, setup.record.id),
            status: setup.record.status.clone(),
            volumes: setup.volumes,
            record: setup.record,
            store: setup.store,
            jobs: 0,
            rate: RateWindow::default(),
            done,
            answers,
            inbox: setup.inbox,
            commands: setup.commands,
            stop: setup.stop,
            wake,
            published: setup.status,
            hook: setup.hook,
            published_at: Instant::now(),
            begin: Instant::now(),
        })
    }

    /// Now, as the machine sees it.
    pub(crate) fn now(&self) -> Time {
        Time::ZERO + self.begin.elapsed()
    }

    /// The next event; the timer's at `deadline`.
    pub(crate) async fn next(&mut self, deadline: Option<Time>) -> Event<D> {
        let timer = async {
            match deadline {
                Some(at) => {
                    let at = self.begin + Duration::from_nanos(at.0);
                    tokio::time::sleep_until(at.into()).await;
                }
                None => std::future::pending().await,
            }
        };
        let room = self.port.room();
        // In this order, so that no flood of one kind keeps the timer from draining dirty marks.
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|&stop| stop) => Event::Stop,
            () = timer => Event::Timer,
            Some(command) = self.commands.recv() => Event::Command(command),
            () = self.wake.notify.notified() => Event::Volume,
            Some(answer) = self.answers.recv() => {
                self.jobs -= 1;
                Event::Done(answer)
            }
            Some(input) = self.inbox.recv() => Event::Link(input),
            () = room => Event::Room,
        }
    }

    /// Whether a guest has read since the last call. Only while the volumes keep a log of that.
    pub(crate) fn has_read(&self) -> bool {
        self.wake.has_read.swap(false, Ordering::AcqRel)
    }

    /// Passes on to the machine what the link did, and returns what the peer said.
    pub(crate) fn take_link_input(
        &mut self,
        machine: &mut impl LinkedMachine,
        input: LinkInput,
    ) -> Option<(Message, Credit)> {
        let now = self.now();
        match input {
            LinkInput::Up(generation) => {
                self.port.set_up(generation);
                self.status.error = None;
                machine.link_up(now);
                None
            }
            LinkInput::Down => {
                self.port.set_down();
                machine.link_down(now);
                None
            }
            LinkInput::Message(message, credit) => Some((message, credit)),
        }
    }

    /// Whether this is about a machine's disks, which switch with the machine.
    pub(crate) fn has_session(&self) -> bool {
        self.hook.is_some()
    }

    /// Tells the move of the machine what happened to its disks, if they belong to one.
    pub(crate) fn tell(&self, event: DisksEvent) {
        if let Some(hook) = &self.hook {
            hook.tell(event);
        }
    }

    /// A way for a job to answer; the driver counts it as under way from now on.
    pub(crate) fn begin_job(&mut self) -> mpsc::UnboundedSender<D> {
        self.jobs += 1;
        self.done.clone()
    }

    /// Whether nothing is under way in the workers, and the link took everything that it can take.
    pub(crate) fn is_quiet(&self) -> bool {
        self.jobs == 0 && (self.port.is_idle() || !self.port.is_up())
    }

    /// Adds a note to the status and to the log.
    pub(crate) fn note(&mut self, text: String) {
        tracing::warn!(migration = %self.record.id, volumes = %self.record.names(), "{text}");
        add_note(&mut self.status, text);
    }

    /// Enters a phase; final ones get their time.
    pub(crate) fn set_phase(&mut self, phase: Phase) {
        if self.status.phase != phase {
            tracing::info!(
                migration = %self.record.id, volumes = %self.record.names(), role = ?self.record.role,
                "{} → {phase}", self.status.phase
            );
            self.status.phase = phase;
        }
        if phase.has_ended() {
            self.status.ended_unix_ms.get_or_insert_with(unix_ms);
            self.status.eta_s = None;
            self.status.rate_bytes_per_sec = 0;
        }
    }

    /// Whether the status should be brought up to date and published.
    pub(crate) fn publish_due(&self) -> bool {
        self.published_at.elapsed() >= PUBLISH
    }

    /// Makes the status visible to others. That the migration has ended is left to the registry, which says so when
    /// everything is cleaned up and the volume may be migrated again.
    pub(crate) fn publish(&mut self) {
        self.published_at = Instant::now();
        let handle = self.port.link().handle();
        self.status.link_up = self.port.is_up();
        let on_link = handle.bytes_sent() + handle.bytes_received();
        self.status.bytes_on_link =
            self.on_link_before + on_link.saturating_sub(self.link_bytes_before);
        if self.status.phase.has_ended() {
            return;
        }
        let mut status = self.status.clone();
        if !status.link_up && status.error.is_none() {
            let why = handle.last_error().map(|error| error.to_string());
            status.error = Some(
                why.unwrap_or_else(|| format!("the link to {} is not up yet", self.record.peer)),
            );
        }
        self.published.send_replace(status);
    }

    /// Has the record written with the status as it is. All writes of it go through the same lane, so that
    /// none overtakes another. The answer need not be waited for.
    pub(crate) fn save_record(&mut self) -> oneshot::Receiver<io::Result<()>> {
        self.record.status = self.status.clone();
        let (store, record) = (self.store.clone(), self.record.clone());
        let (answer, answered) = oneshot::channel();
        self.workers.record(move || {
            let saved = store.save(&record);
            if let Err(error) = &saved {
                tracing::error!(migration = %record.id, "its record cannot be written: {error}");
            }
            // Nobody waits for it where a failure only costs what a restart knows.
            let _ = answer.send(saved);
        });
        answered
    }

    /// Lets the workers finish, writes the record, and gives the last status away.
    pub(crate) async fn close(mut self, outcome: Outcome) -> (MigrationRecord, Outcome) {
        self.volumes.set_read_log(false);
        // The last job of its lane, and `finish` waits for all lanes.
        drop(self.save_record());
        let workers = self.workers;
        if tokio::task::spawn_blocking(move || workers.finish())
            .await
            .is_err()
        {
            tracing::error!(migration = %self.record.id, "waiting for the workers failed");
        }
        (self.record, outcome)
    }
}

/// What the machines want to know of an error.
pub(crate) fn disk_error(what: &str, error: &io::Error) -> DiskError {
    DiskError {
        no_space: matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ),
        text: format!("{what}: {error}"),
    }
}
