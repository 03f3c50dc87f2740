//! The commands of an operator.

pub(crate) mod agent;
pub(crate) mod bench;
pub(crate) mod bench_content;
pub(crate) mod bench_strategies;
pub(crate) mod bench_vm;
pub(crate) mod check;
pub(crate) mod follow;
pub(crate) mod heat;
pub(crate) mod library;
pub(crate) mod migrate;
pub(crate) mod pki;
pub(crate) mod plan;
pub(crate) mod predicted;
pub(crate) mod replica;
pub(crate) mod replicate;
pub(crate) mod sim;
pub(crate) mod status;
pub(crate) mod vm;
pub(crate) mod volume;

use std::{future::Future, process::ExitCode};

use anyhow::Context as _;
use clap::CommandFactory as _;
use flimcd_agent::api::Client;
use serde::Serialize;

use crate::args::{ApiArgs, Cli, CompletionsArgs};

/// Runs a command that talks to an agent.
pub(crate) fn block_on<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?
        .block_on(command)
}

fn client(api: &ApiArgs) -> Client {
    Client::new(&api.socket)
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `flimcd completions SHELL`.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "flimcd", &mut script);
    print!("{}", String::from_utf8(script)?);
    Ok(ExitCode::SUCCESS)
}
