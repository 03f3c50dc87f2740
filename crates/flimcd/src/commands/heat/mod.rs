//! `flimcd heat`: what is hot in a volume, as numbers and as a picture.

mod picture;

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Args;
use flimcd_agent::api::{HeatOf, HeatReport, HeatShare};
use flimcd_core::VolumeName;
use flimcd_lab::report::{Align, Table};

use self::picture::{Picture, Style};
use super::{client, print_json};
use crate::{args::ApiArgs, format};

/// Columns where nobody says how wide the terminal is.
const WIDTH: u16 = 80;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd heat vm1                  numbers, a picture of the disk, the hottest places
  flimcd heat vm1 --top 50
  flimcd heat vm1 --no-color       the picture in plain characters
  flimcd heat vm1 --json | jq '.writes.shares'

Rates are averages in which what happened a minute ago weighs half. They outlive the agent, and go \
along when the volume moves. Each row of the picture is a part of the disk, from its beginning to \
its end; brighter is hotter, on a scale where each step is twice the one before.")]
pub(crate) struct HeatArgs {
    /// Name of the volume
    pub(crate) volume: VolumeName,
    /// How many of the hottest places to list, chunks of 64 KiB
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) top: u32,
    /// Draw with plain characters, as into a file
    #[arg(long)]
    pub(crate) no_color: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

pub(crate) async fn run(args: &HeatArgs) -> anyhow::Result<ExitCode> {
    let is_terminal = std::io::stdout().is_terminal();
    let width = match console::Term::stdout().size_checked() {
        Some((_, columns)) if is_terminal => columns,
        _ => WIDTH,
    };
    let is_plain = args.no_color
        || !is_terminal
        || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = if is_plain {
        Style::Plain
    } else {
        Style::Colors
    };
    let picture = Picture::new(width, style);
    let report = client(&args.api)
        .heat(&args.volume, picture.cells(), args.top)
        .await?;
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", text(&report, &picture));
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything for a person.
fn text(report: &HeatReport, picture: &Picture) -> String {
    let mut text = format!(
        "{}, {}: averages of the last {}\n\n",
        report.volume,
        format::bytes(report.size_bytes),
        format::seconds(report.window_s)
    );
    text.push_str(&numbers(report));
    if report.reads.touched_bytes + report.writes.touched_bytes == 0 {
        text.push_str("\nnothing was read or written lately: the volume is cold\n");
        return text;
    }
    text.push('\n');
    text.push_str(&picture.draw(report));
    if !report.hottest.is_empty() {
        text.push('\n');
        text.push_str(&hottest(report));
    }
    let saturated = report.reads.saturated_chunks + report.writes.saturated_chunks;
    if saturated > 0 {
        text.push_str(&format!(
            "\n{saturated} chunks are hotter than can be counted: their rates are at least what is said\n"
        ));
    }
    text
}

fn numbers(report: &HeatReport) -> String {
    let mut table = Table::new([
        ("", Align::Left),
        ("PER SECOND", Align::Right),
        ("BYTES/S", Align::Right),
        ("TOUCHED", Align::Right),
        ("50% IN", Align::Right),
        ("90% IN", Align::Right),
        ("99% IN", Align::Right),
    ]);
    for (name, of) in [("reads", &report.reads), ("writes", &report.writes)] {
        let HeatOf { shares, .. } = of;
        let share = |percent: f64| shares.iter().find(|share| share.percent == percent);
        let share = |percent| share(percent).map_or_else(|| "–".to_owned(), share_text);
        table.row([
            name.to_owned(),
            rate(of.requests_per_s),
            per_second(of.bytes_per_s),
            format::bytes(of.touched_bytes),
            share(50.0),
            share(90.0),
            share(99.0),
        ]);
    }
    table.to_string()
}

/// `64.0 MiB (0.31%)`.
fn share_text(share: &HeatShare) -> String {
    if share.bytes == 0 {
        return "–".to_owned();
    }
    let percent = match share.percent_of_volume {
        percent if percent < 0.005 => "<0.01".to_owned(),
        percent if percent < 9.995 => format!("{percent:.2}"),
        percent => format!("{percent:.0}"),
    };
    format!("{} ({percent}%)", format::bytes(share.bytes))
}

fn hottest(report: &HeatReport) -> String {
    let mut table = Table::new([
        ("HOTTEST AT", Align::Right),
        ("BYTE", Align::Right),
        ("READ/S", Align::Right),
        ("WRITTEN/S", Align::Right),
    ]);
    for chunk in &report.hottest {
        table.row([
            format::bytes(chunk.offset),
            chunk.offset.to_string(),
            per_second(chunk.read_bytes_per_s),
            per_second(chunk.written_bytes_per_s),
        ]);
    }
    table.to_string()
}

/// `12.3`, `0.04`, `1 234`.
fn rate(per_second: f64) -> String {
    match per_second {
        0.0 => "0".to_owned(),
        r if r < 9.995 => format!("{r:.2}"),
        r if r < 99.95 => format!("{r:.1}"),
        r => format::count(whole(r)),
    }
}

/// `1.20 MiB/s`.
fn per_second(bytes: f64) -> String {
    if bytes <= 0.0 {
        return "0".to_owned();
    }
    format!("{}/s", format::bytes(whole(bytes).max(1)))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates"
)]
fn whole(n: f64) -> u64 {
    n.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_agent::api::{HeatCell, HotChunk};

    /// Of a disk of 1 GiB that is hot at 256 MiB.
    pub(super) fn report(cells: u32) -> HeatReport {
        let cell_bytes = (1u64 << 30).div_ceil(u64::from(cells));
        let share = |percent| HeatShare {
            percent,
            bytes: 64 << 20,
            percent_of_volume: 6.25,
        };
        let of = |rate: f64| HeatOf {
            requests_per_s: rate,
            bytes_per_s: rate * 4096.0,
            touched_bytes: 64 << 20,
            shares: [50.0, 90.0, 99.0].map(share).to_vec(),
            saturated_chunks: 0,
        };
        let mut drawn = vec![HeatCell::default(); cells as usize];
        drawn[cells as usize / 4].read_bytes_per_s = 4096.0;
        drawn[cells as usize - 1].written_bytes_per_s = 1024.0;
        HeatReport {
            volume: "vm".parse().unwrap(),
            size_bytes: 1 << 30,
            chunk_bytes: 65536,
            half_life_s: 60.0,
            window_s: 87.0,
            reads: of(1.0),
            writes: of(1234.5),
            cells: drawn,
            cell_bytes,
            hottest: vec![HotChunk {
                offset: 256 << 20,
                read_bytes_per_s: 4096.0,
                written_bytes_per_s: 0.0,
            }],
        }
    }

    #[test]
    fn a_person_gets_numbers_a_picture_and_places() {
        let picture = Picture::new(80, Style::Plain);
        let text = text(&report(picture.cells()), &picture);
        for part in [
            "vm, 1.00 GiB: averages of the last 87.0 s",
            "1\u{202f}235",
            "64.0 MiB (6.25%)",
            "268435456",
            "4.00 KiB/s",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(
            text.lines().all(|line| line.chars().count() <= 110),
            "{text}"
        );
    }

    #[test]
    fn a_cold_volume_is_called_cold() {
        let picture = Picture::new(80, Style::Plain);
        let mut cold = report(picture.cells());
        cold.reads.touched_bytes = 0;
        cold.writes.touched_bytes = 0;
        let text = text(&cold, &picture);
        assert!(text.contains("the volume is cold"), "{text}");
        assert!(!text.contains("HOTTEST"), "{text}");
    }

    #[test]
    fn rates_are_short() {
        assert_eq!(rate(0.0), "0");
        assert_eq!(rate(0.042), "0.04");
        assert_eq!(rate(12.34), "12.3");
        assert_eq!(per_second(0.2), "1 B/s");
    }
}
