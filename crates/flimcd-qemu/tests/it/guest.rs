//! A Linux guest that writes and checks while its disks are adopted and released, and is moved.

use std::{path::Path, time::Duration};

use flimcd_lab::vm::{
    Bus, DiskFormat, DiskSpec, ExtraDisk, GuestImage, GuestSpec, LoadLine, Qemu, QemuSpec,
    Requirements, Style, Tools,
};
use flimcd_qemu::{Qmp, adopt, inspect, release};
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
    for round in 0..ROUNDS {
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
        for (adopted, volume) in &adopted {
            while volume.stats().guest_writes == 0 {
                assert!(qemu.is_running());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            release(&qmp, adopted, &adopted.disk.file).await.unwrap();
        }
    }
    seconds(&qemu, 2).await;
    let lines = qemu.load_lines();
    let busy = &lines[quiet.len()..];
    let ((write, read), (write_quiet, read_quiet)) = (worst_ms(busy), worst_ms(&quiet));
    eprintln!(
        "{ROUNDS} rounds over 3 disks in {} s: worst write {write} ms (with its fdatasync) and read {read} ms; \
         before: {write_quiet} and {read_quiet} ms",
        busy.len()
    );
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
