//! The load's lines, one a second, and what they come to over a stretch of time.

use serde::Serialize;

/// One second of the load, as the guest prints it, in the guest's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LoadLine {
    /// Seconds since the load was opened.
    pub t: f64,
    /// Writes so far.
    pub seq: u64,
    /// Writes in this second.
    pub iops: u64,
    /// Checked reads in this second.
    pub reads: u64,
    /// Slowest write, with its `fdatasync` when it had one.
    pub worst_write_ms: f64,
    /// Slowest read.
    pub worst_read_ms: f64,
    /// Errors so far.
    pub errors: u64,
}

impl LoadLine {
    /// Reads a line; `None` when it is another kind of line or cut short.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut out = Self::default();
        let mut fields = 0;
        for word in line.trim_end().strip_prefix("LOAD ")?.split(' ') {
            let (name, value) = word.split_once('=')?;
            match name {
                "t" => out.t = value.parse().ok()?,
                "seq" => out.seq = value.parse().ok()?,
                "iops" => out.iops = value.parse().ok()?,
                "reads" => out.reads = value.parse().ok()?,
                "worst_write_ms" => out.worst_write_ms = value.parse().ok()?,
                "worst_read_ms" => out.worst_read_ms = value.parse().ok()?,
                "errors" => out.errors = value.parse().ok()?,
                _ => continue,
            }
            fields += 1;
        }
        (fields == 7).then_some(out)
    }
}

/// What the load did over a number of seconds. All durations are the guest's: a stopped guest does not
/// notice that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LoadSummary {
    /// Seconds looked at.
    pub seconds: u64,
    /// Writes in them.
    pub writes: u64,
    /// Writes per second on average.
    pub writes_per_sec: f64,
    /// Writes in the slowest second.
    pub writes_per_sec_min: u64,
    /// Reads per second on average.
    pub reads_per_sec: f64,
    /// Slowest write, with its `fdatasync` when it had one.
    pub worst_write_ms: f64,
    /// Slowest read.
    pub worst_read_ms: f64,
    /// Errors at the end, since the guest's start.
    pub errors: u64,
}

impl LoadSummary {
    /// Sums up some lines.
    #[must_use]
    pub fn of(lines: &[LoadLine]) -> Self {
        let mut sum = Self {
            seconds: lines.len() as u64,
            writes_per_sec_min: lines.iter().map(|line| line.iops).min().unwrap_or(0),
            errors: lines.last().map_or(0, |line| line.errors),
            ..Self::default()
        };
        let mut reads = 0;
        for line in lines {
            sum.writes += line.iops;
            reads += line.reads;
            sum.worst_write_ms = sum.worst_write_ms.max(line.worst_write_ms);
            sum.worst_read_ms = sum.worst_read_ms.max(line.worst_read_ms);
        }
        #[expect(clippy::cast_precision_loss, reason = "counts of a run are below 2^53")]
        let per_sec = |count: u64| count as f64 / sum.seconds.max(1) as f64;
        (sum.writes_per_sec, sum.reads_per_sec) = (per_sec(sum.writes), per_sec(reads));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_load_are_read_and_others_are_not() {
        let text = "LOAD t=12.0 seq=240 iops=20 reads=19 worst_write_ms=3.1 worst_read_ms=1.2 errors=0\r\n";
        let line = LoadLine::parse(text).unwrap();
        assert_eq!((line.seq, line.reads, line.worst_write_ms), (240, 19, 3.1));
        assert_eq!(LoadLine::parse(&text[..40]), None);
        assert_eq!(LoadLine::parse("GUEST READY files=1"), None);
    }

    #[test]
    fn seconds_are_summed_up() {
        let line = |iops, worst_write_ms, errors| LoadLine {
            iops,
            worst_write_ms,
            errors,
            ..LoadLine::default()
        };
        let sum = LoadSummary::of(&[line(20, 1.0, 0), line(4, 900.0, 0), line(0, 0.0, 2)]);
        assert_eq!((sum.seconds, sum.writes, sum.writes_per_sec), (3, 24, 8.0));
        assert_eq!(
            (sum.writes_per_sec_min, sum.worst_write_ms, sum.errors),
            (0, 900.0, 2)
        );
        assert_eq!(LoadSummary::of(&[]), LoadSummary::default());
    }
}
