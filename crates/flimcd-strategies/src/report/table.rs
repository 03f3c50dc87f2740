//! The table for a terminal.

use flimcd_lab::report::{Align, Table};

use super::{Row, groups, times};
use crate::CellResult;

/// A table for each group of runs that can be compared, with the group's name above it. `×` columns are multiples of what was
/// possible (the oracle).
#[must_use]
pub fn table(results: &[CellResult]) -> String {
    let mut text = String::new();
    for group in groups(results) {
        let mut table = Table::new([
            ("STRATEGY", Align::Left),
            ("time s", Align::Right),
            ("×", Align::Right),
            ("switch s", Align::Right),
            ("down ms", Align::Right),
            ("link MB", Align::Right),
            ("×", Align::Right),
            ("misses", Align::Right),
            ("of reads", Align::Right),
            ("oracle's", Align::Right),
            ("read p99 ms", Align::Right),
            ("stall ms", Align::Right),
            ("guest", Align::Right),
        ]);
        for row in &group.rows {
            table.row(cells(row));
        }
        text += &format!("{}\n{table}\n", group.title);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
fn cells(row: &Row<'_>) -> [String; 13] {
    let median = |of: fn(&CellResult) -> f64| row.median(of);
    let time = median(|cell| cell.migration_s);
    let bytes = median(|cell| cell.link_bytes as f64);
    let reads = median(|cell| cell.reads_after as f64);
    let misses = median(|cell| cell.misses as f64);
    let share = if reads > 0.0 {
        format!("{:.2}%", misses / reads * 100.0)
    } else {
        String::new()
    };
    [
        row.name.clone(),
        format!("{time:.1}"),
        times(time, median(|cell| cell.bound.seconds)),
        format!("{:.1}", median(|cell| cell.switch_s)),
        format!("{:.0}", median(|cell| cell.downtime_ms)),
        format!("{:.1}", bytes / 1e6),
        times(bytes, median(|cell| cell.bound.bytes as f64)),
        format!("{misses:.0}"),
        share,
        format!("{:.0}", median(|cell| cell.bound.misses as f64)),
        format!("{:.1}", median(|cell| cell.read_latency_after.p99_ms)),
        format!("{:.0}", median(|cell| cell.stall_max_ms)),
        format!(
            "{:.0}%",
            median(|cell| cell.requests_per_sec / cell.requests_per_sec_alone.max(1e-9)) * 100.0
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::tests::result;

    #[test]
    fn a_row_for_each_strategy_with_multiples_of_the_bound() {
        let text = super::table(&[result("flimcd", 1, 3), result("precopy", 1, 0)]);
        let row = text
            .lines()
            .find(|line| line.starts_with("flimcd"))
            .unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(
            cells[1..9],
            ["10.0", "1.11", "5.0", "30", "0.0", "1.12", "3", "3.00%"]
        );
        assert!(text.contains("precopy"));
    }
}
