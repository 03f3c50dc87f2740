//! `flimcd check`: whether the copy that a migration left here is what arrived.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use flimcd_agent::api::{CheckPhase, CheckStatus, Client, MigrationStatus};
use flimcd_core::MigrationId;

use super::{client, print_json};
use crate::{args::ApiArgs, format, outcome::advise};

/// How often the agent is asked.
const POLL: Duration = Duration::from_millis(100);
/// How long `flimcd migrate --wait` stays for the check after the migration.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd check 3f2a09c1d4e5b678          compare, and wait for the outcome
  flimcd check 3f2a09c1d4e5b678 --json

Only hashes cross the link. What the guest has written at the target since the switch is not compared. \
Ask the agent of the site that the volume came from, while it still has its copy.")]
pub(crate) struct CheckArgs {
    /// The migration, as `flimcd status` and `flimcd migrate` name it
    migration: MigrationId,
    /// Print JSON: the migration with the outcome
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

pub(crate) async fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let mut status = client.check(args.migration).await?;
    while !has_ended(&status) {
        tokio::time::sleep(POLL).await;
        status = client.migration(args.migration).await?;
    }
    if args.json {
        print_json(&status)?;
    }
    outcome(&status, args.json)
}

fn has_ended(status: &MigrationStatus) -> bool {
    status
        .check
        .as_ref()
        .is_none_or(|check| check.phase.has_ended())
}

/// After a migration that has completed: stays a little for its check, and says what comes of it.
pub(crate) async fn after(
    client: &Client,
    mut status: MigrationStatus,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let begun = std::time::Instant::now();
    while !has_ended(&status) && begun.elapsed() < PATIENCE {
        tokio::time::sleep(POLL).await;
        // The migration is over: whatever became of the agent, that is not this command's failure.
        match client.migration(status.id).await {
            Ok(now) => status = now,
            Err(_) => return Ok(ExitCode::SUCCESS),
        }
    }
    if json && status.check.is_some() {
        println!("{}", serde_json::to_string(&status)?);
    }
    let id = status.id;
    match &status.check {
        None => Ok(ExitCode::SUCCESS),
        Some(check) if check.phase == CheckPhase::Running => {
            if !json {
                println!(
                    "source and target are being compared in the background; `flimcd check {id}` waits for the outcome"
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        // That it could not be compared says nothing against the migration.
        Some(CheckStatus {
            phase: CheckPhase::Stopped,
            error,
            ..
        }) => {
            let why = error.as_deref().unwrap_or("the agent does not say why");
            eprintln!("source and target were not compared: {why}");
            Ok(ExitCode::SUCCESS)
        }
        Some(_) => outcome(&status, json),
    }
}

/// What a check that has ended came to.
fn outcome(status: &MigrationStatus, json: bool) -> anyhow::Result<ExitCode> {
    let Some(check) = &status.check else {
        return Err(anyhow::anyhow!("the agent does not say what came of it"));
    };
    let error = check
        .error
        .as_deref()
        .unwrap_or("the agent does not say why");
    match check.phase {
        CheckPhase::Equal => {
            if !json {
                println!("{}", equal(check));
            }
            Ok(ExitCode::SUCCESS)
        }
        CheckPhase::Different => Err(advise(
            error,
            format!(
                "the copy of {} here is kept, and is as it was at the switch: find out which of the two is right, and put those \
                 blocks right at {}",
                status.names(),
                status.peer
            ),
        )),
        CheckPhase::Running | CheckPhase::Stopped => Err(advise(
            format!("source and target were not compared: {error}"),
            "`flimcd check` tries again, as long as both copies stand",
        )),
    }
}

fn equal(check: &CheckStatus) -> String {
    let written = match check.blocks_written {
        0 => String::new(),
        blocks => format!(", {} written at the target since", format::count(blocks)),
    };
    format!(
        "checked: {} blocks equal{written}",
        format::count(check.blocks_equal)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_says_what_was_not_compared() {
        let mut check = CheckStatus {
            blocks_equal: 12_345,
            ..CheckStatus::default()
        };
        let text = equal(&check);
        assert!(
            text.starts_with("checked: 12") && text.ends_with("blocks equal"),
            "{text}"
        );
        check.blocks_written = 7;
        assert!(equal(&check).ends_with(", 7 written at the target since"));
    }
}
