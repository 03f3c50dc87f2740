//! `flimcd bench strategies`, small and whole.

use std::{fs, process::Command};

fn bench(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_flimcd"))
        .args(["bench", "strategies"])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn a_small_comparison_is_a_table_json_and_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let (json, html) = (dir.path().join("r.json"), dir.path().join("r.html"));
    let output = bench(&[
        "--load",
        "random,mail",
        "--size",
        "64MiB",
        "--strategies",
        "flimcd,precopy",
        "--without",
        "prefetch+order",
        "--switch-at",
        "25%",
        "--seeds",
        "2",
        "--json",
        json.to_str().unwrap(),
        "--html",
        html.to_str().unwrap(),
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    for row in ["flimcd without order+prefetch", "precopy"] {
        assert!(text.contains(row), "{text}");
    }
    let report: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["cells"].as_array().unwrap().len(), 2 * 3 * 2);
    assert!(
        fs::read_to_string(html)
            .unwrap()
            .starts_with("<!doctype html>")
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_what_there_is() {
    for (args, expected) in [
        (&["--strategies", "teleport"][..], "hybrid-threshold"),
        (&["--without", "luck"], "prefetch"),
        (&["--load", "nothing"], "web-vm"),
        (&["--switch-at", "150%"], "25%"),
        (&["--size", "1KiB"], "16 MiB"),
        (&["--speed", "0"], "above 0"),
    ] {
        let output = bench(args);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{args:?}");
        assert!(errors.contains(expected), "{args:?}: {errors}");
    }
}
