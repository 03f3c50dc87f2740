//! `flimcd bench strategies`: every strategy on the same engine, link and load, in virtual time.

use std::{
    fs,
    io::Write as _,
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use flimcd_lab::wan::LinkModel;
use flimcd_migrate::policy::{Part, STRATEGIES};
use flimcd_strategies::{
    Cell, CellResult, LinkModel as CellLink,
    report::{Report, html, table},
    sim,
};

use crate::{
    format,
    outcome::{advise, interrupted},
    signals::Signals,
    units::parse_size,
};

/// How often progress is shown and Ctrl-C looked for.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd bench strategies                                       all of them on the mail-like load
  flimcd bench strategies --load mail,homes,web-vm --switch-at 25% --without prefetch,order,prefetch+order --seeds 5
  flimcd bench strategies --load trace:disk.vscsi --link 1gbit,10ms --size 8GiB --html report.html --json report.json
  flimcd bench strategies --load mail --replica 10% --strategies flimcd,precopy,postcopy

The machines, the rules of the volumes and the loads are the real ones; link, disks and content are models, so that hours take \
seconds (docs/strategies.md says how good they are). Before each migration the load runs for a minute, so that heat is known. \
Columns with × are multiples of what was possible for somebody who knows the future. The figures are medians over the seeds.

Loads: mail, homes, web-vm, iometer-database, iometer-fileserver, iometer-webserver, iometer-workstation, random, trace:FILE \
(docs/loads.md).")]
pub(crate) struct BenchStrategiesArgs {
    /// Loads
    #[arg(long, value_delimiter = ',', default_value = "mail")]
    load: Vec<String>,
    /// Size of the volume
    #[arg(long, value_parser = parse_size, default_value = "2GiB")]
    size: u64,
    /// The link; may be given several times
    #[arg(
        long,
        value_name = "RATE,RTT[,loss=P][,jitter=T]",
        default_value = "100mbit,40ms"
    )]
    link: Vec<LinkModel>,
    /// Share of its blocks in which the copy at the target differs; none: the target has nothing
    #[arg(long, value_name = "none|PART", value_parser = parse_replica, default_value = "none")]
    replica: Replica,
    /// Strategies
    #[arg(
        long,
        value_name = "all|NAME,…",
        value_delimiter = ',',
        default_value = "all"
    )]
    strategies: Vec<String>,
    /// Parts of flimcd to leave out, a row for each; several at once with +
    #[arg(long, value_name = "PART[+PART],…", value_delimiter = ',')]
    without: Vec<String>,
    /// Have all of them switch when this share of the data has been sent
    #[arg(long, value_name = "PART", value_parser = parse_share)]
    switch_at: Option<f64>,
    /// How many times faster the load runs
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    speed: f64,
    /// Runs of each, with images and loads from other seeds
    #[arg(long, value_name = "N", default_value_t = 1)]
    seeds: u64,
    /// Write everything to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave curves and disks out of the JSON
    #[arg(long, requires = "json")]
    brief: bool,
    /// Write tables and pictures to a file, as a page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug)]
struct Replica(Option<f64>);

fn parse_share(text: &str) -> Result<f64, String> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    let share = number.trim().parse::<f64>().ok().map(|n| n / scale);
    share
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| format!("{text:?} is no share; write 25% or 0.25"))
}

fn parse_replica(text: &str) -> Result<Replica, String> {
    if text == "none" {
        return Ok(Replica(None));
    }
    parse_share(text).map(|share| Replica(Some(share)))
}

/// Runs all cells, as many at once as there are processors.
pub(crate) fn run(args: &BenchStrategiesArgs) -> anyhow::Result<ExitCode> {
    let cells = cells(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    let stop = AtomicBool::new(false);
    let results = run_cells(&cells, &stop, &runtime);
    let mut results: Vec<CellResult> = results?.into_iter().flatten().collect();
    print!("{}", table(&results));
    if let Some(file) = &args.html {
        write(file, html(&results).as_bytes())?;
    }
    if let Some(file) = &args.json {
        if args.brief {
            for result in &mut results {
                result.samples.clear();
                result.regions.clear();
            }
        }
        let json = serde_json::to_vec_pretty(&Report::new(results)).context("making JSON")?;
        write(file, &json)?;
    }
    if stop.load(Ordering::Relaxed) {
        eprintln!("stopped: what is missing was not run");
        return Ok(interrupted());
    }
    Ok(ExitCode::SUCCESS)
}

fn write(file: &std::path::Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}

fn run_cells(
    cells: &[Cell],
    stop: &AtomicBool,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<Vec<Option<CellResult>>> {
    let results: Mutex<Vec<Option<CellResult>>> = Mutex::new(vec![None; cells.len()]);
    let first_error: Mutex<Option<sim::SimError>> = Mutex::new(None);
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begin = Instant::now();
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(cell) = cells.get(at).filter(|_| !stop.load(Ordering::Relaxed)) else {
                return;
            };
            match sim::run(cell) {
                Ok(result) => lock(&results)[at] = Some(result),
                Err(error) => {
                    lock(&first_error).get_or_insert(error);
                    stop.store(true, Ordering::Relaxed);
                }
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
    };
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| -> anyhow::Result<()> {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let _guard = runtime.enter();
        let mut signals = Signals::new()?;
        while threads.iter().any(|thread| !thread.is_finished()) {
            let asked = runtime
                .block_on(async { tokio::time::timeout(LOOK, signals.recv()).await.is_ok() });
            if asked {
                stop.store(true, Ordering::Relaxed);
            }
            progress(done.load(Ordering::Relaxed), cells.len(), begin);
        }
        Ok(())
    })?;
    eprintln!();
    match first_error
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        Some(error) => Err(error.into()),
        None => Ok(results.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn progress(done: usize, of: usize, begin: Instant) {
    let spent = begin.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "shown")]
    let left = spent / done.max(1) as f64 * (of - done) as f64;
    let left = if done == 0 {
        "?".to_owned()
    } else {
        format::seconds(left)
    };
    eprint!("\r{done} of {of} runs, {left} left    ");
    // Only shown.
    let _ = std::io::stderr().flush();
}

/// Every run that was asked for.
fn cells(args: &BenchStrategiesArgs) -> anyhow::Result<Vec<Cell>> {
    let known = STRATEGIES.join(", ");
    let strategies: Vec<&str> = if args.strategies.iter().any(|name| name == "all") {
        STRATEGIES.to_vec()
    } else {
        args.strategies.iter().map(String::as_str).collect()
    };
    if let Some(unknown) = strategies.iter().find(|name| !STRATEGIES.contains(name)) {
        return Err(advise(
            format!("there is no strategy {unknown:?}"),
            format!("choose of {known}, or all"),
        ));
    }
    let mut rows: Vec<(&str, Vec<String>)> =
        strategies.iter().map(|name| (*name, Vec::new())).collect();
    for parts in &args.without {
        let mut names = Vec::new();
        for name in parts.split('+') {
            let part: Part = name
                .parse()
                .map_err(|error| advise(format!("{error}"), "join several with +"))?;
            names.push(part.name().to_owned());
        }
        names.sort();
        rows.push(("flimcd", names));
    }
    if !(args.speed > 0.0 && args.speed.is_finite()) {
        return Err(advise("the load's speed must be above 0", "try --speed 2"));
    }
    let mut cells = Vec::new();
    for load in &args.load {
        for link in &args.link {
            for (strategy, without) in &rows {
                for seed in 1..=args.seeds.max(1) {
                    cells.push(Cell {
                        load: load.clone(),
                        size_bytes: args.size,
                        link: CellLink {
                            rate_bits_per_sec: link.rate_bits_per_sec,
                            rtt_ms: link.delay.as_secs_f64() * 2000.0,
                            loss: link.loss,
                            jitter_ms: link.jitter.as_secs_f64() * 1000.0,
                        },
                        replica_differs: args.replica.0,
                        strategy: (*strategy).to_owned(),
                        without: without.clone(),
                        switch_at: args.switch_at,
                        speed: args.speed,
                        seed,
                        is_simulated: true,
                    });
                }
            }
        }
    }
    Ok(cells)
}
