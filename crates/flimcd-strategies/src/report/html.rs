//! One page that needs nothing else: tables and pictures.

use std::fmt::Write as _;

use super::{
    Group, Row, groups,
    plot::{self, Piece},
    table::table,
};
use crate::CellResult;

const STYLE: &str = "
:root{--ink:#1b1f24;--dim:#667;--back:#fff;--line:#2563c9;--pre:#e8eef8;--post:#fdf0dc;--none:#ddd;--rule:#ccd}
@media(prefers-color-scheme:dark){:root{--ink:#dde;--dim:#99a;--back:#15181d;--line:#7db0ff;--pre:#1d2735;--post:#33291a;--none:#333;--rule:#345}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1400px;margin:2em auto;padding:0 1em}
pre{overflow-x:auto;font:12px/1.4 ui-monospace,monospace}
h2{border-top:1px solid var(--rule);padding-top:1em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:1.2em}
figure{margin:0}figcaption{color:var(--dim);font-size:12px}
svg{width:100%;display:block;margin:.2em 0}svg text{font-size:9px;fill:var(--dim)}svg .title{fill:var(--ink);font-size:10px}
svg .end{text-anchor:end}polyline{fill:none;stroke:var(--line);stroke-width:1.3}
.precopy{fill:var(--pre)}.postcopy{fill:var(--post)}.axis{stroke:var(--rule)}.spot{fill:transparent}
.zstd{fill:#2563c9}.raw{fill:#7a4fc9}.same{fill:#2f9e6e}.copy{fill:#8fc93a}.head{fill:#999}
.read{fill:#2f9e6e}.write{fill:#d9822b}.miss{fill:#d33}
.key span{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
";

/// The page.
#[must_use]
pub fn html(results: &[CellResult]) -> String {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>flimcd: strategies side by side</title><style>{STYLE}</style></head><body>\
         <h1>Strategies side by side</h1>\
         <p>Each strategy on the same engine, link and load. Columns with × are multiples of what was possible for somebody who knows \
         the future (the oracle); misses are guest reads after the switch that touched a block that was not there. Medians over the \
         seeds; the pictures are of the first. Point at a picture for its numbers.</p><pre>{}</pre>",
        escape(&table(results))
    );
    for group in groups(results) {
        section(&mut page, &group);
    }
    page + "</body></html>\n"
}

fn section(page: &mut String, group: &Group<'_>) {
    let first = |row: &Row<'_>| row.cells.first().map_or(0.0, |cell| cell.migration_s);
    let end_s = group.rows.iter().map(first).fold(0.0, f64::max);
    #[expect(clippy::cast_precision_loss, reason = "a picture")]
    let most = group
        .rows
        .iter()
        .filter_map(|row| row.cells.first())
        .map(|cell| cell.link_bytes as f64)
        .fold(0.0, f64::max);
    let _ = write!(
        page,
        "<h2>{}</h2><p class=\"key\"><span><i class=\"precopy\" style=\"background:var(--pre)\"></i>pre-copy</span>\
         <span><i style=\"background:var(--post)\"></i>post-copy</span><span><i style=\"background:#2563c9\"></i>compressed</span>\
         <span><i style=\"background:#7a4fc9\"></i>raw</span><span><i style=\"background:#999\"></i>around it</span>\
         <span><i style=\"background:hsl(220 70% 50%)\"></i>sent early</span><span><i style=\"background:hsl(20 70% 50%)\"></i>late</span>\
         <span><i style=\"background:#2f9e6e\"></i>read</span><span><i style=\"background:#d9822b\"></i>written</span>\
         <span><i style=\"background:#d33\"></i>missed</span></p><div class=\"grid\">",
        escape(&group.title)
    );
    for row in &group.rows {
        if let Some(cell) = row.cells.first() {
            figure(page, row, cell, end_s, most);
        }
    }
    *page += "</div>";
}

#[expect(clippy::cast_precision_loss, reason = "pictures")]
fn figure(page: &mut String, row: &Row<'_>, cell: &CellResult, end_s: f64, most: f64) {
    let name = escape(&row.name);
    let mut before = 0.0;
    let seconds: Vec<f64> = cell
        .samples
        .iter()
        .map(|sample| {
            let took = sample.at_s - before;
            before = sample.at_s;
            took.max(1e-9)
        })
        .collect();
    let interval = seconds.get(1).or(seconds.first()).copied().unwrap_or(1.0);
    let mut missed = 0;
    let sums: Vec<u64> = cell
        .samples
        .iter()
        .map(|sample| {
            missed += sample.misses;
            missed
        })
        .collect();
    let sum_at = |at_s: f64| {
        let at = cell.samples.partition_point(|sample| sample.at_s < at_s);
        sums.get(at).copied().unwrap_or(0)
    };
    let plots = [
        plot::line("guest requests", "/s", cell, end_s, |sample| {
            (sample.reads + sample.writes) as f64 / interval
        }),
        plot::line(
            "guest latency, 99th percentile",
            "ms",
            cell,
            end_s,
            |sample| sample.latency_p99_ms,
        ),
        plot::line("bytes on the link", "B/s", cell, end_s, |sample| {
            sample.bytes as f64 / interval
        }),
        plot::line("misses so far", "", cell, end_s, |sample| {
            sum_at(sample.at_s) as f64
        }),
    ];
    let kinds = cell.kinds;
    let raw = (kinds.raw_blocks * 4096) as f64;
    let content = kinds.zstd_bytes as f64 + raw;
    let parts: [Piece; 3] = [
        ("compressed", "zstd", kinds.zstd_bytes as f64),
        ("raw", "raw", raw),
        (
            "around it",
            "head",
            (cell.link_bytes as f64 - content).max(0.0),
        ),
    ];
    let _ = write!(
        page,
        "<figure id=\"{name}\"><h3>{name}</h3>{}<figcaption>bytes on the link by kind; beside them {} blocks of zeroes, {} at the same place, {} \
         elsewhere, {} repeated</figcaption>{}{}<figcaption>the disk: when each part went over, reads, writes, misses</figcaption></figure>",
        plot::bar("bytes by kind", &parts, most),
        kinds.zero_blocks,
        kinds.same_blocks,
        kinds.elsewhere_blocks,
        kinds.repeated_blocks,
        plots.concat(),
        plot::disk(cell),
    );
}

/// Text that is text in HTML, also inside quotes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::result;

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let page = super::html(&[result("flimcd", 1, 3), result("precopy", 1, 0)]);
        for strategy in ["flimcd", "precopy"] {
            assert!(page.contains(&format!("<h3>{strategy}</h3>")), "{strategy}");
        }
        for outside in ["http://", "https://", "src=", "href=", "@import", "<b>&"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for tag in [
            "svg", "figure", "div", "pre", "p", "g", "title", "body", "html",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            let closed = page.matches(&format!("</{tag}>")).count();
            assert_eq!(opened, closed, "{tag}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }
}
