//! Recorded traces as loads. The recorded files are not part of the project: the tests that read
//! one need `FLIMCD_TRACES` to name a folder that holds it.

use std::{collections::HashSet, io::Write as _, path::PathBuf};

use flimcd_lab::{
    load::{Baseline, Load, LoadOptions, LoadPhase, LoadStats, MemoryDisk, RequestSource, catalog},
    trace::{
        Fold, Replay, ReplayOptions, SECTOR_BYTES, Trace, TraceError, TraceFile, parse, read_file,
        vscsi,
    },
};
use proptest::prelude::*;

/// Longer than any replay in a test would be at its recorded speed.
const AT_ONCE: f64 = 1e9;

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn recorded(file: &str) -> Option<PathBuf> {
    let path = std::env::var_os("FLIMCD_TRACES")
        .map(|folder| PathBuf::from(folder).join(file))
        .filter(|path| path.exists());
    if path.is_none() {
        eprintln!("SKIPPED: needs FLIMCD_TRACES to name a folder with {file}");
    }
    path
}

/// Replays a trace once, as fast as it goes, on a disk in memory, with everything checked.
fn replay_once(trace: Trace, granule: u32) -> LoadStats {
    let size = (256 << 20) + 1000;
    let original = (0..size)
        .map(|i| u8::try_from(i / 512 % 255 + 1).unwrap())
        .collect();
    let mut disk = MemoryDisk::new(original);
    let baseline = Baseline::of_disk(&mut disk, granule).unwrap();
    let options = ReplayOptions {
        speed: AT_ONCE,
        is_repeating: false,
        ..ReplayOptions::default()
    };
    let replay = Replay::new(trace, baseline.size(), options);
    let (disk, source) = (Box::new(disk), Box::new(replay));
    let load = Load::start_with(disk, baseline, source, LoadOptions::default()).unwrap();
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
    let mut disk = load.pause().unwrap().disk.unwrap();
    assert!(load.final_check(&mut *disk).unwrap().is_right());
    stats
}

/// Share of the written blocks whose content was written before in the trace.
fn duplicate_share(trace: &Trace) -> f64 {
    let contents: Vec<u32> = trace
        .records
        .iter()
        .filter_map(|record| record.content.as_deref())
        .flatten()
        .copied()
        .collect();
    let unique: HashSet<u32> = contents.iter().copied().collect();
    1.0 - unique.len() as f64 / contents.len() as f64
}

#[test]
fn mail_with_a_hash_per_block_is_read_and_its_contents_replayed() {
    let Some(path) = recorded("mail.replay.0") else {
        return;
    };
    let trace = read_file(&path).unwrap();
    let summary = &trace.summary;
    assert_eq!(
        (summary.reads, summary.writes, summary.bad_records),
        (107, 15, 0)
    );
    assert_eq!(summary.blocks_with_content, 16);
    let share = duplicate_share(&trace);
    assert!((0.2..0.7).contains(&share), "{share}");
    replay_once(trace, 4096);
}

#[test]
fn homes_with_a_hash_per_sector_is_read_and_its_contents_replayed() {
    let Some(path) = recorded("homes.replay.0") else {
        return;
    };
    let trace = read_file(&path).unwrap();
    let summary = &trace.summary;
    assert_eq!(
        (summary.reads, summary.writes, summary.bad_records),
        (2, 998, 0)
    );
    assert_eq!(summary.blocks_with_content, 998);
    let share = duplicate_share(&trace);
    // As the hashes themselves count.
    assert!((0.16..0.18).contains(&share), "{share}");
    replay_once(trace.clone(), 4096);
    replay_once(trace, SECTOR_BYTES);
}

#[test]
fn a_recorded_file_is_a_load_by_name() {
    for (file, granule) in [
        ("homes.replay.0", 4096),
        ("mail.replay.0", 4096),
        ("cloudphysics-first-hour.vscsi", 512),
    ] {
        let Some(path) = recorded(file) else { continue };
        let name = format!("trace:{}", path.display());
        let mut load = catalog::by_name(&name, 64 << 20, 1, 10.0).unwrap();
        assert_eq!(load.granule, granule, "{}", load.describe);
        let ops: Vec<_> = (0..2000).map_while(|_| load.requests.next_op()).collect();
        assert_eq!(ops.len(), 2000);
        assert!(ops.is_sorted_by_key(|op| op.due));
        assert_eq!(ops.iter().any(|op| op.content.is_some()), granule == 4096);
    }
}

#[test]
fn a_specification_in_a_file_is_a_load_by_name() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let line = "'size,% of size,% reads,% random,delay,burst,align,reply";
    for (name, numbers) in [
        ("One", "8192,100,67,100,0,1,0,0"),
        ("Two", "512,100,0,0,0,1,0,0"),
    ] {
        let head = "'ACCESS SPECIFICATIONS ==\n'Access specification name,default assignment";
        writeln!(file, "{head}\n\t{name},NONE\n{line}\n\t{numbers}").unwrap();
    }
    let name = format!("trace:{}", file.path().display());
    let load = |name: &str| catalog::by_name(name, 64 << 20, 1, 1.0);
    assert_eq!(load(&name).unwrap().granule, 4096);
    assert_eq!(load(&format!("{name}#Two")).unwrap().granule, 512);
    let error = load(&format!("{name}#Three")).unwrap_err().to_string();
    assert!(error.contains("One, Two"), "{error}");
    let error = load("trace:/no/such/file").unwrap_err().to_string();
    assert!(error.contains("/no/such/file"), "{error}");
    let error = load("database").unwrap_err().to_string();
    assert!(error.contains("iometer-database"), "{error}");
}

#[test]
fn a_recorded_trace_replays_on_a_small_disk_without_a_wrong_read() {
    let Some(path) = recorded("cloudphysics-first-hour.vscsi") else {
        return;
    };
    let trace = read_file(&path).unwrap();
    assert_eq!(trace.summary.bad_records, 0, "{:?}", trace.summary);
    assert_eq!(trace.records.len(), 55_918);
    assert!(
        (3500.0..3700.0).contains(&trace.summary.seconds),
        "{:?}",
        trace.summary
    );

    let stats = replay_once(trace, SECTOR_BYTES);
    assert!(
        stats.reads.ops >= 22_327 && stats.writes.ops >= 33_591,
        "{stats:?}"
    );
}

#[test]
fn files_that_are_no_trace_say_so() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [0xff; 100]).unwrap();
    let error = read_file(file.path()).unwrap_err();
    assert!(matches!(error, TraceError::Empty { bad: 4, .. }), "{error}");
    assert!(error.to_string().contains("command 0xffff"), "{error}");
    let missing = read_file("/no/such/file".as_ref()).unwrap_err();
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

    #[test]
    fn any_lines_parse_and_replay_within_the_disk(
        lines in prop::collection::vec(
            prop_oneof![
                "[0-9]{1,20} [0-9] [a-z ]{1,9} [0-9]{1,20} [0-9]{1,9} [RWX] 6 0 [0-9a-f]{30,66}",
                "[0-9]{1,20}[ ,]sd[a-c][ ,][0-9]{1,20} [0-9]{1,9} (R|W|trim)",
                " 8,[01] 1 [0-9] [0-9]{1,3}\\.[0-9]{1,10} 7 [QDCG] (R|WS|D|FWS)( [0-9]{1,9} \\+ [0-9]{1,5})? \\[x\\]",
                "'(ACCESS SPECIFICATIONS =|Access specification name|size,)",
                "[0-9]{1,6}(,[0-9]{1,4}){6,8}",
                "[ -~]{0,40}",
            ],
            0..40,
        ),
        size in 512u64..(8 << 20),
    ) {
        match parse(lines.join("\n").as_bytes()) {
            TraceFile::Requests(trace) => {
                let summary = &trace.summary;
                let counted = summary.reads + summary.writes;
                prop_assert_eq!(trace.records.len() as u64, counted);
                let all = counted + summary.bad_records + summary.other_lines;
                let empty = lines.iter().filter(|line| line.trim().is_empty()).count();
                prop_assert_eq!(all, (lines.len() - empty) as u64, "{:?}", summary);
                let mut replay = Replay::new(trace, size, ReplayOptions::default());
                for op in (0..100).map_while(|_| replay.next_op()) {
                    prop_assert!(op.offset + u64::from(op.length) <= size);
                }
            }
            TraceFile::Specifications(file) => {
                prop_assert!(file.specs.iter().all(|spec| !spec.lines.is_empty()));
            }
        }
    }
}
