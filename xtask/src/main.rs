//! Repository chores: `cargo xtask check` enforces the layers that ARCHITECTURE.md draws.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool for the terminal")]

mod layers;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("check") => report("layering", layers::check()),
        _ => {
            eprintln!("usage: cargo xtask check    refuse dependencies that cross the layers");
            ExitCode::from(2)
        }
    }
}

fn report(what: &str, result: Result<Vec<String>, String>) -> ExitCode {
    match result {
        Ok(faults) if faults.is_empty() => {
            println!("{what}: ok");
            ExitCode::SUCCESS
        }
        Ok(faults) => {
            for fault in &faults {
                eprintln!("{what}: {fault}");
            }
            eprintln!("{what}: {} faults; see ARCHITECTURE.md for what may use what", faults.len());
            ExitCode::FAILURE
        }
        Err(problem) => {
            eprintln!("{what}: could not be checked: {problem}");
            ExitCode::FAILURE
        }
    }
}
