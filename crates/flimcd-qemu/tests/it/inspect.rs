//! What is said about the disks of a VM.

use flimcd_qemu::{DiskFormat, Problem, RunState, adopt, inspect};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    host::Host,
    vm::{BitmapAdd, BlockdevAddRaw, Mirror, Vm, has_qemu, make_image},
};

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|a| (*a).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_a_vm_has() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    make_image(&path("a.raw"), "raw", &[]);
    make_image(&path("base.qcow2"), "qcow2", &[]);
    let base = path("base.qcow2").display().to_string();
    make_image(&path("mid.qcow2"), "qcow2", &["-b", &base, "-F", "qcow2"]);
    make_image(
        &path("c.qcow2"),
        "qcow2",
        &["-b", "mid.qcow2", "-F", "qcow2"],
    );
    let args = strings(&[
        "-S",
        "-drive",
        // Relative to QEMU's directory.
        "file=a.raw,format=raw,if=virtio,cache=none,aio=io_uring,throttling.iops-total=100000",
        "-object",
        "throttle-group,id=tg0",
        "-blockdev",
        r#"{"driver":"throttle","node-name":"top","throttle-group":"tg0","file":{"driver":"qcow2","node-name":"fmt","file":{"driver":"file","filename":"c.qcow2","aio":"native","cache":{"direct":true}}}}"#,
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,drive=top,id=Data_1",
        "-drive",
        "file=base.qcow2,if=none,id=cd,readonly=on,media=cdrom",
        "-device",
        "ide-cd,drive=cd,id=cd0,bus=ide.2",
        "-device",
        "ide-cd,id=empty,bus=ide.3",
    ]);
    let mut vm = Vm::start(dir.path(), "a vm", &args);
    let qmp = vm.connect().await;
    let found = inspect(&qmp).await.unwrap();
    assert_eq!(found.vm_name.as_deref(), Some("a vm"));
    assert_eq!(
        (found.status, found.memory_bytes),
        (RunState::Prelaunch, 32 << 20)
    );
    assert!(found.version.is_at_least(6, 0));
    let ids: Vec<_> = found.disks.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["virtio0", "cd0", "data-1"]);
    let [virtio, cd, data] = &found.disks[..] else {
        unreachable!()
    };
    assert_eq!(virtio.file, path("a.raw"));
    assert_eq!(
        (virtio.size_bytes, virtio.file_bytes, virtio.export_bytes),
        (32 << 20, 32 << 20, 32 << 20)
    );
    assert_eq!(virtio.format, DiskFormat::Raw);
    assert_eq!(virtio.problem, None);
    assert!(virtio.options.writeback && virtio.options.protocol.node.cache_direct);
    assert_eq!(virtio.options.protocol.aio, "io_uring");
    assert_eq!(cd.problem, Some(Problem::ReadOnly));
    assert_eq!(data.problem, None);
    assert_eq!(data.format, DiskFormat::Qcow2);
    assert_eq!(
        (data.nodes.root.as_str(), data.nodes.format.as_deref()),
        ("top", Some("fmt"))
    );
    assert_eq!(data.file, path("c.qcow2"));
    assert_eq!(data.backing, [path("mid.qcow2"), path("base.qcow2")]);
    assert_eq!(data.qdev.as_deref(), Some("Data_1"));
    let again = inspect(&qmp).await.unwrap();
    assert_eq!(again.disks, found.disks);
    // A filter above does not matter.
    let host = Host::new(dir.path());
    for disk in [virtio, data] {
        let (export, _volume) = host.export(disk);
        let adopted = adopt(&qmp, disk, &export).await.unwrap();
        flimcd_qemu::release(&qmp, &adopted, &disk.file)
            .await
            .unwrap();
    }
}

/// The only disk of a VM that was started with these arguments.
async fn problem_of(args: &[&str], prepare: impl Fn(&std::path::Path)) -> Option<Problem> {
    let dir = TempDir::new().unwrap();
    make_image(&dir.path().join("raw.img"), "raw", &[]);
    prepare(dir.path());
    let mut args = strings(args);
    args.push("-S".to_owned());
    let mut vm = Vm::start(dir.path(), "vm", &args);
    let qmp = vm.connect().await;
    if dir.path().join("replaced").exists() {
        std::fs::rename(dir.path().join("replaced"), dir.path().join("raw.img")).unwrap();
    }
    inspect(&qmp).await.unwrap().disks.remove(0).problem
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_adopted_and_why() {
    if !has_qemu() {
        return;
    }
    let plain = ["-drive", "file=raw.img,format=raw,if=virtio"];
    let qcow2 = ["-drive", "file=q.img,format=qcow2,if=virtio"];
    let image = |options: &'static str| {
        move |dir: &std::path::Path| {
            make_image(&dir.join("q.img"), "qcow2", &["-o", options]);
        }
    };
    assert_eq!(problem_of(&plain, |_| ()).await, None);
    assert_eq!(
        problem_of(&qcow2, image("lazy_refcounts=on")).await,
        Some(Problem::LazyRefcounts)
    );
    assert_eq!(
        problem_of(&qcow2, image("data_file=d.img,data_file_raw=on")).await,
        Some(Problem::DataFile)
    );
    assert_eq!(
        problem_of(&["-drive", "file=v.img,format=vmdk,if=virtio"], |dir| {
            make_image(&dir.join("v.img"), "vmdk", &[]);
        })
        .await,
        Some(Problem::Format("vmdk".into()))
    );
    assert_eq!(
        problem_of(
            &["-drive", "driver=null-co,read-zeroes=on,if=virtio"],
            |_| ()
        )
        .await,
        Some(Problem::Protocol("null-co".into()))
    );
    assert!(matches!(
        problem_of(&plain, |dir| make_image(&dir.join("replaced"), "raw", &[])).await,
        Some(Problem::OtherFile { .. })
    ));
    assert!(matches!(
        problem_of(
            &["-drive", "file=raw.img,format=raw,if=virtio,snapshot=on"],
            |_| ()
        )
        .await,
        Some(Problem::NoFile { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn bitmaps_and_jobs_are_in_the_way() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    make_image(&dir.path().join("raw.img"), "raw", &[]);
    make_image(&dir.path().join("copy.img"), "raw", &[]);
    let args = [
        "-S",
        "-drive",
        "file=raw.img,format=raw,if=virtio",
        "-drive",
        "file=copy.img,format=raw,if=virtio",
    ];
    let mut vm = Vm::start(dir.path(), "vm", &strings(&args));
    let qmp = vm.connect().await;
    let disks = inspect(&qmp).await.unwrap().disks;
    let mirror =
        json!({"job-id": "backup7", "device": disks[0].nodes.root, "target": "t", "sync": "full"});
    let target = json!({"driver": "null-co", "node-name": "t", "size": 32 << 20});
    qmp.execute(BlockdevAddRaw(target)).await.unwrap();
    qmp.execute(Mirror(mirror)).await.unwrap();
    let found = inspect(&qmp).await.unwrap().disks;
    assert!(
        matches!(&found[0].problem, Some(Problem::Job(job) | Problem::Filter(job)) if job.contains("mirror")),
        "{found:?}"
    );
    assert!(
        matches!(&found[1].problem, Some(Problem::Job(job)) if job == "backup7 (mirror)"),
        "{found:?}"
    );
    let cancel = flimcd_qemu::commands::BlockJobCancel {
        device: "backup7".into(),
        force: true,
    };
    qmp.execute(cancel).await.unwrap();
    while !qmp
        .execute(flimcd_qemu::commands::QueryJobs {})
        .await
        .unwrap()
        .is_empty()
    {
        tokio::task::yield_now().await;
    }
    let bitmap = json!({"node": disks[1].nodes.root, "name": "daily"});
    qmp.execute(BitmapAdd(bitmap)).await.unwrap();
    let found = inspect(&qmp).await.unwrap().disks;
    assert_eq!(found[0].problem, None);
    assert_eq!(found[1].problem, Some(Problem::Bitmaps("daily".into())));
}
