//! `flimcd agent`: the daemon of one site.

use std::process::ExitCode;

use anyhow::Context as _;
use flimcd_agent::Config;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::args::AgentArgs;

pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<ExitCode> {
    if let Some(parent) = args.with_parent {
        end_with(parent)?;
    }
    let config = Config::load(&args.config)?;
    if args.check {
        println!("{} can be used", args.config.display());
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!("not yet {:?}", config.site)
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
