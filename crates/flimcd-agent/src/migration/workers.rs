//! Threads that do the blocking work of one migration.
//!
//! ```text
//!  driver ──► lane 0 ─┐                      content: read and pack, or unpack and apply
//!         ──► lane 1 ─┼──► answers ──► driver
//!         ──► records ┘                      syncs, records: may wait long for the disk
//! ```
//! Work of one lane is done in the order it was given. What touches one chunk always goes to the same
//! lane, so that content is applied in the order it arrived; a job over several chunks is done
//! alone, after all before it and before all after it.
//! The driver bounds what is queued: by the machine's own windows and the link's credits.

use flimcd_content::{Compression, Decoder, Effort, Encoder};
use flimcd_core::{BlockRange, ChunkIndex};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Barrier,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

/// Threads for content.
const LANES: usize = 2;

/// What a content thread keeps between jobs.
pub(crate) struct Tools {
    /// For fast links.
    pub(crate) pack: Encoder,
    /// For others.
    pub(crate) pack_thoroughly: Encoder,
    pub(crate) keep: Encoder,
    pub(crate) unpack: Decoder,
    pub(crate) buffer: Vec<u8>,
}

impl Tools {
    fn new() -> Self {
        Self {
            pack: Encoder::new(Compression::DEFAULT),
            pack_thoroughly: Encoder::new(Compression::THOROUGH),
            keep: Encoder::new(Compression::None),
            unpack: Decoder::new(),
            buffer: Vec::new(),
        }
    }

    /// The encoder that compresses so, or the one that does not.
    pub(crate) fn encoder(&mut self, effort: Option<Effort>) -> &mut Encoder {
        match effort {
            Some(Effort::Thorough) => &mut self.pack_thoroughly,
            Some(_) => &mut self.pack,
            None => &mut self.keep,
        }
    }
}

type Job = Box<dyn FnOnce(&mut Tools) + Send>;

enum Work {
    Do(Job),
    /// All lanes meet before and after; the one that has the job does it between.
    Alone(Arc<Barrier>, Option<Job>),
}

/// See the module. Dropping it lets the threads finish what they were given.
pub(crate) struct Workers {
    lanes: Vec<Sender<Work>>,
    records: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
    next: usize,
}

impl Workers {
    /// Starts the threads of a migration.
    pub(crate) fn start(label: &str) -> io::Result<Self> {
        let mut threads = Vec::new();
        let mut lanes = Vec::new();
        for lane in 0..LANES {
            let (sender, receiver) = channel();
            let named = thread::Builder::new().name(format!("{label}-{lane}"));
            threads.push(named.spawn(move || run_lane(&receiver))?);
            lanes.push(sender);
        }
        let (records, receiver) = channel::<Job>();
        let named = thread::Builder::new().name(format!("{label}-rec"));
        threads.push(named.spawn(move || {
            let mut tools = Tools::new();
            for job in receiver {
                run(job, &mut tools);
            }
        })?);
        Ok(Self {
            lanes,
            records,
            threads,
            next: 0,
        })
    }

    /// Work on content that has no order to anything.
    pub(crate) fn any_order(&mut self, job: impl FnOnce(&mut Tools) + Send + 'static) {
        self.next = (self.next + 1) % LANES;
        self.send(self.next, Work::Do(Box::new(job)));
    }

    /// Work on the content of these runs, in order with all other such work on the same chunks.
    pub(crate) fn in_order(
        &self,
        mut ranges: impl Iterator<Item = BlockRange>,
        job: impl FnOnce(&mut Tools) + Send + 'static,
    ) {
        let chunk = |range: BlockRange| {
            let first = flimcd_core::BlockIndex(range.start).chunk();
            let last = flimcd_core::BlockIndex(range.end.max(1) - 1).chunk();
            (first == last).then_some(first)
        };
        let first: Option<ChunkIndex> = ranges.next().and_then(chunk);
        let one = first.filter(|_| ranges.all(|range| chunk(range) == first));
        let job: Job = Box::new(job);
        match one {
            Some(chunk) => {
                let lane = usize::try_from(chunk.0 % LANES as u64).unwrap_or(0);
                self.send(lane, Work::Do(job));
            }
            None => {
                let barrier = Arc::new(Barrier::new(LANES));
                let mut job = Some(job);
                for lane in 0..LANES {
                    self.send(lane, Work::Alone(barrier.clone(), job.take()));
                }
            }
        }
    }

    /// Work on records, in order with all other such work.
    pub(crate) fn record(&self, job: impl FnOnce() + Send + 'static) {
        let sent = self.records.send(Box::new(move |_| job()));
        debug_assert!(sent.is_ok(), "the thread lives as long as this");
    }

    /// Waits for all work that was given.
    pub(crate) fn finish(self) {
        drop(self.lanes);
        drop(self.records);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread of a migration has panicked");
            }
        }
    }

    fn send(&self, lane: usize, work: Work) {
        let sent = self.lanes[lane].send(work);
        debug_assert!(sent.is_ok(), "the thread lives as long as this");
    }
}

/// Runs a job. One that panics never answers, and its migration stands still from then on; the other
/// work of the thread, and whoever meets it at a barrier, must not.
fn run(job: Job, tools: &mut Tools) {
    if catch_unwind(AssertUnwindSafe(|| job(tools))).is_err() {
        tracing::error!("a migration's work has panicked; restart the agent to go on with it");
        *tools = Tools::new();
    }
}

fn run_lane(work: &Receiver<Work>) {
    let mut tools = Tools::new();
    for work in work {
        match work {
            Work::Do(job) => run(job, &mut tools),
            Work::Alone(barrier, job) => {
                barrier.wait();
                if let Some(job) = job {
                    run(job, &mut tools);
                }
                barrier.wait();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Each job writes its number into its chunks; the last one given must be the one that stays.
    #[test]
    fn work_on_one_chunk_keeps_its_order() {
        let content = Arc::new(Mutex::new(vec![0u32; 8]));
        let workers = Workers::start("test").unwrap();
        let mut expected = vec![0u32; 8];
        for number in 1..500u32 {
            let first = u64::from(number * 7 % 8);
            let last = if number % 11 == 0 { 8 } else { first + 1 };
            let ranges = (first..last).map(|chunk| BlockRange::new(chunk * 16 + 1, chunk * 16 + 9));
            for chunk in first..last {
                expected[usize::try_from(chunk).unwrap()] = number;
            }
            let content = content.clone();
            workers.in_order(ranges, move |_| {
                for chunk in first..last {
                    content.lock().unwrap()[usize::try_from(chunk).unwrap()] = number;
                }
            });
        }
        workers.finish();
        assert_eq!(*content.lock().unwrap(), expected);
    }
}
