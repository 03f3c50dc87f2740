//! What was possible for somebody who knows the future.
//!
//! ```text
//!   time ──────────── begin ─────────────── switch ─────────────────── end
//!   writes            └ what is written here last counts ┘
//!                                             └ reads here have deadlines ┘
//! ```
//! * **Bytes**: every content that the target lacks and needs, once, packed: the blocks that it lacked at the beginning or that were
//!   written before the switch, each as it was at the switch, and the same content once only. Blocks that the guest overwrites at the
//!   target before it reads them are not needed.
//! * **Seconds**: those bytes at the link's rate, and a round trip.
//! * **Misses**: with the switch where it was. A block can be sent once it has been written for the last time before the switch; of those
//!   that can be sent the one goes first that will be read first at the target. What the guest never reads there is not sent at all
//!   before it. A block that is late is fetched when it is read. Earliest deadline first is optimal when everything can be in time;
//!   otherwise it is what a scheduler can be expected to do, and the bound is taken with the late ones given up in the order in
//!   which they turn out to be late.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    hash::Hash,
};

use flimcd_core::{BlockRange, BlockSet};

use crate::Bound;

/// One request of the guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Access<C> {
    /// Seconds since the request to migrate; negative before it.
    pub at_s: f64,
    /// The blocks it touches.
    pub blocks: BlockRange,
    /// For a write, what each of them holds afterwards; empty for a read.
    pub content: Vec<C>,
}

/// What a run was like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// When the guest moved, in seconds since the request.
    pub switch_s: f64,
    /// When everything was there.
    pub end_s: f64,
    /// What the link carries.
    pub bytes_per_sec: f64,
    /// Its round trip in seconds.
    pub rtt_s: f64,
}

/// A block that can be sent: the sooner it is read, the sooner it goes.
#[derive(Clone, Copy, PartialEq)]
struct Job {
    deadline_s: f64,
    block: u64,
    bytes: f64,
}

impl Eq for Job {}

impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Job {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let by_time = self.deadline_s.total_cmp(&other.deadline_s);
        by_time.then(self.block.cmp(&other.block))
    }
}

/// The bound of a run.
///
/// `lacking` is what the target lacks at the beginning, `initial` what the source's blocks hold then, `packed` the bytes that content comes
/// to on the link (0 for what costs nothing), `has` whether the target has it anywhere at the beginning.
pub fn bound<C: Copy + Eq + Hash>(
    setting: Setting,
    lacking: &BlockSet,
    accesses: &[Access<C>],
    initial: impl Fn(u64) -> C,
    packed: impl Fn(C) -> u32,
    has: impl Fn(C) -> bool,
) -> Bound {
    // What each block holds at the switch, and since when.
    let mut written: HashMap<u64, (f64, C)> = HashMap::new();
    // When it is first read at the target; never if it is overwritten first.
    let mut first_read: HashMap<u64, f64> = HashMap::new();
    let mut overwritten: HashSet<u64> = HashSet::new();
    for access in accesses {
        for (number, block) in access.blocks.iter().enumerate() {
            if access.at_s < setting.switch_s {
                if let Some(&content) = access.content.get(number) {
                    written.insert(block.0, (access.at_s, content));
                }
            } else if access.at_s < setting.end_s && !overwritten.contains(&block.0) {
                if access.content.is_empty() {
                    first_read.entry(block.0).or_insert(access.at_s);
                } else if !first_read.contains_key(&block.0) {
                    overwritten.insert(block.0);
                }
            }
        }
    }
    let mut seen: HashSet<C> = HashSet::new();
    let mut bytes = 0;
    // Content that costs nothing or is there: no job, but it is there in time.
    let mut jobs: Vec<(f64, Job)> = Vec::new();
    let mut need = |block: u64, since_s: f64, content: C| {
        if overwritten.contains(&block) || has(content) {
            return;
        }
        let cost = packed(content);
        if cost > 0 && seen.insert(content) {
            bytes += u64::from(cost);
        }
        if let Some(&deadline_s) = first_read.get(&block) {
            jobs.push((
                since_s,
                Job {
                    deadline_s,
                    block,
                    bytes: f64::from(cost),
                },
            ));
        }
    };
    for run in lacking.runs() {
        for block in run.iter().filter(|block| !written.contains_key(&block.0)) {
            need(block.0, 0.0, initial(block.0));
        }
    }
    for (&block, &(since_s, content)) in &written {
        need(block, since_s.max(0.0), content);
    }
    #[expect(clippy::cast_precision_loss, reason = "a bound on a time")]
    let seconds = bytes as f64 / setting.bytes_per_sec + setting.rtt_s;
    Bound {
        bytes,
        seconds,
        misses: misses(setting, jobs, accesses),
    }
}

/// Reads after the switch that find a block that has not come, when it is sent by earliest deadline.
fn misses<C>(setting: Setting, mut jobs: Vec<(f64, Job)>, accesses: &[Access<C>]) -> u64 {
    jobs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut late: HashMap<u64, f64> = HashMap::new();
    let mut ready: BinaryHeap<Reverse<Job>> = BinaryHeap::new();
    let mut jobs = jobs.into_iter().peekable();
    let mut now = 0.0;
    loop {
        while let Some((_, job)) = jobs.next_if(|(since, _)| *since <= now) {
            ready.push(Reverse(job));
        }
        let Some(Reverse(job)) = ready.pop() else {
            match jobs.peek() {
                Some(&(since, _)) => now = since,
                None => break,
            }
            continue;
        };
        let arrives = now + job.bytes / setting.bytes_per_sec + setting.rtt_s / 2.0;
        if arrives <= job.deadline_s {
            now += job.bytes / setting.bytes_per_sec;
        } else {
            // Fetched when it is read.
            late.insert(job.block, job.deadline_s + setting.rtt_s);
        }
    }
    let after = accesses.iter().filter(|access| {
        access.content.is_empty() && access.at_s >= setting.switch_s && access.at_s < setting.end_s
    });
    let missed = after.filter(|access| {
        access.blocks.iter().any(|block| {
            late.get(&block.0)
                .is_some_and(|&arrives| access.at_s <= arrives)
        })
    });
    missed.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTING: Setting = Setting {
        switch_s: 10.0,
        end_s: 100.0,
        bytes_per_sec: 1000.0,
        rtt_s: 0.0,
    };

    fn read(at_s: f64, block: u64) -> Access<u32> {
        Access {
            at_s,
            blocks: BlockRange::new(block, block + 1),
            content: Vec::new(),
        }
    }

    fn write(at_s: f64, block: u64, content: u32) -> Access<u32> {
        Access {
            content: vec![content],
            ..read(at_s, block)
        }
    }

    fn check(accesses: &[Access<u32>], bytes: u64, misses: u64) {
        // Blocks 0 to 9 hold 100 to 109, 1000 bytes each; content 7 is at the target.
        let lacking = BlockSet::full(10);
        let got = bound(
            SETTING,
            &lacking,
            accesses,
            |block| u32::try_from(block).unwrap() + 100,
            |_| 1000,
            |content| content == 7,
        );
        assert_eq!((got.bytes, got.misses), (bytes, misses), "{accesses:?}");
    }

    #[test]
    fn each_needed_content_counts_once() {
        check(&[], 10_000, 0);
        // The same content twice, content that is there, and a block that is overwritten before it is read.
        check(
            &[write(1.0, 0, 50), write(2.0, 1, 50), write(3.0, 2, 7)],
            8000,
            0,
        );
        check(&[write(12.0, 3, 60), read(13.0, 3)], 9000, 0);
        check(&[read(11.0, 3), write(12.0, 3, 60)], 10_000, 0);
    }

    #[test]
    fn what_is_written_late_can_only_be_late() {
        check(&[write(9.5, 0, 50), read(10.1, 0)], 10_000, 1);
        check(&[write(8.5, 0, 50), read(10.1, 0)], 10_000, 0);
        // Two that could each be in time, and not both.
        let writes = [write(9.0, 0, 50), write(9.0, 1, 51)];
        let reads = [read(10.5, 0), read(10.6, 1), read(10.7, 1)];
        check(&[&writes[..], &reads[..]].concat(), 10_000, 1);
    }

    /// Against every order in which the blocks could go.
    #[test]
    fn no_order_is_better() {
        let mut dice: u64 = 1;
        let mut below = |n: u64| {
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % n
        };
        for _ in 0..300 {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let mut accesses: Vec<_> = (0..4)
                .map(|block| {
                    write(
                        5.0 + below(50) as f64 / 10.0,
                        block,
                        50 + u32::try_from(block).unwrap(),
                    )
                })
                .collect();
            accesses.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let mut reads: Vec<_> = (0..4)
                .map(|block| read(10.0 + below(30) as f64 / 10.0, block))
                .collect();
            reads.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
            let best = permutations(&[0, 1, 2, 3])
                .iter()
                .map(|order| late_in(order, &accesses, &reads))
                .min()
                .unwrap();
            accesses.extend(reads);
            let got = bound(
                SETTING,
                &BlockSet::new(10),
                &accesses,
                |_| 0,
                |_| 1000,
                |_| false,
            );
            assert!(
                got.misses >= best && got.misses <= best + 1,
                "{} instead of {best}: {accesses:?}",
                got.misses
            );
        }
    }

    fn permutations(of: &[u64]) -> Vec<Vec<u64>> {
        if of.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for &first in of {
            let rest: Vec<u64> = of.iter().copied().filter(|n| *n != first).collect();
            for mut tail in permutations(&rest) {
                tail.insert(0, first);
                all.push(tail);
            }
        }
        all
    }

    /// Blocks that are late when they go in this order, each as soon as may be, and those that would be late not at all.
    fn late_in(order: &[u64], writes: &[Access<u32>], reads: &[Access<u32>]) -> u64 {
        let (mut now, mut late) = (0.0f64, 0);
        for &block in order {
            let of = |all: &[Access<u32>]| {
                all.iter()
                    .find(|access| access.blocks.start == block)
                    .unwrap()
                    .at_s
            };
            let done = now.max(of(writes)) + 1.0;
            if done <= of(reads) {
                now = done;
            } else {
                late += 1;
            }
        }
        late
    }
}
