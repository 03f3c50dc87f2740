//! Recorded traces as loads. The recorded files are not part of the project: the test that reads
//! one needs `FLIMCD_TRACES` to name a folder that holds `cloudphysics-first-hour.vscsi`.

use std::path::PathBuf;

use flimcd_lab::{
    load::{Baseline, Load, LoadOptions, LoadPhase, MemoryDisk, RequestSource},
    trace::{Fold, Replay, ReplayOptions, SECTOR_BYTES, TraceError, vscsi},
};
use proptest::prelude::*;

/// Longer than any replay in a test would be at its recorded speed.
const AT_ONCE: f64 = 1e9;

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn recorded() -> Option<PathBuf> {
    let path = std::env::var_os("FLIMCD_TRACES")
        .map(|folder| PathBuf::from(folder).join("cloudphysics-first-hour.vscsi"))
        .filter(|path| path.exists());
    if path.is_none() {
        eprintln!(
            "SKIPPED: needs FLIMCD_TRACES to name a folder with cloudphysics-first-hour.vscsi"
        );
    }
    path
}

#[test]
fn a_recorded_trace_replays_on_a_small_disk_without_a_wrong_read() {
    let Some(path) = recorded() else { return };
    let trace = vscsi::read_file(&path).unwrap();
    assert_eq!(trace.summary.bad_records, 0, "{:?}", trace.summary);
    assert_eq!(trace.records.len(), 55_918);
    assert!(
        (3500.0..3700.0).contains(&trace.summary.seconds),
        "{:?}",
        trace.summary
    );

    let size = (256 << 20) + 1000;
    let original = (0..size)
        .map(|i| u8::try_from(i / 512 % 255 + 1).unwrap())
        .collect();
    let mut disk = MemoryDisk::new(original);
    let baseline = Baseline::of_disk(&mut disk, SECTOR_BYTES).unwrap();
    let options = ReplayOptions {
        speed: AT_ONCE,
        is_repeating: false,
        ..ReplayOptions::default()
    };
    let replay = Replay::new(trace, baseline.size(), options);
    let load = Load::start_with(
        Box::new(disk),
        baseline,
        Box::new(replay),
        LoadOptions::default(),
    )
    .unwrap();
    while load.phase() != LoadPhase::Ended {
        std::thread::yield_now();
    }
    let stats = load.snapshot();
    assert_eq!(
        (stats.reads_wrong, stats.errors),
        (0, 0),
        "{:?}",
        stats.wrong
    );
    assert!(
        stats.reads.ops >= 22_327 && stats.writes.ops >= 33_591,
        "{stats:?}"
    );
    let mut disk = load.pause().unwrap().disk.unwrap();
    assert!(load.final_check(&mut *disk).unwrap().is_right());
}

#[test]
fn files_that_are_no_trace_say_so() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [0xff; 100]).unwrap();
    let error = vscsi::read_file(file.path()).unwrap_err();
    assert!(matches!(error, TraceError::Empty { bad: 4, .. }), "{error}");
    assert!(error.to_string().contains("command 0xffff"), "{error}");
    let missing = vscsi::read_file("/no/such/file".as_ref()).unwrap_err();
    assert!(missing.to_string().contains("/no/such/file"), "{missing}");
}

proptest! {
    #[test]
    fn any_bytes_parse_and_replay_within_the_disk(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        fixes in prop::collection::vec((any::<bool>(), 1u32..300, any::<u32>()), 0..60),
        size in 1u64..(8 << 20),
    ) {
        let mut bytes = bytes;
        // Random bytes are hardly ever a good record, so some are made into one.
        for (raw, (is_write, sectors, start)) in bytes.chunks_exact_mut(32).zip(fixes) {
            raw[4..8].copy_from_slice(&(sectors * 512).to_le_bytes());
            raw[12..14].copy_from_slice(&[if is_write { 0x2a } else { 0x28 }, 0]);
            raw[16..24].copy_from_slice(&u64::from(start).to_le_bytes());
        }
        let trace = vscsi::parse(&bytes);
        let whole = bytes.len() / 32 + usize::from(bytes.len() % 32 != 0);
        prop_assert_eq!(trace.records.len() as u64 + trace.summary.bad_records, whole as u64);
        let fold = Fold::new(&trace.records, size);
        for record in &trace.records {
            let parts = fold.map(record);
            let mapped: u64 = parts.iter().map(|part| u64::from(part.1)).sum();
            prop_assert_eq!(mapped, if size < 512 { 0 } else { u64::from(record.length) });
        }
        let mut replay = Replay::new(trace, size, ReplayOptions::default());
        for op in (0..200).map_while(|_| replay.next_op()) {
            prop_assert!(op.offset + u64::from(op.length) <= size);
            prop_assert!(op.offset.is_multiple_of(512) && op.length.is_multiple_of(512));
        }
    }
}
