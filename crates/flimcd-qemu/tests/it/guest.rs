//! A Linux guest that writes and checks while its disks are adopted and released, and is moved.

use std::{path::Path, time::Duration};

use flimcd_lab::vm::{
    Bus, DiskFormat, DiskSpec, ExtraDisk, GuestImage, GuestSpec, LoadLine, Qemu, QemuSpec,
    Requirements, Storage, Style, Tools,
};
use flimcd_qemu::{
    EventKind, Events, Qmp, adopt, adopted_by_export, inspect, release,
    transfer::{
        IncomingSettings, OutgoingSettings, TransferState, continue_switchover, listen_incoming,
        resume_guest, start_outgoing, start_postcopy, wait_for,
    },
};
use tempfile::TempDir;

use crate::host::Host;

fn tools() -> Option<Tools> {
    match Requirements::check() {
        Ok(tools) => Some(tools),
        Err(missing) => {
            eprintln!("SKIPPED: {missing}");
            None
        }
    }
}

const ROUNDS: usize = 20;
/// The last of them, with a second of the guest's between the steps.
const CALM_ROUNDS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(60);

fn disk(id: &str, file: &Path, bus: Bus, format: DiskFormat, style: Style) -> DiskSpec {
    DiskSpec {
        bus,
        format,
        style,
        // With the host's page cache in between.
        is_direct: style == Style::Blockdev,
        ..DiskSpec::new(id, file)
    }
}

/// Root on a qcow2 overlay by `-drive`, a raw disk on virtio-scsi, and one with SATA where the guest's
/// kernel has a driver.
fn spec(tools: &Tools, dir: &Path, image: &GuestImage) -> QemuSpec {
    let overlay = dir.join("root.qcow2");
    tools
        .qcow2_overlay(&image.disks[0], "raw", &overlay)
        .unwrap();
    let mut spec = QemuSpec::new("vm", &dir.join("run"), image);
    let bus = if tools.has_sata() {
        Bus::Sata
    } else {
        Bus::VirtioBlk
    };
    spec.disks = vec![
        disk(
            "root",
            &overlay,
            Bus::VirtioBlk,
            DiskFormat::Qcow2,
            Style::Drive,
        ),
        disk(
            "data",
            &image.disks[1],
            Bus::VirtioScsi,
            DiskFormat::Raw,
            Style::Blockdev,
        ),
        disk("more", &image.disks[2], bus, DiskFormat::Raw, Style::Drive),
    ];
    spec.load.writes_per_sec = 300.0;
    spec.load.reads_per_sec = 100.0;
    spec.memory_mib = 192;
    spec
}

fn worst_ms(lines: &[LoadLine]) -> (f64, f64) {
    let worst = |of: fn(&LoadLine) -> f64| lines.iter().map(of).fold(0.0, f64::max);
    (worst(|l| l.worst_write_ms), worst(|l| l.worst_read_ms))
}

/// Waits for that many more of the guest's seconds, without holding the executor up.
async fn seconds(qemu: &Qemu, count: usize) {
    let wanted = qemu.load_lines().len() + count;
    while qemu.load_lines().len() < wanted {
        assert!(qemu.is_running());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_at_work_does_not_notice() {
    let Some(tools) = tools() else { return };
    // RUST_LOG=flimcd_qemu=debug says how long each swap took.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).try_init();
    let dir = TempDir::new().unwrap();
    let extra = ExtraDisk {
        disk_bytes: 64 << 20,
        load_bytes: 16 << 20,
    };
    let guest = GuestSpec {
        extra_disks: vec![extra; 2],
        ..GuestSpec::default()
    };
    let image = GuestImage::build(&tools, dir.path(), &guest).unwrap();
    let qemu = spec(&tools, dir.path(), &image).spawn(&tools).unwrap();
    qemu.wait_ready().unwrap();
    seconds(&qemu, 5).await;
    let quiet = qemu.load_lines();
    let qmp = Qmp::connect(&qemu.qmp()).await.unwrap();
    let before = inspect(&qmp).await.unwrap().disks;
    assert_eq!(before.len(), 3, "{before:?}");
    let host = Host::new(dir.path());
    qemu.control("mark before 300").unwrap();
    let mut calm_from = 0;
    for round in 0..ROUNDS {
        let is_calm = round >= ROUNDS - CALM_ROUNDS;
        if round == ROUNDS - CALM_ROUNDS {
            seconds(&qemu, 2).await;
            calm_from = qemu.load_lines().len();
        }
        let disks = inspect(&qmp).await.unwrap().disks;
        for (disk, first) in disks.iter().zip(&before) {
            assert_eq!((&disk.id, &disk.problem), (&first.id, &None));
            // The guest's driver has long decided on its write cache, and nobody changes it.
            assert_eq!(disk.options, first.options, "round {round}");
        }
        let mut adopted = Vec::new();
        for disk in &disks {
            let (export, volume) = host.export(disk);
            adopted.push((adopt(&qmp, disk, &export).await.unwrap(), volume));
        }
        if is_calm {
            seconds(&qemu, 2).await;
        }
        for (adopted, volume) in &adopted {
            while volume.stats().guest_writes == 0 {
                assert!(qemu.is_running());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            release(&qmp, adopted, &adopted.disk.file).await.unwrap();
        }
        if is_calm {
            seconds(&qemu, 2).await;
        }
    }
    seconds(&qemu, 2).await;
    let lines = qemu.load_lines();
    let report = |what: &str, lines: &[LoadLine]| {
        let (write, read) = worst_ms(lines);
        eprintln!(
            "{what}, {} s: worst write {write} ms (with its fdatasync), read {read} ms",
            lines.len()
        );
    };
    report("before", &quiet);
    report(
        "adopted and released without a pause",
        &lines[quiet.len()..calm_from],
    );
    report("adopted and released with pauses", &lines[calm_from..]);
    let verified = qemu.control("verify").unwrap();
    assert!(verified.ends_with("errors=0"), "{verified}");
    assert_eq!(qemu.complaints(), Vec::<String>::new());
    assert!(!qemu.serial().contains("I/O error"), "{}", qemu.serial());
    drop(qmp);
    qemu.power_off().unwrap();
    for disk in &before[1..] {
        tools.check_file_system(&disk.file).unwrap();
    }
}

/// Two QEMUs on one host, whose disks are on the same exports: what is left of a move when no disk has to cross.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_at_work_moves_to_another_qemu() {
    let Some(tools) = tools() else { return };
    for postcopy in [false, true] {
        let dir = TempDir::new().unwrap();
        let extra = ExtraDisk {
            disk_bytes: 64 << 20,
            load_bytes: 16 << 20,
        };
        let guest = GuestSpec {
            extra_disks: vec![extra; 2],
            ..GuestSpec::default()
        };
        let image = GuestImage::build(&tools, dir.path(), &guest).unwrap();
        let source_spec = spec(&tools, dir.path(), &image);
        let qemu = source_spec.spawn(&tools).unwrap();
        qemu.wait_ready().unwrap();
        let source = Qmp::connect(&qemu.qmp()).await.unwrap();
        let host = Host::new(dir.path());
        let mut target_spec = source_spec.clone();
        target_spec.dir = dir.path().join("target");
        (target_spec.is_incoming, target_spec.is_paused) = (true, true);
        let (mut adopted, mut volumes) = (Vec::new(), Vec::new());
        for disk in inspect(&source).await.unwrap().disks {
            let (export, volume) = host.export(&disk);
            let mut all = target_spec.disks.iter_mut();
            let same = all.find(|d| disk.id.starts_with(&d.id)).unwrap();
            same.storage = Storage::Nbd {
                socket: export.socket.clone(),
                export: export.name.clone(),
                reconnect_delay_s: 60,
            };
            adopted.push(adopt(&source, &disk, &export).await.unwrap());
            volumes.push(volume);
        }
        let moved = target_spec.spawn(&tools).unwrap();
        let target = Qmp::connect(&moved.qmp()).await.unwrap();
        let uri = format!("unix:{}", dir.path().join("ram").display());
        listen_incoming(&target, &uri, IncomingSettings { postcopy })
            .await
            .unwrap();
        seconds(&qemu, 2).await;
        let settings = OutgoingSettings {
            uri,
            downtime_limit_ms: Some(300),
            max_bandwidth_bytes_per_sec: None,
            postcopy,
        };
        let mut stops = source.events();
        let mut resumes = target.events();
        start_outgoing(&source, &settings).await.unwrap();
        if postcopy {
            start_postcopy(&source).await.unwrap();
        }
        let waits = |s| s == TransferState::PreSwitchover;
        wait_for(&source, "copying memory", PATIENCE, waits)
            .await
            .unwrap();
        // From here on an agent has frozen the exports: nothing but flushes may come before the target runs.
        let frozen: Vec<_> = volumes.iter().map(|v| v.stats()).collect();
        continue_switchover(&source).await.unwrap();
        let done = |s| matches!(s, TransferState::Completed | TransferState::PostcopyActive);
        wait_for(&target, "switching", PATIENCE, done)
            .await
            .unwrap();
        for (volume, before) in volumes.iter().zip(&frozen) {
            let now = volume.stats();
            assert_eq!(
                (now.guest_reads, now.guest_writes, now.guest_zeroes),
                (before.guest_reads, before.guest_writes, before.guest_zeroes)
            );
        }
        resume_guest(&target).await.unwrap();
        let stopped = time_of(&mut stops, &EventKind::Stop).await;
        let resumed = time_of(&mut resumes, &EventKind::Resume).await;
        let end = wait_for(&source, "completing", PATIENCE, TransferState::is_final)
            .await
            .unwrap();
        assert_eq!(end.status, TransferState::Completed, "{end:?}");
        eprintln!(
            "moved with {} of RAM sent, post-copy {postcopy}: stood still for {} ms",
            end.ram.transferred_bytes,
            (resumed - stopped) / 1000
        );
        drop(source);
        qemu.kill();
        // Released at the target, onto the same files, with the source's options.
        let exports: Vec<_> = adopted.iter().map(|a| a.export.clone()).collect();
        let there = adopted_by_export(&target, &exports).await.unwrap();
        assert_eq!(there.len(), adopted.len());
        for mut disk in there {
            let before = adopted.iter().find(|a| a.export == disk.export).unwrap();
            disk.disk.options.protocol = before.disk.options.protocol.clone();
            release(&target, &disk, &before.disk.file).await.unwrap();
        }
        for disk in inspect(&target).await.unwrap().disks {
            let mut all = adopted.iter().map(|a| &a.disk);
            let before = all.find(|a| a.id == disk.id).unwrap();
            assert_eq!(
                (&disk.file, &disk.problem, &disk.backing),
                (&before.file, &None, &before.backing)
            );
            assert_eq!(disk.options.writeback, before.options.writeback);
            assert_eq!(disk.options.protocol.node, before.options.protocol.node);
        }
        seconds(&moved, 2).await;
        let verified = moved.control("verify").unwrap();
        assert!(verified.ends_with("errors=0"), "{verified}");
        assert_eq!(moved.complaints(), Vec::<String>::new());
        moved.power_off().unwrap();
    }
}

async fn time_of(events: &mut Events, kind: &EventKind) -> u64 {
    loop {
        let event = events.next().await.unwrap();
        if event.kind == *kind {
            return event.time_us;
        }
    }
}
