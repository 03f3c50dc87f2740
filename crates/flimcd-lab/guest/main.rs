//! The program that runs inside the guests of the VM lab: a load that checks itself, an echo
//! service, and commands to mark, verify and stop.
//!
//! Started by the guest's init with no arguments; the kernel's command line has the settings, as
//! `flimcd.NAME=VALUE`. Once a second it prints a line to its standard output, the serial console:
//! ```text
//! LOAD t=12.0 seq=240 iops=20 reads=20 worst_write_ms=3.1 worst_read_ms=1.2 errors=0
//! ```
//! `t` and all durations are the **guest's** clock, which stands still while the guest does. `seq`
//! counts writes, so that an observer outside sees gaps in it. Whatever is wrong is counted in
//! `errors` and printed as a line that begins with `BAD`; nothing is ever forgiven.
//!
//! Built as a static executable by the build script of `flimcd-lab` (only std and the modules
//! below), and as an ordinary binary so that it is linted and tested.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it talks to the serial console"
)]

#[allow(dead_code, reason = "shared with the lab, which uses more of it")]
#[path = "../src/content.rs"]
mod content;
mod files;
mod load;
mod marks;
mod ram;
#[allow(dead_code, reason = "shared with the lab, which uses more of it")]
#[path = "../src/rng.rs"]
mod rng;
mod services;
mod settings;
#[allow(dead_code, reason = "shared with the lab, which uses more of it")]
#[path = "../src/vm/stamp.rs"]
mod stamp;

use std::{
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use load::Load;
use marks::Marks;
use services::Guest;
use settings::Settings;

fn main() -> ExitCode {
    let text = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let settings = Settings::parse(&text);
    match run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("BAD the guest's program ended: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &Settings) -> std::io::Result<()> {
    let start = Instant::now();
    let load = Load::open(settings)?;
    let guest = Arc::new(Guest {
        load: Arc::clone(&load),
        marks: Mutex::new(Marks::new(Path::new("/marks"))),
    });
    services::start(&guest)?;
    load.start();
    println!(
        "GUEST READY files={} blocks={}",
        load.files(),
        load.blocks()
    );
    for second in 1u64.. {
        let next = start + Duration::from_secs(second);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        println!("{}", load.line(start.elapsed()));
    }
    Ok(())
}
