//! `flimcd migrate`, `switchover` and `cancel`.

use std::{process::ExitCode, time::Duration};

use anyhow::Context as _;
use flimcd_agent::api::{
    ApiCode, Client, ClientError, MigrateRequest, MigrationStatus, Phase, Switchover,
};

use tokio::signal::unix::{SignalKind, signal};

use super::{client, print_json};
use crate::{
    args::{MigrateArgs, OneVolumeArgs, SwitchoverArg},
    format,
    outcome::{advise, interrupted},
    progress::Progress,
};

const POLL: Duration = Duration::from_millis(250);
/// With --json a line is printed at every so-manieth poll.
const POLLS_PER_LINE: u32 = 4;
/// An agent that is restarted is waited for this long before `--wait` gives up.
const AGENT_AWAY_MAX: Duration = Duration::from_secs(30);

pub(crate) async fn run(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let request = MigrateRequest {
        to: args.to.clone(),
        strategy: args.strategy.into(),
        bandwidth_bytes_per_sec: args.bandwidth,
        switchover: match args.switchover {
            SwitchoverArg::Auto => Switchover::Auto,
            SwitchoverArg::Manual => Switchover::Manual,
        },
        compress: args.compress,
    };
    let status = client.migrate(&args.volume, &request).await?;
    if args.wait {
        return Wait::new(client, args, status).run().await;
    }
    if args.json {
        print_json(&status)?;
    } else {
        println!(
            "migration {} of {} to {} has begun",
            status.id, args.volume, status.peer
        );
        println!(
            "`flimcd status --watch` shows it, `flimcd cancel {}` ends it",
            args.volume
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn switchover(args: &OneVolumeArgs) -> anyhow::Result<ExitCode> {
    let status = client(&args.api).switchover(&args.name).await?;
    if args.json {
        print_json(&status)?;
    } else if status.ready_for_switchover || status.phase != Phase::Precopy {
        println!("{} switches to {}", status.names(), status.peer);
    } else {
        println!(
            "{} switches to {} as soon as it is ready",
            status.names(),
            status.peer
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn cancel(args: &OneVolumeArgs) -> anyhow::Result<ExitCode> {
    let status = client(&args.api).cancel(&args.name).await?;
    if args.json {
        print_json(&status)?;
    } else {
        println!(
            "the migration of {} to {} is cancelled; the guest was not touched",
            status.names(),
            status.peer
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `--wait`: follows one migration to its end.
struct Wait<'a> {
    client: Client,
    args: &'a MigrateArgs,
    status: MigrationStatus,
    progress: Option<Progress>,
    polls: u32,
    cancelling: bool,
    /// How long the agent has not answered.
    away: Duration,
}

impl<'a> Wait<'a> {
    fn new(client: Client, args: &'a MigrateArgs, status: MigrationStatus) -> Self {
        let progress = (!args.json).then(|| Progress::new(status.names()));
        Self {
            client,
            args,
            status,
            progress,
            polls: 0,
            cancelling: false,
            away: Duration::ZERO,
        }
    }

    async fn run(mut self) -> anyhow::Result<ExitCode> {
        // One listener for all of it: a Ctrl-C during a poll must not be lost.
        let mut interrupts = signal(SignalKind::interrupt()).context("Ctrl-C cannot be watched")?;
        loop {
            self.show()?;
            if self.status.phase.has_ended() {
                return self.finish();
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => self.poll().await?,
                _ = interrupts.recv() => {
                    if self.interrupt().await? {
                        return Ok(interrupted());
                    }
                }
            }
        }
    }

    async fn poll(&mut self) -> anyhow::Result<()> {
        match self.client.migration(self.status.id).await {
            Ok(status) => {
                self.status = status;
                self.away = Duration::ZERO;
                Ok(())
            }
            // A restarted agent picks the migration up again, and so does this command.
            Err(ClientError::NotRunning { .. } | ClientError::Broken(_))
                if self.away < AGENT_AWAY_MAX =>
            {
                if self.away.is_zero() {
                    self.say("the agent does not answer; waiting for it to come back");
                }
                self.away += POLL;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ctrl-C: whether to leave at once.
    async fn interrupt(&mut self) -> anyhow::Result<bool> {
        let volume = self.args.volume.clone();
        if self.cancelling {
            self.say("not waiting for the cancellation any longer; `flimcd status` shows what became of it");
            return Ok(true);
        }
        let detach = || {
            format!(
                "{volume} has switched or is switching to {}, so the migration goes on without this command; \
                 `flimcd status --watch` shows it",
                self.status.peer
            )
        };
        if matches!(self.status.phase, Phase::Switchover | Phase::Postcopy) {
            self.say(&detach());
            return Ok(true);
        }
        self.say("cancelling the migration (again: leave without waiting for that)");
        match self.client.cancel(&volume).await {
            Ok(status) => {
                self.status = status;
                self.cancelling = true;
                Ok(false)
            }
            Err(ClientError::Refused(body)) if body.code == ApiCode::TooLate => {
                self.say(&detach());
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn show(&mut self) -> anyhow::Result<()> {
        match &mut self.progress {
            Some(progress) => progress.show(&self.status),
            None => {
                if self.polls.is_multiple_of(POLLS_PER_LINE) || self.status.phase.has_ended() {
                    println!("{}", serde_json::to_string(&self.status)?);
                }
            }
        }
        self.polls = self.polls.wrapping_add(1);
        Ok(())
    }

    fn say(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.say(text),
            None => eprintln!("{text}"),
        }
    }

    fn finish(mut self) -> anyhow::Result<ExitCode> {
        self.progress = None;
        let status = &self.status;
        let (volume, peer) = (status.names(), &status.peer);
        match status.phase {
            Phase::Completed => {
                if !self.args.json {
                    println!("{}", summary(status));
                }
                Ok(ExitCode::SUCCESS)
            }
            Phase::Cancelled if self.cancelling => {
                eprintln!(
                    "the migration of {volume} to {peer} is cancelled; the guest was not touched"
                );
                Ok(interrupted())
            }
            Phase::Cancelled => Err(advise(
                format!("the migration of {volume} to {peer} was cancelled"),
                "the guest was not touched; `flimcd migrate` begins it again",
            )),
            _ => Err(advise(
                format!(
                    "the migration of {volume} to {peer} failed: {}",
                    status
                        .error
                        .as_deref()
                        .unwrap_or("the agent does not say why")
                ),
                format!(
                    "{volume} stays here and its guest was not touched; `flimcd migrate` tries again"
                ),
            )),
        }
    }
}

fn summary(status: &MigrationStatus) -> String {
    let ended = status.ended_unix_ms.unwrap_or(status.started_unix_ms);
    let took = ended.saturating_sub(status.started_unix_ms) as f64 / 1e3;
    let downtime = status.downtime_ms.map_or_else(String::new, |ms| {
        format!(", downtime at most {}", format::milliseconds(ms))
    });
    format!(
        "{} is at {}: {}{downtime}, {} on the link, {} misses in {} reads after the switch",
        status.names(),
        status.peer,
        format::seconds(took),
        format::bytes(status.bytes_on_link),
        format::count(status.guest_reads_missed),
        format::count(status.guest_reads),
    )
}
