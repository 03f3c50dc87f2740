//! What is shown of results: medians over seeds in a table, everything in JSON, and one HTML page.

mod html;
mod plot;
mod table;

use serde::{Deserialize, Serialize};

pub use html::html;
pub use table::table;

use crate::CellResult;

/// The JSON of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the schema: 1.
    pub schema: u32,
    /// Every run.
    pub cells: Vec<CellResult>,
}

impl Report {
    /// A report of these runs.
    #[must_use]
    pub const fn new(cells: Vec<CellResult>) -> Self {
        Self { schema: 1, cells }
    }
}

/// Runs that differ in nothing but the seed.
pub(crate) struct Row<'a> {
    pub(crate) name: String,
    pub(crate) cells: Vec<&'a CellResult>,
}

impl Row<'_> {
    /// The median over the seeds.
    pub(crate) fn median(&self, of: impl Fn(&CellResult) -> f64) -> f64 {
        let mut values: Vec<f64> = self.cells.iter().map(|cell| of(cell)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    }
}

/// Runs that can be compared: the same load, size, link, replica, switch and speed.
pub(crate) struct Group<'a> {
    pub(crate) title: String,
    pub(crate) rows: Vec<Row<'a>>,
}

/// Groups in the order in which they first appear, and so their rows.
pub(crate) fn groups(results: &[CellResult]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for result in results {
        let title = title(result);
        let at = groups.iter().position(|group| group.title == title);
        let at = at.unwrap_or_else(|| {
            groups.push(Group {
                title,
                rows: Vec::new(),
            });
            groups.len() - 1
        });
        let rows = &mut groups[at].rows;
        let name = name(result);
        match rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.cells.push(result),
            None => rows.push(Row {
                name,
                cells: vec![result],
            }),
        }
    }
    groups
}

/// A strategy with what is left out of it.
fn name(result: &CellResult) -> String {
    let cell = &result.cell;
    if cell.without.is_empty() {
        cell.strategy.clone()
    } else {
        format!("{} without {}", cell.strategy, cell.without.join("+"))
    }
}

fn title(result: &CellResult) -> String {
    let cell = &result.cell;
    let link = cell.link;
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let (size, rate) = (
        cell.size_bytes as f64 / f64::from(1 << 30),
        link.rate_bits_per_sec as f64 / 1e6,
    );
    let mut title = format!(
        "{}, {size} GiB, {rate} Mbit/s, {} ms",
        cell.load, link.rtt_ms
    );
    if link.loss > 0.0 {
        title += &format!(", {}% loss", link.loss * 100.0);
    }
    if link.jitter_ms > 0.0 {
        title += &format!(", {} ms jitter", link.jitter_ms);
    }
    match cell.replica_differs {
        Some(share) => title += &format!(", a replica that differs in {}%", share * 100.0),
        None => title += ", nothing at the target",
    }
    if let Some(share) = cell.switch_at {
        title += &format!(", switch at {}%", share * 100.0);
    }
    if (cell.speed - 1.0).abs() > 1e-9 {
        title += &format!(", load {} times as fast", cell.speed);
    }
    title += if cell.is_simulated {
        " (simulated)"
    } else {
        " (real)"
    };
    title
}

/// `value` as so many times `bound`; empty where the bound says nothing.
pub(crate) fn times(value: f64, bound: f64) -> String {
    if bound > 0.0 {
        format!("{:.2}", value / bound)
    } else {
        String::new()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Bound, Cell, Kinds, LinkModel, Phase, ReadLatency, Region, Sample};

    pub(crate) fn result(strategy: &str, seed: u64, misses: u64) -> CellResult {
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let sample = |at: u64| Sample {
            at_s: at as f64,
            phase: if at < 5 {
                Phase::Precopy
            } else {
                Phase::Postcopy
            },
            reads: 10 + at,
            writes: 5,
            latency_p99_ms: 1.0,
            latency_max_ms: 40.0,
            bytes: 1000 * at,
            misses: at / 6,
        };
        CellResult {
            cell: Cell {
                load: "mail <b>&".to_owned(),
                size_bytes: 1 << 30,
                link: LinkModel {
                    rate_bits_per_sec: 100_000_000,
                    rtt_ms: 40.0,
                    loss: 0.0,
                    jitter_ms: 0.0,
                },
                replica_differs: None,
                strategy: strategy.to_owned(),
                without: Vec::new(),
                switch_at: Some(0.25),
                speed: 1.0,
                seed,
                is_simulated: true,
            },
            migration_s: 10.0,
            switch_s: 5.0,
            downtime_ms: 30.0,
            link_bytes: 45_000,
            kinds: Kinds {
                zstd_blocks: 10,
                zstd_bytes: 30_000,
                ..Kinds::default()
            },
            reads_after: 100,
            misses,
            read_latency_after: ReadLatency::default(),
            requests_per_sec_alone: 20.0,
            requests_per_sec: 19.0,
            stall_max_ms: 40.0,
            predicted: None,
            bound: Bound {
                bytes: 40_000,
                seconds: 9.0,
                misses: 2,
            },
            samples: (0..10).map(sample).collect(),
            regions: vec![
                Region {
                    sent_at_s: Some(3.0),
                    reads: 4,
                    writes: 2,
                    misses: 1
                };
                8
            ],
        }
    }

    #[test]
    fn runs_are_grouped_and_seeds_are_not_told_apart() {
        let results = [
            result("flimcd", 1, 3),
            result("precopy", 1, 0),
            result("flimcd", 2, 9),
            result("flimcd", 3, 5),
        ];
        let groups = groups(&results);
        assert_eq!(groups.len(), 1);
        assert!(groups[0].title.contains("switch at 25%"));
        let [flimcd, precopy] = &groups[0].rows[..] else {
            panic!("two strategies");
        };
        assert_eq!((flimcd.cells.len(), precopy.cells.len()), (3, 1));
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let misses = flimcd.median(|cell| cell.misses as f64);
        assert!((misses - 5.0).abs() < 1e-9);
    }

    #[test]
    fn the_json_comes_back_as_it_was() {
        let report = Report::new(vec![result("flimcd", 1, 3)]);
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
