//! `flimcd bench content`, small and over the relay: its figures have their shape, every image is right, and nothing
//! is left behind.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::util::{Said, flimcd, signal, until};

/// Not a whole number of blocks.
const SIZE: u64 = 9_999_991;
const FAST: &str = "400mbit,10ms";

fn bench(dir: &Path, link: &str, cases: &str, more: &[&str]) -> Command {
    let mut command = flimcd();
    command
        .args(["bench", "content", "--relay", "--link", link])
        .args(["--size", &SIZE.to_string(), "--case", cases, "--dir"])
        .arg(dir)
        .arg("--json")
        .arg(dir.join("content.json"))
        .args(more);
    command
}

fn report(dir: &Path) -> Value {
    let text = fs::read_to_string(dir.join("content.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn files_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// What every measurement has.
fn check_measured(row: &Value) {
    assert!(
        row["skipped"].is_null() && row["failed"].is_null(),
        "{row:#}"
    );
    assert_eq!(row["image_is_right"], true, "{row:#}");
    assert!(row["seconds"].as_f64() > Some(0.0), "{row:#}");
    assert!(row["bytes_on_link"].as_u64() > Some(1 << 12), "{row:#}");
    assert!(row["bound_bytes"].as_u64() > Some(1 << 12), "{row:#}");
    assert!(row["gathered_bound_bytes"].is_u64(), "{row:#}");
}

#[test]
fn figures_have_their_shape_and_images_are_right() {
    let dir = tempfile::tempdir().unwrap();
    let cases = "replica-5,debootstrap,mail,back";
    let said: Said = bench(dir.path(), FAST, cases, &[]).output().unwrap().into();
    let out = said.ok();
    assert!(
        out.contains("× BOUND") && out.contains("TCP relay"),
        "{out}"
    );
    let report = report(dir.path());
    assert_eq!(report["link"]["front_end"], "relay");
    assert_eq!(report["size_bytes"], SIZE);
    let rows = report["rows"].as_array().unwrap();
    let of =
        |case: &str| -> Vec<&Value> { rows.iter().filter(|row| row["case"] == case).collect() };
    let blocks = SIZE.div_ceil(4096);
    let replicas = of("replica-5");
    assert_eq!(replicas.len(), 6, "{rows:#?}");
    for row in replicas {
        check_measured(row);
        let variant = row["variant"].as_str().unwrap();
        // One more block than asked for was written to a replica behind the agent's back.
        let touched = u64::from(variant.starts_with("touched"));
        let changed = row["changed"]["blocks"].as_u64().unwrap();
        let wanted = (blocks + 10) / 20;
        assert!((wanted..=wanted + touched).contains(&changed), "{row:#}");
        // What stayed and was not touched needs no comparing: only what was written travels.
        let same = row["content"]["same_blocks"].as_u64().unwrap();
        assert_eq!(same == 0, variant.starts_with("replica"), "{row:#}");
        assert!(row["not_sent_share"].as_f64() > Some(0.1), "{row:#}");
        assert!(row["is_within_bound"].is_boolean(), "{row:#}");
    }
    let mail = of("mail");
    let by: Vec<_> = mail.iter().map(|row| row["by"].as_str().unwrap()).collect();
    assert_eq!(by, ["flimcd-base", "precopy", "precopy-zstd"]);
    for row in mail {
        check_measured(row);
        let guest = &row["details"]["strategy"];
        assert!(guest["guest_reads"].as_u64() > Some(0), "{row:#}");
        assert_eq!(guest["details"]["final_check_bytes"], SIZE, "{row:#}");
        let less = row["details"]["flimcd_less_time_percent"].is_number();
        assert_eq!(less, row["by"] != "flimcd-base", "{row:#}");
    }
    // What cannot run here says so, in the figures and to the person.
    for case in ["debootstrap", "back"] {
        let rows = of(case);
        let why = rows[0]["skipped"].as_str().unwrap();
        assert!(rows.len() == 1 && out.contains(why), "{why}: {out}");
    }
    assert_eq!(files_in(dir.path()), ["content.json"]);
}

#[test]
fn other_programs_copy_the_same_image_or_are_named_as_missing() {
    let dir = tempfile::tempdir().unwrap();
    let said: Said = bench(dir.path(), FAST, "peers", &[])
        .output()
        .unwrap()
        .into();
    let out = said.ok();
    let report = report(dir.path());
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        if let Some(why) = row["skipped"].as_str() {
            eprintln!("SKIPPED: {}: {why}", row["by"]);
            assert!(row["by"] != "flimcd" && out.contains(why), "{out}");
        } else {
            check_measured(row);
        }
    }
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = bench(
        dir.path(),
        "10mbit,10ms",
        "replica-1",
        &["--only", "library"],
    )
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("replica-1:")));
    signal(child.id(), Signal::INT);
    let status = until("the benchmark's end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    assert_eq!(files_in(dir.path()), Vec::<String>::new());
}
