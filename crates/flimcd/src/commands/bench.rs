//! `flimcd bench`: measurements, each beside something to compare with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use flimcd_lab::{
    bench::{
        link::{self, Latency, LinkBenchOptions, LinkBenchReport, UnderBulk},
        nbd,
    },
    report::{Align, Table},
};
use serde::Serialize;

use crate::{
    args::{BenchArgs, BenchCommand},
    format,
    outcome::interrupted,
    signals::Signals,
};

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BenchCommand::Link {
            link,
            seconds,
            json,
        } => {
            let mut options = LinkBenchOptions {
                duration: Duration::from_secs(*seconds),
                ..LinkBenchOptions::default()
            };
            if !link.is_empty() {
                options.models.clone_from(link);
            }
            bench_link(options, json.as_deref())
        }
        BenchCommand::Nbd {
            dir,
            size,
            seconds,
            rounds,
            only,
            json,
        } => {
            let options = nbd::Options {
                dir: dir.clone().unwrap_or_else(std::env::temp_dir),
                size_bytes: *size,
                runtime: Duration::from_secs(*seconds),
                rounds: *rounds,
                only: only.clone(),
                serve_command: Some(serve_command()?),
            };
            bench_nbd(options, json.as_deref())
        }
        BenchCommand::Vm(args) => {
            super::bench_vm::run(args)?;
            Ok(ExitCode::SUCCESS)
        }
        BenchCommand::Content(args) => super::bench_content::run(args),
        BenchCommand::Strategies(args) => super::bench_strategies::run(args),
        BenchCommand::NbdServe { image, socket } => {
            nbd::serve(image, socket)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Our server has a process of its own, as those it is compared with have.
fn serve_command() -> anyhow::Result<Vec<String>> {
    let program = std::env::current_exe().context("this program does not find itself")?;
    let program = program
        .to_str()
        .context("this program has a path that is not UTF-8")?;
    Ok([program, "bench", "nbd-serve"].map(str::to_owned).into())
}

fn bench_link(options: LinkBenchOptions, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    let seconds = options.duration.as_secs();
    eprintln!(
        "{} links, about {} s each",
        options.models.len(),
        2 * seconds + 15
    );
    let report = interruptible(move || {
        link::run(&options, |case| {
            eprintln!("{}: done ({})", case.link, case.front_end);
        })
    })?;
    let Some(report) = report else {
        return Ok(interrupted());
    };
    println!("{}", link_table(&report));
    for case in &report.cases {
        if !case.not_modelled.is_empty() {
            println!("{}: {}", case.link, case.not_modelled);
        }
    }
    write(&report, json)?;
    Ok(ExitCode::SUCCESS)
}

/// Goodput as a share of the link's rate, and faults beside it.
fn link_table(report: &LinkBenchReport) -> Table {
    let mut table = Table::new([
        ("LINK", Align::Left),
        ("EMULATOR", Align::Left),
        ("CONGESTION", Align::Left),
        ("BULK", Align::Left),
        ("GOODPUT", Align::Right),
        ("OF RATE", Align::Right),
        ("FAULT P50", Align::Right),
        ("P99", Align::Right),
        ("MAX", Align::Right),
        ("LATE", Align::Right),
    ]);
    for case in &report.cases {
        let mut row = |what: &str, bulk: Option<&UnderBulk>, fault: &Latency| {
            let none = || "–".to_owned();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate"
            )]
            let goodput = bulk.map(|bulk| format::rate(bulk.goodput_bytes_per_sec as u64));
            table.row([
                case.link.clone(),
                case.front_end.clone(),
                case.congestion_control.clone(),
                what.to_owned(),
                goodput.unwrap_or_else(none),
                bulk.map_or_else(none, |bulk| format!("{:.1}%", bulk.goodput_share * 100.0)),
                format::milliseconds(fault.p50_ms),
                format::milliseconds(fault.p99_ms),
                format::milliseconds(fault.max_ms),
                case.late_packets.to_string(),
            ]);
        };
        row("none", None, &case.idle_fault);
        row("unpaced", Some(&case.unpaced), &case.unpaced.fault);
        row("paced", Some(&case.paced), &case.paced.fault);
    }
    table
}

fn bench_nbd(mut options: nbd::Options, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    let scratch = tempfile::Builder::new()
        .prefix("flimcd-bench-")
        .tempdir_in(&options.dir);
    let scratch = scratch.with_context(|| {
        format!(
            "no directory can be made in {}; name another with --dir",
            options.dir.display()
        )
    })?;
    options.dir = scratch.path().to_owned();
    let report = interruptible(move || nbd::run(&options, |line| eprintln!("{line}")));
    drop(scratch);
    let Some(report) = report? else {
        return Ok(interrupted());
    };
    println!("{report}");
    write(&report, json)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs a benchmark on a thread of its own; `None` when a signal came before its end.
fn interruptible<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> anyhow::Result<Option<T>>
where
    T: Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            result = tokio::task::spawn_blocking(work) => {
                Ok(Some(result.context("the benchmark panicked")??))
            }
            name = signals.recv() => {
                eprintln!("{name}");
                Ok(None)
            }
        }
    });
    runtime.shutdown_background();
    outcome
}

fn write(report: &impl Serialize, json: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = json else { return Ok(()) };
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(path, text)
        .with_context(|| format!("the figures cannot be written to {}", path.display()))?;
    println!("all figures: {}", PathBuf::from(path).display());
    Ok(())
}
