//! The target's side of a machine's move.

use flimcd_core::MigrationId;
use flimcd_migrate::vm::{
    DisksCommand, VmTarget, VmTargetAction, VmTargetEvent, VmTargetPhase, VmTargetStart,
};
use flimcd_qemu::{Export, Qmp, RunState, transfer};
use flimcd_wire::{ErrorCode, VmMessage, WireError};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use super::{
    CancelRequest, Ends, LOOK, PUBLISH,
    base::{self, FromLink, Stream},
    launch::{self, Launch},
    record::{Description, Launched, SessionRecord},
};
use crate::{
    agent::Agent,
    api::{VmMoveStatus, VmPhase},
    config::MachineSource,
    links::{Inbox, LinkInput, PeerLink},
    migration::{Outcome, hooks::DisksEvent, progress::unix_ms},
    vm::{
        CareState, VmDisk, VmRecord, Working,
        ram::{PumpEvent, RamPump, socket_path},
    },
};

/// How long the volumes may take to be made after the machine was announced.
const VOLUMES: Duration = Duration::from_secs(30);
/// How long guests wait for this agent to come back before the hypervisor fails their requests.
const RECONNECT_DELAY_S: u32 = 3600;

/// What came of a step.
enum Stepped {
    /// A machine listens.
    Listening {
        launched: Launched,
        qmp: Qmp,
        postcopy: bool,
    },
    /// A machine of this attempt did not come about, or is of no use.
    Broken {
        attempt: u32,
        why: String,
    },
    /// The guest runs, and the machine is under care.
    Running,
    Killed,
    Told,
    /// No step: something that a person should know.
    Note(String),
}

/// How the machine fares.
enum Looked {
    Receiving,
    Loaded,
    Broken(String),
}

/// Everything that can happen to a target.
enum Event {
    Link(LinkInput),
    Disks(DisksEvent),
    Step(Stepped),
    Looked(u32, Looked),
    Stream(PumpEvent),
    Cancel(CancelRequest),
    Timer,
    Stop,
}

/// See the module.
pub(super) struct TargetSession {
    agent: Arc<Agent>,
    link: Arc<PeerLink>,
    record: SessionRecord,
    machine: VmTarget,
    /// The name is ours until the move is over.
    working: Working,
    inbox: Inbox,
    disks: mpsc::UnboundedReceiver<DisksEvent>,
    disks_done: bool,
    cancel: mpsc::Receiver<CancelRequest>,
    stop: watch::Receiver<bool>,
    steps: mpsc::UnboundedSender<VmTargetAction>,
    results: mpsc::UnboundedReceiver<Stepped>,
    /// The attempt whose machine is to be there, 0 for none.
    wanted: Arc<AtomicU32>,
    steps_left: usize,
    look: mpsc::UnboundedSender<(u32, Looked)>,
    looks: mpsc::UnboundedReceiver<(u32, Looked)>,
    is_looking: bool,
    qmp: Option<Qmp>,
    stream: Stream,
    status: watch::Sender<VmMoveStatus>,
    published_at: Instant,
}

/// What a target is made from.
pub(super) struct TargetSetup {
    pub(super) link: Arc<PeerLink>,
    pub(super) record: SessionRecord,
    pub(super) ends: Ends,
    pub(super) inbox: Inbox,
    pub(super) working: Working,
    /// Where the machine comes from, if the configuration still says so.
    pub(super) machine: Option<MachineSource>,
    /// The machine that a run before this has started, if it can still be asked.
    pub(super) qmp: Option<Qmp>,
    pub(super) start: VmTargetStart,
}

impl TargetSession {
    pub(super) fn new(agent: &Arc<Agent>, setup: TargetSetup) -> Self {
        let (steps, actions) = mpsc::unbounded_channel();
        let (results_in, results) = mpsc::unbounded_channel();
        let (look, looks) = mpsc::unbounded_channel();
        let wanted = Arc::new(AtomicU32::new(0));
        let runner = Steps {
            agent: agent.clone(),
            session: setup.record.id,
            record: setup.record.clone(),
            machine: setup.machine,
            qmp: setup.qmp.clone(),
            results: results_in,
            wanted: wanted.clone(),
        };
        tokio::spawn(runner.run(actions));
        Self {
            agent: agent.clone(),
            disks: agent.disks_of(setup.record.id),
            disks_done: false,
            machine: VmTarget::new(setup.start),
            link: setup.link,
            record: setup.record,
            working: setup.working,
            inbox: setup.inbox,
            cancel: setup.ends.cancel,
            stop: agent.stop_signal(),
            steps,
            results,
            wanted,
            steps_left: 0,
            look,
            looks,
            is_looking: false,
            qmp: setup.qmp,
            stream: Stream::default(),
            status: setup.ends.status,
            published_at: Instant::now(),
        }
    }

    /// Drives the move until it is over or the agent stops.
    pub(super) async fn run(mut self, disks_done: bool) -> (SessionRecord, Outcome) {
        self.disks_done = disks_done;
        if disks_done && self.machine.phase() != VmTargetPhase::Running {
            self.machine.handle_ended();
        }
        self.act();
        let outcome = loop {
            let is_over = match self.machine.phase() {
                VmTargetPhase::Completed => self.disks_done,
                phase => phase.is_final(),
            };
            if is_over && self.steps_left == 0 {
                break Outcome::Ended;
            }
            let event = self.next().await;
            if matches!(event, Event::Stop) {
                break Outcome::Paused;
            }
            self.apply(event);
            self.act();
        };
        self.publish();
        self.link.unregister(self.record.id);
        drop(self.working);
        (self.record, outcome)
    }

    async fn next(&mut self) -> Event {
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|&stop| stop) => Event::Stop,
            Some(cancel) = self.cancel.recv() => Event::Cancel(cancel),
            Some(input) = self.inbox.recv() => Event::Link(input),
            Some(event) = self.disks.recv() => Event::Disks(event),
            Some(stepped) = self.results.recv() => Event::Step(stepped),
            Some((attempt, looked)) = self.looks.recv() => Event::Looked(attempt, looked),
            event = self.stream.next_event() => Event::Stream(event),
            () = sleep(LOOK) => Event::Timer,
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Link(input) => match self.stream.handle(input) {
                Some(FromLink::Up) => self.machine.handle_link_up(),
                Some(FromLink::Down) => self.machine.handle_link_down(),
                Some(FromLink::Message(message)) => self.machine.handle_message(&message),
                None => {}
            },
            Event::Disks(DisksEvent::Owned) => self.machine.handle_disks_owned(),
            Event::Disks(DisksEvent::Completed) => {
                self.disks_done = true;
                self.machine.handle_disks_owned();
            }
            Event::Disks(DisksEvent::Ended(result)) => {
                self.disks_done = true;
                if let Err(why) = result {
                    self.record.status.error.get_or_insert(why);
                }
                self.machine.handle_ended();
            }
            Event::Disks(_) => {}
            Event::Step(stepped) => self.stepped(stepped),
            Event::Looked(attempt, looked) => self.looked(attempt, looked),
            Event::Stream(PumpEvent::Broken(why)) => {
                self.stream.end();
                // A machine that has all of its state needs the stream no more.
                if self.machine.phase() == VmTargetPhase::Receiving {
                    self.broken(self.machine.attempt(), &why);
                }
            }
            Event::Stream(_) => {}
            // The source decides.
            Event::Cancel(answer) => drop(answer.send(false)),
            Event::Timer => self.start_look(),
            Event::Stop => {}
        }
    }

    fn stepped(&mut self, stepped: Stepped) {
        if let Stepped::Note(text) = stepped {
            tracing::warn!(session = %self.record.id, vm = %self.record.vm, "{text}");
            base::add_note(&mut self.record.status, text);
            return self.publish();
        }
        self.steps_left -= 1;
        match stepped {
            Stepped::Note(_) => {}
            Stepped::Listening {
                launched,
                qmp,
                postcopy,
            } => {
                let attempt = launched.attempt;
                let socket = ram_socket(&self.agent, self.record.id, attempt);
                self.record.launched = Some(launched);
                self.qmp = Some(qmp);
                let pump = RamPump::connect(self.link.clone(), self.record.id, attempt, &socket);
                self.stream.begin(pump);
                self.machine.handle_listening(attempt, postcopy);
            }
            Stepped::Broken { attempt, why } => self.broken(attempt, &why),
            Stepped::Running => self.machine.handle_running(),
            Stepped::Killed => {
                self.record.launched = None;
                self.stream.end();
                self.qmp = None;
            }
            Stepped::Told => {}
        }
    }

    fn broken(&mut self, attempt: u32, why: &str) {
        tracing::warn!(session = %self.record.id, vm = %self.record.vm, attempt, "the machine cannot go on: {why}");
        self.machine.handle_broken(attempt, why);
    }

    fn start_look(&mut self) {
        let phase = self.machine.phase();
        let watched = matches!(phase, VmTargetPhase::Receiving | VmTargetPhase::Loaded);
        let Some(qmp) = self.qmp.clone().filter(|_| watched && !self.is_looking) else {
            return;
        };
        self.is_looking = true;
        let (attempt, look) = (self.machine.attempt(), self.look.clone());
        let log = log_path(&self.agent, &self.record);
        tokio::spawn(async move {
            let looked = match transfer::status(&qmp).await {
                Ok(status) => looked_at(&status),
                Err(_) if qmp.is_closed() => {
                    Looked::Broken(format!("the machine ended; {}", launch::last_words(&log)))
                }
                // Busy: it is asked again.
                Err(_) => Looked::Receiving,
            };
            let _ = look.send((attempt, looked));
        });
    }

    fn looked(&mut self, attempt: u32, looked: Looked) {
        self.is_looking = false;
        match looked {
            Looked::Receiving => {}
            Looked::Loaded => self.machine.handle_loaded(attempt),
            Looked::Broken(why) => self.broken(attempt, &why),
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            tracing::debug!(session = %self.record.id, ?action, "step");
            match action {
                VmTargetAction::Start { attempt } => self.wanted.store(attempt, Ordering::Relaxed),
                VmTargetAction::Kill => self.wanted.store(0, Ordering::Relaxed),
                VmTargetAction::Disks(_) | VmTargetAction::Run => {}
            }
            self.steps_left += 1;
            // The runner lives as long as this.
            let _ = self.steps.send(action);
        }
        while let Some(event) = self.machine.poll_event() {
            match event {
                VmTargetEvent::Phase(phase) => {
                    tracing::info!(session = %self.record.id, vm = %self.record.vm, "move: {phase:?}");
                    if phase == VmTargetPhase::Running {
                        self.record
                            .status
                            .switched_unix_ms
                            .get_or_insert_with(unix_ms);
                    }
                }
                VmTargetEvent::Note(text) => base::add_note(&mut self.record.status, text),
            }
            self.publish();
        }
        if let Some(generation) = self.stream.generation() {
            while let Some(message) = self.machine.poll_transmit() {
                base::send(&self.link, self.record.id, generation, message);
            }
        }
        if self.published_at.elapsed() >= PUBLISH {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.published_at = Instant::now();
        let status = &mut self.record.status;
        status.phase = match self.machine.phase() {
            VmTargetPhase::Idle | VmTargetPhase::Starting => VmPhase::Disks,
            VmTargetPhase::Receiving => VmPhase::Ram,
            VmTargetPhase::Loaded | VmTargetPhase::Going => VmPhase::Switchover,
            VmTargetPhase::Running => VmPhase::Postcopy,
            VmTargetPhase::Completed if self.disks_done => VmPhase::Completed,
            VmTargetPhase::Completed => VmPhase::Postcopy,
            VmTargetPhase::Ended if status.error.is_some() => VmPhase::Failed,
            VmTargetPhase::Ended => VmPhase::Cancelled,
        };
        status.attempt = self.machine.attempt();
        if status.phase.has_ended() {
            status.ended_unix_ms.get_or_insert_with(unix_ms);
        } else {
            self.status.send_replace(status.clone());
        }
    }
}

fn looked_at(status: &transfer::TransferStatus) -> Looked {
    use transfer::TransferState as S;
    match status.status {
        S::Completed | S::PostcopyActive => Looked::Loaded,
        S::Failed | S::Cancelled => Looked::Broken(match &status.error {
            Some(error) => format!("the machine could not take its running state: {error}"),
            None => "the machine could not take its running state".to_owned(),
        }),
        _ => Looked::Receiving,
    }
}

/// Whether a machine that a run before this has started has its running state, and whether its guest runs.
pub(super) async fn probe(qmp: &Qmp) -> (bool, bool) {
    let running = matches!(transfer::run_state(qmp).await, Ok(RunState::Running));
    let loaded = match transfer::status(qmp).await {
        Ok(status) => matches!(looked_at(&status), Looked::Loaded),
        Err(_) => false,
    };
    (loaded, running)
}

/// Where the hypervisor of an attempt listens.
fn ram_socket(agent: &Agent, session: MigrationId, attempt: u32) -> PathBuf {
    socket_path(&agent.config.runtime_dir, session, attempt)
}

fn log_path(agent: &Agent, record: &SessionRecord) -> PathBuf {
    agent
        .config
        .state_dir
        .join("moves")
        .join(format!("{}.log", record.vm))
}

/// Takes one action after the other.
struct Steps {
    agent: Arc<Agent>,
    session: MigrationId,
    record: SessionRecord,
    machine: Option<MachineSource>,
    qmp: Option<Qmp>,
    results: mpsc::UnboundedSender<Stepped>,
    /// As in the session.
    wanted: Arc<AtomicU32>,
}

impl Steps {
    async fn run(mut self, mut actions: mpsc::UnboundedReceiver<VmTargetAction>) {
        while let Some(action) = actions.recv().await {
            let stepped = self.take(action).await;
            if self.results.send(stepped).is_err() {
                return;
            }
        }
    }

    async fn take(&mut self, action: VmTargetAction) -> Stepped {
        match action {
            VmTargetAction::Disks(command) => {
                // Before their migration is here there is nothing to tell it.
                if let Err(why) = self.agent.tell_disks(self.session, command).await
                    && command != DisksCommand::VmReady(false)
                {
                    tracing::warn!(session = %self.session, ?command, "{why}");
                }
                Stepped::Told
            }
            VmTargetAction::Start { attempt } => {
                self.kill().await;
                match self.launch(attempt).await {
                    Ok(listening) => listening,
                    Err(why) => Stepped::Broken { attempt, why },
                }
            }
            VmTargetAction::Kill => {
                self.kill().await;
                Stepped::Killed
            }
            VmTargetAction::Run => match self.go().await {
                Ok(()) => Stepped::Running,
                Err(why) => {
                    let attempt = self
                        .record
                        .launched
                        .as_ref()
                        .map_or(0, |launched| launched.attempt);
                    Stepped::Broken { attempt, why }
                }
            },
        }
    }

    async fn kill(&mut self) {
        if let Some(launched) = self.record.launched.take() {
            launch::end(&launched, self.qmp.take().as_ref()).await;
            self.save().await;
        }
    }

    /// Starts a machine and has it listen.
    async fn launch(&mut self, attempt: u32) -> Result<Stepped, String> {
        let machine = self.machine.clone();
        let machine =
            machine.ok_or("the configuration has no [[machine]] table for it any more")?;
        let (command, qmp) = match machine {
            MachineSource::Awaited(qmp) => (None, qmp),
            MachineSource::Command(command) => {
                let file = format!("{}.qmp", self.record.vm);
                (Some(command), self.agent.config.runtime_dir.join(file))
            }
        };
        let launch = Launch {
            attempt,
            name: self.record.vm.clone(),
            exports: self.exports().await?,
            description: self.record.description.clone(),
            qmp,
            log: log_path(&self.agent, &self.record),
        };
        let (launched, qmp) = match command {
            Some(command) => launch.start(&command).await?,
            None => {
                let results = self.results.clone();
                let is_wanted = || self.wanted.load(Ordering::Relaxed) == attempt;
                launch
                    .wait(is_wanted, |text| drop(results.send(Stepped::Note(text))))
                    .await?
            }
        };
        self.record.launched = Some(launched.clone());
        self.qmp = Some(qmp.clone());
        // A restart has to find it.
        self.save().await;
        let uri = format!(
            "unix:{}",
            ram_socket(&self.agent, self.session, attempt).display()
        );
        let mut postcopy = self.record.description.postcopy;
        let listen = |postcopy| {
            let (qmp, uri) = (qmp.clone(), uri.clone());
            async move {
                let settings = transfer::IncomingSettings { postcopy };
                transfer::listen_incoming(&qmp, &uri, settings).await
            }
        };
        let mut listening = listen(postcopy).await;
        if postcopy && listening.is_err() {
            // It takes a kernel and rights that not every host has.
            postcopy = false;
            listening = listen(false).await;
        }
        listening.map_err(|error| error.to_string())?;
        Ok(Stepped::Listening {
            launched,
            qmp,
            postcopy,
        })
    }

    /// The disks' exports, once their migration has made the volumes.
    async fn exports(&self) -> Result<Vec<Export>, String> {
        let deadline = Instant::now() + VOLUMES;
        loop {
            match self.try_exports() {
                Ok(exports) => return Ok(exports),
                Err(why) if Instant::now() >= deadline => return Err(why),
                Err(_) => sleep(LOOK).await,
            }
        }
    }

    fn try_exports(&self) -> Result<Vec<Export>, String> {
        let disks = self.record.description.disks.iter();
        let exports = disks.map(|disk| {
            let export = self
                .agent
                .export(&disk.volume)
                .map_err(|error| error.to_string())?;
            Ok(Export {
                socket: export.socket,
                name: export.export,
                reconnect_delay_s: RECONNECT_DELAY_S,
            })
        });
        exports.collect()
    }

    /// Lets the guest run and takes the machine under care.
    async fn go(&mut self) -> Result<(), String> {
        let qmp = self.qmp.clone().ok_or("there is no machine")?;
        if self.record.description.was_running {
            let resumed = transfer::resume_guest(&qmp).await;
            resumed.map_err(|error| error.to_string())?;
        }
        // It is there; whatever fails from here on is put right by a person.
        if let Err(why) = self.take_under_care(&qmp).await {
            tracing::error!(vm = %self.record.vm, "taking the machine that arrived under care failed: {why}");
        }
        Ok(())
    }

    async fn take_under_care(&self, qmp: &Qmp) -> Result<(), String> {
        let exports = self.try_exports()?;
        let adopted = flimcd_qemu::adopted_by_export(qmp, &exports).await;
        let adopted = adopted.map_err(|error| error.to_string())?;
        let Description { disks, .. } = &self.record.description;
        let mut known = Vec::new();
        for (disk, export) in disks.iter().zip(&exports) {
            let hosted = self
                .agent
                .hosting
                .get(&disk.volume)
                .map_err(|error| error.to_string())?;
            let image = hosted.record().image;
            let adopted = adopted
                .iter()
                .find(|adopted| adopted.export.name == export.name);
            let adopted = adopted.cloned().map(|mut adopted| {
                // Given back as it was before it was adopted at the source.
                adopted.disk.file.clone_from(&image);
                adopted.disk.options = disk.found.options.clone();
                adopted
            });
            known.push(VmDisk {
                volume: disk.volume.clone(),
                image,
                found: adopted
                    .as_ref()
                    .map_or_else(|| disk.found.clone(), |adopted| adopted.disk.clone()),
                adopted,
            });
        }
        let launched = self.record.launched.as_ref().ok_or("there is no machine")?;
        let record = VmRecord::new(
            self.record.vm.clone(),
            launched.qmp.clone(),
            CareState::InCare,
            known,
        );
        self.agent.vms.give_qmp(&self.record.vm, qmp.clone());
        let vms = self.agent.vms.clone();
        let saved = tokio::task::spawn_blocking(move || vms.save(record)).await;
        match saved {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(panic.to_string()),
        }
    }

    async fn save(&self) {
        let (store, record) = (self.agent.moves_store.clone(), self.record.clone());
        let saved = tokio::task::spawn_blocking(move || store.save(&record)).await;
        if let Ok(Err(error)) = saved {
            tracing::error!(session = %self.session, "the record of a move cannot be written: {error}");
        }
    }
}

/// A refusal for the source.
pub(super) fn refusal(text: String) -> VmMessage {
    VmMessage::Failed(WireError::new(ErrorCode::NOT_ALLOWED, text))
}
