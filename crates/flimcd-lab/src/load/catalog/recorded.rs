//! Loads from files: recordings, and Iometer's access specifications.

use std::path::Path;

use flimcd_core::BLOCK_SIZE;

use super::{
    super::{AccessSpec, LoadOptions},
    ImageProfile, QUEUE_DEPTH, TRACE, UnknownLoad, Workload, access,
};
use crate::trace::{self, Replay, ReplayOptions, SECTOR_BYTES, Trace, TraceFile};

/// A recording, or a specification: the file's first, or the one named after a `#`.
pub(super) fn load(
    name: &str,
    size_bytes: u64,
    seed: u64,
    speed: f64,
) -> Result<Workload, UnknownLoad> {
    let path = Path::new(name.strip_prefix(TRACE).unwrap_or(name));
    let (path, wanted) = match name
        .strip_prefix(TRACE)
        .and_then(|path| path.rsplit_once('#'))
    {
        Some((file, wanted)) if !path.exists() => (Path::new(file), Some(wanted)),
        _ => (path, None),
    };
    let file = match trace::open(path)? {
        TraceFile::Requests(trace) => return Ok(replay(path, trace, size_bytes, seed, speed)),
        TraceFile::Specifications(file) => file,
    };
    let found: Vec<String> = file.specs.iter().map(|spec| spec.name.clone()).collect();
    let fits = |spec: &AccessSpec| wanted.is_none_or(|wanted| spec.name == wanted);
    let Some(spec) = file.specs.into_iter().find(fits) else {
        return Err(UnknownLoad::Specification {
            path: path.to_owned(),
            wanted: wanted.unwrap_or_default().to_owned(),
            found,
        });
    };
    let title = format!("{:?} of {}", spec.name, found.join(", "));
    let load = access(spec, size_bytes, seed, speed);
    let bad = described_bad(file.bad_lines, &file.first_bad);
    Ok(Workload {
        describe: format!("{title}: {}{bad}", load.describe),
        ..load
    })
}

fn replay(path: &Path, trace: Trace, size_bytes: u64, seed: u64, speed: f64) -> Workload {
    let is_whole_blocks = trace.records.iter().all(|record| {
        record.offset.is_multiple_of(BLOCK_SIZE)
            && u64::from(record.length).is_multiple_of(BLOCK_SIZE)
    });
    let summary = trace.summary.clone();
    let options = ReplayOptions {
        speed,
        ..ReplayOptions::default()
    };
    let replay = Replay::new(trace, size_bytes, options);
    let describe = format!(
        "{}: {}{}, {} reads of {:.1} MB, {} writes of {:.1} MB in {:.0} s, again and again, {speed} times as fast; {} blocks \
         written with {} known contents, the others are new; {:.1} MB of addresses{}{}",
        path.display(),
        summary.format,
        summary
            .action
            .map_or(String::new(), |action| format!(", events {action}")),
        summary.reads,
        megabytes(summary.read_bytes),
        summary.writes,
        megabytes(summary.write_bytes),
        summary.seconds,
        summary.blocks_with_content,
        summary.contents,
        megabytes(replay.fold().touched_bytes()),
        if replay.fold().is_aliasing() {
            ", more than the disk has, so that some share a place"
        } else {
            ""
        },
        described_bad(summary.bad_records, &summary.first_bad),
    );
    Workload {
        name: String::new(),
        requests: Box::new(replay),
        options: LoadOptions {
            seed,
            queue_depth: QUEUE_DEPTH,
            ..LoadOptions::default()
        },
        image: ImageProfile {
            data_share: 0.5,
            compressible_share: 0.5,
        },
        granule: if is_whole_blocks { 4096 } else { SECTOR_BYTES },
        describe,
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// What could not be used of a file, if there is any.
fn described_bad(count: u64, first: &[String]) -> String {
    if count == 0 {
        return String::new();
    }
    format!(
        "; {count} lines or records cannot be used ({})",
        first.join("; ")
    )
}
