//! `flimcd demo`: a disk moves between two agents on this machine, once with each strategy.
//!
//! ```text
//!   this process                     agent "berlin"           agent "lisbon"
//!   guest load ── NBD ─────────────► export                   export ◄── NBD ── (after the switch)
//!   TCP relay  ◄── the link ───────► dials         relay ───► listens
//! ```
//! Everything lies in one temporary directory. Whatever ends the demo (its end, an error, Ctrl-C,
//! SIGTERM, SIGHUP), [`run`] first kills the agents, so that nothing can wait for them, and then removes
//! the directory; the agents ask the kernel to end them should this process be killed outright.

pub(crate) mod args;
pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod site;
mod vm;
pub(crate) mod world;

use std::{path::Path, pin::pin, process::ExitCode, time::Duration};

use anyhow::Context as _;
use flimcd_lab::{
    report::{DemoReport, LinkReport, LowerBound},
    wan::Wan,
};

use crate::{
    format,
    outcome::{advise, interrupted},
    signals::Signals,
};
use args::DemoArgs;
use guest::GuestPlan;
use report::{BOUND_HOW, Settings};
use run::Setting;
use site::Reaper;
use world::World;

/// Threads that copy or check an image are given this long to notice that the demo ended.
const STRAGGLERS: Duration = Duration::from_millis(500);

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    if args.vm {
        return vm::run(args);
    }
    check_report_path(&args.json)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    // Watched before anything exists that would have to be removed.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let dir = world::make_dir(args)?;
    let outcome = runtime.block_on(async {
        let reaper = Reaper::default();
        let mut demo = pin!(demo(dir.path(), args, &reaper));
        tokio::select! {
            outcome = &mut demo => outcome.map(Some),
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

/// Sets everything up, runs the strategies one after the other, and puts the figures together.
async fn demo(dir: &Path, args: &DemoArgs, reaper: &Reaper) -> anyhow::Result<DemoReport> {
    let owned = args.clone();
    let guest = blocking(move || GuestPlan::new(&owned)).await?;
    match &args.image {
        Some(file) => println!("image    {} (a copy of it)", file.display()),
        None => println!(
            "image    {} from seed {}",
            format::bytes(args.size),
            args.seed
        ),
    }
    let (owned, into) = (args.clone(), dir.to_owned());
    let image = blocking(move || image::prepare(&into, &owned)).await?;
    println!(
        "         {} of it are not zero, {} after compression",
        format::bytes(image.facts.non_zero_bytes),
        format::bytes(image.facts.encoded_bytes)
    );
    let world = World::start(dir, Wan::relay(args.link, args.seed), reaper).await?;
    let bound = report::bound(image.facts.encoded_bytes, &args.link);
    introduce(&world, &guest, &bound, args);
    let base = match args.strategies.iter().any(|strategy| strategy.uses_base()) {
        true => Some(prepare_base(&world, &image, args).await?),
        false => None,
    };
    let base_bound = base
        .as_ref()
        .map(|base| report::bound(base.encoded_bytes, &args.link));
    println!();
    let setting = Setting {
        world: &world,
        image: &image,
        guest: &guest,
        bound: &bound,
        base_bound: base_bound.as_ref(),
    };
    let mut strategies = Vec::new();
    for &strategy in &args.strategies {
        let report = run::run(&setting, strategy).await?;
        println!(
            "{:>12}: {}, downtime {}, {} on the link, {} misses, {} wrong reads",
            report.strategy,
            format::seconds(report.migration_time_s),
            format::milliseconds(report.downtime_ms),
            format::bytes(report.bytes_on_link),
            format::count(report.guest_reads_missed),
            format::count(report.guest_reads_wrong),
        );
        strategies.push(report);
    }
    let settings = Settings {
        image: &image.facts,
        base: base.as_ref(),
        load: &guest.facts,
        lower_bound_is: BOUND_HOW,
    };
    Ok(DemoReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        link: LinkReport::new(
            &args.link,
            world.wan.front_end(),
            world.wan.cannot_model().as_deref(),
        ),
        settings: serde_json::to_value(settings)?,
        image_bytes: image.facts.size_bytes,
        image_non_zero_bytes: image.facts.non_zero_bytes,
        strategies,
    })
}

fn introduce(world: &World, guest: &GuestPlan, bound: &LowerBound, args: &DemoArgs) {
    println!(
        "agents   {} (pid {}), {} (pid {})",
        world::SOURCE,
        world.source.pid(),
        world::TARGET,
        world.target.pid()
    );
    println!(
        "link     {}, {} round trip, emulated by a TCP relay",
        format::rate(args.link.rate_bytes_per_sec()),
        format::milliseconds(args.link.rtt().as_secs_f64() * 1e3)
    );
    if let Some(missing) = world.wan.cannot_model() {
        println!("         note: {missing}");
    }
    println!("guest    {}", guest.facts.what);
    println!(
        "bound    {}: {BOUND_HOW}",
        format::seconds(bound.migration_time_s)
    );
}

/// Puts a base image into the target's library, for those strategies that use it.
async fn prepare_base(
    world: &World,
    image: &image::DemoImage,
    args: &DemoArgs,
) -> anyhow::Result<image::BaseFacts> {
    let path = world.target.images().join("demo-base.raw");
    let (from, to) = (image.path.clone(), path.clone());
    let (percent, seed) = (args.base_differs, args.seed);
    let base = blocking(move || image::make_base(&from, &to, percent, seed)).await?;
    world.target.add_to_library(&path).await?;
    println!(
        "base     an image in the library of {}, of which {:.1}% of the image's chunks with data differ; \
         flimcd-base alone uses it (its bound: {})",
        world::TARGET,
        base.differs_percent,
        format::seconds(report::bound(base.encoded_bytes, &args.link).migration_time_s)
    );
    Ok(base)
}

fn conclude(report: &DemoReport, args: &DemoArgs) -> anyhow::Result<ExitCode> {
    println!("\n{report}");
    report::write(report, &args.json)?;
    println!("all figures: {}", args.json.display());
    let faults = report::faults(report);
    if faults.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(advise(
        faults.join("; "),
        format!(
            "this is a defect of flimcd; please report it with {} and the command line",
            args.json.display()
        ),
    ))
}

/// Two minutes of work should not end with a report that has no place.
fn check_report_path(path: &Path) -> anyhow::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if path.is_dir() || !parent.is_dir() {
        return Err(advise(
            format!("the report cannot be written to {}", path.display()),
            "name a file in a directory that exists with --json",
        ));
    }
    Ok(())
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a thread of the demo panicked")?
}
