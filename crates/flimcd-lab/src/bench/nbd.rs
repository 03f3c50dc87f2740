//! Block export side by side: our NBD server, `qemu-nbd` and `nbdkit file`, on the same image.
//!
//! One load client for all of them, one connection, fresh server processes that take turns. Every cell begins with
//! the image's pages dropped from the cache, and a cell that writes ends with a flush inside the measured time, so
//! that a server that only fills the page cache does not look fast. `nbdkit file` has no direct I/O: what it reads a second time
//! comes from memory.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use flimcd_nbd::{Client, ClientError, Server, client::Op};
use flimcd_volume::{
    Volume,
    device::{DirectIo, FileDevice, OpenError, OpenOptions},
    rules::Mode,
};
use serde::Serialize;

use super::harness::{Candidate, Samples, compare};
use crate::report::{Align, Table};

/// Tells [`serve`] to use the page cache.
const BUFFERED: &str = "FLIMCD_BENCH_BUFFERED";
/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(10);
/// Longest request of a cell.
const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the image and the sockets are made, in a directory that is removed at the end. On the disk that matters.
    pub dir: PathBuf,
    /// Size of the image in bytes, rounded down to 1 MiB.
    pub size_bytes: u64,
    /// Length of one measurement.
    pub runtime: Duration,
    /// Measurements per server and cell.
    pub rounds: u32,
    /// Only cells whose name contains this.
    pub only: Option<String>,
    /// Command that runs [`serve`] in a process of its own; image and socket are appended. Without it the server runs in this
    /// process, which saves it some of the cost of a switch between processes, and the report says so.
    pub serve_command: Option<Vec<String>>,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Files, processes.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system says.
        source: io::Error,
    },
    /// A server did not begin to listen.
    #[error("{name} did not listen within {} s; it said: {said}", START_MAX.as_secs())]
    NotListening {
        /// The server.
        name: String,
        /// Its error output.
        said: String,
    },
    /// A server broke off or refused a request.
    #[error("{name}: {source}")]
    Client {
        /// The server.
        name: String,
        /// What the client says.
        source: ClientError,
    },
    /// Our own server cannot use the image.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Our own server cannot listen.
    #[error(transparent)]
    Bind(#[from] flimcd_nbd::BindError),
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.into();
    |source| BenchError::System { what, source }
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Name in the table.
    pub name: &'static str,
    /// Whether it writes.
    pub writes: bool,
    /// Whether places are random.
    pub random: bool,
    /// Bytes per request.
    pub request_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
}

/// All cells.
pub const CELLS: [Cell; 6] = [
    Cell {
        name: "4 KiB random read, 1 in flight",
        writes: false,
        random: true,
        request_bytes: 4096,
        depth: 1,
    },
    Cell {
        name: "4 KiB random read, 32 in flight",
        writes: false,
        random: true,
        request_bytes: 4096,
        depth: 32,
    },
    Cell {
        name: "4 KiB random write, 1 in flight",
        writes: true,
        random: true,
        request_bytes: 4096,
        depth: 1,
    },
    Cell {
        name: "4 KiB random write, 32 in flight",
        writes: true,
        random: true,
        request_bytes: 4096,
        depth: 32,
    },
    Cell {
        name: "1 MiB sequential read, 4 in flight",
        writes: false,
        random: false,
        request_bytes: 1 << 20,
        depth: 4,
    },
    Cell {
        name: "1 MiB sequential write, 4 in flight",
        writes: true,
        random: false,
        request_bytes: 1 << 20,
        depth: 4,
    },
];

/// Ours and the better peer of one class in one cell.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The class.
    pub class: Class,
    /// The peer with the highest median; `None` without peers.
    pub better_peer: Option<String>,
    /// Ours by the better peer's: median of the ratios within each round.
    pub ratio: Option<f64>,
}

/// Results of one cell.
#[derive(Clone, Debug, Serialize)]
pub struct CellReport {
    /// The load.
    pub cell: Cell,
    /// Requests per second of each server.
    pub requests_per_sec: Vec<Samples>,
    /// One per class.
    pub comparisons: Vec<Comparison>,
}

/// All results.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Size of the image in bytes.
    pub size_bytes: u64,
    /// Seconds of one measurement.
    pub runtime_s: f64,
    /// How our server did its I/O.
    pub own_backend: String,
    /// Whether our server had a process of its own, as its peers have.
    pub own_process: bool,
    /// Peers that are not installed.
    pub missing_peers: Vec<String>,
    /// One per cell.
    pub cells: Vec<CellReport>,
}

/// Whether the page cache is avoided. Servers are compared within a class, because the page cache changes
/// what is measured: it makes a write a copy to memory, and a second read of a block one from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// O_DIRECT.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A server under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Own,
    QemuUring,
    QemuNative,
    OwnBuffered,
    QemuBuffered,
    Nbdkit,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Own,
        Self::QemuUring,
        Self::QemuNative,
        Self::OwnBuffered,
        Self::QemuBuffered,
        Self::Nbdkit,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Own => "flimcd",
            Self::QemuUring => "qemu-nbd io_uring",
            Self::QemuNative => "qemu-nbd native",
            Self::OwnBuffered => "flimcd buffered",
            Self::QemuBuffered => "qemu-nbd buffered",
            Self::Nbdkit => "nbdkit file",
        }
    }

    fn class(self) -> Class {
        match self {
            Self::Own | Self::QemuUring | Self::QemuNative => Class::Direct,
            Self::OwnBuffered | Self::QemuBuffered | Self::Nbdkit => Class::Buffered,
        }
    }

    fn is_own(self) -> bool {
        matches!(self, Self::Own | Self::OwnBuffered)
    }

    fn program(self) -> &'static str {
        match self {
            Self::Own | Self::OwnBuffered => "flimcd",
            Self::QemuUring | Self::QemuNative | Self::QemuBuffered => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
        }
    }

    fn is_installed(self) -> bool {
        if self.is_own() {
            return true;
        }
        let found = Command::new(self.program())
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        found.is_ok_and(|status| status.success())
    }

    fn command(self, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Self::Own | Self::OwnBuffered => {}
            Self::QemuUring | Self::QemuNative | Self::QemuBuffered => {
                let how: &[&str] = match self {
                    Self::QemuUring => &["--cache=none", "--aio=io_uring"],
                    Self::QemuNative => &["--cache=none", "--aio=native"],
                    _ => &["--cache=writeback"],
                };
                command
                    .arg("--format=raw")
                    .args(how)
                    .args(["--persistent", "--socket"]);
                command.arg(socket).arg(image);
            }
            Self::Nbdkit => {
                command.args(["--foreground", "--exit-with-parent", "--unix"]);
                command.arg(socket).arg("file").arg(image);
            }
        }
        command
    }
}

/// Measures everything. `progress` gets a line for people now and then.
///
/// # Errors
/// When the image cannot be made, or a server that is installed does not work. A peer that is not installed is named in the report.
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let scratch = Scratch::new(&options.dir)?;
    let size_bytes = options.size_bytes & !u64::from(REQUEST_BYTES_MAX - 1);
    progress(&format!("writing an image of {} MiB", size_bytes >> 20));
    let image = scratch.image(size_bytes)?;
    let (installed, missing): (Vec<_>, Vec<_>) =
        Kind::ALL.into_iter().partition(|kind| kind.is_installed());
    for peer in &missing {
        progress(&format!(
            "MISSING: {} is not installed, so this comparison is incomplete",
            peer.program()
        ));
    }
    let own_backend = FileDevice::open(&image, &OpenOptions::default())?
        .backend()
        .to_string();
    let bench = Bench {
        options,
        image: &image,
        socket: &scratch.path.join("nbd.sock"),
        size_bytes,
    };
    let mut cells = Vec::new();
    let wanted = |cell: &Cell| {
        options
            .only
            .as_deref()
            .is_none_or(|part| cell.name.contains(part))
    };
    for cell in CELLS.into_iter().filter(wanted) {
        let mut candidates: Vec<_> = installed
            .iter()
            .map(|&kind| Candidate::new(kind.name(), move || bench.measure(kind, cell)))
            .collect();
        let samples = compare(&mut candidates, options.rounds, |name, round, value| {
            progress(&format!(
                "{}, round {}: {name} {value:.0}/s",
                cell.name,
                round + 1
            ));
        })?;
        cells.push(CellReport::new(cell, &installed, samples));
    }
    let mut missing_peers: Vec<String> = missing
        .iter()
        .map(|peer| peer.program().to_owned())
        .collect();
    missing_peers.dedup();
    Ok(Report {
        size_bytes,
        runtime_s: options.runtime.as_secs_f64(),
        own_backend,
        own_process: options.serve_command.is_some(),
        missing_peers,
        cells,
    })
}

/// Serves `image` on `socket` until the standard input ends: the process that [`Options::serve_command`]
/// starts. Through the page cache when `FLIMCD_BENCH_BUFFERED` is in the environment.
///
/// # Errors
/// When the image or the socket cannot be used.
pub fn serve(image: &Path, socket: &Path) -> Result<(), BenchError> {
    let buffered = std::env::var_os(BUFFERED).is_some();
    let direct = if buffered {
        DirectIo::Off
    } else {
        DirectIo::Auto
    };
    let _server = own_server(image, socket, direct)?;
    let wait = io::stdin().lock().read_to_end(&mut Vec::new());
    wait.map(drop).map_err(system("read the standard input"))
}

fn own_server(image: &Path, socket: &Path, direct: DirectIo) -> Result<Server, BenchError> {
    let options = OpenOptions {
        direct,
        ..OpenOptions::default()
    };
    let device = FileDevice::open(image, &options)?;
    let server = Server::bind(socket)?;
    #[expect(clippy::expect_used, reason = "a constant that is a valid name")]
    let name = "bench".parse().expect("a valid name");
    server.export(
        "bench",
        Volume::ephemeral(name, Arc::new(device), Mode::Owner),
    );
    Ok(server)
}

/// The directory of one run; removed when dropped.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(dir: &Path) -> Result<Self, BenchError> {
        let path = dir.join(format!("flimcd-bench-{}", std::process::id()));
        fs::create_dir(&path).map_err(system(format!("create {}", path.display())))?;
        Ok(Self { path })
    }

    /// An image in which every block is allocated and written.
    fn image(&self, size_bytes: u64) -> Result<PathBuf, BenchError> {
        let path = self.path.join("bench.img");
        let write = || {
            let mut file = fs::File::create(&path)?;
            let mut random = Random(1);
            let mut piece = vec![0; REQUEST_BYTES_MAX as usize];
            for _ in 0..size_bytes / u64::from(REQUEST_BYTES_MAX) {
                random.fill(&mut piece);
                file.write_all(&piece)?;
            }
            file.sync_all()
        };
        write().map_err(system(format!(
            "write an image of {size_bytes} bytes at {}",
            path.display()
        )))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[derive(Clone, Copy)]
struct Bench<'a> {
    options: &'a Options,
    image: &'a Path,
    socket: &'a Path,
    size_bytes: u64,
}

impl Bench<'_> {
    /// Requests per second of `kind` in `cell`.
    fn measure(&self, kind: Kind, cell: Cell) -> Result<f64, BenchError> {
        self.drop_caches()
            .map_err(system("drop the image's pages from the cache"))?;
        let server = self.start(kind)?;
        let name = kind.name();
        let client = |source| BenchError::Client {
            name: name.to_owned(),
            source,
        };
        let mut load = Load {
            client: Client::connect_unix(self.socket, "").map_err(client)?,
            cell,
            size_bytes: self.size_bytes,
            random: Random(7),
            next: 0,
            content: vec![0; cell.request_bytes as usize],
        };
        let result = load.run(self.options.runtime).map_err(client);
        drop(load);
        server.stop();
        result
    }

    fn drop_caches(&self) -> io::Result<()> {
        let file = fs::File::open(self.image)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        // One block back in, so that nobody pays for the inode.
        file.read_at(&mut [0; 4096], 0).map(drop)
    }

    fn start(&self, kind: Kind) -> Result<Running, BenchError> {
        // Until whoever had the image last is really gone.
        drop(FileDevice::open(self.image, &OpenOptions::default())?);
        let direct = match kind.class() {
            Class::Direct => DirectIo::Auto,
            Class::Buffered => DirectIo::Off,
        };
        let mut command = match &self.options.serve_command {
            None if kind.is_own() => {
                return own_server(self.image, self.socket, direct).map(Running::Thread);
            }
            Some(words) if kind.is_own() => {
                let mut command = Command::new(words.first().map_or("flimcd", String::as_str));
                command
                    .args(words.iter().skip(1))
                    .arg(self.image)
                    .arg(self.socket);
                if direct == DirectIo::Off {
                    command.env(BUFFERED, "1");
                }
                command
            }
            _ => kind.command(self.image, self.socket),
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let started = command
            .spawn()
            .map_err(system(format!("start {}", kind.program())))?;
        let mut process = Process {
            child: started,
            socket: self.socket.to_owned(),
            ends_by_itself: kind.is_own(),
        };
        let begin = Instant::now();
        while Client::list_unix(self.socket).is_err() {
            let ended = process
                .child
                .try_wait()
                .is_ok_and(|status| status.is_some());
            if ended || begin.elapsed() > START_MAX {
                return Err(BenchError::NotListening {
                    name: kind.name().to_owned(),
                    said: process.said(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Running::Process(process))
    }
}

/// A server that runs.
enum Running {
    Thread(Server),
    Process(Process),
}

impl Running {
    fn stop(self) {
        match self {
            Self::Thread(server) => server.shutdown(),
            Self::Process(process) => drop(process),
        }
    }
}

/// A server's process; ended when dropped.
struct Process {
    child: Child,
    socket: PathBuf,
    /// At the end of its standard input.
    ends_by_itself: bool,
}

impl Process {
    /// Ends it and returns what it said.
    fn said(&mut self) -> String {
        let _ = self.child.kill();
        let mut said = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            let _ = pipe.read_to_string(&mut said);
        }
        said.trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Our own server ends by itself then, and in order; the image's locks are free when it has.
        drop(self.child.stdin.take());
        if !self.ends_by_itself {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// The load client.
struct Load {
    client: Client,
    cell: Cell,
    size_bytes: u64,
    random: Random,
    next: u64,
    content: Vec<u8>,
}

impl Load {
    /// Requests per second over `runtime`.
    fn run(&mut self, runtime: Duration) -> Result<f64, ClientError> {
        let mut content = std::mem::take(&mut self.content);
        self.random.fill(&mut content);
        self.content = content;
        let passes = self.cell.writes && !self.cell.random;
        let requests_per_pass = self.size_bytes / u64::from(self.cell.request_bytes);
        let begin = Instant::now();
        let mut done = 0u64;
        let mut sent = 0;
        while sent < self.cell.depth {
            self.send()?;
            sent += 1;
        }
        loop {
            let reply = self.client.recv()?;
            done += self.ended(reply)?;
            while let Some(reply) = self.client.recv_buffered()? {
                done += self.ended(reply)?;
            }
            let time_is_up = begin.elapsed() >= runtime;
            if time_is_up && self.client.in_flight() == 0 {
                break;
            }
            if passes
                && done > 0
                && done.is_multiple_of(requests_per_pass)
                && self.client.in_flight() == 0
            {
                self.client.flush()?;
            }
            while !time_is_up && self.client.in_flight() < self.cell.depth {
                // A pass of writes ends before its flush.
                let at_end =
                    (done + self.client.in_flight() as u64).is_multiple_of(requests_per_pass);
                if passes && at_end && self.client.in_flight() > 0 {
                    break;
                }
                self.send()?;
            }
        }
        if self.cell.writes {
            self.client.flush()?;
        }
        #[expect(clippy::cast_precision_loss, reason = "far from 2^52 requests")]
        Ok(done as f64 / begin.elapsed().as_secs_f64())
    }

    fn ended(&mut self, reply: flimcd_nbd::client::Reply) -> Result<u64, ClientError> {
        reply.result?;
        self.client.recycle(reply.data);
        Ok(1)
    }

    fn send(&mut self) -> Result<(), ClientError> {
        let length = self.cell.request_bytes;
        let places = self.size_bytes / u64::from(length);
        let place = if self.cell.random {
            self.random.next()
        } else {
            self.next
        };
        self.next += 1;
        let offset = place % places * u64::from(length);
        let op = if self.cell.writes {
            // Every block gets content of its own.
            self.content[..8].copy_from_slice(&self.next.to_le_bytes());
            Op::Write {
                offset,
                data: &self.content,
                fua: false,
            }
        } else {
            Op::Read { offset, length }
        };
        self.client.submit(op).map(drop)
    }
}

/// A xorshift generator: only speed matters here.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

impl CellReport {
    fn new(cell: Cell, kinds: &[Kind], requests_per_sec: Vec<Samples>) -> Self {
        let comparisons = [Class::Direct, Class::Buffered].map(|class| {
            let in_class = |own: bool| {
                let servers = kinds.iter().zip(&requests_per_sec);
                servers
                    .filter(move |(kind, _)| kind.class() == class && kind.is_own() == own)
                    .map(|(_, samples)| samples)
            };
            let better = in_class(false).max_by(|a, b| a.median().total_cmp(&b.median()));
            let own = in_class(true).next();
            Comparison {
                class,
                better_peer: better.map(|peer| peer.name.clone()),
                ratio: own.zip(better).map(|(own, peer)| own.ratio_to(peer)),
            }
        });
        Self {
            cell,
            comparisons: comparisons.into(),
            requests_per_sec,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.own_process {
            "a process of its own"
        } else {
            "the load's process"
        };
        writeln!(
            f,
            "image of {} MiB, {} s per measurement; flimcd: {}, in {place}",
            self.size_bytes >> 20,
            self.runtime_s,
            self.own_backend
        )?;
        for peer in &self.missing_peers {
            writeln!(
                f,
                "MISSING: {peer} is not installed: this comparison is incomplete"
            )?;
        }
        let mut columns = vec![("load", Align::Left)];
        if let Some(first) = self.cells.first() {
            columns.extend(
                first
                    .requests_per_sec
                    .iter()
                    .map(|s| (s.name.as_str(), Align::Right)),
            );
        }
        columns.extend([("direct", Align::Right), ("buffered", Align::Right)]);
        let mut table = Table::new(columns);
        for cell in &self.cells {
            let mut row = vec![cell.cell.name.to_owned()];
            row.extend(
                cell.requests_per_sec
                    .iter()
                    .map(|s| cell.cell.show(s.median())),
            );
            row.extend(
                cell.comparisons
                    .iter()
                    .map(|comparison| match comparison.ratio {
                        Some(ratio) => format!("{ratio:.2} x"),
                        None => "no peer".to_owned(),
                    }),
            );
            table.row(row);
        }
        writeln!(f, "{table}")?;
        write!(
            f,
            "direct, buffered: flimcd by the better peer, with O_DIRECT and through the page cache"
        )
    }
}

impl Cell {
    fn show(&self, requests_per_sec: f64) -> String {
        if self.request_bytes >= REQUEST_BYTES_MAX {
            format!("{requests_per_sec:.0} MiB/s")
        } else {
            format!("{:.1} k/s", requests_per_sec / 1000.0)
        }
    }
}
