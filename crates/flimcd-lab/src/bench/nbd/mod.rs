//! Block export side by side: our NBD server, `qemu-nbd` and `nbdkit file`, on the same image.
//!
//! One load client for all of them, one connection, fresh server processes that take turns. Every
//! cell begins with the image's pages dropped from the cache, and a cell that writes ends with a
//! flush inside the measured time, so that a server that only fills the page cache does not look
//! fast. `nbdkit file` has no direct I/O: what it reads a second time comes from memory.

mod load;
mod servers;

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use flimcd_nbd::{Client, ClientError};
use flimcd_volume::device::{FileDevice, OpenError, OpenOptions};
use serde::Serialize;

use super::harness::{Candidate, Samples, compare};
use crate::report::{Align, Table};
use load::{Load, REQUEST_BYTES_MAX, Random};
use servers::Kind;

pub use load::{CELLS, Cell};
pub use servers::{Class, serve};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the image and the sockets are made, in a directory that is removed at the end. On the
    /// disk that matters.
    pub dir: PathBuf,
    /// Size of the image in bytes, rounded down to 1 MiB.
    pub size_bytes: u64,
    /// Length of one measurement.
    pub runtime: Duration,
    /// Measurements per server and cell.
    pub rounds: u32,
    /// Only cells whose name contains this.
    pub only: Option<String>,
    /// Command that runs [`serve`] in a process of its own; image and socket are appended. Without
    /// it the server runs in this process, which saves it some of the cost of a switch between
    /// processes, and the report says so.
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
    #[error("{name} did not listen within {} s; it said: {said}", servers::START_MAX.as_secs())]
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

/// Measures everything. `progress` gets a line for people now and then.
///
/// # Errors
/// When the image cannot be made, or a server that is installed does not work. A peer that is not
/// installed is named in the report.
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
        let serve_command = self.options.serve_command.as_deref();
        let server = kind.start(self.image, self.socket, serve_command)?;
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
