//! Builds the program that runs inside the guests of the VM lab, as a static executable, so that the
//! library can carry it and a guest needs no libraries of the host.
//!
//! It is plain `rustc`, because cargo has no static executable beside a dynamic library of one
//! package. Where the C library cannot be linked statically the library is built without it, and
//! `vm::Requirements::check` says what is missing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Sources of the program; it uses nothing but these and std.
const SOURCES: &[&str] = &[
    "build.rs",
    "guest",
    "src/content.rs",
    "src/rng.rs",
    "src/vm/stamp.rs",
];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("flimcd-guest");
    if let Err(text) = build(&out) {
        println!("cargo::warning=the program for VM guests was not built: {text}");
        fs::write(&out, []).expect("cargo's output directory can be written");
    }
}

fn build(out: &Path) -> Result<(), String> {
    let target = env::var("TARGET").map_err(|error| error.to_string())?;
    if !target.contains("linux") {
        return Err(format!("guests run Linux, and this is built for {target}"));
    }
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--edition", "2024", "--crate-name", "flimcd_guest"])
        .args(["--crate-type", "bin", "--cap-lints", "allow"])
        .args(["--target", &target, "-C", "target-feature=+crt-static"])
        .args(["-C", "opt-level=2", "-C", "panic=abort"])
        .args(["-C", "strip=symbols"])
        .arg("-o")
        .arg(out)
        .arg("guest/main.rs")
        .output()
        .map_err(|error| format!("rustc cannot be started: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(text.lines().take(20).collect::<Vec<_>>().join(" | "))
}
