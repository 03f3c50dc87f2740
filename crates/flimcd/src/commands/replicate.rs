//! `flimcd replicate`: replicas that are kept up to date at another site.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Args, Subcommand};
use flimcd_agent::api::{ReplicateRequest, ReplicationState, ReplicationStatus};
use flimcd_core::{SiteName, VolumeName};
use flimcd_lab::report::{Align, Table};

use super::{client, print_json};
use crate::{args::ApiArgs, format, units::parse_rate};

/// How often an increment that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  flimcd replicate vm1 --to lisbon --every 15m
  flimcd replicate vm1 --to lisbon --every 1h --bandwidth 50mbit
  flimcd replicate vm1 --to lisbon --once       one increment, and wait for it
  flimcd replicate list                         how old the replicas are, and why
  flimcd replicate stop vm1

The volume stays here. The first increment sends what the site lacks, the next ones what has changed. What stands there is \
always a disk as it was at one moment: `flimcd replica restore` at that site puts one that was being updated back to it. A \
later `flimcd migrate` goes over the replica, and moves what has changed since."
)]
pub(crate) struct ReplicateArgs {
    #[command(subcommand)]
    pub(crate) command: Option<ReplicateCommand>,
    /// Name of the volume
    #[arg(required = true)]
    pub(crate) volume: Option<VolumeName>,
    /// Site to keep the replica at; a configured peer
    #[arg(long, value_name = "SITE", required = true)]
    pub(crate) to: Option<SiteName>,
    /// From the beginning of one increment to that of the next: 30s, 15m, 1h, 1d
    #[arg(long, value_name = "TIME", value_parser = parse_time, required_unless_present = "once")]
    pub(crate) every: Option<u64>,
    /// One increment now, and wait for its end
    #[arg(long, conflicts_with = "every")]
    pub(crate) once: bool,
    /// Ceiling on the link to that site while an increment is sent
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReplicateCommand {
    /// Show all replicas that are kept from here
    #[command(after_help = "Examples:\n  flimcd replicate list\n  flimcd replicate list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Keep a replica no more; what is there stays
    #[command(after_help = "Examples:\n  flimcd replicate stop vm1")]
    Stop {
        /// Name of the volume
        volume: VolumeName,
        #[command(flatten)]
        api: ApiArgs,
    },
}

/// Seconds.
fn parse_time(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a time; write it like 30s, 15m, 1h or 1d");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number
        .checked_mul(factor)
        .filter(|&seconds| seconds > 0)
        .ok_or_else(wrong)
}

pub(crate) async fn run(args: &ReplicateArgs) -> anyhow::Result<ExitCode> {
    match (&args.command, &args.volume, &args.to) {
        (Some(ReplicateCommand::List { json, api }), ..) => {
            let all = client(api).replications().await?;
            if *json {
                print_json(&all)?;
            } else {
                print!("{}", table(&all, SystemTime::now()));
            }
            Ok(ExitCode::SUCCESS)
        }
        (Some(ReplicateCommand::Stop { volume, api }), ..) => {
            let stopped = client(api).stop_replication(volume).await?;
            println!(
                "no replica of {volume} is kept at {} any more; what is there stays",
                stopped.to
            );
            Ok(ExitCode::SUCCESS)
        }
        (None, Some(volume), Some(to)) => begin(args, volume, to).await,
        // Refused by clap.
        (None, ..) => anyhow::bail!("name a volume, and a site with --to"),
    }
}

async fn begin(
    args: &ReplicateArgs,
    volume: &VolumeName,
    to: &SiteName,
) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let request = ReplicateRequest {
        to: to.clone(),
        every_s: args.every,
        bandwidth_bytes_per_sec: args.bandwidth,
    };
    let mut status = client.replicate(volume, &request).await?;
    if args.once {
        let before = status.increments;
        loop {
            status = client.replication(volume).await?;
            let has_failed = status.running.is_none() && status.behind.is_some();
            if status.increments > before || has_failed {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    if args.json {
        print_json(&status)?;
    } else {
        print!(
            "{}",
            table(std::slice::from_ref(&status), SystemTime::now())
        );
    }
    let failed = args.once && status.state != ReplicationState::Done;
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn table(all: &[ReplicationStatus], now: SystemTime) -> String {
    if all.is_empty() {
        return "no replicas are kept from here\n".to_owned();
    }
    let mut table = Table::new([
        ("VOLUME", Align::Left),
        ("TO", Align::Left),
        ("STATE", Align::Left),
        ("CONSISTENT", Align::Right),
        ("SENT", Align::Right),
        ("GUEST STOOD", Align::Right),
        ("NEXT", Align::Right),
        ("WHY", Align::Left),
    ]);
    for one in all {
        let state = match one.state {
            ReplicationState::Running => "running",
            ReplicationState::Waiting => "waiting",
            ReplicationState::Behind => "behind",
            ReplicationState::Done => "done",
            ReplicationState::Stopped => "stopped",
        };
        let ago = one
            .lag_ms
            .map(|ms| format!("{} ago", span(Duration::from_millis(ms))));
        let next = one.next_due_unix_ms.map(|due| {
            let due = UNIX_EPOCH + Duration::from_millis(due);
            due.duration_since(now)
                .map_or_else(|_| "now".to_owned(), |left| format!("in {}", span(left)))
        });
        table.row([
            one.volume.to_string(),
            one.to.to_string(),
            state.to_owned(),
            ago.unwrap_or_else(|| "never".to_owned()),
            format::bytes(one.bytes_sent),
            one.stall_ms
                .map_or_else(|| "–".to_owned(), format::milliseconds),
            next.unwrap_or_else(|| "–".to_owned()),
            one.behind.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

fn span(span: Duration) -> String {
    format::seconds(span.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        let cases = [("30s", 30), ("15m", 900), ("1h", 3600), ("2d", 172_800)];
        for (text, seconds) in cases {
            assert_eq!(parse_time(text), Ok(seconds));
        }
        for text in [
            "",
            "15",
            "m",
            "0s",
            "-1h",
            "1w",
            "99999999999999999999s",
            "ä",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
