//! The load's thread: issues requests, checks answers, pauses, and moves between disks.
//!
//! ```text
//!            pause             all answered
//!  Running ────────► Pausing ───────────────► Paused ──┐
//!   ▲ │ └─ disk gone ─► Broken ─┐   source at its end  │
//!   │ └──────────────► Ended ───┤                      │
//!   └───────── resume on a disk ┴──────────────────────┘
//! ```

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    DiskOp, DiskReply, DiskRequest, GuestDisk, LoadError, LoadOptions, Paused, PlannedOp,
    RequestSource, Resumed,
    inflight::{InFlight, Pending},
    oracle::{Oracle, States},
    pace::Pacer,
    stats::Recorder,
};

/// Longest wait for an answer before commands are looked at again.
const LOOK: Duration = Duration::from_millis(5);
/// Buffers kept for reuse.
const SPARE_BUFFERS_MAX: usize = 256;

/// What the load is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadPhase {
    /// Making requests.
    Running,
    /// Waiting for the answers to what is in flight.
    Pausing,
    /// Stopped by the user.
    Paused,
    /// The disk went away; goes on when resumed on another.
    Broken,
    /// The source of requests has no more, and all were answered.
    Ended,
}

/// What the engine shares with the handle.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) oracle: Oracle,
    pub(super) recorder: Recorder,
    pub(super) phase: LoadPhase,
    /// Why it is [`LoadPhase::Broken`].
    pub(super) broken_by: Option<String>,
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) enum Command {
    Pause(mpsc::Sender<Result<Paused, LoadError>>),
    Resume(Box<dyn GuestDisk>, mpsc::Sender<Result<Resumed, LoadError>>),
    Stop,
}

/// When the next request can go.
enum Next {
    Now(PlannedOp),
    In(Duration),
    /// After an answer.
    Blocked,
    Ended,
}

pub(super) struct Engine {
    start: Instant,
    shared: Arc<Mutex<Shared>>,
    inbox: mpsc::Receiver<Command>,
    disk: Option<Box<dyn GuestDisk>>,
    source: Box<dyn RequestSource>,
    options: LoadOptions,
    phase: LoadPhase,
    pacer: Pacer,
    in_flight: InFlight,
    /// Requests that wait for conflicting ones, in order.
    deferred: VecDeque<PlannedOp>,
    /// The next request, when it is not time for it yet.
    held: Option<PlannedOp>,
    spare: Vec<Vec<u8>>,
    /// Time spent paused: the source's times do not count it.
    paused_total: Duration,
    paused_since: Duration,
    last_completed: Option<Instant>,
    pause_reply: Option<mpsc::Sender<Result<Paused, LoadError>>>,
    resume_reply: Option<mpsc::Sender<Result<Resumed, LoadError>>>,
}

impl Engine {
    pub(super) fn new(
        disk: Box<dyn GuestDisk>,
        source: Box<dyn RequestSource>,
        options: LoadOptions,
        start: Instant,
        shared: Arc<Mutex<Shared>>,
        inbox: mpsc::Receiver<Command>,
    ) -> Self {
        let pacer = {
            let oracle = &lock(&shared).oracle;
            let granules = usize::try_from(oracle.size().div_ceil(u64::from(oracle.granule())));
            Pacer::new(
                options.dirty_bytes_per_sec,
                options.dirty_window,
                oracle.granule(),
                granules.unwrap_or(usize::MAX),
            )
        };
        Self {
            start,
            shared,
            inbox,
            disk: Some(disk),
            source,
            options,
            phase: LoadPhase::Running,
            pacer,
            in_flight: InFlight::default(),
            deferred: VecDeque::new(),
            held: None,
            spare: Vec::new(),
            paused_total: Duration::ZERO,
            paused_since: Duration::ZERO,
            last_completed: None,
            pause_reply: None,
            resume_reply: None,
        }
    }

    pub(super) fn run(mut self) {
        while self.obey() {
            if let Err(error) = self.step() {
                self.disk_gone(&error);
            }
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn enter(&mut self, phase: LoadPhase) {
        self.phase = phase;
        lock(&self.shared).phase = phase;
    }

    /// Takes commands; waits for one when there is nothing else to do. False at the end.
    fn obey(&mut self) -> bool {
        loop {
            let is_idle = !matches!(self.phase, LoadPhase::Running | LoadPhase::Pausing);
            let command = if is_idle {
                self.inbox.recv().ok()
            } else {
                match self.inbox.try_recv() {
                    Err(mpsc::TryRecvError::Empty) => return true,
                    other => other.ok(),
                }
            };
            match command {
                None | Some(Command::Stop) => return false,
                Some(Command::Pause(reply)) => self.pause(reply),
                Some(Command::Resume(disk, reply)) => self.resume(disk, reply),
            }
        }
    }

    fn pause(&mut self, reply: mpsc::Sender<Result<Paused, LoadError>>) {
        match self.phase {
            LoadPhase::Running => {
                self.paused_since = self.now();
                self.pause_reply = Some(reply);
                self.enter(LoadPhase::Pausing);
            }
            LoadPhase::Pausing => drop(reply.send(Err(LoadError::NotRunning))),
            LoadPhase::Paused | LoadPhase::Broken | LoadPhase::Ended => {
                let paused = Paused {
                    last_completed: self.last_completed,
                    disk: self.disk.take(),
                };
                drop(reply.send(Ok(paused)));
                if self.phase == LoadPhase::Ended {
                    self.paused_since = self.now();
                    self.enter(LoadPhase::Paused);
                }
            }
        }
    }

    fn resume(
        &mut self,
        disk: Box<dyn GuestDisk>,
        reply: mpsc::Sender<Result<Resumed, LoadError>>,
    ) {
        let expected = lock(&self.shared).oracle.size();
        if matches!(self.phase, LoadPhase::Running | LoadPhase::Pausing) {
            drop(reply.send(Err(LoadError::NotPaused)));
        } else if disk.size() != expected {
            drop(reply.send(Err(LoadError::Size {
                expected,
                found: disk.size(),
            })));
        } else {
            self.disk = Some(disk);
            self.resume_reply = Some(reply);
            self.paused_total += self.now().saturating_sub(self.paused_since);
            self.enter(LoadPhase::Running);
        }
    }

    /// Issues what can be issued and waits a little for answers.
    fn step(&mut self) -> io::Result<()> {
        let mut wait = LOOK;
        if self.phase == LoadPhase::Running {
            wait = self.issue()?;
        }
        if self.in_flight.is_empty() {
            if self.phase == LoadPhase::Pausing {
                self.is_paused();
                return Ok(());
            }
            if self.is_at_end() {
                self.is_ended();
                return Ok(());
            }
        } else if self.phase == LoadPhase::Pausing
            && self.now().saturating_sub(self.paused_since) > self.options.drain_timeout
        {
            self.give_up_draining();
            return Ok(());
        }
        let mut timeout = wait.min(LOOK);
        while let Some(disk) = self.disk.as_mut() {
            let Some(reply) = disk.receive(timeout)? else {
                break;
            };
            self.answered(reply);
            timeout = Duration::ZERO;
        }
        Ok(())
    }

    /// Submits requests until the queue is full or the next has to wait; says how long.
    fn issue(&mut self) -> io::Result<Duration> {
        while self.in_flight.len() < self.options.queue_depth.max(1) as usize {
            match self.next() {
                Next::Now(plan) => self.submit(plan)?,
                Next::In(wait) => return Ok(wait),
                Next::Blocked | Next::Ended => break,
            }
        }
        Ok(LOOK)
    }

    fn next(&mut self) -> Next {
        for index in 0..self.deferred.len() {
            let plan = &self.deferred[index];
            let is_first = !self
                .deferred
                .range(..index)
                .any(|earlier| earlier.conflicts_with(plan));
            if is_first
                && self.in_flight.admits(plan)
                && let Some(plan) = self.deferred.remove(index)
            {
                return Next::Now(plan);
            }
        }
        let now = self.start.elapsed();
        while self.deferred.len() < self.options.queue_depth.max(1) as usize {
            let Some(plan) = self.held.take().or_else(|| self.source.next_op()) else {
                return if self.deferred.is_empty() {
                    Next::Ended
                } else {
                    Next::Blocked
                };
            };
            let running = now.saturating_sub(self.paused_total);
            let mut wait = plan
                .due
                .map_or(Duration::ZERO, |due| due.saturating_sub(running));
            if matches!(plan.op, DiskOp::Write | DiskOp::WriteZeroes) {
                wait = wait.max(self.pacer.wait(now));
            }
            if !wait.is_zero() {
                self.held = Some(plan);
                return Next::In(wait);
            }
            if self.in_flight.admits(&plan)
                && !self
                    .deferred
                    .iter()
                    .any(|earlier| earlier.conflicts_with(&plan))
            {
                return Next::Now(plan);
            }
            self.deferred.push_back(plan);
        }
        Next::Blocked
    }

    fn submit(&mut self, plan: PlannedOp) -> io::Result<()> {
        let now = self.now();
        let mut data = Vec::new();
        let mut states = States::ZEROED;
        let granules = {
            let mut shared = lock(&self.shared);
            if matches!(plan.op, DiskOp::Read | DiskOp::Write) {
                data = self.spare.pop().unwrap_or_default();
                data.resize(plan.length as usize, 0);
            }
            if plan.op == DiskOp::Write {
                states = shared
                    .oracle
                    .make(plan.offset, &mut data, plan.content.as_deref());
            }
            if self.in_flight.is_empty() {
                shared.recorder.woke(now);
            }
            let granules = shared.oracle.granules(plan.offset, plan.length);
            if matches!(plan.op, DiskOp::Write | DiskOp::WriteZeroes) {
                let before = self.pacer.fresh_bytes();
                self.pacer.charge(granules.clone(), now);
                shared.recorder.dirtied(self.pacer.fresh_bytes() - before);
            }
            granules
        };
        let PlannedOp {
            op, offset, length, ..
        } = plan;
        let id = self.in_flight.insert(Pending {
            plan,
            granules,
            states,
            submitted: now,
        });
        let request = DiskRequest {
            id,
            op,
            offset,
            length,
            data,
        };
        match self.disk.as_mut() {
            Some(disk) => disk.submit(request),
            None => Err(io::Error::from(io::ErrorKind::NotConnected)),
        }
    }

    fn answered(&mut self, reply: DiskReply) {
        let (at, now) = (Instant::now(), self.now());
        let Some(Pending {
            plan,
            granules,
            states,
            submitted,
        }) = self.in_flight.remove(reply.id)
        else {
            let mut shared = lock(&self.shared);
            shared
                .recorder
                .failed("an answer to a request that was never made", now);
            return;
        };
        {
            let shared = &mut *lock(&self.shared);
            match reply.result {
                Ok(()) => {
                    let latency = now.saturating_sub(submitted);
                    shared
                        .recorder
                        .completed(plan.op, u64::from(plan.length), latency, now);
                    match plan.op {
                        DiskOp::Read => check(shared, plan.offset, &reply.data, now),
                        DiskOp::Write | DiskOp::WriteZeroes => {
                            shared.oracle.wrote(granules, &states);
                        }
                        DiskOp::Flush => {}
                    }
                }
                Err(error) => {
                    let PlannedOp {
                        op, offset, length, ..
                    } = plan;
                    let what = format!("{op:?} of {length} bytes at byte {offset}: {error}");
                    shared.recorder.failed(&what, now);
                    if matches!(op, DiskOp::Write | DiskOp::WriteZeroes) {
                        shared.oracle.unanswered(granules, &states);
                    }
                    return;
                }
            }
        }
        if self.spare.len() < SPARE_BUFFERS_MAX && reply.data.capacity() > 0 {
            self.spare.push(reply.data);
        }
        if let Some(resumed) = self.resume_reply.take() {
            let downtime = self
                .last_completed
                .map(|last| at.saturating_duration_since(last));
            drop(resumed.send(Ok(Resumed {
                first_completed: at,
                downtime,
            })));
        }
        self.last_completed = Some(at);
    }

    fn is_at_end(&mut self) -> bool {
        if self.held.is_none() {
            self.held = self.source.next_op();
        }
        self.held.is_none() && self.deferred.is_empty()
    }

    fn is_paused(&mut self) {
        self.enter(LoadPhase::Paused);
        if let Some(reply) = self.pause_reply.take() {
            let paused = Paused {
                last_completed: self.last_completed,
                disk: self.disk.take(),
            };
            drop(reply.send(Ok(paused)));
        }
    }

    fn is_ended(&mut self) {
        self.enter(LoadPhase::Ended);
        if let Some(reply) = self.resume_reply.take() {
            drop(reply.send(Err(LoadError::Ended)));
        }
    }

    fn give_up_draining(&mut self) {
        let in_flight = self.in_flight.len();
        self.forget_in_flight();
        self.disk = None;
        self.enter(LoadPhase::Broken);
        if let Some(reply) = self.pause_reply.take() {
            let waited = self.options.drain_timeout;
            drop(reply.send(Err(LoadError::DrainTimeout { in_flight, waited })));
        }
    }

    fn disk_gone(&mut self, error: &io::Error) {
        tracing::debug!(%error, "the load's disk is gone");
        let was_pausing = self.phase == LoadPhase::Pausing;
        self.forget_in_flight();
        self.disk = None;
        if !was_pausing {
            self.paused_since = self.now();
        }
        lock(&self.shared).broken_by = Some(error.to_string());
        self.enter(LoadPhase::Broken);
        let gone = || LoadError::DiskGone(error.to_string());
        if let Some(reply) = self.pause_reply.take() {
            drop(reply.send(Err(gone())));
        }
        if let Some(reply) = self.resume_reply.take() {
            drop(reply.send(Err(gone())));
        }
    }

    /// Nobody will answer what is in flight: its writes may have been done or not.
    fn forget_in_flight(&mut self) {
        let shared = &mut *lock(&self.shared);
        let pending = self.in_flight.take_all();
        shared.recorder.lost(pending.len() as u64);
        for Pending {
            plan,
            granules,
            states,
            ..
        } in pending
        {
            if matches!(plan.op, DiskOp::Write | DiskOp::WriteZeroes) {
                shared.oracle.unanswered(granules, &states);
            }
        }
    }
}

fn check(shared: &mut Shared, offset: u64, data: &[u8], now: Duration) {
    let mut wrong = Vec::new();
    shared.oracle.check(offset, data, |at, expected, found| {
        wrong.push((at, expected, found));
    });
    if !wrong.is_empty() {
        shared.recorder.wrong_read(&wrong, now);
    }
}
