//! `flimcd agent`: the daemon of one site.

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::Context as _;
use flimcd_agent::{
    Config,
    config::{Log, LogFormat},
};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use tracing_subscriber::EnvFilter;

use crate::{args::AgentArgs, outcome::advise};

pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<ExitCode> {
    if let Some(parent) = args.with_parent {
        end_with(parent)?;
    }
    let config = Config::load(&args.config)?;
    if args.check {
        println!("{} can be used", args.config.display());
        return Ok(ExitCode::SUCCESS);
    }
    start_log(&config.log)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?
        .block_on(flimcd_agent::run(config))?;
    Ok(ExitCode::SUCCESS)
}

/// Log lines go to standard error, where a service manager expects them.
fn start_log(log: &Log) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&log.filter).map_err(|error| {
        advise(
            format!("the configuration's log.filter {:?} cannot be used: {error}", log.filter),
            "write a level (error, warn, info, debug, trace), or directives like flimcd_link=debug,info",
        )
    })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

/// Has the kernel end this process when its parent ends, however that happens.
fn end_with(parent: u32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("the kernel does not tell of the parent's end")?;
    // It may have ended before the kernel was asked.
    let now = Pid::as_raw(getppid());
    anyhow::ensure!(
        u32::try_from(now) == Ok(parent),
        "the process {parent} that started this agent is gone"
    );
    Ok(())
}
