//! `flimcd migrate`, `switchover` and `cancel`.

use std::process::ExitCode;

use flimcd_agent::api::{Client, ClientError, MigrateRequest, MigrationStatus, Phase, Switchover};
use flimcd_core::{MigrationId, VolumeName};

use super::{
    client,
    follow::{End, Follow, Followed},
    plan, print_json,
};
use crate::{
    args::{MigrateArgs, OneVolumeArgs, SwitchoverArg},
    format,
    outcome::{advise, interrupted},
    progress,
};

pub(crate) async fn run(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let request = MigrateRequest {
        to: args.to.clone(),
        strategy: args.strategy,
        bandwidth_bytes_per_sec: args.bandwidth,
        switchover: match args.switchover {
            SwitchoverArg::Auto => Switchover::Auto,
            SwitchoverArg::Manual => Switchover::Manual,
        },
        compress: args.compress,
        library: args.library,
        keep_replica: args.keep_replica,
        check: args.no_check.then_some(false),
    };
    let status = client.migrate(&args.volume, &request).await?;
    if args.wait {
        let what = OneMigration {
            id: status.id,
            volume: args.volume.clone(),
        };
        let follow = Follow::new(client.clone(), what, status, args.json);
        return match follow.run().await? {
            End::Ended { status, cancelled } => {
                let code = finish(args.json, &status, cancelled)?;
                if status.phase == Phase::Completed {
                    return super::check::after(&client, status, args.json).await;
                }
                Ok(code)
            }
            End::Left => Ok(interrupted()),
        };
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

/// One migration of a volume.
struct OneMigration {
    id: MigrationId,
    volume: VolumeName,
}

impl Followed for OneMigration {
    type Status = MigrationStatus;

    fn name(&self) -> String {
        self.volume.to_string()
    }

    async fn poll(&self, client: &Client) -> Result<MigrationStatus, ClientError> {
        client.migration(self.id).await
    }

    async fn cancel(&self, client: &Client) -> Result<MigrationStatus, ClientError> {
        client.cancel(&self.volume).await
    }

    fn switches(status: &MigrationStatus) -> bool {
        matches!(status.phase, Phase::Switchover | Phase::Postcopy)
    }

    fn detached(&self, status: &MigrationStatus) -> String {
        format!(
            "{} has switched or is switching to {}, so the migration goes on without this command; \
             `flimcd status --watch` shows it",
            self.volume, status.peer
        )
    }
}

/// What there is to say at the end.
fn finish(json: bool, status: &MigrationStatus, cancelled: bool) -> anyhow::Result<ExitCode> {
    let (volume, peer) = (status.names(), &status.peer);
    match status.phase {
        Phase::Completed => {
            if !json {
                println!("{}", summary(status));
                if let Some(line) = super::predicted::line(status) {
                    println!("{line}");
                }
                if let Some(table) = plan::beside(status) {
                    print!("{table}");
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Phase::Cancelled if cancelled => {
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

fn summary(status: &MigrationStatus) -> String {
    let ended = status.ended_unix_ms.unwrap_or(status.started_unix_ms);
    let took = ended.saturating_sub(status.started_unix_ms) as f64 / 1e3;
    let downtime = status.downtime_ms.map_or_else(String::new, |ms| {
        format!(", downtime at most {}", format::milliseconds(ms))
    });
    let how = progress::by_kind(status).map_or_else(String::new, |text| format!("\n{text}"));
    format!(
        "{} is at {}: {}{downtime}, {} on the link, {} misses in {} reads after the switch{how}",
        status.names(),
        status.peer,
        format::seconds(took),
        format::bytes(status.bytes_on_link),
        format::count(status.guest_reads_missed),
        format::count(status.guest_reads),
    )
}
