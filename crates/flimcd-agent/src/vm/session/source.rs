//! The source's side of a machine's move.

use flimcd_core::Time;
use flimcd_migrate::vm::{
    DisksEnd, RamMode, Transfer, TransferState, VmSource, VmSourceAction, VmSourceConfig,
    VmSourceEvent, VmSourcePhase, VmSourceStart,
};
use flimcd_wire::VmOpen;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

use super::{
    CancelRequest, Ends, LOOK, PUBLISH,
    base::{self, FromLink, Stream},
    record::SessionRecord,
    steps::{self, SourceSteps},
};
use crate::{
    agent::Agent,
    api::{self, VmMoveStatus, VmPhase},
    links::{Inbox, LinkInput, PeerLink},
    migration::{
        Outcome,
        hooks::DisksEvent,
        progress::{RateWindow, unix_ms},
    },
    vm::ram::{PumpEvent, RamPump, socket_path},
};

/// The guest may stand so long if nothing else was asked for.
const DOWNTIME_MS: u64 = 300;

/// Everything that can happen to a source.
enum Event {
    Link(LinkInput),
    Disks(DisksEvent),
    Step(VmSourceAction, Result<(), String>),
    Looked(Result<Transfer, String>),
    Stream(PumpEvent),
    Cancel(CancelRequest),
    Timer,
    Stop,
}

/// Where the disks stand when a move is taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disks {
    /// Their migration runs, and tells.
    Migrating,
    /// It is over, and they are here.
    Here,
    /// It is over, and the target has them.
    Moved,
}

/// See the module.
pub(super) struct SourceSession {
    agent: Arc<Agent>,
    link: Arc<PeerLink>,
    record: SessionRecord,
    machine: VmSource,
    inbox: Inbox,
    disks: mpsc::UnboundedReceiver<DisksEvent>,
    /// The migration of the disks is over.
    disks_done: bool,
    cancel: mpsc::Receiver<CancelRequest>,
    stop: watch::Receiver<bool>,
    steps: mpsc::UnboundedSender<VmSourceAction>,
    results: mpsc::UnboundedReceiver<(VmSourceAction, Result<(), String>)>,
    /// Steps that were asked for and not heard of again.
    steps_left: usize,
    look: mpsc::UnboundedSender<Result<Transfer, String>>,
    looks: mpsc::UnboundedReceiver<Result<Transfer, String>>,
    is_looking: bool,
    stream: Stream,
    /// Bytes of earlier attempts.
    read_before: u64,
    sent_before: u64,
    rate: RateWindow,
    stopped_at: Option<Instant>,
    status: watch::Sender<VmMoveStatus>,
    published_at: Instant,
    begin: Instant,
}

impl SourceSession {
    /// Takes a move up, from its beginning or from where its disks' record stands.
    pub(super) fn new(
        agent: &Arc<Agent>,
        link: Arc<PeerLink>,
        record: SessionRecord,
        ends: Ends,
        start: VmSourceStart,
    ) -> Self {
        let (steps, actions) = mpsc::unbounded_channel();
        let (results_in, results) = mpsc::unbounded_channel();
        let (look, looks) = mpsc::unbounded_channel();
        let runner = SourceSteps {
            agent: agent.clone(),
            session: record.id,
            vm: record.vm.clone(),
        };
        tokio::spawn(runner.run(actions, results_in));
        Self {
            inbox: link.register(record.id),
            disks: agent.disks_of(record.id),
            disks_done: false,
            machine: VmSource::new(config(&record), start),
            agent: agent.clone(),
            link,
            cancel: ends.cancel,
            stop: agent.stop_signal(),
            steps,
            results,
            steps_left: 0,
            look,
            looks,
            is_looking: false,
            stream: Stream::default(),
            read_before: record.status.ram_bytes_read,
            sent_before: record.status.ram_bytes_sent,
            rate: RateWindow::default(),
            stopped_at: None,
            status: ends.status,
            published_at: Instant::now(),
            begin: Instant::now(),
            record,
        }
    }

    /// Drives the move until it is over or the agent stops.
    pub(super) async fn run(mut self, disks: Disks) -> (SessionRecord, Outcome) {
        let now = self.now();
        self.disks_done = disks != Disks::Migrating;
        match disks {
            Disks::Migrating => {}
            Disks::Moved => self.machine.handle_disks_moved(now),
            Disks::Here => self.machine.handle_disks_ended(now, DisksEnd::Cancelled),
        }
        self.act();
        let outcome = loop {
            // The disks may follow for long after the machine's part is over.
            let is_over = self.machine.phase().is_final()
                && (self.disks_done || *self.machine.phase() != VmSourcePhase::Completed);
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
        (self.record, outcome)
    }

    /// Where the hypervisor finds the stream of an attempt.
    fn socket(&self, attempt: u32) -> PathBuf {
        socket_path(&self.agent.config.runtime_dir, self.record.id, attempt)
    }

    fn now(&self) -> Time {
        Time::ZERO + self.begin.elapsed()
    }

    async fn next(&mut self) -> Event {
        let pause = if self.machine.wants_transfer() {
            LOOK
        } else {
            PUBLISH
        };
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|&stop| stop) => Event::Stop,
            Some(cancel) = self.cancel.recv() => Event::Cancel(cancel),
            Some(input) = self.inbox.recv() => Event::Link(input),
            Some(event) = self.disks.recv() => Event::Disks(event),
            Some((action, result)) = self.results.recv() => Event::Step(action, result),
            Some(looked) = self.looks.recv() => Event::Looked(looked),
            event = self.stream.next_event() => Event::Stream(event),
            () = tokio::time::sleep(pause) => Event::Timer,
        }
    }

    fn apply(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Link(input) => match self.stream.handle(input) {
                Some(FromLink::Up) => self.machine.handle_link_up(),
                Some(FromLink::Down) => self.machine.handle_link_down(),
                Some(FromLink::Message(message)) => self.machine.handle_message(now, message),
                None => {}
            },
            Event::Disks(event) => self.disks_event(now, event),
            Event::Step(action, result) => self.step_taken(now, &action, result),
            Event::Looked(looked) => self.looked(now, looked),
            Event::Stream(PumpEvent::Broken(why)) => {
                self.end_stream();
                self.machine.handle_stream_broken(now, why);
            }
            Event::Stream(_) => {}
            Event::Cancel(answer) => {
                let in_time = self.machine.handle_cancel(now);
                // Whoever asked may have gone away.
                let _ = answer.send(in_time);
            }
            Event::Timer => self.start_look(),
            Event::Stop => {}
        }
    }

    fn disks_event(&mut self, now: Time, event: DisksEvent) {
        match event {
            DisksEvent::Ready(is_ready) => self.machine.handle_disks_ready(now, is_ready),
            DisksEvent::Moved => self.machine.handle_disks_moved(now),
            DisksEvent::Completed => {
                self.disks_done = true;
                self.machine.handle_disks_moved(now);
            }
            DisksEvent::Ended(result) => {
                self.disks_done = true;
                let end = match result {
                    Ok(()) => DisksEnd::Cancelled,
                    Err(why) => DisksEnd::Failed(why),
                };
                self.machine.handle_disks_ended(now, end);
            }
            // Which the machine need not know: the target waits for both.
            DisksEvent::Prepared | DisksEvent::Owned => {}
        }
    }

    fn step_taken(&mut self, now: Time, action: &VmSourceAction, result: Result<(), String>) {
        self.steps_left -= 1;
        match action {
            VmSourceAction::EndTransfer | VmSourceAction::Quit => self.end_stream(),
            VmSourceAction::Resume if result.is_ok() => self.stopped_at = None,
            _ => {}
        }
        match result {
            Ok(()) => self.machine.handle_done(now, action),
            Err(why) => self.machine.handle_refused(now, action, why),
        }
    }

    /// Looks at the transfer, unless a look is under way: the hypervisor answers late when it is busy.
    fn start_look(&mut self) {
        if self.is_looking || !self.machine.wants_transfer() {
            return;
        }
        self.is_looking = true;
        let (agent, vm, look) = (
            self.agent.clone(),
            self.record.vm.clone(),
            self.look.clone(),
        );
        tokio::spawn(async move {
            let looked = match agent.vms.qmp(&vm).await {
                Ok(qmp) => steps::look(&qmp).await,
                Err(error) => Err(error.to_string()),
            };
            // The session is gone when the agent stops.
            let _ = look.send(looked);
        });
    }

    fn looked(&mut self, now: Time, looked: Result<Transfer, String>) {
        self.is_looking = false;
        let mut transfer = looked.unwrap_or_else(|why| Transfer {
            // A machine that is gone sends nothing more; where its guest runs elsewhere that is all there is to know.
            state: if *self.machine.phase() == VmSourcePhase::Following {
                TransferState::None
            } else {
                TransferState::Failed(format!("the source's machine cannot be asked: {why}"))
            },
            ..Transfer::default()
        });
        if let Some(stats) = self.stream.stats() {
            transfer.rate_bytes_per_sec = self.rate.update(Instant::now(), stats.bytes_in);
        }
        self.record.status.ram_bytes_left = transfer.remaining_bytes;
        // QEMU forgets them when it ends.
        if transfer.syncs > 0 {
            self.record.status.ram_rounds = transfer.syncs;
        }
        self.machine.handle_transfer(now, transfer);
    }

    /// The stream of an attempt is over; its hypervisor finds its connection closed.
    fn end_stream(&mut self) {
        if let Some(stats) = self.stream.end() {
            self.read_before += stats.bytes_in;
            self.sent_before += stats.bytes_packed;
            self.rate = RateWindow::default();
        }
    }

    /// Does everything that the machine has to do and to say.
    fn act(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.start(action);
        }
        while let Some(event) = self.machine.poll_event() {
            self.report(event);
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

    fn start(&mut self, action: VmSourceAction) {
        tracing::debug!(session = %self.record.id, ?action, "step");
        match &action {
            VmSourceAction::Start { attempt, .. } => {
                self.end_stream();
                let socket = self.socket(*attempt);
                match RamPump::listen(self.link.clone(), self.record.id, *attempt, &socket) {
                    Ok(pump) => self.stream.begin(pump),
                    Err(error) => {
                        let why = format!("{} cannot be listened on: {error}", socket.display());
                        let now = self.now();
                        return self.machine.handle_refused(now, &action, why);
                    }
                }
            }
            VmSourceAction::Stop => {
                self.stopped_at = Some(Instant::now());
                self.record.status.stopped_unix_ms = Some(unix_ms());
            }
            _ => {}
        }
        self.steps_left += 1;
        // The runner lives as long as this.
        let _ = self.steps.send(action);
    }

    fn report(&mut self, event: VmSourceEvent) {
        match event {
            VmSourceEvent::Phase(phase) => {
                tracing::info!(session = %self.record.id, vm = %self.record.vm, "move: {phase:?}");
                if let VmSourcePhase::Failed(error) = &phase {
                    self.record.status.error = Some(error.text.clone());
                }
            }
            VmSourceEvent::Running => {
                let status = &mut self.record.status;
                status.switched_unix_ms = Some(unix_ms());
                let rtt = self.link.handle().estimate().rtt_min.unwrap_or_default();
                status.downtime_ms = self.stopped_at.take().map(|at| {
                    let stood = at.elapsed().saturating_sub(rtt / 2);
                    stood.as_secs_f64() * 1000.0
                });
                tracing::info!(
                    vm = %self.record.vm, to = %self.record.peer, downtime_ms = status.downtime_ms,
                    "the guest runs at the target"
                );
            }
            VmSourceEvent::Note(text) => {
                tracing::warn!(session = %self.record.id, vm = %self.record.vm, "{text}");
                base::add_note(&mut self.record.status, text);
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.published_at = Instant::now();
        let status = &mut self.record.status;
        status.phase = match self.machine.phase() {
            VmSourcePhase::Disks => VmPhase::Disks,
            VmSourcePhase::Ram => VmPhase::Ram,
            VmSourcePhase::Switching | VmSourcePhase::Moved => VmPhase::Switchover,
            VmSourcePhase::Returning => VmPhase::Returning,
            VmSourcePhase::Following => VmPhase::Postcopy,
            VmSourcePhase::Completed if self.disks_done => VmPhase::Completed,
            VmSourcePhase::Completed => VmPhase::Postcopy,
            VmSourcePhase::Cancelled => VmPhase::Cancelled,
            VmSourcePhase::Failed(_) => VmPhase::Failed,
        };
        status.attempt = self.machine.attempt();
        let stats = self.stream.stats().unwrap_or_default();
        status.ram_bytes_read = self.read_before + stats.bytes_in;
        status.ram_bytes_sent = self.sent_before + stats.bytes_packed;
        if status.phase.has_ended() {
            status.ended_unix_ms.get_or_insert_with(unix_ms);
        } else {
            // The end is published when everything is cleaned up.
            self.status.send_replace(status.clone());
        }
    }
}

fn config(record: &SessionRecord) -> VmSourceConfig {
    let request = record.request.as_ref();
    let downtime_ms = request.and_then(|request| request.downtime_ms);
    let ram = request.map(|request| request.ram).unwrap_or_default();
    VmSourceConfig {
        open: VmOpen {
            name: record.vm.clone(),
            description: base::describe(&record.description),
        },
        ram: match ram {
            api::RamMode::Precopy => RamMode::Precopy,
            api::RamMode::Postcopy => RamMode::Postcopy,
            api::RamMode::Auto => RamMode::Auto,
        },
        downtime_max: Duration::from_millis(downtime_ms.unwrap_or(DOWNTIME_MS)),
        was_running: record.description.was_running,
    }
}
