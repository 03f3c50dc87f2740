//! `flimcd demo --vm`: a running guest moves between two sites while a client talks to it.

use std::{fs, process::ExitCode};

use anyhow::Context as _;
use flimcd_agent::api::{MoveVm, RamMode, Strategy, VmMoveStatus};
use flimcd_lab::vm::{
    GuestImage, GuestSpec, Layout, LoadSettings, Requirements, Stage, StageOptions,
};

use super::DemoArgs;
use crate::{
    commands::vm::move_summary,
    format,
    outcome::interrupted,
    progress::Progress,
    signals::Signals,
    vm_stage::{MoveOptions, Moved, TO, Two},
};

/// Seconds of load before the move, and after it.
const WARM_UP_S: usize = 3;
const SETTLE_S: usize = 3;

pub(super) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let tools = Requirements::check()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    // Watched before anything exists that would have to be removed.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let dir = super::world::make_dir(args)?;
    eprintln!("making a guest and two sites, {} between them", args.link);
    let spec = GuestSpec {
        disk_bytes: 1 << 30,
        load_bytes: 64 << 20,
        content_bytes: 192 << 20,
        seed: args.seed,
        extra_disks: Vec::new(),
    };
    let image = GuestImage::build(&tools, dir.path(), &spec)?;
    let options = StageOptions {
        link: args.link,
        seed: args.seed,
        memory_mib: 256,
        load: LoadSettings::default(),
        layout: Layout::Raw,
        warm_up_s: WARM_UP_S,
    };
    let stage = Stage::start(&tools, dir.path(), &image, &options)?;
    let two = Two::start(&stage, dir.path())?;
    let request = MoveVm {
        to: TO.parse()?,
        downtime_ms: None,
        ram: RamMode::Auto,
        bandwidth_bytes_per_sec: None,
        strategy: Strategy::Flimcd,
        release: true,
    };
    let options = MoveOptions {
        request,
        settle_s: SETTLE_S,
        library: Vec::new(),
    };
    let mut progress = Progress::new("guest");
    let moved = runtime.block_on(async {
        let go = two.go(&stage, &options, |status: &VmMoveStatus| {
            progress.show(status);
        });
        tokio::select! {
            moved = go => moved.map(Some),
            name = signals.recv() => {
                eprintln!("{name}: ending the guest, the agents and the sites");
                Ok(None)
            }
        }
    });
    drop(progress);
    let Some(moved) = moved? else {
        return Ok(interrupted());
    };
    print(&moved);
    two.check_disks(&stage)?;
    println!("  disks     file system checked after switching the guest off: clean");
    let json = serde_json::to_string_pretty(&moved)?;
    fs::write(&args.json, json + "\n")
        .with_context(|| format!("writing {}", args.json.display()))?;
    eprintln!("figures are in {}", args.json.display());
    let is_good = moved.complaints.is_empty() && moved.verified.ends_with("errors=0");
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(moved: &Moved) {
    print!("{}", move_summary(&moved.status));
    println!(
        "  client    longest gap of a 10 ms ping {}, of its TCP connection {} (median round trip {})",
        format::milliseconds(moved.client.ping.gap_ms_max),
        format::milliseconds(moved.client.tcp.gap_ms_max),
        format::milliseconds(moved.client.ping.rtt_ms_median)
    );
    println!(
        "  guest     {:.0} writes/s before, {:.0} meanwhile; slowest write {}, slowest read {}",
        moved.load_before.writes_per_sec,
        moved.load.writes_per_sec,
        format::milliseconds(moved.load.worst_write_ms),
        format::milliseconds(moved.load.worst_read_ms)
    );
    println!(
        "  wire      {} from source to target",
        format::bytes(moved.wire_bytes)
    );
    println!("  check     {}", moved.verified);
    for complaint in &moved.complaints {
        println!("  WRONG     {complaint}");
    }
}
