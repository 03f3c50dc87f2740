//! Whole runs on small volumes: the same cell is the same run, content arrives, and the figures are what the models say.

use flimcd_core::BLOCK_SIZE;
use flimcd_migrate::policy;

use super::*;
use crate::LinkModel;

const SIZE: u64 = 64 << 20;
const RTT_MS: f64 = 40.0;

fn cell(load: &str, strategy: &str) -> Cell {
    Cell {
        load: load.to_owned(),
        size_bytes: SIZE,
        link: LinkModel {
            rate_bits_per_sec: 100_000_000,
            rtt_ms: RTT_MS,
            loss: 0.0,
            jitter_ms: 0.0,
        },
        replica_differs: None,
        strategy: strategy.to_owned(),
        without: Vec::new(),
        switch_at: None,
        speed: 1.0,
        seed: 1,
        is_simulated: true,
    }
}

fn done(cell: &Cell) -> CellResult {
    run(cell).unwrap_or_else(|error| panic!("{error}"))
}

/// Blocks that hold data at the beginning.
fn data_blocks(cell: &Cell) -> u64 {
    let load = catalog::by_name(&cell.load, cell.size_bytes, cell.seed, cell.speed).unwrap();
    let profile = Profile {
        seed: cell.seed,
        data_share: load.image.data_share,
        compressible_share: load.image.compressible_share,
        replica_differs: None,
    };
    profile.data(cell.size_bytes / BLOCK_SIZE).count()
}

#[test]
fn the_same_cell_is_the_same_run() {
    let mut mail = cell("mail", "flimcd");
    mail.link.jitter_ms = 3.0;
    mail.link.loss = 0.001;
    mail.replica_differs = Some(0.1);
    let first = done(&mail);
    assert_eq!(first, done(&mail));
    mail.seed = 2;
    assert_ne!(first.link_bytes, done(&mail).link_bytes);
}

/// Every read on the way and every block at the end is checked by the run itself.
#[test]
fn every_strategy_moves_every_block() {
    for load in ["mail", "random"] {
        for strategy in policy::STRATEGIES {
            for replica_differs in [None, Some(0.1)] {
                let cell = Cell {
                    replica_differs,
                    ..cell(load, strategy)
                };
                let result = done(&cell);
                assert!(result.migration_s >= result.switch_s, "{cell:?}");
                assert!(result.misses <= result.reads_after, "{cell:?}");
            }
        }
    }
}

#[test]
fn precopy_without_writes_sends_the_data_once_and_nothing_misses() {
    let cell = cell("iometer-webserver", "precopy");
    let result = done(&cell);
    let data = data_blocks(&cell);
    let kinds = result.kinds;
    assert_eq!(kinds.raw_blocks + kinds.zstd_blocks, data);
    let bytes = data * BLOCK_SIZE;
    assert!(
        (bytes..bytes + bytes / 50).contains(&result.link_bytes),
        "{} for {bytes}",
        result.link_bytes
    );
    assert_eq!(result.misses, 0);
}

#[test]
fn a_fault_takes_a_round_trip_and_what_the_link_needs() {
    let result = done(&cell("iometer-webserver", "postcopy"));
    assert!(result.misses > 0);
    let p99_ms = result.read_latency_after.p99_ms;
    assert!((RTT_MS..2.0 * RTT_MS).contains(&p99_ms), "{p99_ms} ms");
}
