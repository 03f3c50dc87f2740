//! `flimcd bench`: measurements, each beside something to compare with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use flimcd_lab::bench::nbd;
use serde::Serialize;

use crate::{
    args::{BenchArgs, BenchCommand},
    outcome::{advise, interrupted},
    signals::Signals,
};

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BenchCommand::Link { .. } => Err(advise("todo", "todo")),
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

fn bench_nbd(mut options: nbd::Options, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let scratch = tempfile::Builder::new()
        .prefix("flimcd-bench-")
        .tempdir_in(&options.dir)
        .with_context(|| {
            format!(
                "no directory can be made in {}; name another with --dir",
                options.dir.display()
            )
        })?;
    options.dir = scratch.path().to_owned();
    let report = runtime.block_on(async {
        let measured =
            tokio::task::spawn_blocking(move || nbd::run(&options, |line| eprintln!("{line}")));
        tokio::select! {
            report = measured => Ok(Some(report.context("the benchmark panicked")??)),
            name = signals.recv() => {
                eprintln!("{name}: removing {}", scratch.path().display());
                anyhow::Ok(None)
            }
        }
    });
    runtime.shutdown_background();
    drop(scratch);
    let Some(report) = report? else {
        return Ok(interrupted());
    };
    println!("{report}");
    write(&report, json)?;
    Ok(ExitCode::SUCCESS)
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
