//! What `blkparse` prints by default, one event a line:
//!
//! ```text
//!   8,0    3        1     0.000000000   697  Q   W 223490 + 8 [kjournald]
//!   device cpu  number    seconds       pid  action RWBS sector + sectors [process]
//! ```
//! A request has several events. Those of one action are taken: `Q` (queued) if there is any, else `D`
//! (sent to the disk), else `C` (completed); the others are counted as other lines, and so are flushes and
//! discards, and the statistics at the end.

use std::time::Duration;

use super::collect::{BadRecord, Collector, excerpt, number};

pub(super) const FORMAT: &str = "blkparse";
const WANTED: &str = "10 (device cpu number seconds pid action RWBS sector + sectors)";

/// The actions that requests can be taken from, best first.
const ACTIONS: [&str; 3] = ["Q", "D", "C"];

/// An event of any action.
struct Event<'a> {
    device: &'a str,
    at: Duration,
    action: &'a str,
    rest: Vec<&'a str>,
}

fn event(line: &str) -> Result<Event<'_>, BadRecord> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let &[device, cpu, sequence, time, pid, action, ref rest @ ..] = fields.as_slice() else {
        return Err(BadRecord::Fields {
            found: fields.len(),
            wanted: WANTED,
        });
    };
    let is_device = device
        .split_once(',')
        .is_some_and(|(major, minor)| [major, minor].iter().all(|part| is_number(part)));
    if !is_device {
        return Err(BadRecord::Device(excerpt(device)));
    }
    number("cpu", cpu)?;
    number("sequence", sequence)?;
    number("pid", pid)?;
    Ok(Event {
        device,
        at: seconds(time)?,
        action,
        rest: rest.to_vec(),
    })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// `12.000345678`, exactly.
fn seconds(text: &str) -> Result<Duration, BadRecord> {
    let bad = || BadRecord::Number {
        what: "time",
        text: excerpt(text),
    };
    let (whole, fraction) = text.split_once('.').ok_or_else(bad)?;
    if !is_number(fraction) || fraction.len() > 9 {
        return Err(bad());
    }
    let nanos: u32 = format!("{fraction:0<9}").parse().map_err(|_| bad())?;
    Ok(Duration::new(number("time", whole)?, nanos))
}

/// The action to take from these lines: the best that any of them has.
pub(super) fn action<'a>(lines: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let mut best = None;
    for line in lines {
        let Ok(event) = event(line) else { continue };
        let place = ACTIONS.iter().position(|action| *action == event.action);
        best = match (best, place) {
            (Some(best), Some(place)) => Some(place.min(best)),
            (best, place) => best.or(place),
        };
        if best == Some(0) {
            break;
        }
    }
    best.map(|place| ACTIONS[place])
}

/// Whether the statistics begin here, which stand after the last event.
pub(super) fn is_end(line: &str) -> bool {
    line.starts_with("CPU") || line.starts_with("Total")
}

/// Takes one line, if it is an event of this action.
pub(super) fn line(
    line: &str,
    action: Option<&str>,
    collector: &mut Collector,
) -> Result<(), BadRecord> {
    let event = event(line)?;
    if Some(event.action) != action {
        collector.summary.other_lines += 1;
        return Ok(());
    }
    let rwbs = event.rest.first().copied().unwrap_or("");
    let is_write = rwbs.contains('W');
    let is_flush = rwbs.contains('F') && event.rest.get(2) != Some(&"+");
    if is_flush || rwbs.contains('D') || rwbs == "N" {
        collector.summary.other_lines += 1;
        return Ok(());
    }
    if !is_write && !rwbs.contains('R') {
        return Err(BadRecord::Type(excerpt(rwbs)));
    }
    let &[_, sector, "+", sectors, ..] = event.rest.as_slice() else {
        return Err(BadRecord::Fields {
            found: 6 + event.rest.len(),
            wanted: WANTED,
        });
    };
    let (sector, sectors) = (number("sector", sector)?, number("size", sectors)?);
    let bytes = sectors
        .checked_mul(512)
        .ok_or(BadRecord::Length(u64::MAX))?;
    let device = collector.device(event.device)?;
    collector.push(event.at, is_write, (device, sector, bytes), None)
}
