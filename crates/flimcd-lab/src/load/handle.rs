//! Starting a load and talking to it.

use std::{
    fmt, io,
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    Baseline, GuestDisk, LoadOptions, LoadStats, RequestSource, Synthetic, WrongRead,
    baseline::read_blocking,
    engine::{Command, Engine, LoadPhase, Shared, lock},
    oracle::Oracle,
    source::SyntheticSource,
    stats::{Recorder, whole_ms},
};

/// Bytes per request of the final check.
const CHECK_STEP: u64 = 1 << 20;
/// Wrong granules that the final check details.
const DETAILS_MAX: usize = 16;

/// What a load can run into.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Disk and baseline, or old and new disk, differ in size.
    #[error(
        "the disk has {found} bytes, the load knows one of {expected} bytes: not the same volume"
    )]
    Size {
        /// Of the baseline.
        expected: u64,
        /// Of the disk.
        found: u64,
    },
    /// The synthetic requests do not fit the baseline's granule.
    #[error(
        "requests of {request_bytes} bytes cannot be checked in units of {granule} bytes; survey \
         the image with a granule that divides both the request and 64 KiB"
    )]
    Granule {
        /// Asked for.
        request_bytes: u32,
        /// Of the baseline.
        granule: u32,
    },
    /// The connection broke.
    #[error("the load's disk went away: {0}; resume the load on a new connection")]
    DiskGone(String),
    /// A pause waited too long for answers.
    #[error("{in_flight} requests were not answered within {waited:?}; is the volume frozen?")]
    DrainTimeout {
        /// Requests without an answer.
        in_flight: usize,
        /// How long they were waited for.
        waited: Duration,
    },
    /// Only one pause at a time.
    #[error("the load is being paused already")]
    NotRunning,
    /// The load must be paused for that.
    #[error("the load is running; pause it first")]
    NotPaused,
    /// There are no more requests to make.
    #[error("the load came to the end of its requests")]
    Ended,
    /// The load's thread is gone.
    #[error("the load's thread ended unexpectedly; this is a defect of the lab, please report it")]
    Crashed,
    /// Reading the disk for a check failed.
    #[error("the disk cannot be read for the check: {0}")]
    Check(io::Error),
    /// No thread could be had.
    #[error("the load cannot start: {0}")]
    System(io::Error),
}

/// A paused load.
pub struct Paused {
    /// When the last request was answered; `None` if none ever was.
    pub last_completed: Option<Instant>,
    /// The disk it ran on: drop it to close the connection. `None` if it was gone already.
    pub disk: Option<Box<dyn GuestDisk>>,
}

impl fmt::Debug for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paused")
            .field("last_completed", &self.last_completed)
            .finish_non_exhaustive()
    }
}

/// A load that goes on.
#[derive(Clone, Copy, Debug)]
pub struct Resumed {
    /// When the first request on the new disk was answered.
    pub first_completed: Instant,
    /// From the last completed request before to the first one after; `None` if there was none
    /// before.
    pub downtime: Option<Duration>,
}

/// What a check of the whole disk found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FinalCheck {
    /// Bytes read and compared.
    pub bytes: u64,
    /// Granules that were wrong.
    pub wrong_granules: u64,
    /// The first of them.
    pub wrong: Vec<WrongRead>,
}

impl FinalCheck {
    /// Whether every byte was right.
    #[must_use]
    pub const fn is_right(&self) -> bool {
        self.wrong_granules == 0
    }
}

/// Starts loads.
#[derive(Debug)]
pub struct Load;

impl Load {
    /// Starts the load described by `synthetic` on `disk`, whose content is `baseline`.
    ///
    /// # Errors
    /// [`LoadError::Size`] and [`LoadError::Granule`] when the three do not fit.
    pub fn start(
        disk: Box<dyn GuestDisk>,
        baseline: Baseline,
        synthetic: Synthetic,
        options: LoadOptions,
    ) -> Result<LoadHandle, LoadError> {
        let (request_bytes, granule) = (synthetic.request_bytes, baseline.granule());
        if request_bytes == 0 || !request_bytes.is_multiple_of(granule) {
            return Err(LoadError::Granule {
                request_bytes,
                granule,
            });
        }
        let source = SyntheticSource::new(synthetic, baseline.size(), options.seed);
        Self::start_with(disk, baseline, Box::new(source), options)
    }

    /// Starts a load with any source of requests, which must keep to the baseline's granule.
    ///
    /// # Errors
    /// [`LoadError::Size`] when disk and baseline differ.
    pub fn start_with(
        disk: Box<dyn GuestDisk>,
        baseline: Baseline,
        source: Box<dyn RequestSource>,
        options: LoadOptions,
    ) -> Result<LoadHandle, LoadError> {
        if disk.size() != baseline.size() {
            return Err(LoadError::Size {
                expected: baseline.size(),
                found: disk.size(),
            });
        }
        let shared = Arc::new(Mutex::new(Shared {
            oracle: Oracle::new(baseline, &options),
            recorder: Recorder::new(options.interval),
            phase: LoadPhase::Running,
            broken_by: None,
        }));
        let (commands, inbox) = mpsc::channel();
        let start = Instant::now();
        let engine = Engine::new(disk, source, options, start, Arc::clone(&shared), inbox);
        let thread = std::thread::Builder::new()
            .name("guest-load".into())
            .spawn(move || engine.run())
            .map_err(LoadError::System)?;
        Ok(LoadHandle {
            start,
            shared,
            commands,
            thread: Some(thread),
        })
    }
}

/// A running load. Dropping it stops the load and closes its disk.
#[derive(Debug)]
pub struct LoadHandle {
    start: Instant,
    shared: Arc<Mutex<Shared>>,
    commands: mpsc::Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl LoadHandle {
    /// Stops making requests, waits for all answers and gives the disk back.
    ///
    /// # Errors
    /// [`LoadError::DrainTimeout`] and [`LoadError::DiskGone`] when answers do not come; the load
    /// can be resumed on another disk all the same.
    pub fn pause(&self) -> Result<Paused, LoadError> {
        let (reply, answer) = mpsc::channel();
        self.commands
            .send(Command::Pause(reply))
            .map_err(|_| LoadError::Crashed)?;
        answer.recv().map_err(|_| LoadError::Crashed)?
    }

    /// Goes on with `disk`; returns after the first completed request.
    ///
    /// # Errors
    /// [`LoadError::Size`], [`LoadError::NotPaused`], [`LoadError::Ended`] when it cannot go on;
    /// [`LoadError::DiskGone`] when the new disk goes away before it answered anything.
    pub fn resume_on(&self, disk: Box<dyn GuestDisk>) -> Result<Resumed, LoadError> {
        let (reply, answer) = mpsc::channel();
        self.commands
            .send(Command::Resume(disk, reply))
            .map_err(|_| LoadError::Crashed)?;
        answer.recv().map_err(|_| LoadError::Crashed)?
    }

    /// What it is doing now.
    #[must_use]
    pub fn phase(&self) -> LoadPhase {
        lock(&self.shared).phase
    }

    /// Why the disk went away, if it did since the start.
    #[must_use]
    pub fn broken_by(&self) -> Option<String> {
        lock(&self.shared).broken_by.clone()
    }

    /// Starts a phase in the statistics, such as "migration".
    pub fn begin_phase(&self, name: &str) {
        lock(&self.shared)
            .recorder
            .begin_phase(name, self.start.elapsed());
    }

    /// Everything recorded since the start.
    #[must_use]
    pub fn snapshot(&self) -> LoadStats {
        lock(&self.shared).recorder.total(self.start.elapsed())
    }

    /// What was recorded in each phase; the current one is the last.
    #[must_use]
    pub fn phases(&self) -> Vec<LoadStats> {
        lock(&self.shared).recorder.phases(self.start.elapsed())
    }

    /// Reads all of `disk` and compares every byte with what it must hold. The load must not be
    /// running.
    ///
    /// # Errors
    /// [`LoadError::NotPaused`], [`LoadError::Size`], or [`LoadError::Check`] when a read fails.
    pub fn final_check(&self, disk: &mut dyn GuestDisk) -> Result<FinalCheck, LoadError> {
        let mut check = FinalCheck {
            bytes: 0,
            wrong_granules: 0,
            wrong: Vec::new(),
        };
        let mut buffer = Vec::new();
        loop {
            let shared = &mut *lock(&self.shared);
            if matches!(shared.phase, LoadPhase::Running | LoadPhase::Pausing) {
                return Err(LoadError::NotPaused);
            }
            let (offset, size) = (check.bytes, shared.oracle.size());
            if disk.size() != size {
                return Err(LoadError::Size {
                    expected: size,
                    found: disk.size(),
                });
            }
            if offset >= size {
                return Ok(check);
            }
            buffer = read_blocking(disk, offset, CHECK_STEP.min(size - offset), buffer)
                .map_err(LoadError::Check)?;
            let at_ms = whole_ms(self.start.elapsed());
            shared
                .oracle
                .check(offset, &buffer, |offset, expected, found| {
                    check.wrong_granules += 1;
                    if check.wrong.len() < DETAILS_MAX {
                        check.wrong.push(WrongRead {
                            offset,
                            expected,
                            found,
                            at_ms,
                        });
                    }
                });
            check.bytes += buffer.len() as u64;
        }
    }

    /// Granules of which a write was never answered and which nobody has read since.
    #[must_use]
    pub fn unsettled_granules(&self) -> usize {
        lock(&self.shared).oracle.unsettled()
    }
}

impl Drop for LoadHandle {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the load's thread panicked");
        }
    }
}
