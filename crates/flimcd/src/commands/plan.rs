//! `flimcd plan`: what a migration would cost, while nothing moves; and what was planned beside what happened.

use std::{process::ExitCode, time::Duration};

use anyhow::Context as _;
use flimcd_agent::api::{
    Client, ContentStats, MigrationStatus, PlanBase, PlanPhase, PlanRequest, PlanStatus, Planned,
    StrategyEstimate,
};
use flimcd_core::BLOCK_SIZE;
use flimcd_lab::report::{Align, Table};
use tokio::signal::unix::{SignalKind, signal};

use super::{client, print_json};
use crate::{
    args::PlanArgs,
    format,
    outcome::{advise, interrupted},
    progress::{Progress, Shown},
};

const POLL: Duration = Duration::from_millis(200);
/// Pieces of a sample if nothing else is said: 128 MiB.
const SAMPLE: u32 = 512;

pub(crate) async fn run(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    let request = PlanRequest {
        volumes: args.volumes.clone(),
        to: args.to.clone(),
        bandwidth_bytes_per_sec: args.bandwidth,
        sample: args.quick.then(|| args.sample.unwrap_or(SAMPLE)),
        watch_s: Some(args.watch),
    };
    // Before it begins, so that no Ctrl-C is lost.
    let mut interrupts = signal(SignalKind::interrupt()).context("Ctrl-C cannot be watched")?;
    let mut status = client.make_plan(&request).await?;
    let mut progress = (!args.json).then(|| Progress::new(names(&status)));
    while !status.phase.has_ended() {
        if let Some(progress) = &mut progress {
            progress.show(&status);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => status = client.plan(status.id).await?,
            _ = interrupts.recv() => return cancel(&client, status).await,
        }
    }
    drop(progress);
    match status.phase {
        PlanPhase::Completed if args.json => print_json(&status)?,
        PlanPhase::Completed => print!("{}", text(&status)),
        PlanPhase::Cancelled => {
            return Err(advise("the plan was ended", "nothing was moved"));
        }
        _ => {
            let why = status
                .error
                .as_deref()
                .unwrap_or("the agent does not say why");
            return Err(advise(
                format!("planning {} to {} failed: {why}", names(&status), status.to),
                "nothing was moved, and nothing is left at the target",
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn cancel(client: &Client, status: PlanStatus) -> anyhow::Result<ExitCode> {
    client.cancel_plan(status.id).await?;
    eprintln!("the plan is ended; nothing was moved, and nothing is left at the target");
    Ok(interrupted())
}

fn names(status: &PlanStatus) -> String {
    let names: Vec<&str> = status.volumes.iter().map(|name| name.as_str()).collect();
    names.join(", ")
}

impl Shown for PlanStatus {
    fn line(&self) -> String {
        let (read, all) = (
            format::bytes(self.bytes_read),
            format::bytes(self.bytes_to_read),
        );
        match self.phase {
            PlanPhase::Comparing => format!("comparing with {}, {read} of {all}", self.to),
            PlanPhase::Watching => "watching what the guest writes".to_owned(),
            phase => phase.to_string(),
        }
    }

    fn done(&self) -> (u64, u64) {
        (self.bytes_read, self.bytes_to_read)
    }

    fn mark(&self) -> String {
        self.phase.to_string()
    }

    fn has_ended(&self) -> bool {
        self.phase.has_ended()
    }
}

/// The kinds of content with their blocks, in the order of all tables.
fn kinds(content: &ContentStats) -> [(&'static str, u64); 6] {
    [
        ("zero", content.zero_blocks),
        ("same place", content.same_blocks),
        ("elsewhere", content.elsewhere_blocks),
        ("repeated", content.repeated_blocks),
        ("new, compressed", content.compressed_blocks),
        ("new, raw", content.raw_blocks),
    ]
}

/// What those blocks take on the link, where it is more than a mention.
fn packed(kind: &str, content: &ContentStats) -> Option<u64> {
    match kind {
        "new, compressed" => Some(content.compressed_bytes),
        "new, raw" => Some(content.raw_blocks * BLOCK_SIZE),
        _ => None,
    }
}

fn text(status: &PlanStatus) -> String {
    let mut out = format!(
        "{} to {}: {}, of which {}\n\n",
        names(status),
        status.to,
        format::bytes(status.bytes_total),
        scope(status)
    );
    out.push_str(&content_table(status));
    let error = status
        .bytes_on_link_error_95
        .map_or_else(String::new, |error| format!(" ± {}", format::bytes(error)));
    out.push_str(&format!(
        "on the link: {}{error}\n",
        format::bytes(status.bytes_on_link)
    ));
    if let Some(image) = &status.library_image {
        out.push_str(&format!("compared with {image} at {}\n", status.to));
    }
    out.push_str(&format!(
        "the guest: {} written, {:.0} reads/s, watched for {}\n",
        rate_of(status.guest.written_bytes_per_sec),
        status.guest.reads_per_sec,
        format::seconds(status.guest.watched_s)
    ));
    let rate = status.rate_bytes_per_sec;
    let rate = rate.map_or_else(|| "rate not known yet".to_owned(), format::rate);
    let how = if status.rate_is_given {
        "as given"
    } else {
        "as measured"
    };
    let how = status.rate_bytes_per_sec.map_or("", |_| how);
    let rtt = status.rtt_ms.map_or_else(String::new, |ms| {
        format!(", round trip {}", format::milliseconds(ms))
    });
    out.push_str(&format!("the link: {rate} {how}{rtt}\n\n"));
    out.push_str(&estimates(&status.estimates));
    for note in &status.notes {
        out.push_str(&format!("note: {note}\n"));
    }
    out
}

fn rate_of(bytes_per_sec: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "for people"
    )]
    let whole = bytes_per_sec.round() as u64;
    format!("{}/s", format::bytes(whole))
}

fn scope(status: &PlanStatus) -> String {
    let moves = format::bytes(status.bytes_to_move);
    let what = match status.base {
        PlanBase::Nothing => format!("{moves} are not holes"),
        PlanBase::KnownCopy => format!("{moves} changed since the copy at {}", status.to),
        PlanBase::UnknownCopy => format!("all is compared with the copy at {}", status.to),
    };
    if status.content_error_95.is_some() {
        return format!("{what}; a sample of {}", format::bytes(status.bytes_read));
    }
    what
}

fn content_table(status: &PlanStatus) -> String {
    let mut table = Table::new([
        ("CONTENT", Align::Left),
        ("BYTES", Align::Right),
        ("± 95%", Align::Right),
        ("ON THE LINK", Align::Right),
    ]);
    let errors = status.content_error_95.as_ref().map(kinds);
    for (at, (kind, blocks)) in kinds(&status.content).into_iter().enumerate() {
        let error = errors.map_or_else(
            || "–".to_owned(),
            |errors| format::bytes(errors[at].1 * BLOCK_SIZE),
        );
        let on_link = packed(kind, &status.content);
        table.row([
            kind.to_owned(),
            format::bytes(blocks * BLOCK_SIZE),
            error,
            on_link.map_or_else(|| "–".to_owned(), format::bytes),
        ]);
    }
    table.to_string()
}

fn estimates(estimates: &[StrategyEstimate]) -> String {
    let mut table = Table::new([
        ("STRATEGY", Align::Left),
        ("ON THE LINK", Align::Right),
        ("GUEST MOVES AFTER", Align::Right),
        ("ALL THERE AFTER", Align::Right),
        ("DOWNTIME", Align::Right),
        ("MISSES", Align::Right),
    ]);
    let none = || "–".to_owned();
    for e in estimates {
        let downtime = e.downtime_ms.map_or_else(none, format::milliseconds);
        table.row([
            e.strategy.clone(),
            format::bytes(e.bytes_on_link),
            e.moves_s.map_or_else(none, format::seconds),
            e.total_s.map_or_else(none, format::seconds),
            match e.converges {
                true => downtime,
                false => format!("{downtime}, never gets ready"),
            },
            e.misses.map_or_else(none, format::count),
        ]);
    }
    table.to_string()
}

/// What was planned for a migration, beside what has happened; nothing without a plan.
pub(crate) fn beside(status: &MigrationStatus) -> Option<String> {
    let planned = status.planned.as_ref()?;
    let mut table = Table::new([
        ("", Align::Left),
        ("PLANNED", Align::Right),
        ("HAPPENED", Align::Right),
    ]);
    if let Some(content) = &planned.content {
        let happened = kinds(&status.content);
        for ((kind, blocks), (_, there)) in kinds(content).into_iter().zip(happened) {
            if blocks + there > 0 {
                table.row([
                    kind.to_owned(),
                    format::bytes(blocks * BLOCK_SIZE),
                    format::bytes(there * BLOCK_SIZE),
                ]);
            }
        }
    }
    let Planned { estimate, .. } = planned;
    let none = || "–".to_owned();
    let took = status
        .ended_unix_ms
        .map(|ended| ended.saturating_sub(status.started_unix_ms) as f64 / 1e3);
    table.row([
        "on the link".to_owned(),
        format::bytes(estimate.bytes_on_link),
        format::bytes(status.bytes_on_link),
    ]);
    table.row([
        "time".to_owned(),
        estimate.total_s.map_or_else(none, format::seconds),
        took.map_or_else(none, format::seconds),
    ]);
    table.row([
        "downtime".to_owned(),
        estimate.downtime_ms.map_or_else(none, format::milliseconds),
        status.downtime_ms.map_or_else(none, format::milliseconds),
    ]);
    table.row([
        "misses".to_owned(),
        estimate.misses.map_or_else(none, format::count),
        format::count(status.guest_reads_missed),
    ]);
    Some(table.to_string())
}
