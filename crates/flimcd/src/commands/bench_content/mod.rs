//! `flimcd bench content`: what does not have to cross the link, and what others send instead. Same images, same
//! emulated link, one run.
//!
//! Each measurement gets two agents of its own, so that no library, index or connection is left over from another.
//! Every migration's image is compared with what it must be, byte by byte. Whatever ends the benchmark, the agents are
//! killed first, and then its directory is removed.

mod away_and_back;
mod debootstrap;
mod images;
mod mail;
mod moves;
mod peers;
mod replica;
mod report;

use std::{
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use flimcd_lab::{
    report::LinkReport,
    wan::{LinkModel, Wan},
};
use serde::Serialize;

use crate::{
    demo::{site::Reaper, world},
    outcome::{advise, interrupted},
    signals::Signals,
    units::{parse_rate, parse_size},
};
use report::{Report, Row};

/// Threads that copy or compare an image are given this long to notice that the benchmark ended.
const STRAGGLERS: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd bench content --json content.json                     all cases: about an hour
  flimcd bench content --case replica-5,peers --size 256MiB    two of them, small
  flimcd bench content --case mail --link 100mbit,40ms
  flimcd bench content --case back --trace disk.vscsi --trace-speed 60

Cases:
  replica-1, replica-5, replica-20   the target holds an older image, of which so many percent of the blocks (4 KiB) are \
others now: single ones or in runs of 64 KiB to 1 MiB. It is in the target's library; or it is the replica that stayed \
when the volume had moved away, found by the dirty blocks; or that replica was touched, found by fingerprints.
  debootstrap   a Debian root file system (raw, and as qcow2) against a library with another one, built separately
  mail          under a mail-like load, against precopy and precopy with zstd; 10% of the blocks are others at the target
  peers         the image of replica-5 by rsync --inplace -z and by qemu-img convert over NBD
  back          away, a recorded hour of writes at the other site, and back

The mail-like load is made from published statistics of the FIU mail trace (Koller and Rangaswami, FAST 2010): 91% writes \
of 4 KiB over 6.3% of the disk, Zipf 1.0 by chunk; 88% of the written blocks have one of so many contents as the disk has \
blocks divided by 128, early ones far more often, and half of them stand on the disk before.

Needs root for network namespaces with a router between. Without, a TCP relay stands for the link: it has no loss and \
counts payload only, and debootstrap is left out. What is not installed is left out too, and named.")]
pub(crate) struct BenchContentArgs {
    /// Cases to run, in this order; all if left out
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    case: Vec<Case>,
    /// Only variants whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Size of the images
    #[arg(long, value_parser = parse_size, default_value = "2GiB")]
    size: u64,
    /// The emulated link
    #[arg(long, value_name = "RATE,RTT[,loss=P]", default_value = "100mbit,40ms")]
    link: LinkModel,
    /// Use the TCP relay, also as root
    #[arg(long)]
    relay: bool,
    /// Decides images, changes and loads
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Freshly dirtied bytes per second of the mail-like load; the trace itself has 0.8 MB/s over a week
    #[arg(long, value_name = "RATE", value_parser = parse_rate, default_value = "2MB/s")]
    mail_dirty: u64,
    /// Recorded disk for `back` (CloudPhysics vscsi)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Replay it so many times as fast as it was recorded
    #[arg(long, value_name = "X", default_value_t = 60.0)]
    trace_speed: f64,
    /// Where to make the temporary directory: it needs about five times the size
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A case, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Case {
    /// 1% of the blocks differ from what the target holds
    #[value(name = "replica-1")]
    #[serde(rename = "replica-1")]
    Replica1,
    /// 5%
    #[value(name = "replica-5")]
    #[serde(rename = "replica-5")]
    Replica5,
    /// 20%
    #[value(name = "replica-20")]
    #[serde(rename = "replica-20")]
    Replica20,
    /// Two Debian root file systems
    Debootstrap,
    /// A mail-like load
    Mail,
    /// rsync and qemu-img beside flimcd
    Peers,
    /// The way back after a recorded hour
    Back,
}

impl Case {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

pub(super) fn run(args: &BenchContentArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    // Watched before anything exists that would have to be removed.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let dir = world::make_dir_in(args.dir.as_deref(), "flimcd-bench-")?;
    let outcome = runtime.block_on(async {
        let reaper = Reaper::default();
        let bench = Bench::new(args, dir.path(), &reaper)?;
        let mut all = pin!(bench.run());
        tokio::select! {
            outcome = &mut all => outcome.map(Some),
            name = signals.recv() => {
                eprintln!("{name}: stopping the agents and removing {}", dir.path().display());
                reaper.kill();
                Ok(None)
            }
        }
    });
    runtime.shutdown_timeout(STRAGGLERS);
    let removed = world::remove_dir(dir);
    let report = outcome?;
    removed?;
    let Some(report) = report else {
        return Ok(interrupted());
    };
    conclude(&report, args)
}

fn conclude(report: &Report, args: &BenchContentArgs) -> anyhow::Result<ExitCode> {
    println!("\n{report}");
    if let Some(path) = &args.json {
        println!("all figures: {}", path.display());
    }
    let wrong: Vec<String> = report
        .rows
        .iter()
        .filter(|row| row.failed.is_some() || row.image_is_right == Some(false))
        .map(|row| format!("{} ({}, {})", row.case, row.variant, row.by))
        .collect();
    if wrong.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(advise(
        format!("failed, or left a wrong image: {}", wrong.join(", ")),
        "the table says why; a wrong image is a defect of flimcd, please report it with the command line",
    ))
}

/// What all cases have in common.
struct Bench<'a> {
    args: &'a BenchContentArgs,
    dir: &'a Path,
    reaper: &'a Reaper,
    /// Why there is no router.
    no_router: Option<String>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a BenchContentArgs, dir: &'a Path, reaper: &'a Reaper) -> anyhow::Result<Self> {
        if !(args.trace_speed.is_finite() && args.trace_speed > 0.0) {
            return Err(advise(
                format!(
                    "a trace cannot be replayed {} times as fast",
                    args.trace_speed
                ),
                "give --trace-speed a number above 0",
            ));
        }
        let no_router = if args.relay {
            Some("--relay asks for it".to_owned())
        } else {
            Wan::router(args.link, args.seed)
                .err()
                .map(|error| error.to_string())
        };
        Ok(Self {
            args,
            dir,
            reaper,
            no_router,
        })
    }

    /// A link for one measurement.
    fn wan(&self) -> anyhow::Result<Wan> {
        match self.no_router {
            None => Ok(Wan::router(self.args.link, self.args.seed)?),
            Some(_) => Ok(Wan::relay(self.args.link, self.args.seed)),
        }
    }

    /// Whether a variant was asked for.
    fn wants(&self, variant: &str) -> bool {
        let only = self.args.only.as_deref();
        only.is_none_or(|only| variant.contains(only))
    }

    async fn run(&self) -> anyhow::Result<Report> {
        let all = Case::value_variants();
        let cases = match self.args.case.as_slice() {
            [] => all,
            some => some,
        };
        let mut report = self.new_report(cases);
        println!(
            "link     {}, emulated by a {}",
            self.args.link,
            if self.no_router.is_none() {
                "router between network namespaces"
            } else {
                "TCP relay"
            }
        );
        for note in &report.notes {
            println!("         note: {note}");
        }
        for &case in cases {
            let rows = match case {
                Case::Replica1 => replica::run(self, case, 0.01).await,
                Case::Replica5 => replica::run(self, case, 0.05).await,
                Case::Replica20 => replica::run(self, case, 0.2).await,
                Case::Debootstrap => debootstrap::run(self, case).await,
                Case::Mail => mail::run(self, case).await,
                Case::Peers => peers::run(self, case).await,
                Case::Back => away_and_back::run(self, case).await,
            };
            let rows =
                rows.unwrap_or_else(|error| vec![Row::failed(&case.name(), "set-up", "", &error)]);
            for row in &rows {
                println!("{row}");
            }
            report.rows.extend(rows);
            // What there is so far, should the rest not come.
            if let Some(path) = &self.args.json {
                report.write(path)?;
            }
        }
        Ok(report)
    }

    fn new_report(&self, cases: &[Case]) -> Report {
        let mut notes = Vec::new();
        if let Some(why) = &self.no_router {
            notes.push(format!(
                "a TCP relay stands for the link ({why}): no loss, and only payload is counted; left out: debootstrap"
            ));
        }
        let not_modelled = (self.no_router.is_some() && self.args.link.loss > 0.0)
            .then_some("a TCP relay has no loss");
        let front_end = if self.no_router.is_none() {
            "tun"
        } else {
            "relay"
        };
        Report {
            version: env!("CARGO_PKG_VERSION"),
            link: LinkReport::new(&self.args.link, front_end, not_modelled),
            size_bytes: self.args.size,
            seed: self.args.seed,
            cases: cases.iter().map(|case| case.name()).collect(),
            bound_is: report::BOUND_IS,
            notes,
            rows: Vec::new(),
        }
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a thread of the benchmark panicked")?
}
