//! The demonstration's report: each strategy side by side on the same image, link and load.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Align, Table};
use crate::wan::LinkModel;

/// The emulated link of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// Text that names the link.
    pub description: String,
    /// Rate.
    pub rate_bits_per_sec: u64,
    /// Round trip of the empty link.
    pub rtt_ms: f64,
    /// Probability of losing a packet, as modelled.
    pub loss: f64,
    /// Queue before the link.
    pub queue_bytes: u64,
    /// `relay` or `tun`.
    pub front_end: String,
    /// What the model asks for and the front end cannot do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_modelled: Option<String>,
}

impl LinkReport {
    /// The report of `model` behind `front_end`.
    #[must_use]
    pub fn new(model: &LinkModel, front_end: &str, not_modelled: Option<&str>) -> Self {
        Self {
            description: model.to_string(),
            rate_bits_per_sec: model.rate_bits_per_sec,
            rtt_ms: model.rtt().as_secs_f64() * 1e3,
            loss: if not_modelled.is_some() {
                0.0
            } else {
                model.loss
            },
            queue_bytes: model.queue_limit_bytes(),
            front_end: front_end.to_owned(),
            not_modelled: not_modelled.map(str::to_owned),
        }
    }
}

/// What no strategy can beat: the bytes that had to cross at the link's rate, plus a round trip.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowerBound {
    /// Bytes that had to cross, compressed.
    pub bytes: u64,
    /// Seconds they take.
    pub migration_time_s: f64,
}

impl LowerBound {
    /// The bound for `bytes` on `link`.
    #[must_use]
    pub fn new(bytes: u64, link: &LinkModel) -> Self {
        let time = link.transmission(bytes) + link.rtt();
        Self {
            bytes,
            migration_time_s: time.as_secs_f64(),
        }
    }
}

/// One strategy's figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StrategyReport {
    /// Name of the strategy, such as `flimcd` or `precopy`.
    pub strategy: String,
    /// Whether blocks were compressed.
    pub is_compressing: bool,
    /// From the request until the source can be switched off.
    pub migration_time_s: f64,
    /// From the guest's last completed request at the source to its first at the target.
    pub downtime_ms: f64,
    /// Bytes on the link, both directions.
    pub bytes_on_link: u64,
    /// Bytes of blocks that the target had at the same place in its library.
    #[serde(default)]
    pub same_place_bytes: u64,
    /// Bytes of blocks of zeroes.
    #[serde(default)]
    pub zero_bytes: u64,
    /// Bytes of blocks that the target had elsewhere.
    #[serde(default)]
    pub elsewhere_bytes: u64,
    /// Bytes of blocks whose content had come before in the same migration.
    #[serde(default)]
    pub repeated_bytes: u64,
    /// Bytes of blocks that were compressed, before it.
    #[serde(default)]
    pub compressed_from_bytes: u64,
    /// What they came to.
    #[serde(default)]
    pub compressed_bytes: u64,
    /// Bytes of blocks that were sent as they are.
    #[serde(default)]
    pub raw_bytes: u64,
    /// Reads the guest made during the migration.
    pub guest_reads: u64,
    /// Reads that returned a wrong byte.
    pub guest_reads_wrong: u64,
    /// Reads at the target that touched a block not there yet.
    pub guest_reads_missed: u64,
    /// 99th percentile of the time the guest waited for a request during the migration.
    pub guest_stall_ms_p99: f64,
    /// Longest such wait.
    pub guest_stall_ms_max: f64,
    /// Requests of the guest that were answered with an error.
    pub guest_errors: u64,
    /// Blocks of the final image that were wrong.
    pub final_blocks_wrong: u64,
    /// What had to cross in this run, if it was computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lower_bound: Option<LowerBound>,
    /// Further figures, which may change from version to version.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub details: serde_json::Value,
    /// Why the migration failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl StrategyReport {
    /// Migration time as a multiple of the lower bound.
    #[must_use]
    pub fn ratio_to_bound(&self) -> Option<f64> {
        self.lower_bound
            .map(|bound| self.migration_time_s / bound.migration_time_s)
    }
}

/// A whole demonstration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DemoReport {
    /// Version of flimcd.
    pub version: String,
    /// The link.
    pub link: LinkReport,
    /// Image and load, as settings that make the same run again.
    pub settings: serde_json::Value,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Bytes of the image in blocks that are not zero.
    pub image_non_zero_bytes: u64,
    /// One entry per strategy, in the order they ran.
    pub strategies: Vec<StrategyReport>,
}

impl DemoReport {
    /// Whether every migration succeeded and no byte was wrong anywhere.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.strategies.iter().all(|run| {
            run.error.is_none()
                && run.guest_reads_wrong == 0
                && run.guest_errors == 0
                && run.final_blocks_wrong == 0
        })
    }
}

impl fmt::Display for DemoReport {
    /// A table for people: strategies side by side, figures below one another.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |run: &StrategyReport| {
            let zstd = if run.is_compressing && run.strategy == "precopy" {
                " + zstd"
            } else {
                ""
            };
            format!("{}{zstd}", run.strategy)
        };
        let names: Vec<String> = self.strategies.iter().map(name).collect();
        let mut table = Table::new(
            [("", Align::Left)]
                .into_iter()
                .chain(names.iter().map(|n| (n.as_str(), Align::Right))),
        );
        let mut line = |title: &str, cell: &dyn Fn(&StrategyReport) -> String| {
            table.row(
                [title.to_owned()]
                    .into_iter()
                    .chain(self.strategies.iter().map(cell)),
            );
        };
        line("migration time", &|run| {
            format!("{:.1} s", run.migration_time_s)
        });
        line("× lower bound", &|run| {
            run.ratio_to_bound()
                .map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"))
        });
        line("downtime", &|run| format!("{:.0} ms", run.downtime_ms));
        line("bytes on the link", &|run| megabytes(run.bytes_on_link));
        line("  not sent: zero", &|run| megabytes(run.zero_bytes));
        line("  not sent: same place", &|run| {
            megabytes(run.same_place_bytes)
        });
        line("  not sent: elsewhere", &|run| {
            megabytes(run.elsewhere_bytes)
        });
        line("  not sent: repeated", &|run| megabytes(run.repeated_bytes));
        line("  sent compressed", &|run| {
            let from = megabytes(run.compressed_from_bytes);
            match run.compressed_from_bytes {
                0 => from,
                _ => format!("{} of {from}", megabytes(run.compressed_bytes)),
            }
        });
        line("  sent raw", &|run| megabytes(run.raw_bytes));
        line("guest reads", &|run| run.guest_reads.to_string());
        line("  wrong", &|run| run.guest_reads_wrong.to_string());
        line("  missed", &|run| run.guest_reads_missed.to_string());
        line("guest wait p99", &|run| {
            format!("{:.1} ms", run.guest_stall_ms_p99)
        });
        line("guest wait max", &|run| {
            format!("{:.0} ms", run.guest_stall_ms_max)
        });
        line(
            "final image",
            &|run| match (&run.error, run.final_blocks_wrong) {
                (Some(_), _) => "failed".into(),
                (None, 0) => "right".into(),
                (None, wrong) => format!("{wrong} wrong"),
            },
        );
        write!(f, "{table}")?;
        for run in &self.strategies {
            if let Some(error) = &run.error {
                writeln!(f, "{}: {error}", run.strategy)?;
            }
        }
        Ok(())
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> DemoReport {
        let link: LinkModel = "200mbit,40ms,loss=0.1%".parse().unwrap();
        let run = StrategyReport {
            strategy: "precopy".into(),
            migration_time_s: 50.0,
            bytes_on_link: 1_234_567_890,
            lower_bound: Some(LowerBound::new(25_000_000, &link)),
            ..StrategyReport::default()
        };
        let compressed = StrategyReport {
            is_compressing: true,
            ..run.clone()
        };
        DemoReport {
            version: "0".into(),
            link: LinkReport::new(&link, "relay", Some("no loss")),
            settings: serde_json::Value::Null,
            image_bytes: 1 << 30,
            image_non_zero_bytes: 1 << 29,
            strategies: vec![run, compressed],
        }
    }

    #[test]
    fn json_has_the_names_that_scripts_read() {
        let json = serde_json::to_value(report()).unwrap();
        let run = &json["strategies"][0];
        for name in [
            "migration_time_s",
            "downtime_ms",
            "bytes_on_link",
            "guest_reads",
            "guest_reads_wrong",
            "guest_reads_missed",
            "guest_stall_ms_p99",
        ] {
            assert!(run[name].is_number(), "{name}");
        }
        assert_eq!(json["link"]["rate_bits_per_sec"], 200_000_000);
        assert_eq!(json["link"]["loss"], 0.0);
        let bound = run["lower_bound"]["migration_time_s"].as_f64().unwrap();
        assert!((bound - 1.04).abs() < 1e-9);
        assert_eq!(
            serde_json::from_value::<DemoReport>(json).unwrap(),
            report()
        );
    }

    #[test]
    fn the_table_and_the_verdict_show_what_went_wrong() {
        let mut report = report();
        assert!(report.is_right());
        let text = report.to_string();
        assert!(
            text.contains("precopy + zstd") && text.contains("1234.5 MB"),
            "{text}"
        );
        assert!(text.contains("48.08"), "{text}");
        report.strategies[0].final_blocks_wrong = 2;
        assert!(!report.is_right() && report.to_string().contains("2 wrong"));
        report.strategies[0].error = Some("target is full".into());
        assert!(report.to_string().contains("precopy: target is full"));
    }
}
