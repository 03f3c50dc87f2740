//! The second half of guests' flushes in post-copy, on a thread of its own: writing presence and waiting for the disk would
//! keep a connection's thread from its other requests.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use super::Volume;
use crate::rules::FlushPlan;

/// A flush whose data is durable, and whom to tell when the rest is.
pub(crate) struct FlushJob {
    pub(crate) volume: Arc<Volume>,
    pub(crate) plan: FlushPlan,
    pub(crate) done: Box<dyn FnOnce(io::Result<()>) + Send>,
}

impl FlushJob {
    fn run(self) {
        let Self {
            volume,
            mut plan,
            done,
        } = self;
        let result = volume.run_flush(&mut plan);
        volume
            .core()
            .change(|core| core.rules.end_flush(plan, result.is_ok()));
        // Before anybody hears of the end: whoever closes the volume then finds it closed.
        drop(volume);
        done(result);
    }
}

/// The way to the thread. It starts with the first job and ends when this is dropped and its jobs are done.
#[derive(Default)]
pub(super) struct Flusher {
    jobs: Mutex<Option<Sender<FlushJob>>>,
}

impl Flusher {
    /// Runs `job` on the thread; right here when there cannot be one.
    pub(super) fn run(&self, job: FlushJob) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.is_none() {
            let (sender, receiver) = channel();
            let name = "volume-flush".to_owned();
            match thread::Builder::new()
                .name(name)
                .spawn(move || work(&receiver))
            {
                Ok(_) => *jobs = Some(sender),
                Err(error) => {
                    tracing::warn!(%error, "no thread for flushes: connections wait for them");
                }
            }
        }
        let unsent = match &*jobs {
            Some(sender) => sender.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        drop(jobs);
        if let Some(job) = unsent {
            job.run();
        }
    }

    /// Lets the thread end, once post-copy is over.
    pub(super) fn stop(&self) {
        *self.jobs.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn work(jobs: &Receiver<FlushJob>) {
    while let Ok(job) = jobs.recv() {
        job.run();
    }
}
