//! The command line: everything a person does with flimcd goes through here.
//!
//! `commands` holds one file per command of an operator, each a thin layer over the agent's API;
//! `demo` runs two agents and an emulated WAN by itself. Errors go to standard error and say what was
//! tried, what went wrong and what to do; the exit code is then not zero (2 for a wrong command line).
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "talking to a terminal is what this binary is for"
)]

mod args;
mod commands;
mod demo;
mod format;
mod outcome;
mod progress;
mod signals;
mod units;
mod vm_stage;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser as _;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            outcome::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Pki(args) => commands::pki::run(&args),
        Command::Agent(args) => commands::agent::run(&args),
        Command::Volume(args) => commands::block_on(commands::volume::run(&args)),
        Command::Vm(args) => commands::block_on(commands::vm::run(&args)),
        Command::Replica(args) => commands::block_on(commands::replica::run(&args)),
        Command::Replicate(args) => commands::block_on(commands::replicate::run(&args)),
        Command::Library(args) => commands::block_on(commands::library::run(&args)),
        Command::Heat(args) => commands::block_on(commands::heat::run(&args)),
        Command::Export(args) => commands::block_on(commands::volume::export(&args)),
        Command::Plan(args) => commands::block_on(commands::plan::run(&args)),
        Command::Migrate(args) => commands::block_on(commands::migrate::run(&args)),
        Command::Switchover(args) => commands::block_on(commands::migrate::switchover(&args)),
        Command::Cancel(args) => commands::block_on(commands::migrate::cancel(&args)),
        Command::Check(args) => commands::block_on(commands::check::run(&args)),
        Command::Status(args) => commands::block_on(commands::status::run(&args)),
        Command::Sim(args) => commands::sim::run_seeds(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Completions(args) => commands::completions(&args),
    }
}
