//! Guests in QEMU. Without QEMU or a kernel for the guest these tests say so and pass.

use flimcd_lab::vm::{
    Bus, DiskFormat, DiskSpec, ExtraDisk, GuestImage, GuestSpec, Net, QemuSpec, Requirements,
    Storage, Style, Tools,
};

pub(crate) fn tools() -> Option<Tools> {
    find(&Requirements::default())
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn find(requirements: &Requirements) -> Option<Tools> {
    match requirements.find() {
        Ok(tools) => Some(tools),
        Err(missing) => {
            eprintln!("SKIPPED: {missing}");
            None
        }
    }
}

#[test]
fn a_guest_boots_runs_its_load_and_leaves_a_clean_disk() {
    let Some(tools) = tools() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default()).unwrap();
    let mut spec = QemuSpec::new("vm", &dir.path().join("run"), &image);
    spec.disks = vec![DiskSpec::new("disk0", &image.disks[0])];
    spec.load.writes_per_sec = 200.0;
    let qemu = spec.spawn(&tools).unwrap();
    qemu.wait_ready().unwrap();
    let sum = qemu.control("mark before 300").unwrap();
    qemu.wait_seconds(2).unwrap();
    let lines = qemu.load_lines();
    let (first, last) = (lines[0], lines[lines.len() - 1]);
    assert!(last.seq > first.seq && last.reads > 0, "{lines:?}");
    let sums = qemu.control("sums").unwrap();
    assert_eq!(sums, format!("SUM before {}\nOK", &sum[3..]));
    let verified = qemu.control("verify").unwrap();
    assert_eq!(verified, "OK files=1 blocks=8192 pages=4096 errors=0");
    assert!(qemu.control("nonsense").is_err());
    assert_eq!(qemu.complaints(), Vec::<String>::new());
    qemu.power_off().unwrap();
    tools.check_file_system(&image.disks[0]).unwrap();
}

#[test]
fn several_disks_in_every_way_that_qemu_has() {
    let Some(tools) = tools() else { return };
    let dir = tempfile::tempdir().unwrap();
    let extra = ExtraDisk {
        disk_bytes: 32 << 20,
        load_bytes: 4 << 20,
    };
    let guest = GuestSpec {
        extra_disks: vec![extra; 2],
        load_bytes: 4 << 20,
        ..GuestSpec::default()
    };
    let image = GuestImage::build(&tools, dir.path(), &guest).unwrap();
    let overlay = dir.path().join("root.qcow2");
    tools
        .qcow2_overlay(&image.disks[0], "raw", &overlay)
        .unwrap();
    let copy = dir.path().join("disk1.qcow2");
    tools.qcow2_copy(&image.disks[1], &copy).unwrap();

    let mut spec = QemuSpec::new("vm", &dir.path().join("run"), &image);
    let disk = |id, file, bus, format, style| DiskSpec {
        bus,
        format,
        style,
        ..DiskSpec::new(id, file)
    };
    spec.disks = vec![
        disk(
            "disk0",
            &overlay,
            Bus::VirtioBlk,
            DiskFormat::Qcow2,
            Style::Drive,
        ),
        disk(
            "disk1",
            &copy,
            Bus::VirtioScsi,
            DiskFormat::Qcow2,
            Style::Blockdev,
        ),
        disk(
            "disk2",
            &image.disks[2],
            Bus::VirtioScsi,
            DiskFormat::Raw,
            Style::Drive,
        ),
    ];
    let qemu = spec.spawn(&tools).unwrap();
    qemu.wait_ready().unwrap();
    assert!(
        qemu.serial().contains("GUEST READY files=3"),
        "{}",
        qemu.serial()
    );
    let verified = qemu.control("verify").unwrap();
    assert_eq!(verified, "OK files=0 blocks=3072 pages=4096 errors=0");
    assert_eq!(qemu.complaints(), Vec::<String>::new());
    qemu.power_off().unwrap();
    tools.check_file_system(&image.disks[2]).unwrap();
}

#[test]
fn a_guest_boots_from_sata() {
    let requirements = Requirements {
        needs_sata: true,
        ..Requirements::default()
    };
    let Some(tools) = find(&requirements) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let guest = GuestSpec {
        load_bytes: 4 << 20,
        ..GuestSpec::default()
    };
    let image = GuestImage::build(&tools, dir.path(), &guest).unwrap();
    let mut spec = QemuSpec::new("vm", &dir.path().join("run"), &image);
    spec.disks = vec![DiskSpec {
        bus: Bus::Sata,
        ..DiskSpec::new("disk0", &image.disks[0])
    }];
    let qemu = spec.spawn(&tools).unwrap();
    qemu.wait_ready().unwrap();
    let verified = qemu.control("verify").unwrap();
    assert!(verified.ends_with("errors=0"), "{verified}");
    assert_eq!(qemu.complaints(), Vec::<String>::new());
}

#[test]
fn command_lines_name_nodes_and_double_commas() {
    let image = GuestImage {
        kernel: "/k".into(),
        initramfs: "/i".into(),
        disks: Vec::new(),
    };
    let mut spec = QemuSpec::new("vm", "/run/a,b".as_ref(), &image);
    let nbd = Storage::Nbd {
        socket: "/s,1".into(),
        export: "e".into(),
        reconnect_delay_s: 30,
    };
    spec.disks = vec![DiskSpec {
        storage: nbd.clone(),
        ..DiskSpec::new("d", "/x".as_ref())
    }];
    spec.net = Net::Tap {
        device: "tap0".into(),
        address: "192.168.50.100/24".into(),
    };
    spec.is_incoming = true;
    let text = spec.arguments().join(" ");
    for part in [
        "driver=nbd,server.type=unix,server.path=/s,,1,export=e,reconnect-delay=30,node-name=d-file",
        "driver=raw,node-name=d,file=d-file,cache.direct=on,discard=unmap",
        "virtio-blk-pci,drive=d,id=d-dev,write-cache=on",
        "unix:/run/a,,b/qmp.sock,server=on",
        "flimcd.ip=192.168.50.100/24",
        "-incoming defer",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    spec.disks[0].style = Style::Drive;
    let text = spec.arguments().join(" ");
    let part = "format=raw,file.driver=nbd,file.server.type=unix,file.server.path=/s,,1,file.export=e,\
                file.reconnect-delay=30,cache.direct=on";
    assert!(text.contains(part), "{text}");
}
