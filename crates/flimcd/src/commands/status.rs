//! `flimcd status`: an agent's links, volumes and migrations.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use flimcd_agent::api::{LinkStatus, MigrationStatus, Role, Status};
use flimcd_lab::report::{Align, Table};

use super::{client, print_json, volume};
use crate::{args::StatusArgs, format, progress};

const AGAIN: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let client = client(&args.api);
    loop {
        let status = client.status().await?;
        match (args.json, args.watch) {
            (true, false) => print_json(&status)?,
            (true, true) => println!("{}", serde_json::to_string(&status)?),
            (false, watch) => {
                if watch && std::io::stdout().is_terminal() {
                    print!("\x1b[H\x1b[2J");
                }
                print!("{}", text(&status));
            }
        }
        std::io::stdout().flush()?;
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn text(status: &Status) -> String {
    let listen = status
        .listen
        .as_deref()
        .unwrap_or("nothing (it only dials)");
    let mut out = format!(
        "site {}, flimcd {}, pid {}, listens on {listen}\n\n",
        status.site, status.version, status.pid
    );
    out.push_str(&links(&status.links));
    out.push('\n');
    out.push_str(&volume::table(&status.volumes));
    if !status.migrations.is_empty() {
        out.push('\n');
        out.push_str(&migrations(&status.migrations));
    }
    out
}

fn links(links: &[LinkStatus]) -> String {
    if links.is_empty() {
        return "no peers; name them with [[peer]] in the configuration\n".into();
    }
    let none = || "–".to_owned();
    let mut table = Table::new([
        ("PEER", Align::Left),
        ("LINK", Align::Left),
        ("RATE", Align::Right),
        ("RTT", Align::Right),
        ("SENT", Align::Right),
        ("RECEIVED", Align::Right),
        ("LAST ERROR", Align::Left),
    ]);
    for link in links {
        table.row([
            link.peer.to_string(),
            if link.up { "up" } else { "down" }.to_owned(),
            link.rate_bytes_per_sec.map_or_else(none, format::rate),
            link.rtt_ms.map_or_else(none, format::milliseconds),
            format::bytes(link.bytes_sent),
            format::bytes(link.bytes_received),
            link.last_error.clone().unwrap_or_else(none),
        ]);
    }
    table.to_string()
}

fn migrations(migrations: &[MigrationStatus]) -> String {
    let mut out = String::from("MIGRATIONS\n");
    for migration in migrations {
        let direction = match migration.role {
            Role::Source => "to",
            Role::Target => "from",
        };
        out.push_str(&format!(
            "{} {} {direction} {}: {}\n",
            migration.id,
            migration.names(),
            migration.peer,
            progress::line(migration)
        ));
        if let Some(text) = progress::by_kind(migration) {
            out.push_str(&format!("    {text}\n"));
        }
        if let Some(error) = &migration.error {
            out.push_str(&format!("    {error}\n"));
        }
    }
    out
}
