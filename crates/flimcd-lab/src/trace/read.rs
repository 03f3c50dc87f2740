//! Opens a trace whatever its format is: that is found out from the content.

use std::{borrow::Cow, path::Path};

use super::{
    Trace, TraceError, blkparse,
    collect::{BadRecord, Collector},
    fiu, generic, icf,
    icf::IcfFile,
    vscsi,
};

/// Lines by which the format is told, at most.
const SAMPLE_LINES: usize = 1000;

/// What a file is.
#[derive(Clone, Debug)]
pub enum TraceFile {
    /// Recorded requests.
    Requests(Trace),
    /// Iometer's access specifications: what requests are to be like.
    Specifications(IcfFile),
}

/// Formats that are read, in words.
pub(super) fn known_formats() -> String {
    let formats: [&str; 5] = [
        fiu::FORMAT,
        vscsi::FORMAT,
        generic::FORMAT,
        blkparse::FORMAT,
        icf::FORMAT,
    ];
    formats.join("; ")
}

/// Reads a file of any format.
///
/// # Errors
/// [`TraceError`] when the file cannot be read or holds nothing usable. Bad records in between
/// are counted, the first are named, and they are left out.
pub fn open(path: &Path) -> Result<TraceFile, TraceError> {
    let bytes = std::fs::read(path).map_err(|source| TraceError::Read {
        path: path.to_owned(),
        source,
    })?;
    let (file, bad, first_bad) = match parse(&bytes) {
        TraceFile::Requests(trace) => {
            if !trace.records.is_empty() {
                return Ok(TraceFile::Requests(trace));
            }
            let summary = trace.summary;
            (summary.format, summary.bad_records, summary.first_bad)
        }
        TraceFile::Specifications(file) => {
            if !file.specs.is_empty() {
                return Ok(TraceFile::Specifications(file));
            }
            (icf::FORMAT, file.bad_lines, file.first_bad)
        }
    };
    Err(TraceError::Empty {
        path: path.to_owned(),
        format: file,
        bad,
        first: first_bad
            .into_iter()
            .next()
            .unwrap_or_else(|| "none".to_owned()),
    })
}

/// Reads recorded requests of any format.
///
/// # Errors
/// Those of [`open`], and [`TraceError::Specification`] for a file that is no recording.
pub fn read_file(path: &Path) -> Result<Trace, TraceError> {
    match open(path)? {
        TraceFile::Requests(trace) => Ok(trace),
        TraceFile::Specifications(_) => Err(TraceError::Specification {
            path: path.to_owned(),
        }),
    }
}

/// Reads a file's content. Never fails: what cannot be used is counted and named.
#[must_use]
pub fn parse(bytes: &[u8]) -> TraceFile {
    if is_binary(bytes) {
        return TraceFile::Requests(vscsi::parse(bytes));
    }
    let format = detect(bytes);
    if format == icf::FORMAT {
        return TraceFile::Specifications(icf::parse(&String::from_utf8_lossy(bytes)));
    }
    TraceFile::Requests(parse_lines(bytes, format))
}

/// Text has no control characters but line ends and tabs, and few others than ASCII (names of processes).
fn is_binary(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(4096)];
    let is_control = |byte: &u8| byte.is_ascii_control() && !b"\t\r\n\x0c".contains(byte);
    let other = start.iter().filter(|byte| !byte.is_ascii()).count();
    start.iter().any(is_control) || other > start.len() / 2
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = Cow<'_, str>> {
    bytes.split(|byte| *byte == b'\n').map(|line| {
        let line = String::from_utf8_lossy(line);
        match line {
            Cow::Borrowed(line) => Cow::Borrowed(line.trim()),
            Cow::Owned(line) => Cow::Owned(line.trim().to_owned()),
        }
    })
}

const fn is_remark(line: &str) -> bool {
    matches!(line.as_bytes(), [] | [b'#', ..])
}

/// The format of which most of the first lines are. Nobody's text is taken for the FIU's, whose lines then say what
/// is wrong.
fn detect(bytes: &[u8]) -> &'static str {
    let formats = [fiu::FORMAT, blkparse::FORMAT, generic::FORMAT];
    let mut hits = [0_usize; 3];
    for line in lines(bytes)
        .filter(|line| !is_remark(line))
        .take(SAMPLE_LINES)
    {
        if icf::is_start(&line) {
            return icf::FORMAT;
        }
        for (format, hits) in formats.into_iter().zip(&mut hits) {
            // A collector of its own, so that the sample leaves nothing behind.
            let mut scratch = Collector::new(format);
            *hits += usize::from(take(&line, format, None, &mut scratch).is_ok());
        }
    }
    let best = (0..formats.len()).rev().max_by_key(|index| hits[*index]);
    formats[best.unwrap_or(0)]
}

fn take(
    line: &str,
    format: &str,
    action: Option<&str>,
    collector: &mut Collector,
) -> Result<(), BadRecord> {
    match format {
        blkparse::FORMAT => blkparse::line(line, action, collector),
        generic::FORMAT => generic::line(line, collector),
        _ => fiu::line(line, collector),
    }
}

fn parse_lines(bytes: &[u8], format: &'static str) -> Trace {
    let mut collector = Collector::new(format);
    let is_blkparse = format == blkparse::FORMAT;
    let action = is_blkparse
        .then(|| {
            let text: Vec<_> = lines(bytes).collect();
            blkparse::action(text.iter().map(AsRef::as_ref))
        })
        .flatten();
    collector.summary.action = action;
    let mut is_over = false;
    for (number, line) in (1..).zip(lines(bytes)) {
        is_over |= is_blkparse && blkparse::is_end(&line);
        if line.is_empty() {
            continue;
        }
        if is_over || is_remark(&line) {
            collector.summary.other_lines += 1;
            continue;
        }
        if let Err(problem) = take(&line, format, action, &mut collector) {
            collector.bad(&format!("line {number}"), &problem);
        }
    }
    collector.finish()
}
