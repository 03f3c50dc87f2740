//! `flimcd vm migrate` and `flimcd vm cancel`.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use flimcd_agent::api::{Client, ClientError, MoveVm, RamMode, Strategy, VmMoveStatus, VmPhase};
use flimcd_core::{BLOCK_SIZE, SiteName, VolumeName};

use crate::{
    args::ApiArgs,
    commands::{
        client,
        follow::{End, Follow, Followed},
        plan, print_json,
    },
    format,
    outcome::{advise, interrupted},
    progress::{Shown, by_kind, line as disks_line},
    units::parse_rate,
};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd vm migrate vm1 --to lisbon
  flimcd vm migrate vm1 --to lisbon --downtime 150 --ram precopy
  flimcd vm migrate vm1 --to lisbon --bandwidth 80mbit --release

The machine must be under care (`flimcd vm adopt`), and the target's configuration must say how to start it \
([[machine]]). The command follows the move to its end; Ctrl-C before the switch cancels it, and the guest goes on \
here. With --ram postcopy (or auto, where the memory does not converge) the guest is lost if either machine dies \
while pages still follow it.")]
pub(crate) struct MigrateArgs {
    /// Name of the machine
    name: VolumeName,
    /// Site to move it to
    #[arg(long, value_name = "SITE")]
    to: SiteName,
    /// How long the guest may stand, in milliseconds, as a goal [default: 300]
    #[arg(long, value_name = "MS")]
    downtime: Option<u64>,
    /// How the memory goes: before the switch, after it, or as it turns out
    #[arg(long, value_name = "precopy|postcopy|auto", default_value = "auto")]
    ram: RamMode,
    /// Ceiling on the link for everything that goes to this site, such as 80mbit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<u64>,
    /// How the disks go
    #[arg(long, value_parser = crate::args::strategy(), default_value_t)]
    strategy: Strategy,
    /// Have the target give the disks back as plain files once it has all of them
    #[arg(long)]
    release: bool,
    /// Do not follow the move
    #[arg(long)]
    detach: bool,
    /// Print JSON, one status per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  flimcd vm cancel vm1")]
pub(crate) struct CancelArgs {
    /// Name of the machine
    name: VolumeName,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

pub(crate) async fn run(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let request = MoveVm {
        to: args.to.clone(),
        downtime_ms: args.downtime,
        ram: args.ram,
        bandwidth_bytes_per_sec: args.bandwidth,
        strategy: args.strategy,
        release: args.release,
    };
    let status = client.move_vm(&args.name, &request).await?;
    if !args.detach {
        let what = OneMove(args.name.clone());
        return match Follow::new(client, what, status, args.json).run().await? {
            End::Ended { status, cancelled } => finish(args.json, &status, cancelled),
            End::Left => Ok(interrupted()),
        };
    }
    if args.json {
        print_json(&status)?;
    } else {
        println!("{} begins to move to {}", status.vm, status.peer);
        println!(
            "`flimcd vm show {0}` shows where it stands, `flimcd vm cancel {0}` ends it",
            status.vm
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn cancel(args: &CancelArgs) -> anyhow::Result<ExitCode> {
    let status = client(&args.api).cancel_vm_move(&args.name).await?;
    if args.json {
        print_json(&status)?;
    } else {
        println!(
            "the move of {} to {} is cancelled; its guest goes on here",
            status.vm, status.peer
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The move of one machine.
struct OneMove(VolumeName);

impl Followed for OneMove {
    type Status = VmMoveStatus;

    fn name(&self) -> String {
        self.0.to_string()
    }

    async fn poll(&self, client: &Client) -> Result<VmMoveStatus, ClientError> {
        client.vm_move(&self.0).await
    }

    async fn cancel(&self, client: &Client) -> Result<VmMoveStatus, ClientError> {
        client.cancel_vm_move(&self.0).await
    }

    fn switches(status: &VmMoveStatus) -> bool {
        matches!(status.phase, VmPhase::Switchover | VmPhase::Postcopy)
    }

    fn detached(&self, status: &VmMoveStatus) -> String {
        format!(
            "{} runs or begins to run at {}, so its move goes on without this command",
            self.0, status.peer
        )
    }
}

impl Shown for VmMoveStatus {
    fn line(&self) -> String {
        let mut line = match self.phase {
            VmPhase::Ram => format!(
                "memory: {} left, {} sent as {}, round {}",
                format::bytes(self.ram_bytes_left),
                format::bytes(self.ram_bytes_read),
                format::bytes(self.ram_bytes_sent),
                self.ram_rounds
            ),
            VmPhase::Switchover => "switching".to_owned(),
            VmPhase::Returning => "going back to a guest here".to_owned(),
            _ => String::new(),
        };
        if let Some(disks) = &self.disks {
            if !line.is_empty() {
                line.push_str("; ");
            }
            let _ = write!(line, "disks: {}", disks_line(disks));
        }
        if line.is_empty() {
            self.phase.to_string()
        } else {
            line
        }
    }

    fn done(&self) -> (u64, u64) {
        let (disks, all_disks) = self.disks.as_ref().map_or((0, 1), Shown::done);
        let all_ram = self.ram_bytes_total / BLOCK_SIZE;
        let ram = match self.phase {
            VmPhase::Disks | VmPhase::Returning => 0,
            _ => all_ram.saturating_sub(self.ram_bytes_left / BLOCK_SIZE),
        };
        (disks + ram, all_disks + all_ram)
    }

    fn mark(&self) -> String {
        self.phase.to_string()
    }

    fn has_ended(&self) -> bool {
        self.phase.has_ended()
    }
}

/// What there is to say at the end.
fn finish(json: bool, status: &VmMoveStatus, cancelled: bool) -> anyhow::Result<ExitCode> {
    let (vm, peer) = (&status.vm, &status.peer);
    match status.phase {
        VmPhase::Completed => {
            if !json {
                print!("{}", summary(status));
            }
            Ok(ExitCode::SUCCESS)
        }
        VmPhase::Cancelled if cancelled => {
            eprintln!("the move of {vm} to {peer} is cancelled; its guest goes on here");
            Ok(interrupted())
        }
        VmPhase::Cancelled => Err(advise(
            format!("the move of {vm} to {peer} was cancelled"),
            "its guest goes on here; `flimcd vm migrate` begins it again",
        )),
        _ => Err(advise(
            format!(
                "the move of {vm} to {peer} failed: {}",
                status
                    .error
                    .as_deref()
                    .unwrap_or("the agent does not say why")
            ),
            match status.switched_unix_ms {
                None => format!("{vm} goes on here; `flimcd vm migrate` tries again"),
                Some(_) => format!("its disks are at {peer}: see `flimcd vm show {vm}` there"),
            },
        )),
    }
}

/// What a move came to, for people.
pub(crate) fn summary(status: &VmMoveStatus) -> String {
    let ended = status.ended_unix_ms.unwrap_or(status.started_unix_ms);
    let seconds = |from: u64, to: u64| format::seconds(to.saturating_sub(from) as f64 / 1e3);
    let mut text = format!(
        "{} runs at {}: {} in all",
        status.vm,
        status.peer,
        seconds(status.started_unix_ms, ended)
    );
    if let Some(switched) = status.switched_unix_ms {
        let _ = write!(
            text,
            ", {} of it before the switch, {} after",
            seconds(status.started_unix_ms, switched),
            seconds(switched, ended)
        );
    }
    text.push('\n');
    if let Some(ms) = status.downtime_ms {
        let _ = writeln!(text, "  downtime  {}", format::milliseconds(ms));
    }
    let _ = writeln!(
        text,
        "  memory    {} sent as {}, {} passes",
        format::bytes(status.ram_bytes_read),
        format::bytes(status.ram_bytes_sent),
        status.ram_rounds
    );
    if let Some(disks) = &status.disks {
        let _ = writeln!(
            text,
            "  disks     {} sent; {} missing at the switch, {} misses in {} reads after it",
            format::bytes(disks.bytes_sent),
            format::bytes(disks.missing_blocks_at_switch.unwrap_or(0) * BLOCK_SIZE),
            format::count(disks.guest_reads_missed),
            format::count(disks.guest_reads)
        );
        let _ = writeln!(
            text,
            "  link      {} on it in all",
            format::bytes(disks.bytes_on_link)
        );
        if let Some(kinds) = by_kind(disks) {
            let _ = writeln!(text, "  {kinds}");
        }
        if let Some(table) = plan::beside(disks) {
            let _ = write!(
                text,
                "what was planned for the disks, and what happened:\n{table}"
            );
        }
    }
    text
}
