//! Repository chores.
//!
//! - `cargo xtask layering` enforces the layers that ARCHITECTURE.md draws.
//! - `cargo xtask demo-report FILE` checks the figures of a demo that are not timings.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a tool for the terminal"
)]

mod layers;
mod report;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["layering"] => verdict("layering", layers::check()),
        ["demo-report", file] => verdict("demo report", report::check(Path::new(file))),
        _ => {
            eprintln!(
                "usage: cargo xtask layering            refuse dependencies that cross the layers"
            );
            eprintln!(
                "       cargo xtask demo-report FILE    check a demo's figures that are not timings"
            );
            ExitCode::from(2)
        }
    }
}

fn verdict(what: &str, result: Result<Vec<String>, String>) -> ExitCode {
    match result {
        Ok(faults) if faults.is_empty() => {
            println!("{what}: ok");
            ExitCode::SUCCESS
        }
        Ok(faults) => {
            for fault in &faults {
                eprintln!("{what}: {fault}");
            }
            ExitCode::FAILURE
        }
        Err(problem) => {
            eprintln!("{what}: could not be checked: {problem}");
            ExitCode::FAILURE
        }
    }
}
