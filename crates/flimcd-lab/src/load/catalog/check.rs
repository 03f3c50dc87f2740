//! What a stream of requests is like, counted: the check that a server load has the statistics it states.

use std::collections::{HashMap, HashSet};

use flimcd_core::BLOCK_SIZE;

use super::{
    super::{BlockContent, DiskOp, PlannedOp, Stamp},
    NAMES, by_name,
    server::{HOMES, MAIL, Server, WEB_VM, blocks},
};

#[derive(Debug, Default)]
struct Counted {
    requests: [u64; 2],
    blocks: [u64; 2],
    read: HashSet<u64>,
    written: HashSet<u64>,
    contents: HashSet<BlockContent>,
    duplicates: u64,
    sequential_reads: u64,
    seconds: f64,
    version: u32,
    ends: HashMap<u64, u64>,
}

impl Counted {
    fn count(&mut self, op: &PlannedOp, stamp: &Stamp) {
        let is_write = match op.op {
            DiskOp::Read => false,
            DiskOp::Write => true,
            _ => return,
        };
        let first = op.offset / BLOCK_SIZE;
        let len = u64::from(op.length) / BLOCK_SIZE;
        self.requests[usize::from(is_write)] += 1;
        self.blocks[usize::from(is_write)] += len;
        self.seconds = op.due.unwrap().as_secs_f64();
        if is_write {
            self.version += 1;
            for block in first..first + len {
                self.written.insert(block);
                let content = stamp.content(block * BLOCK_SIZE, self.version);
                self.duplicates += u64::from(!self.contents.insert(content));
            }
        } else {
            self.read.extend(first..first + len);
            // Goes on where one of the last reads ended.
            self.sequential_reads += u64::from(self.ends.remove(&first).is_some());
            let number = self.requests[0];
            self.ends.insert(first + len, number);
            self.ends.retain(|_, at| number - *at < 64);
        }
    }
}

/// Counts a week: as many writes as the rewrite factor says.
fn week(server: &Server, size_bytes: u64, seed: u64) -> Counted {
    let mut load = by_name(server.name, size_bytes, seed, 1.0).unwrap();
    let stamp = Stamp::of(&load.options);
    let disk = blocks(size_bytes / BLOCK_SIZE);
    let mut counted = Counted::default();
    while blocks(counted.blocks[1]) < disk * server.written_share * server.rewrite_factor {
        let op = load.requests.next_op().unwrap();
        assert!(op.offset + u64::from(op.length) <= size_bytes, "{op:?}");
        counted.count(&op, &stamp);
    }
    counted
}

/// `size` is large enough for the draws of a week to come near their means.
fn check(server: &Server, size: u64) {
    let disk = blocks(size / BLOCK_SIZE);
    for seed in 1..=3 {
        let counted = week(server, size, seed);
        let near = |what: &str, found: f64, stated: f64, tolerance: f64| {
            assert!(
                (found / stated - 1.0).abs() <= tolerance,
                "{}, seed {seed}: {what} is {found:.4}, stated {stated:.4}",
                server.name
            );
        };
        let [reads, writes] = counted.requests.map(blocks);
        let [read, written] = counted.blocks.map(blocks);
        near(
            "share of reads in the bytes",
            read / (read + written),
            server.read_bytes_share,
            0.06,
        );
        near(
            "share of reads in the requests",
            reads / (reads + writes),
            server.read_requests_share(),
            0.06,
        );
        let unique = |set: &HashSet<u64>| blocks(set.len() as u64) / disk;
        let touched: HashSet<u64> = counted.read.union(&counted.written).copied().collect();
        near(
            "share that is read",
            unique(&counted.read),
            server.read_share,
            0.1,
        );
        near(
            "share that is written",
            unique(&counted.written),
            server.written_share,
            0.05,
        );
        near(
            "share that is touched",
            unique(&touched),
            server.touched_share,
            0.1,
        );
        near(
            "bytes written to bytes that are written at all",
            written / blocks(counted.written.len() as u64),
            server.rewrite_factor,
            0.06,
        );
        let duplicates = blocks(counted.duplicates) / written;
        near(
            "share of duplicates",
            duplicates,
            server.duplicate_share,
            0.04,
        );
        near(
            "rate",
            (reads + writes) / counted.seconds,
            server.rate_per_sec,
            0.05,
        );
        // Files are read from start to end: most requests to them continue one.
        let sequential = blocks(counted.sequential_reads) / reads;
        assert!((0.15..0.9).contains(&sequential), "{sequential}");
    }
}

#[test]
fn mail_has_the_stated_statistics() {
    check(&MAIL, 1 << 30);
    // By requests, what is said of the mail server most often.
    let reads = MAIL.read_requests_share();
    assert!((0.08..0.10).contains(&reads), "{reads}");
}

#[test]
fn homes_has_the_stated_statistics() {
    check(&HOMES, 8 << 30);
}

#[test]
fn web_vm_has_the_stated_statistics() {
    check(&WEB_VM, 4 << 30);
}

#[test]
fn the_same_seed_is_the_same_stream_whatever_the_size_and_another_is_not() {
    let ops = |name, size, seed| -> Vec<PlannedOp> {
        let mut load = by_name(name, size, seed, 2.0).unwrap();
        let next = |_| load.requests.next_op().unwrap();
        (0..5000).map(next).collect()
    };
    for name in NAMES.into_iter().filter(|name| *name != "trace:FILE") {
        for size in [super::MIN_BYTES, super::MIN_BYTES + 5000, 3 << 30] {
            let one = ops(name, size, 1);
            assert_eq!(one, ops(name, size, 1), "{name}");
            assert_ne!(one, ops(name, size, 2), "{name}");
            for op in &one {
                assert!(
                    op.offset + u64::from(op.length) <= size,
                    "{name} {size} {op:?}"
                );
                assert!((op.length > 0) == (op.op != DiskOp::Flush), "{op:?}");
            }
            let granule = u64::from(by_name(name, size, 1, 1.0).unwrap().granule);
            for op in &one {
                assert!(
                    op.offset % granule == 0 && u64::from(op.length) % granule == 0,
                    "{name}"
                );
            }
            let due: Vec<_> = one.iter().map(|op| op.due.unwrap()).collect();
            assert!(due.is_sorted(), "{name}");
        }
    }
}
