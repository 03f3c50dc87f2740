//! Tools that others wrote: libnbd, QEMU, fio.

use std::fs;

use crate::fixture::{Fixture, has, output, pattern, run};

const ODD: usize = 1_000_003;

#[test]
fn nbdinfo_finds_size_and_abilities() {
    if !has("nbdinfo") {
        return;
    }
    let fixture = Fixture::new(&pattern(ODD));
    assert_eq!(
        run("nbdinfo", &["--size", &fixture.uri()]).trim(),
        ODD.to_string()
    );
    let json = run("nbdinfo", &["--json", &fixture.uri()]);
    for able in [
        "can_multi_conn",
        "can_trim",
        "can_zero",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_df",
        "can_cache",
    ] {
        assert!(
            json.contains(&format!("\"{able}\": true")),
            "{able} in {json}"
        );
    }
    assert!(
        json.contains("\"structured\": true") && json.contains("base:allocation"),
        "{json}"
    );
    let list = run("nbdinfo", &["--list", &fixture.uri()]);
    assert!(list.contains("disk"), "{list}");
    let unknown = fixture.uri().replace("/disk?", "/other?");
    assert!(!output("nbdinfo", &[&unknown]).status.success());
}

#[test]
fn nbdcopy_carries_an_odd_sized_image_out_and_back() {
    if !has("nbdcopy") {
        return;
    }
    let mut content = pattern(5 * ODD);
    content[ODD..3 * ODD].fill(0);
    let fixture = Fixture::new(&content);
    let copy = fixture.dir.path().join("copy.img");
    let copy = copy.to_str().unwrap();
    run("nbdcopy", &[&fixture.uri(), copy]);
    assert!(fs::read(copy).unwrap() == content);

    let back = Fixture::new(&vec![7; 5 * ODD]);
    run(
        "nbdcopy",
        &[
            "--connections=4",
            "--requests=32",
            "--flush",
            copy,
            &back.uri(),
        ],
    );
    assert!(back.content() == content);
}

#[test]
fn qemu_img_converts_and_compares() {
    if !has("qemu-img") {
        return;
    }
    let content = pattern(6 << 20);
    let fixture = Fixture::new(&content);
    let copy = fixture.dir.path().join("copy.qcow2");
    let copy = copy.to_str().unwrap();
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &fixture.uri(), copy],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &fixture.uri(), copy],
    );
    let back = Fixture::new(&vec![0; 6 << 20]);
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "-W",
            copy,
            &back.uri(),
        ],
    );
    assert!(back.content() == content);
}

#[test]
fn qemu_io_patterns_hold() {
    if !has("qemu-io") {
        return;
    }
    let fixture = Fixture::new(&vec![0; ODD]);
    let uri = fixture.uri();
    let commands = [
        "write -P 0x11 0 64k",
        "write -P 0x22 1000 3000",
        "write -f -P 0x33 999000 1003",
        "aio_write -P 0x44 128k 64k",
        "aio_write -P 0x55 256k 128k",
        "aio_flush",
        "flush",
        "discard 16k 16k",
        "write -z 32k 8k",
        "write -z -u 40k 8k",
        "read -P 0x11 0 1000",
        "read -P 0x22 1000 3000",
        "read -P 0 32k 16k",
        "read -P 0x44 128k 64k",
        "read -P 0x55 256k 128k",
        "read -P 0x33 999000 1003",
    ];
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let said = run("qemu-io", &args);
    assert!(
        !said.contains("verification failed") && !said.contains("error"),
        "{said}"
    );
    assert_eq!(fixture.content()[999_000..], [0x33; 1003]);
}

#[test]
fn maps_of_a_sparse_file_agree() {
    if !has("nbdinfo") || !has("qemu-img") {
        return;
    }
    let mut content = vec![0; 4 << 20];
    content[1 << 20..2 << 20].copy_from_slice(&pattern(1 << 20));
    let fixture = Fixture::new(&content);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "discard 0 1M",
            "-c",
            "discard 2M 2M",
            &fixture.uri(),
        ],
    );
    let map = run("nbdinfo", &["--map", &fixture.uri()]);
    let lines: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let want = [
        ["0", "1048576", "3"],
        ["1048576", "1048576", "0"],
        ["2097152", "2097152", "3"],
    ];
    let got: Vec<_> = lines
        .iter()
        .map(|words| [words[0], words[1], words[2]])
        .collect();
    assert_eq!(got, want, "{map}");
    let json = run(
        "qemu-img",
        &["map", "-f", "raw", "--output=json", &fixture.uri()],
    );
    assert_eq!(json.matches("\"data\": true").count(), 1, "{json}");
    assert!(
        json.contains("\"start\": 1048576, \"length\": 1048576"),
        "{json}"
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !has("fio") {
        return;
    }
    if !String::from_utf8_lossy(&output("fio", &["--enghelp"]).stdout).contains("nbd") {
        eprintln!("SKIPPED: needs fio with its nbd engine: this one has none");
        return;
    }
    let fixture = Fixture::new(&vec![0; 16 << 20]);
    let uri = format!("--uri={}", fixture.uri());
    for (pattern, depth) in [("randwrite", "32"), ("write", "1")] {
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--size=16m",
            "--bsrange=4k-64k",
            "--verify=crc32c",
            "--randrepeat=0",
            "--fsync=16",
            &format!("--rw={pattern}"),
            &format!("--iodepth={depth}"),
        ];
        let said = run("fio", &args);
        assert!(said.contains("err= 0"), "{said}");
    }
}

#[test]
fn images_in_use_are_refused_both_ways() {
    use flimcd_volume::device::{FileDevice, OpenOptions};
    if !has("qemu-io") || !has("qemu-nbd") {
        return;
    }
    // Ours first: QEMU's tools refuse it.
    let fixture = Fixture::new(&[0; 65536]);
    let image = fixture.image.to_str().unwrap().to_owned();
    for command in ["read 0 512", "write 0 512"] {
        let refused = output("qemu-io", &["-f", "raw", "-c", command, &image]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("lock"), "{said}");
    }
    drop((fixture.server, fixture.volume));

    // QEMU first: we refuse it.
    let pid_file = fixture.dir.path().join("pid");
    let socket = fixture.dir.path().join("qemu.sock");
    run(
        "qemu-nbd",
        &[
            "--fork",
            "-f",
            "raw",
            "-t",
            "-k",
            socket.to_str().unwrap(),
            "--pid-file",
            pid_file.to_str().unwrap(),
            &image,
        ],
    );
    let refused = FileDevice::open(&image, &OpenOptions::default());
    let unlocked = FileDevice::open(
        &image,
        &OpenOptions {
            lock: false,
            ..OpenOptions::default()
        },
    );
    let pid = fs::read_to_string(&pid_file).unwrap();
    run("kill", &[pid.trim()]);
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("in use by another process") && refused.contains("writing"),
        "{refused}"
    );
    unlocked.unwrap();
}
