//! Pictures as SVG.

use std::fmt::Write as _;

use super::html::escape;
use crate::{CellResult, Phase, Region, Sample};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 120.0;
const LEFT: f64 = 52.0;
const BOTTOM: f64 = 18.0;
const TOP: f64 = 16.0;

/// A line over the time of a run, with the phases behind it.
pub(super) fn line(
    title: &str,
    unit: &str,
    result: &CellResult,
    end_s: f64,
    of: impl Fn(&Sample) -> f64,
) -> String {
    let samples = &result.samples;
    let values: Vec<f64> = samples.iter().map(&of).collect();
    let most = values.iter().copied().fold(0.0, f64::max);
    let top = nice(most);
    let x = |at_s: f64| LEFT + (WIDTH - LEFT - 8.0) * (at_s / end_s.max(1e-9)).clamp(0.0, 1.0);
    let y = |value: f64| {
        let height = HEIGHT - TOP - BOTTOM;
        TOP + height - height * (value / top.max(1e-9)).clamp(0.0, 1.0)
    };
    let mut svg = begin(title);
    let base = HEIGHT - BOTTOM;
    let _ = write!(
        svg,
        "<rect class=\"precopy\" x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>\
         <rect class=\"postcopy\" x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
        x(0.0),
        x(result.switch_s) - x(0.0),
        base - TOP,
        x(result.switch_s),
        x(result.migration_s) - x(result.switch_s),
        base - TOP
    );
    let _ = write!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{base}\" x2=\"{WIDTH}\" y2=\"{base}\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" class=\"end\">{} {}</text><text x=\"{:.1}\" y=\"{base}\" class=\"end\">0</text>\
         <text x=\"{LEFT}\" y=\"{:.1}\">0 s</text><text x=\"{WIDTH}\" y=\"{:.1}\" class=\"end\">{end_s:.0} s</text>",
        LEFT - 4.0,
        TOP + 8.0,
        short(top),
        escape(unit),
        LEFT - 4.0,
        HEIGHT - 4.0,
        HEIGHT - 4.0,
    );
    svg += "<polyline points=\"";
    for (sample, value) in samples.iter().zip(&values) {
        let _ = write!(svg, "{:.1},{:.1} ", x(sample.at_s), y(*value));
    }
    svg += "\"/>";
    // What is under the pointer: a strip for each value, as long as they can be told apart.
    let step = samples.len().div_ceil(160).max(1);
    for part in samples.chunks(step).zip(values.chunks(step)) {
        let (Some(sample), Some(value)) = (part.0.last(), part.1.last()) else {
            continue;
        };
        let from = x(part.0[0].at_s);
        let _ = write!(
            svg,
            "<rect class=\"spot\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"><title>{:.1} s, {}: {} {}</title></rect>",
            (x(sample.at_s) - from).max(3.0),
            base - TOP,
            sample.at_s,
            phase(sample.phase),
            short(*value),
            escape(unit),
        );
    }
    svg + "</svg>"
}

const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Before => "before",
        Phase::Precopy => "pre-copy",
        Phase::Switchover => "switchover",
        Phase::Postcopy => "post-copy",
        Phase::After => "after",
    }
}

/// A part of a bar: its name, the CSS class of its colour, its size.
pub(super) type Piece = (&'static str, &'static str, f64);

/// A bar of parts, `most` being the whole width.
pub(super) fn bar(title: &str, parts: &[Piece], most: f64) -> String {
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} 22\" role=\"img\" aria-label=\"{}\">",
        escape(title)
    );
    let mut at = 0.0;
    for (name, class, size) in parts {
        let width = WIDTH * size / most.max(1e-9);
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{at:.1}\" y=\"2\" width=\"{width:.1}\" height=\"18\"><title>{}: {}</title></rect>",
            escape(name),
            short(*size)
        );
        at += width;
    }
    svg + "</svg>"
}

/// The disk from its first block to its last: when each part went over, how much it was read and written, and misses.
pub(super) fn disk(result: &CellResult) -> String {
    let regions = &result.regions;
    #[expect(clippy::cast_precision_loss, reason = "a picture")]
    let count = regions.len().max(1) as f64;
    #[expect(clippy::cast_precision_loss, reason = "a picture")]
    let most = |of: fn(&Region) -> u64| regions.iter().map(of).max().unwrap_or(0).max(1) as f64;
    let (reads, writes) = (most(|r| r.reads), most(|r| r.writes));
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} 76\" role=\"img\" aria-label=\"the disk\">");
    let width = WIDTH / count;
    let mut at = 0.0;
    for (number, region) in regions.iter().enumerate() {
        let sent = region.sent_at_s.map(|s| s / result.migration_s.max(1e-9));
        let fill = sent.map_or_else(
            || "var(--none)".to_owned(),
            |part| format!("hsl({:.0} 70% 50%)", 220.0 - 200.0 * part.clamp(0.0, 1.0)),
        );
        #[expect(clippy::cast_precision_loss, reason = "a picture")]
        let (read, write) = (region.reads as f64 / reads, region.writes as f64 / writes);
        let when = region
            .sent_at_s
            .map_or_else(|| "not sent".to_owned(), |s| format!("sent by {s:.1} s"));
        let _ = write!(
            svg,
            "<g><title>part {number}: {when}, {} reads, {} writes, {} misses</title>\
             <rect x=\"{at:.2}\" y=\"0\" width=\"{width:.2}\" height=\"24\" style=\"fill:{fill}\"/>",
            region.reads, region.writes, region.misses
        );
        for (y, class, heat) in [(28.0, "read", read), (46.0, "write", write)] {
            if heat > 0.0 {
                let _ = write!(
                    svg,
                    "<rect class=\"{class}\" x=\"{at:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"14\" opacity=\"{:.2}\"/>",
                    0.15 + 0.85 * heat.sqrt()
                );
            }
        }
        if region.misses > 0 {
            let _ = write!(
                svg,
                "<rect class=\"miss\" x=\"{at:.2}\" y=\"64\" width=\"{:.2}\" height=\"10\"/>",
                width.max(2.0)
            );
        }
        svg += "</g>";
        at += width;
    }
    svg + "</svg>"
}

fn begin(title: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\"><text x=\"{LEFT}\" y=\"11\" class=\"title\">{0}</text>",
        escape(title)
    )
}

/// The next number above that people like to read.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let magnitude = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|step| step * magnitude)
        .find(|step| *step >= value)
        .unwrap_or(10.0 * magnitude)
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.1} G", v / 1e9),
        v if v >= 1e6 => format!("{:.1} M", v / 1e6),
        v if v >= 1e4 => format!("{:.0} k", v / 1e3),
        v if v >= 100.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v => format!("{v:.1}"),
    }
}
