//! Measures QEMU's own migration with its disk over the emulated WAN, one run, by hand:
//!
//! `cargo run --release -p flimcd-lab --example qemu_migration -- [NAME=VALUE…]` with `link=`, `writes=` (per
//! second), `copy=background|write-blocking`, `at-target=nothing|image`, `layout=raw|overlay`,
//! `ram=multifd|precopy|postcopy`, `granularity=BYTES`, `size=small|large`, `limit=SECONDS`. Prints JSON.
#![allow(clippy::print_stdout, reason = "prints its result")]

use std::{collections::HashMap, error::Error, time::Duration};

use flimcd_lab::vm::{
    AtTarget, GuestImage, GuestSpec, Layout, LoadSettings, Requirements, StageOptions,
    baseline::{BaselineOptions, CopyMode, Ram, Sync, run_case},
};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let given: HashMap<&str, &str> = words
        .iter()
        .filter_map(|word| word.split_once('='))
        .collect();
    let value = |name: &str, default: &'static str| given.get(name).copied().unwrap_or(default);
    let is_large = value("size", "large") == "large";
    let guest = GuestSpec {
        disk_bytes: 2 << 30,
        load_bytes: 256 << 20,
        content_bytes: 512 << 20,
        ..GuestSpec::default()
    };
    let guest = if is_large {
        guest
    } else {
        GuestSpec::default()
    };
    let overlay = value("layout", "raw") == "overlay";
    let have = match value("at-target", "nothing") {
        "image" => AtTarget::Image,
        _ => AtTarget::Nothing,
    };
    let stage = StageOptions {
        link: value("link", "100mbit,40ms,loss=0.1%").parse()?,
        seed: 1,
        memory_mib: if is_large { 512 } else { 192 },
        load: LoadSettings {
            writes_per_sec: value("writes", "20").parse()?,
            ram_mib: if is_large { 64 } else { 16 },
            ..LoadSettings::default()
        },
        layout: if overlay {
            Layout::Overlay
        } else {
            Layout::Raw
        },
        warm_up_s: 5,
    };
    let options = BaselineOptions {
        copy_mode: match value("copy", "background") {
            "write-blocking" => CopyMode::WriteBlocking,
            _ => CopyMode::Background,
        },
        sync: if overlay && have == AtTarget::Image {
            Sync::Top
        } else {
            Sync::Full
        },
        granularity: given
            .get("granularity")
            .map(|text| text.parse())
            .transpose()?,
        ram: match value("ram", "multifd") {
            "precopy" => Ram::Precopy,
            "postcopy" => Ram::Postcopy,
            _ => Ram::Multifd(4),
        },
        mirror_max: Duration::from_secs(value("limit", "300").parse()?),
        ..BaselineOptions::default()
    };
    let tools = Requirements::check()?;
    let dir = tempfile::tempdir()?;
    let image = GuestImage::build(&tools, dir.path(), &guest)?;
    let mut report = run_case(&tools, dir.path(), &image, &stage, have, &options)?;
    // Two lines a second are of no use here.
    report.client.ping.seconds.clear();
    report.client.tcp.seconds.clear();
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
