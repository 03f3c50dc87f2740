//! The demo: what it leaves behind (nothing) and what it finds.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
};

use rustix::process::Signal;

use crate::util::{flimcd, signal, until};

/// A demo whose every file is below `dir`.
fn start(dir: &Path, size: &str, link: &str, more: &[&str]) -> Child {
    flimcd()
        .args(["demo", "--size", size, "--link", link, "--dir"])
        .arg(dir)
        .arg("--json")
        .arg(dir.join("report.json"))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn files_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// Processes that have `dir` in their command line.
fn processes_of(dir: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines
        .filter(|line| line.contains(dir.to_str().unwrap()))
        .collect()
}

#[test]
fn a_small_demo_moves_an_odd_image_with_every_strategy() {
    let dir = tempfile::tempdir().unwrap();
    let strategies = "precopy,precopy-zstd,postcopy,flimcd,flimcd-base";
    let child = start(
        dir.path(),
        "9999991",
        "400mbit,10ms",
        &["--strategies", strategies],
    );
    let said: crate::util::Said = child.wait_with_output().unwrap().into();
    let out = said.ok();
    assert!(
        out.contains("migration time") && out.contains("report.json"),
        "{out}"
    );
    let report = fs::read_to_string(dir.path().join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let runs = report["strategies"].as_array().unwrap();
    assert_eq!(runs.len(), 5);
    for run in runs {
        let with_base = run["strategy"] == "flimcd-base";
        assert_eq!(
            run["same_place_bytes"].as_u64() > Some(0),
            with_base,
            "{run:#}"
        );
        assert!(run["guest_reads"].as_u64().unwrap() > 0, "{run:#}");
        let least = if with_base { 1 << 17 } else { 1 << 20 };
        assert!(run["bytes_on_link"].as_u64().unwrap() > least, "{run:#}");
        for field in ["guest_reads_wrong", "final_blocks_wrong", "guest_errors"] {
            assert_eq!(run[field], 0, "{field} in {run:#}");
        }
        assert_eq!(run["details"]["final_check_bytes"], 9_999_991, "{run:#}");
    }
    assert_eq!(files_in(dir.path()), ["report.json"]);
    assert_eq!(processes_of(dir.path()), Vec::<String>::new());
}

#[test]
fn a_users_image_is_copied_and_never_changed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("mine.raw");
    let content: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    fs::write(&image, &content).unwrap();
    let child = flimcd()
        .args([
            "demo",
            "--strategies",
            "flimcd",
            "--link",
            "400mbit,10ms",
            "--dir",
        ])
        .arg(dir.path())
        .arg("--json")
        .arg(dir.path().join("report.json"))
        .arg("--image")
        .arg(&image)
        .output()
        .unwrap();
    crate::util::Said::from(child).ok();
    assert!(fs::read(&image).unwrap() == content);
}

#[test]
fn a_signal_at_any_stage_leaves_nothing_behind() {
    // What the demo prints just before each stage: image, agents, the first migration.
    for (marker, kind) in [
        ("image ", Signal::INT),
        ("agents ", Signal::TERM),
        ("bound ", Signal::INT),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = start(dir.path(), "16MiB", "20mbit,10ms", &[]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let seen = lines.find(|line| line.as_ref().unwrap().starts_with(marker));
        assert!(seen.is_some(), "the demo never printed {marker:?}");
        interrupt(child, kind, dir.path(), marker);
    }
}

#[test]
fn a_signal_during_the_migration_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path(), "16MiB", "20mbit,10ms", &[]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let seen = lines.find(|line| line.as_ref().unwrap().contains(" sent"));
    assert!(seen.is_some(), "the demo never showed progress");
    interrupt(child, Signal::INT, dir.path(), "migration");
}

fn interrupt(mut child: Child, kind: Signal, dir: &Path, stage: &str) {
    signal(child.id(), kind);
    let status = until("the demo's end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130), "at {stage:?}");
    assert_eq!(files_in(dir), Vec::<String>::new(), "at {stage:?}");
    assert_eq!(processes_of(dir), Vec::<String>::new(), "at {stage:?}");
}

#[test]
fn agents_do_not_outlive_a_demo_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start(dir.path(), "16MiB", "20mbit,10ms", &[]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("agents ")));
    child.kill().unwrap();
    child.wait().unwrap();
    until("the agents' end", || {
        processes_of(dir.path()).is_empty().then_some(())
    });
}
