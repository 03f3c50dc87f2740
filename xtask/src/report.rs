//! Checks the figures of a demo's report that are not timings: those depend on the machine.

use std::path::Path;

use serde_json::Value;

/// What every strategy's figures must have, as scripts of users read them.
const FIELDS: &[&str] = &[
    "migration_time_s",
    "downtime_ms",
    "bytes_on_link",
    "guest_reads",
    "guest_reads_wrong",
    "guest_reads_missed",
    "guest_stall_ms_p99",
];
/// Strategies that must be in it.
const STRATEGIES: &[&str] = &["precopy", "flimcd"];

/// Everything that is wrong with the report at `path`, as sentences.
pub(crate) fn check(path: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let report: Value =
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(faults(&report))
}

fn faults(report: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    let none = Vec::new();
    let runs = report["strategies"].as_array().unwrap_or(&none);
    for name in STRATEGIES {
        if !runs.iter().any(|run| run["strategy"] == **name) {
            faults.push(format!("{name} is missing"));
        }
    }
    for field in ["rate_bits_per_sec", "rtt_ms"] {
        if !report["link"][field].is_number() {
            faults.push(format!("link.{field} is not a number"));
        }
    }
    for run in runs {
        let name = run["strategy"].as_str().unwrap_or("?");
        for field in FIELDS {
            if !run[field].is_number() {
                faults.push(format!("{name}: {field} is not a number"));
            }
        }
        for field in ["guest_reads_wrong", "final_blocks_wrong", "guest_errors"] {
            if run[field] != 0 {
                faults.push(format!("{name}: {field} is {}", run[field]));
            }
        }
        for field in ["guest_reads", "bytes_on_link"] {
            if run[field] == 0 {
                faults.push(format!("{name}: {field} is 0, so nothing was shown"));
            }
        }
        if !run["lower_bound"]["bytes"].is_number() {
            faults.push(format!("{name}: the lower bound is missing"));
        }
        if !run["error"].is_null() {
            faults.push(format!("{name}: {}", run["error"]));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(strategy: &str) -> Value {
        json!({
            "strategy": strategy, "migration_time_s": 1.0, "downtime_ms": 2.0, "bytes_on_link": 3,
            "guest_reads": 4, "guest_reads_wrong": 0, "guest_reads_missed": 0,
            "guest_stall_ms_p99": 1.0, "final_blocks_wrong": 0, "guest_errors": 0,
            "lower_bound": { "bytes": 1, "migration_time_s": 1.0 },
        })
    }

    fn report() -> Value {
        json!({
            "link": { "rate_bits_per_sec": 1, "rtt_ms": 1.0 },
            "strategies": [run("precopy"), run("flimcd")],
        })
    }

    #[test]
    fn a_good_report_passes_and_each_fault_is_found() {
        assert_eq!(faults(&report()), Vec::<String>::new());
        let check = |pointer: &str, value: Value| {
            let mut report = report();
            *report.pointer_mut(pointer).unwrap() = value;
            assert_eq!(faults(&report).len(), 1, "{pointer}");
        };
        check("/strategies/1/guest_reads_wrong", json!(1));
        check("/strategies/0/final_blocks_wrong", json!(7));
        check("/strategies/0/guest_reads", json!(0));
        check("/strategies/0/downtime_ms", json!(null));
        check("/strategies/1/strategy", json!("other"));
        check("/link/rtt_ms", json!("40"));
    }
}
