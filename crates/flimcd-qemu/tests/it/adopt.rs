//! Adopting and releasing disks that are written to all the time.

use std::{fs, path::Path, time::Duration};

use flimcd_qemu::{
    AdoptError, Adopted, Disk, DiskState, Method, Problem, Qmp, adopt, inspect, release, state_of,
};
use tempfile::TempDir;

use crate::{
    host::{Host, Load},
    vm::{Vm, check_image, has_qemu, make_image, open_tap},
};

const ROUNDS: usize = 20;

#[derive(Clone, Copy, Debug)]
struct Case {
    format: &'static str,
    /// Options of the image.
    image: &'static [&'static str],
    /// Arguments of QEMU, with FILE for the image.
    args: &'static [&'static str],
    method: Method,
}

const BLOCKDEV_RAW: Case = Case {
    format: "raw",
    image: &[],
    args: &[
        "-blockdev",
        "driver=file,node-name=prot0,filename=FILE,cache.direct=on,aio=native,discard=unmap",
        "-blockdev",
        "driver=raw,node-name=disk0,file=prot0,cache.direct=on,detect-zeroes=unmap,discard=unmap",
        "-device",
        "virtio-blk-pci,drive=disk0,id=vd0,share-rw=on",
    ],
    method: Method::Child,
};

const BLOCKDEV_QCOW2_IOTHREAD: Case = Case {
    format: "qcow2",
    image: &[],
    args: &[
        "-object",
        "iothread,id=io0",
        "-blockdev",
        "driver=file,node-name=prot0,filename=FILE",
        "-blockdev",
        "driver=qcow2,node-name=disk0,file=prot0",
        "-device",
        "virtio-scsi-pci,iothread=io0",
        "-device",
        "scsi-hd,drive=disk0,id=sd0,share-rw=on",
    ],
    method: Method::Child,
};

const DRIVE_RAW_SATA: Case = Case {
    format: "raw",
    image: &[],
    args: &[
        "-drive",
        "file=FILE,format=raw,if=none,id=drv0,cache=none,aio=io_uring,detect-zeroes=on,discard=unmap",
        "-device",
        "ide-hd,drive=drv0,bus=ide.0,share-rw=on",
    ],
    method: Method::Child,
};

const DRIVE_QCOW2_BACKING: Case = Case {
    format: "qcow2",
    image: &["-b", "base.qcow2", "-F", "qcow2"],
    args: &[
        "-drive",
        "file=FILE,if=none,id=drv0,cache=writethrough",
        "-device",
        "virtio-blk-pci,drive=drv0,share-rw=on",
    ],
    method: Method::Child,
};

const FILE_UNDER_DEVICE_IOTHREAD: Case = Case {
    format: "raw",
    image: &[],
    args: &[
        "-object",
        "iothread,id=io0",
        "-blockdev",
        r#"{"driver":"file","node-name":"disk0","filename":"FILE","discard":"unmap","detect-zeroes":"unmap"}"#,
        "-device",
        "virtio-blk-pci,drive=disk0,id=vd0,iothread=io0,share-rw=on",
    ],
    method: Method::Root,
};

struct Stand {
    dir: TempDir,
    vm: Vm,
    qmp: Qmp,
}

impl Stand {
    async fn new(case: Case) -> Self {
        let dir = TempDir::new().unwrap();
        make_image(&dir.path().join("base.qcow2"), "qcow2", &[]);
        let image = dir.path().join("disk.img");
        let more: Vec<String> = case
            .image
            .iter()
            .map(|o| o.replace("base", &dir.path().join("base").to_string_lossy()))
            .collect();
        let more: Vec<_> = more.iter().map(String::as_str).collect();
        make_image(&image, case.format, &more);
        let args: Vec<_> = case
            .args
            .iter()
            .map(|a| a.replace("FILE", &image.to_string_lossy()))
            .collect();
        let mut vm = Vm::start(dir.path(), "vm", &args);
        let qmp = vm.connect().await;
        Self { dir, vm, qmp }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// An old QEMU refuses what would abort it.
    fn cannot(&self, disk: &Disk) -> bool {
        let refused = matches!(disk.problem, Some(Problem::IoThreads(_)));
        assert!(!refused || !self.qmp.version().is_at_least(9, 0));
        if refused {
            eprintln!("SKIPPED: needs QEMU 9.0: this is {}", self.qmp.version());
        }
        refused
    }

    async fn disk(&self) -> Disk {
        let found = inspect(&self.qmp).await.unwrap();
        assert_eq!(found.disks.len(), 1, "{found:?}");
        found.disks.into_iter().next().unwrap()
    }
}

/// What must be the same after a release. The name of a node that QEMU made up cannot be given again, and
/// the BIOS changes the write cache when it likes.
fn lasting(disk: &Disk) -> Disk {
    let mut disk = disk.clone();
    if disk.nodes.protocol.starts_with('#') || disk.nodes.protocol.starts_with("flimcd-") {
        disk.nodes.protocol = "(any)".to_owned();
    }
    disk.options.writeback = true;
    disk.file_bytes = disk.export_bytes;
    disk
}

async fn round_trips(case: Case) {
    if !has_qemu() {
        return;
    }
    let stand = Stand::new(case).await;
    let tap = stand.path("tap.nbd");
    let before = stand.disk().await;
    if stand.cannot(&before) {
        return;
    }
    assert_eq!(before.problem, None, "{before:?}");
    open_tap(&stand.qmp, &tap, &[(&before.nodes.root, "disk")]).await;
    let host = Host::new(stand.dir.path());
    let load = Load::start(&tap, "disk");
    let mut disk = before.clone();
    for round in 0..ROUNDS {
        let (export, volume) = host.export(&disk);
        let adopted = adopt(&stand.qmp, &disk, &export).await.unwrap();
        assert_eq!(adopted.method, case.method);
        assert!(!stand.vm.has_open(&before.file), "QEMU kept the file open");
        assert!(matches!(
            state_of(&stand.qmp, &disk, &export).await.unwrap(),
            DiskState::OnExport { leftovers, .. } if leftovers.is_empty()
        ));
        // Until the load has gone through the export: it never pauses.
        while volume.stats().guest_writes == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        release(&stand.qmp, &adopted, &before.file).await.unwrap();
        assert!(
            stand.vm.has_open(&before.file),
            "QEMU has not opened the file"
        );
        let now = stand.disk().await;
        assert_eq!(lasting(&now), lasting(&before), "round {round}");
        disk = now;
    }
    let report = load.stop();
    report.verify(&tap, "disk");
    eprintln!(
        "{ROUNDS} rounds of adopt and release under {} requests: worst stall {:?}",
        report.requests, report.stall_max
    );
    stand.vm.quit(&stand.qmp).await;
    if case.format == "qcow2" {
        check_image(&before.file);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blockdev_raw_on_virtio_blk() {
    round_trips(BLOCKDEV_RAW).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blockdev_qcow2_on_virtio_scsi_with_an_io_thread() {
    round_trips(BLOCKDEV_QCOW2_IOTHREAD).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drive_raw_on_sata() {
    round_trips(DRIVE_RAW_SATA).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drive_qcow2_with_a_backing_file() {
    round_trips(DRIVE_QCOW2_BACKING).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_right_under_a_device_with_an_io_thread() {
    round_trips(FILE_UNDER_DEVICE_IOTHREAD).await;
}

/// `discard` is nowhere to be read, so it is seen by what it does.
#[tokio::test(flavor = "multi_thread")]
async fn discards_are_passed_on_or_ignored_as_before() {
    if !has_qemu() {
        return;
    }
    let ignoring = Case {
        args: &[
            "-drive",
            "file=FILE,format=raw,if=none,id=drv0,discard=ignore",
            "-device",
            "virtio-blk-pci,drive=drv0,share-rw=on",
        ],
        ..DRIVE_RAW_SATA
    };
    for (case, expected) in [
        (BLOCKDEV_RAW, true),
        (DRIVE_RAW_SATA, true),
        (ignoring, false),
        (FILE_UNDER_DEVICE_IOTHREAD, true),
    ] {
        let stand = Stand::new(case).await;
        let disk = stand.disk().await;
        if stand.cannot(&disk) {
            continue;
        }
        let tap = stand.path("tap.nbd");
        open_tap(&stand.qmp, &tap, &[(&disk.nodes.root, "disk")]).await;
        let mut client = flimcd_nbd::Client::connect_unix(&tap, "disk").unwrap();
        let host = Host::new(stand.dir.path());
        let (export, volume) = host.export(&disk);
        let mut gives_back = || {
            client.write(0, &[7; 1 << 20], true).unwrap();
            let full = allocated(&disk.file);
            client.trim(0, 1 << 20).unwrap();
            client.flush().unwrap();
            full - allocated(&disk.file) >= 1 << 20
        };
        assert_eq!(gives_back(), expected, "before, {case:?}");
        let adopted = adopt(&stand.qmp, &disk, &export).await.unwrap();
        assert_eq!(gives_back(), expected, "adopted, {case:?}");
        assert!(volume.stats().guest_writes > 0);
        release(&stand.qmp, &adopted, &disk.file).await.unwrap();
        assert_eq!(gives_back(), expected, "released, {case:?}");
    }
}

fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(file).unwrap().blocks() * 512
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_grows_on_its_export() {
    if !has_qemu() {
        return;
    }
    for case in [BLOCKDEV_QCOW2_IOTHREAD, DRIVE_QCOW2_BACKING] {
        let stand = Stand::new(case).await;
        let disk = stand.disk().await;
        if stand.cannot(&disk) {
            continue;
        }
        assert!(
            disk.file_bytes < 1 << 20 && disk.export_bytes > 64 << 20,
            "{disk:?}"
        );
        let tap = stand.path("tap.nbd");
        open_tap(&stand.qmp, &tap, &[(&disk.nodes.root, "disk")]).await;
        let host = Host::new(stand.dir.path());
        let (export, _volume) = host.export(&disk);
        let adopted = adopt(&stand.qmp, &disk, &export).await.unwrap();
        let mut client = flimcd_nbd::Client::connect_unix(&tap, "disk").unwrap();
        for mib in 0..32u8 {
            client
                .write(u64::from(mib) << 20, &[mib + 1; 1 << 20], false)
                .unwrap();
        }
        release(&stand.qmp, &adopted, &disk.file).await.unwrap();
        for mib in 0..32u8 {
            let mut found = vec![0; 1 << 20];
            client.read(u64::from(mib) << 20, &mut found).unwrap();
            assert!(found.iter().all(|b| *b == mib + 1));
        }
        let now = stand.disk().await;
        assert_eq!(
            now.export_bytes, disk.export_bytes,
            "adopting again adds nothing"
        );
        stand.vm.quit(&stand.qmp).await;
        check_image(&disk.file);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_leaves_the_disk_on_its_file() {
    if !has_qemu() {
        return;
    }
    for case in [BLOCKDEV_RAW, DRIVE_RAW_SATA, FILE_UNDER_DEVICE_IOTHREAD] {
        let stand = Stand::new(case).await;
        let disk = stand.disk().await;
        if stand.cannot(&disk) {
            continue;
        }
        let host = Host::new(stand.dir.path());
        let is_as_before = async || {
            let found = state_of(&stand.qmp, &disk, &host.named("none"))
                .await
                .unwrap();
            let DiskState::OnFile {
                disk: now,
                leftovers,
            } = found
            else {
                panic!("{found:?}");
            };
            assert_eq!(lasting(&now), lasting(&disk));
            assert_eq!(leftovers, Vec::<String>::new());
        };
        // Nobody exports it.
        let error = adopt(&stand.qmp, &disk, &host.named("none"))
            .await
            .unwrap_err();
        assert!(matches!(error, AdoptError::Export { .. }), "{error}");
        is_as_before().await;
        // The export is of something else.
        let other = stand.path("other.img");
        make_image(&other, "raw", &[]);
        fs::File::options()
            .write(true)
            .open(&other)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let (export, _volume) = host.export_file(&other, "other");
        let error = adopt(&stand.qmp, &disk, &export).await.unwrap_err();
        assert!(matches!(error, AdoptError::ExportSize { .. }), "{error}");
        is_as_before().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_fails_leaves_the_disk_on_its_export() {
    if !has_qemu() {
        return;
    }
    for case in [
        BLOCKDEV_RAW,
        DRIVE_QCOW2_BACKING,
        FILE_UNDER_DEVICE_IOTHREAD,
    ] {
        let stand = Stand::new(case).await;
        let disk = stand.disk().await;
        if stand.cannot(&disk) {
            continue;
        }
        let host = Host::new(stand.dir.path());
        let (export, _volume) = host.export(&disk);
        let adopted = adopt(&stand.qmp, &disk, &export).await.unwrap();
        let is_adopted = async || {
            let found = state_of(&stand.qmp, &disk, &export).await.unwrap();
            assert!(
                matches!(&found, DiskState::OnExport { leftovers, .. } if leftovers.is_empty()),
                "{found:?}"
            );
        };
        let nowhere = stand.path("nowhere.img");
        let error = release(&stand.qmp, &adopted, &nowhere).await.unwrap_err();
        assert!(matches!(error, AdoptError::File { .. }), "{error}");
        is_adopted().await;
        // Somebody holds locks on the image.
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&disk.file)
            .unwrap();
        flimcd_volume::device::lock::lock_image(&file, &disk.file, false).unwrap();
        let error = release(&stand.qmp, &adopted, &disk.file).await.unwrap_err();
        assert!(
            matches!(&error, AdoptError::Swap { reason, .. } if reason.contains("lock")),
            "{error}"
        );
        is_adopted().await;
        drop(file);
        release(&stand.qmp, &adopted, &disk.file).await.unwrap();
        assert_eq!(lasting(&stand.disk().await), lasting(&disk));
    }
}

/// An agent that died half way finds out and goes on, whatever step it was at.
#[tokio::test(flavor = "multi_thread")]
async fn going_on_from_half_way() {
    use flimcd_qemu::commands::BlockdevAdd;
    use serde_json::json;
    if !has_qemu() {
        return;
    }
    for case in [BLOCKDEV_RAW, DRIVE_RAW_SATA, FILE_UNDER_DEVICE_IOTHREAD] {
        let stand = Stand::new(case).await;
        let disk = stand.disk().await;
        if stand.cannot(&disk) {
            continue;
        }
        let host = Host::new(stand.dir.path());
        let (export, _volume) = host.export(&disk);
        // Died after adding the node.
        let options = json!({"driver": "nbd", "node-name": format!("flimcd-nbd-{}", disk.id),
            "server": {"type": "unix", "path": export.socket}, "export": export.name});
        stand.qmp.execute(BlockdevAdd { options }).await.unwrap();
        let found = state_of(&stand.qmp, &disk, &export).await.unwrap();
        assert!(
            matches!(&found, DiskState::OnFile { leftovers, .. } if leftovers.len() == 1),
            "{found:?}"
        );
        let first = adopt(&stand.qmp, &disk, &export).await.unwrap();
        // Died before it could note that: asks again, with what it knows from before.
        let second = adopt(&stand.qmp, &disk, &export).await.unwrap();
        assert_eq!(first, second);
        // Died after the swap, before the old node was removed.
        let old = if disk.nodes.protocol.starts_with('#') {
            format!("flimcd-img-{}", disk.id)
        } else {
            disk.nodes.protocol.clone()
        };
        let options = json!({"driver": "file", "node-name": old, "filename": disk.file});
        stand.qmp.execute(BlockdevAdd { options }).await.unwrap();
        let found = state_of(&stand.qmp, &disk, &export).await.unwrap();
        assert!(
            matches!(&found, DiskState::OnExport { leftovers, .. } if *leftovers == [old]),
            "{found:?}"
        );
        let kept: Adopted = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
        release(&stand.qmp, &kept, &disk.file).await.unwrap();
        release(&stand.qmp, &kept, &disk.file).await.unwrap();
        assert_eq!(lasting(&stand.disk().await), lasting(&disk));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_an_agent_that_is_away() {
    if !has_qemu() {
        return;
    }
    let stand = Stand::new(BLOCKDEV_RAW).await;
    let disk = stand.disk().await;
    let tap = stand.path("tap.nbd");
    open_tap(&stand.qmp, &tap, &[(&disk.nodes.root, "disk")]).await;
    let mut host = Host::new(stand.dir.path());
    let (export, volume) = host.export(&disk);
    let adopted = adopt(&stand.qmp, &disk, &export).await.unwrap();
    let load = Load::start(&tap, "disk");
    while volume.stats().guest_writes == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(volume);
    host.restart();
    let (_, volume) = host.export(&disk);
    while volume.stats().guest_writes == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let found = state_of(&stand.qmp, &disk, &export).await.unwrap();
    assert!(matches!(found, DiskState::OnExport { .. }), "{found:?}");
    release(&stand.qmp, &adopted, &disk.file).await.unwrap();
    load.stop().verify(&tap, "disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_changed_it() {
    if !has_qemu() {
        return;
    }
    let stand = Stand::new(BLOCKDEV_RAW).await;
    let disk = stand.disk().await;
    let host = Host::new(stand.dir.path());
    let (theirs, _volume) = host.export(&disk);
    adopt(&stand.qmp, &disk, &theirs).await.unwrap();
    let ours = host.named("ours");
    let error = adopt(&stand.qmp, &disk, &ours).await.unwrap_err();
    assert!(
        matches!(&error, AdoptError::Changed { found, .. } if found.contains("vm.vd0")),
        "{error}"
    );
    let on_export = stand.disk().await;
    assert!(
        matches!(on_export.problem, Some(Problem::OnExport { .. })),
        "{on_export:?}"
    );
}
