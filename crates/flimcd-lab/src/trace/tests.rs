//! The readers on lines written by hand.

use std::time::Duration;

use super::*;

fn parsed(text: &str) -> Trace {
    match parse(text.as_bytes()) {
        TraceFile::Requests(trace) => trace,
        TraceFile::Specifications(file) => panic!("{file:?}"),
    }
}

const A: &str = "b5e9f4e5ab62a4fff5313a606b0ad4e3";
const B: &str = "57db00a2a67ca70d33789a784d37729d";
const ZERO_BLOCK: &str = "620f0b67a91f7f74151bc5be745b7110";
const ZERO_SECTOR: &str = "bf619eac0cdf3f68d496ea9344137e8b";

fn check_bad(trace: &Trace, expected: &[(&str, &str)]) {
    let summary = &trace.summary;
    assert_eq!(summary.bad_records, expected.len() as u64, "{summary:?}");
    for (text, (place, problem)) in summary.first_bad.iter().zip(expected) {
        assert!(text.starts_with(place) && text.contains(problem), "{text}");
    }
}

#[test]
fn fiu_hashes_become_contents() {
    let sectors = |first: &str| first.to_owned() + &ZERO_SECTOR.repeat(7);
    let text = [
        format!("1000 7 nfsd 8 8 W 6 0 {A}"),
        format!("2000 7 my job 680 16 W 6 0 {A}{B}"),
        format!("3000 7 nfsd 0 16 W 6 0 {B}{ZERO_BLOCK}"),
        format!("4000 7 kjournald 80 8 W 6 0 {}", sectors(A)),
        format!(
            "5000 7 kjournald 88 16 W 6 0 {}{}",
            sectors(A),
            sectors(ZERO_SECTOR)
        ),
        format!("6000 7 gzip 112 8 R 6 0 {A}"),
        format!("7000 7 nfsd 9 3 W 6 0 {A}{B}{A}"),
    ]
    .join("\n");
    let trace = parsed(&text);
    check_bad(&trace, &[]);
    assert!(trace.summary.format.contains("FIU"));
    let contents: Vec<Option<&[u32]>> =
        trace.records.iter().map(|r| r.content.as_deref()).collect();
    let expected: [Option<&[u32]>; 7] = [
        Some(&[1]),
        Some(&[1, 2]),
        Some(&[2, 0]),
        Some(&[3]),
        Some(&[3, 0]),
        None,
        None,
    ];
    assert_eq!(contents, expected);
    let second = &trace.records[1];
    assert_eq!(
        (second.at, second.offset, second.length),
        (Duration::from_micros(1), 680 * 512, 8192)
    );
    assert_eq!(
        (
            trace.summary.reads,
            trace.summary.writes,
            trace.summary.contents
        ),
        (1, 6, 3)
    );
}

#[test]
fn bad_fiu_lines_are_named_by_their_number() {
    let text = [
        format!("1000 7 nfsd 8 8 W 6 0 {A}"),
        format!("1000 7 nfsd 8 8 X 6 0 {A}"),
        format!("1000 7 nfsd 8 8 W 6 0 {}", &A[1..]),
        format!("1000 7 nfsd 8 32 W 6 0 {A}"),
        format!("soon 7 nfsd 8 8 W 6 0 {A}"),
        "1000 7 nfsd 8 8 W 6 0".to_owned(),
        format!("1000 7 nfsd 18446744073709551615 8 W 6 0 {A}"),
        format!("1000 7 nfsd 8 0 W 6 0 {A}"),
        format!("2000 7 nfsd 8 8 W 6 0 {A}"),
    ]
    .join("\n");
    let trace = parsed(&text);
    assert_eq!(trace.records.len(), 2);
    check_bad(
        &trace,
        &[
            ("line 2:", "\"X\" is neither"),
            ("line 3:", "MD5"),
            ("line 4:", "1 hashes for 32 sectors"),
            ("line 5:", "time \"soon\""),
            ("line 6:", "8 fields"),
            ("line 7:", "beyond any disk"),
            ("line 8:", "hashes for 0 sectors"),
        ],
    );
}

#[test]
fn generic_lines_with_spaces_or_commas_and_several_disks() {
    let trace =
        parsed("# ns dev lba sectors type\n50 sda 8 16 W\n10,sdb,8,8,read\n60 sda 0 1 trim\n");
    assert_eq!(trace.summary.format, "ns dev lba sectors type");
    check_bad(&trace, &[("line 4:", "\"trim\"")]);
    let [first, second] = &trace.records[..] else {
        panic!("{trace:?}")
    };
    assert!(!first.is_write && second.is_write);
    assert_eq!(
        (first.length, second.offset, second.length),
        (4096, 4096, 8192)
    );
    assert_ne!(first.offset, second.offset, "the disks share no address");
    let summary = trace.summary;
    assert_eq!(
        (summary.devices, summary.out_of_order, summary.other_lines),
        (2, 1, 1)
    );
    assert_eq!(summary.end_offset, 4096 + 8192);
}

const BLKPARSE: &str = "\
  8,0    3        1     0.000000000   697  G   W 223490 + 8 [kjournald]
  8,0    3        2     0.000001829   697  Q   W 223490 + 8 [kjournald]
  8,0    3        3     0.000002197   697  P   N [kjournald]
  8,0    3        4     0.000050000   697  Q  RA 80 + 256 [cat my file]
  8,0    3        5     0.000060000   697  Q FWS [fsync]
  8,0    3        6     0.000070000   697  Q   D 800 + 8 [fstrim]
  8,0    3        7     0.000080000   697  D   W 223490 + 8 [kjournald]
  8,0    3        8     1.5           697  C   W 223490 + 8 [0]
  8,0    3        9     0.00009000x   697  Q   W 8 + 8 [x]
  8,0    3       10     0.000100000   697  Q   W 8 - 8 [x]
CPU3 (8,0):
 Reads Queued:           1,      128KiB\t Writes Queued:          2,        4KiB
";

#[test]
fn blkparse_takes_one_event_of_each_request() {
    let trace = parsed(BLKPARSE);
    let summary = &trace.summary;
    assert_eq!((summary.format, summary.action), ("blkparse", Some("Q")));
    let found: Vec<(bool, u64, u32)> = trace
        .records
        .iter()
        .map(|record| (record.is_write, record.offset / 512, record.length))
        .collect();
    assert_eq!(
        found,
        [(true, 223_490, 4096), (false, 80, 131_072)],
        "{summary:?}"
    );
    assert_eq!(trace.records[1].at, Duration::from_nanos(50_000 - 1829));
    // A bare flush says F before W: it is counted as none of the requests.
    assert_eq!(summary.other_lines, 8);
    check_bad(&trace, &[("line 9:", "time"), ("line 10:", "fields")]);
    let completed: String = BLKPARSE
        .lines()
        .filter(|line| line.contains(" C "))
        .map(|line| line.to_owned() + "\n")
        .collect();
    let completed = parsed(&completed);
    assert_eq!(
        (completed.summary.action, completed.records.len()),
        (Some("C"), 1)
    );
}

#[test]
fn what_is_no_trace_names_the_formats_that_are_known() {
    for content in [
        "",
        "hello\nworld\n",
        "1 2 3\n",
        "'ACCESS SPECIFICATIONS ==\n",
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let error = open(file.path()).unwrap_err().to_string();
        for format in ["FIU", "vscsi", "ns dev lba", "blkparse", ".icf"] {
            assert!(error.contains(format), "{error}");
        }
    }
}
