//! `flimcd bench vm`: our move of a running machine beside QEMU's own, same guest, same load, same emulated link.

use std::{fs, path::Path, time::Duration};

use anyhow::Context as _;
use clap::Args;
use flimcd_agent::api::{MoveVm, RamMode, Strategy};
use flimcd_lab::{
    report::{Align, Table},
    vm::{
        AtTarget, GuestImage, GuestSpec, Layout, LoadSettings, Requirements, Stage, StageOptions,
        Tools,
        baseline::{self, BaselineOptions, CopyMode, Outcome, Ram, Sync},
    },
    wan::LinkModel,
};
use serde::Serialize;

use crate::{
    units::parse_size,
    vm_stage::{MoveOptions, TO, Two},
};

/// Seconds of load before each move, and after it.
const WARM_UP_S: usize = 5;
const SETTLE_S: usize = 3;
/// QEMU's mirror is given up after this long.
const MIRROR_MAX: Duration = Duration::from_secs(300);

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd bench vm --json vm.json              all cases, three rounds: about half an hour
  flimcd bench vm --rounds 1 --only base      the cases with the base image at the target, once

Needs root (network namespaces), QEMU and a guest kernel; says what to install. QEMU gets the settings that suit it \
best in each case: memory over four streams with zstd, BBR, background mirror for a light load and write-blocking for a \
heavy one. Nothing else should run on the machine: two guests are emulated, and late packets are counted.")]
pub(crate) struct BenchVmArgs {
    /// The emulated link
    #[arg(
        long,
        value_name = "RATE,RTT[,loss=P]",
        default_value = "100mbit,40ms,loss=0.1%"
    )]
    link: LinkModel,
    /// Moves of each kind and case
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u32,
    /// Size of the guest's disk; two fifths of it are filled
    #[arg(long, value_parser = parse_size, default_value = "2GiB")]
    size: u64,
    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

/// What is compared.
#[derive(Clone, Copy, Debug, Serialize)]
struct Case {
    name: &'static str,
    /// The target has the image that the guest was started from.
    base: bool,
    writes_per_sec: f64,
    copy_mode: CopyMode,
}

const CASES: [Case; 4] = [
    Case {
        name: "base, 20 writes/s",
        base: true,
        writes_per_sec: 20.0,
        copy_mode: CopyMode::Background,
    },
    Case {
        name: "base, 200 writes/s",
        base: true,
        writes_per_sec: 200.0,
        copy_mode: CopyMode::WriteBlocking,
    },
    Case {
        name: "nothing, 20 writes/s",
        base: false,
        writes_per_sec: 20.0,
        copy_mode: CopyMode::Background,
    },
    Case {
        name: "nothing, 200 writes/s",
        base: false,
        writes_per_sec: 200.0,
        copy_mode: CopyMode::WriteBlocking,
    },
];

/// One move, by either.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    converged: bool,
    total_s: f64,
    /// Until the guest ran at the target; QEMU has no other end.
    to_switch_s: f64,
    /// Longest gap between two answers to the client's ping, and on its TCP connection.
    ping_gap_ms: f64,
    tcp_gap_ms: f64,
    /// As the mover itself measures it.
    downtime_ms: Option<f64>,
    wire_bytes: u64,
    /// Bytes of memory and of disks as they were sent, and transfers of the memory that were begun.
    ram_bytes: Option<u64>,
    disk_bytes: Option<u64>,
    attempts: u32,
    writes_per_sec: f64,
    writes_per_sec_before: f64,
    worst_write_ms: f64,
    worst_read_ms: f64,
    /// Worst write and gap while the disks were adopted.
    adopt_write_ms: Option<f64>,
    adopt_gap_ms: Option<f64>,
    late_packets: u64,
    verified: String,
}

#[derive(Clone, Debug, Serialize)]
struct CaseReport {
    case: Case,
    flimcd: Vec<Figures>,
    qemu: Vec<Figures>,
    /// QEMU's total time over ours, medians.
    times_faster: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    version: &'static str,
    link: String,
    memory_mib: u32,
    disk_bytes: u64,
    disk_allocated_bytes: u64,
    base_is: &'static str,
    cases: Vec<CaseReport>,
}

pub(super) fn run(args: &BenchVmArgs) -> anyhow::Result<()> {
    let tools = Requirements::check()?;
    let dir = tempfile::Builder::new()
        .prefix("flimcd-bench-vm-")
        .tempdir()?;
    let spec = GuestSpec {
        disk_bytes: args.size,
        load_bytes: args.size / 8,
        content_bytes: args.size / 4,
        ..GuestSpec::default()
    };
    let image = GuestImage::build(&tools, dir.path(), &spec)?;
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image.disks[0])?) * 512;
    let wanted = |case: &Case| {
        args.only
            .as_ref()
            .is_none_or(|only| case.name.contains(only.as_str()))
    };
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        link: args.link.to_string(),
        memory_mib: args.memory,
        disk_bytes: args.size,
        disk_allocated_bytes: allocated,
        base_is: "flimcd: an image in the target's library, compared at the same offset; QEMU: the target's file is a copy of \
                  it, and the mirror sends everything all the same",
        cases: Vec::new(),
    };
    for case in CASES.into_iter().filter(wanted) {
        let mut done = CaseReport {
            case,
            flimcd: Vec::new(),
            qemu: Vec::new(),
            times_faster: 0.0,
        };
        for round in 0..args.rounds {
            let stage = stage_options(args, case, round);
            let run_dir = tempfile::tempdir_in(dir.path())?;
            eprintln!("{}, round {}: flimcd", case.name, round + 1);
            done.flimcd
                .push(ours(&tools, run_dir.path(), &image, &stage, case)?);
            let run_dir = tempfile::tempdir_in(dir.path())?;
            eprintln!("{}, round {}: QEMU", case.name, round + 1);
            done.qemu
                .push(theirs(&tools, run_dir.path(), &image, &stage, case)?);
        }
        let total = |all: &[Figures]| median(all, |figures| figures.total_s);
        done.times_faster = total(&done.qemu) / total(&done.flimcd);
        report.cases.push(done);
        // What there is so far, should the rest not come.
        if let Some(path) = &args.json {
            write(path, &report)?;
        }
    }
    print!("{}", table(&report));
    Ok(())
}

fn stage_options(args: &BenchVmArgs, case: Case, round: u32) -> StageOptions {
    StageOptions {
        link: args.link,
        seed: u64::from(round) + 1,
        memory_mib: args.memory,
        load: LoadSettings {
            writes_per_sec: case.writes_per_sec,
            ram_mib: args.memory / 8,
            ..LoadSettings::default()
        },
        layout: Layout::Raw,
        warm_up_s: WARM_UP_S,
    }
}

fn ours(
    tools: &Tools,
    dir: &Path,
    image: &GuestImage,
    options: &StageOptions,
    case: Case,
) -> anyhow::Result<Figures> {
    let stage = Stage::start(tools, dir, image, options)?;
    let two = Two::start(&stage, dir)?;
    let options = MoveOptions {
        request: MoveVm {
            to: TO.parse()?,
            downtime_ms: None,
            ram: RamMode::Auto,
            bandwidth_bytes_per_sec: None,
            strategy: Strategy::Flimcd,
            release: false,
        },
        settle_s: SETTLE_S,
        library: if case.base {
            image.disks.clone()
        } else {
            Vec::new()
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    let moved = runtime.block_on(two.go(&stage, &options, |_| {}))?;
    let figures = Figures {
        converged: true,
        total_s: moved.total_s,
        to_switch_s: moved.to_switch_s,
        ping_gap_ms: moved.client.ping.gap_ms_max,
        tcp_gap_ms: moved.client.tcp.gap_ms_max,
        downtime_ms: moved.status.downtime_ms,
        wire_bytes: moved.wire_bytes,
        ram_bytes: Some(moved.status.ram_bytes_sent),
        disk_bytes: moved.status.disks.as_ref().map(|disks| disks.bytes_sent),
        attempts: moved.status.attempt,
        writes_per_sec: moved.load.writes_per_sec,
        writes_per_sec_before: moved.load_before.writes_per_sec,
        worst_write_ms: moved.load.worst_write_ms,
        worst_read_ms: moved.load.worst_read_ms,
        adopt_write_ms: Some(moved.load_adopt.worst_write_ms),
        adopt_gap_ms: Some(moved.client_adopt.ping.gap_ms_max),
        late_packets: moved.late_packets,
        verified: moved.verified.clone(),
    };
    two.check_disks(&stage)?;
    Ok(figures)
}

fn theirs(
    tools: &Tools,
    dir: &Path,
    image: &GuestImage,
    stage: &StageOptions,
    case: Case,
) -> anyhow::Result<Figures> {
    let options = BaselineOptions {
        copy_mode: case.copy_mode,
        sync: Sync::Full,
        ram: Ram::Multifd(4),
        mirror_max: MIRROR_MAX,
        settle_s: SETTLE_S,
        ..BaselineOptions::default()
    };
    let have = if case.base {
        AtTarget::Image
    } else {
        AtTarget::Nothing
    };
    let report = baseline::run_case(tools, dir, image, stage, have, &options)?;
    Ok(Figures {
        converged: report.outcome == Outcome::Completed,
        total_s: report.total_s,
        to_switch_s: report.total_s,
        ping_gap_ms: report.client.ping.gap_ms_max,
        tcp_gap_ms: report.client.tcp.gap_ms_max,
        downtime_ms: report.stop_to_resume_ms,
        wire_bytes: report.wire_bytes,
        ram_bytes: report.ram_bytes,
        disk_bytes: Some(report.wire_bytes_mirror),
        attempts: 1,
        writes_per_sec: report.load.writes_per_sec,
        writes_per_sec_before: report.load_before.writes_per_sec,
        worst_write_ms: report.load.worst_write_ms,
        worst_read_ms: report.load.worst_read_ms,
        adopt_write_ms: None,
        adopt_gap_ms: None,
        late_packets: report.late_packets,
        verified: report.verified.unwrap_or_default(),
    })
}

fn median(all: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    let mut values: Vec<f64> = all.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(report: &Report) -> String {
    let columns = [
        "total s",
        "to switch s",
        "ping gap ms",
        "TCP gap ms",
        "wire MB",
        "writes/s",
        "worst write ms",
        "worst read ms",
    ];
    let mut heads = vec![("CASE", Align::Left), ("MOVED BY", Align::Left)];
    heads.extend(columns.map(|name| (name, Align::Right)));
    heads.push(("FASTER", Align::Right));
    let mut table = Table::new(heads);
    for case in &report.cases {
        for (who, all) in [("flimcd", &case.flimcd), ("QEMU", &case.qemu)] {
            let gave_up = all.iter().any(|figures| !figures.converged);
            let value =
                |of: fn(&Figures) -> f64, digits: usize| format!("{:.*}", digits, median(all, of));
            table.row([
                case.case.name.to_owned(),
                if gave_up {
                    format!("{who} (gave up)")
                } else {
                    who.to_owned()
                },
                value(|figures| figures.total_s, 1),
                value(|figures| figures.to_switch_s, 1),
                value(|figures| figures.ping_gap_ms, 0),
                value(|figures| figures.tcp_gap_ms, 0),
                value(|figures| figures.wire_bytes as f64 / 1e6, 0),
                value(|figures| figures.writes_per_sec, 0),
                value(|figures| figures.worst_write_ms, 0),
                value(|figures| figures.worst_read_ms, 0),
                if who == "flimcd" {
                    format!("{:.1} x", case.times_faster)
                } else {
                    String::new()
                },
            ]);
        }
    }
    table.to_string()
}

fn write(path: &Path, report: &Report) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    fs::write(path, json + "\n").with_context(|| format!("writing {}", path.display()))
}
