//! Agents that are killed (SIGKILL) in the middle of their work. The victim is this test binary, started again for the test
//! `victim` with a role in its environment.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions as FileOptions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use flimcd_core::{BlockIndex, BlockRange};
use flimcd_volume::{ApplyData, Volume, rules::Mode};

use super::{arriving, block_of, create, flush, incoming, open, owner, read, set, size, write};

const ROLE: &str = "FLIMCD_TEST_VICTIM";
const DIR: &str = "FLIMCD_TEST_VICTIM_DIR";
const BLOCKS: u64 = 256;

/// Starts the victim.
fn start(role: &str, dir: &Path) -> Child {
    let _no_forks = super::no_forks();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::victim", "--nocapture"])
        .env(ROLE, role)
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Says something to the parent: what it has heard before the kill is true.
fn say(what: &str, block: u64, tag: u64) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{what} {block} {tag}").unwrap();
}

/// What the victim said, until `count` lines were there and it was killed.
fn kill_after(mut child: Child, count: usize) -> Vec<(String, u64, u64)> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut heard = Vec::new();
    let mut killed = false;
    // What is left in the pipe after the kill was said before it.
    for line in lines {
        let line = line.unwrap();
        if let Some(said) = line.split('@').nth(1) {
            let words: Vec<_> = said.split(' ').collect();
            heard.push((
                words[0].to_owned(),
                words[1].parse().unwrap(),
                words[2].parse().unwrap(),
            ));
        }
        if heard.len() >= count && !killed {
            killed = true;
            child.kill().unwrap();
        }
    }
    assert!(killed, "the victim ended by itself");
    child.wait().unwrap();
    heard
}

/// Deterministic numbers, different ones for each life.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Not a test of its own: what the killed process does.
#[test]
fn victim() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let dir = std::env::var(DIR).unwrap();
    let volume = open(Path::new(&dir));
    match role.as_str() {
        "source" => source(&volume, Path::new(&dir)),
        "target" => target(&volume),
        other => panic!("no role {other}"),
    }
}

/// Guest writes and sends to a "target", which is a plain file.
fn source(volume: &std::sync::Arc<Volume>, dir: &Path) {
    let target = FileOptions::new()
        .write(true)
        .open(dir.join("target"))
        .unwrap();
    let pending = volume.unacked().unwrap();
    volume.start_tracking(pending.as_ref()).unwrap();
    let mut pending = volume.unacked().unwrap().unwrap();
    let mut guest = volume.guest_port().unwrap();
    let mut numbers = Numbers(pending.count() + u64::from(std::process::id()));
    say("started", 0, 0);
    for tag in 1.. {
        let block = numbers.next(BLOCKS);
        let tag = numbers.next(1 << 30) * 1_000_000 + tag;
        write(&mut guest, block, tag);
        say("wrote", block, tag);
        pending.union_with(&volume.take_dirty());
        for _ in 0..2 {
            let Some(run) = pending.next_run(numbers.next(BLOCKS), BLOCKS) else {
                continue;
            };
            let block = BlockIndex(run.start);
            pending.remove(block);
            let mut content = vec![0; 4096];
            let range = BlockRange::single(block);
            volume.read_for_send(range, &mut content).unwrap();
            target.write_all_at(&content, block.byte_offset()).unwrap();
            volume.mark_clean(&[range]).unwrap();
        }
    }
}

#[test]
fn a_killed_source_knows_what_the_target_may_lack() {
    let dir = tempfile::tempdir().unwrap();
    drop(create(dir.path(), BLOCKS, owner(1)));
    let target = File::create(dir.path().join("target")).unwrap();
    target.set_len(size(BLOCKS).bytes()).unwrap();
    let mut sent_any = false;
    for round in 1..=6 {
        let heard = kill_after(start("source", dir.path()), round * 60);
        assert_eq!(heard[0].0, "started");
        let volume = open(dir.path());
        let unacked = volume.unacked().unwrap().unwrap();
        sent_any |= unacked.count() < BLOCKS;
        let image = std::fs::read(dir.path().join("vm.raw")).unwrap();
        let target = std::fs::read(dir.path().join("target")).unwrap();
        let blocks = image.chunks(4096).zip(target.chunks(4096)).zip(0..);
        for ((here, there), block) in blocks {
            assert!(
                here == there || unacked.contains(BlockIndex(block)),
                "round {round}: the target lacks block {block} unnoticed"
            );
        }
        // Writes are marked from the first one on.
        let mut guest = volume.guest_port().unwrap();
        write(&mut guest, 3, 1);
        assert_eq!(volume.take_dirty(), set(BLOCKS, &[(3, 4)]));
    }
    assert!(sent_any);
}

/// Content that arrives for a missing block.
fn fetched(block: u64) -> u64 {
    1_000_000 + block
}

/// Guest writes and arriving content, with flushes.
fn target(volume: &std::sync::Arc<Volume>) {
    let mut guest = volume.guest_port().unwrap();
    let mut numbers = Numbers(volume.missing_count() + u64::from(std::process::id()));
    say("started", 0, 0);
    for tag in 1.. {
        let block = numbers.next(BLOCKS);
        if numbers.next(2) == 0 {
            write(&mut guest, block, 2_000_000 + tag);
            say("wrote", block, 2_000_000 + tag);
        } else {
            let content = block_of(fetched(block));
            let range = BlockRange::new(block, block + 1);
            volume.apply(range, ApplyData::Bytes(&content)).unwrap();
        }
        if numbers.next(8) == 0 {
            flush(&mut guest);
        }
    }
}

#[test]
fn a_killed_target_takes_no_acknowledged_write_for_missing() {
    for round in 1..=6 {
        let dir = tempfile::tempdir().unwrap();
        let volume = create(dir.path(), BLOCKS, incoming());
        volume
            .take_over(set(BLOCKS, &[(0, BLOCKS)]), arriving(2))
            .unwrap();
        drop(volume);
        let heard = kill_after(start("target", dir.path()), round * 25);
        let volume = open(dir.path());
        assert_eq!(volume.mode(), Mode::PostCopy);
        let missing: Vec<_> = volume.first_missing(BLOCKS);
        let is_missing = |block| missing.iter().any(|run| run.contains(BlockIndex(block)));
        let acknowledged: HashMap<u64, u64> = heard
            .iter()
            .filter(|(what, ..)| what == "wrote")
            .map(|(_, block, tag)| (*block, *tag))
            .collect();
        let mut guest = volume.guest_port().unwrap();
        for block in 0..BLOCKS {
            let expected = acknowledged.get(&block);
            if is_missing(block) {
                assert_eq!(expected, None, "round {round}: block {block} was written");
                continue;
            }
            let found = read(&mut guest, block);
            let newer = |tag: u64| found >= tag && found > 2_000_000;
            match expected {
                Some(&tag) => assert!(newer(tag), "round {round}: {block} has {found} not {tag}"),
                None => assert!(found == fetched(block) || newer(2_000_001)),
            }
        }
    }
}
