//! A guest that checks every byte it reads, one request at a time.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flimcd_nbd::Client;

/// Bytes of each request.
const REQUEST: usize = 4096;

/// A small generator: the tests need no good randomness, but the same each time.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Content with holes, runs of text-like and of random bytes, in chunks of 64 KiB.
pub(crate) fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed | 1);
    let mut content = vec![0; bytes];
    for chunk in content.chunks_mut(65536) {
        match rng.below(4) {
            0 => {}
            1 => chunk
                .iter_mut()
                .enumerate()
                .for_each(|(at, byte)| *byte = (at / 97) as u8 | 1),
            _ => chunk.chunks_mut(8).for_each(|part| {
                let number = rng.next().to_le_bytes();
                let length = part.len();
                part.copy_from_slice(&number[..length]);
            }),
        }
    }
    content
}

/// Writes `content` as a file with holes where it is zero.
pub(crate) fn write_sparse(path: &Path, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (at, chunk) in content.chunks(65536).enumerate() {
        if chunk.iter().any(|&byte| byte != 0) {
            file.write_all_at(chunk, at as u64 * 65536).unwrap();
        }
    }
}

/// What the guest believes to be on its disk, and where the disk is.
pub(crate) struct Guest {
    model: Vec<u8>,
    rng: Rng,
    /// A request that was not answered: it is made again before anything else.
    pending: Option<Step>,
    /// Counted up with each request that was answered.
    pub(crate) requests: Arc<AtomicU64>,
}

/// A guest that works until it is told to stop.
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    pub(crate) requests: Arc<AtomicU64>,
    thread: JoinHandle<Guest>,
}

impl Guest {
    pub(crate) fn new(model: Vec<u8>, seed: u64) -> Self {
        Self {
            model,
            rng: Rng(seed | 1),
            pending: None,
            requests: Arc::default(),
        }
    }

    /// Works on the export until it is told to stop. When a request fails, it is made again on a new
    /// connection, to the next of the sockets: so a guest survives that an agent is killed, or that its disk moves.
    pub(crate) fn start(mut self, sockets: &[PathBuf], export: &str) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, export, sockets) = (stop.clone(), export.to_owned(), sockets.to_vec());
        let requests = self.requests.clone();
        let thread = thread::spawn(move || {
            let mut sockets = sockets.iter().cycle();
            let mut client = None;
            while !flag.load(Ordering::Relaxed) {
                let Some(connected) = &mut client else {
                    client = connect(&mut sockets, &export, &flag);
                    continue;
                };
                let step = self.pending.take().unwrap_or_else(|| self.plan());
                if !self.run(connected, &step) {
                    self.pending = Some(step);
                    client = None;
                }
                // Guests that never rest would leave the agents no processor.
                thread::sleep(Duration::from_micros(200));
            }
            self
        });
        Running {
            stop,
            requests,
            thread,
        }
    }

    fn plan(&mut self) -> Step {
        let blocks = self.model.len().div_ceil(REQUEST) as u64;
        // Half of the requests go to a twentieth of the disk.
        let block = match self.rng.below(2) {
            0 => self.rng.below(blocks),
            _ => self.rng.below(blocks.div_ceil(20)),
        } as usize;
        let at = block * REQUEST;
        match self.rng.below(10) {
            0..5 => Step::Read(at),
            5 => Step::Zero(at),
            6 => Step::Flush,
            7 if self.length(at) == REQUEST => Step::Write(at + 512, self.fresh(1024)),
            _ => {
                let length = self.length(at);
                Step::Write(at, self.fresh(length))
            }
        }
    }

    /// Bytes of the block at `at`: the last one may be short.
    fn length(&self, at: usize) -> usize {
        REQUEST.min(self.model.len() - at)
    }

    fn fresh(&mut self, bytes: usize) -> Vec<u8> {
        let stamp = self.rng.next().to_le_bytes();
        stamp.iter().copied().cycle().take(bytes).collect()
    }

    /// Runs one step; false when it was not answered, or refused. The caller makes it again, so the model need
    /// not know whether an unanswered write is there.
    fn run(&mut self, client: &mut Client, step: &Step) -> bool {
        let done = match step {
            Step::Read(at) => {
                let mut got = vec![0; self.length(*at)];
                let done = client.read(*at as u64, &mut got);
                if done.is_ok() {
                    assert_same(&got, &self.model[*at..*at + got.len()], *at);
                }
                done
            }
            Step::Write(at, data) => {
                let done = client.write(*at as u64, data, false);
                if done.is_ok() {
                    self.model[*at..*at + data.len()].copy_from_slice(data);
                }
                done
            }
            Step::Zero(at) => {
                let length = self.length(*at);
                let done = client.write_zeroes(*at as u64, length as u32, true);
                if done.is_ok() {
                    self.model[*at..*at + length].fill(0);
                }
                done
            }
            Step::Flush => client.flush(),
        };
        if done.is_ok() {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        done.is_ok()
    }

    /// Compares the whole disk through its export.
    pub(crate) fn check_all(&self, socket: &Path, export: &str) {
        let mut client = Client::connect_unix(socket, export).unwrap();
        let mut got = vec![0; 1 << 20];
        for (at, expected) in self.model.chunks(1 << 20).enumerate() {
            let got = &mut got[..expected.len()];
            client.read((at << 20) as u64, got).unwrap();
            assert_same(got, expected, at << 20);
        }
        client.disconnect().unwrap();
    }

    /// Compares the whole disk with a file.
    pub(crate) fn check_file(&self, path: &Path) {
        assert_same(&fs::read(path).unwrap(), &self.model, 0);
    }
}

fn assert_same(got: &[u8], expected: &[u8], base: usize) {
    assert_eq!(got.len(), expected.len());
    if let Some(at) = got
        .iter()
        .zip(expected)
        .position(|(got, expected)| got != expected)
    {
        panic!(
            "wrong content at {}: {} instead of {}",
            base + at,
            got[at],
            expected[at]
        );
    }
}

enum Step {
    Read(usize),
    Write(usize, Vec<u8>),
    Zero(usize),
    Flush,
}

/// Connects, again and again while nobody is there; `None` once told to stop.
fn connect<'a>(
    sockets: &mut impl Iterator<Item = &'a PathBuf>,
    export: &str,
    stop: &AtomicBool,
) -> Option<Client> {
    let begin = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        match Client::connect_unix(sockets.next()?, export) {
            Ok(client) => return Some(client),
            Err(error) => {
                assert!(
                    begin.elapsed() < Duration::from_secs(60),
                    "cannot connect: {error}"
                );
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

impl Running {
    /// Lets it finish its request, and takes it off the disk.
    pub(crate) async fn stop(self) -> Guest {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread;
        match tokio::task::spawn_blocking(move || thread.join())
            .await
            .unwrap()
        {
            Ok(guest) => guest,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}
