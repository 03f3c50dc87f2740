//! What is present at the target, who is writing what is not, and which blocks to ask for.

use std::collections::VecDeque;

use flimcd_core::{BlockRange, BlockSet, VolumeSize};

use super::{GuestOp, Mode, Outcome, ops::Op};

/// Name of an apply between [`begin_apply`](super::Rules::begin_apply) and [`end_apply`](super::Rules::end_apply).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApplyToken(u64);

/// What to do with content that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ApplyPlan {
    /// Its name.
    pub token: ApplyToken,
    /// The blocks that arrived.
    pub range: BlockRange,
    /// Another apply of one of the blocks is under way: wait for [`poll_apply_ready`](super::Rules::poll_apply_ready).
    pub wait: bool,
    /// The blocks of `range` to write, ascending; the rest is dropped.
    pub write: Vec<BlockRange>,
}

impl ApplyPlan {
    /// Number of blocks to write.
    #[must_use]
    pub fn blocks_to_write(&self) -> u64 {
        self.write.iter().map(|run| run.len()).sum()
    }
}

/// Whether a guest request may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Go,
    Wait,
}

#[derive(Debug)]
struct Running {
    token: ApplyToken,
    range: BlockRange,
    write: Vec<BlockRange>,
    /// Began in post-copy: the content is that of the switch, so the blocks become present.
    fills: bool,
}

#[derive(Debug)]
struct Waiting {
    token: ApplyToken,
    range: BlockRange,
    /// Arrived in post-copy.
    fills: bool,
}

/// The target's part of the rules. Empty and unused at an owner.
#[derive(Debug)]
pub(super) struct Presence {
    missing: BlockSet,
    /// Missing blocks that a guest write in flight covers.
    claimed: BlockSet,
    /// Blocks that an apply in flight writes.
    applying: BlockSet,
    /// Present, but a crash would have them missing again.
    undurable: BlockSet,
    /// Made present by guest writes and not reported yet.
    overwritten: BlockSet,
    /// Missing blocks that were put into `faults` and need not be again.
    reported: BlockSet,
    /// Missing blocks whose covering write failed: content that arrived meanwhile was dropped.
    refetch: BlockSet,
    faults: VecDeque<BlockRange>,
    running: Vec<Running>,
    waiting: VecDeque<Waiting>,
    last_token: u64,
    finishing: bool,
}

impl Presence {
    pub(super) fn new(size: VolumeSize) -> Self {
        // A set of a volume without blocks costs nothing; `start` makes the real ones.
        let set = || BlockSet::new(0);
        Self {
            missing: BlockSet::new(size.blocks()),
            claimed: set(),
            applying: BlockSet::new(size.blocks()),
            undurable: set(),
            overwritten: set(),
            reported: set(),
            refetch: set(),
            faults: VecDeque::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            last_token: 0,
            finishing: false,
        }
    }

    pub(super) fn start(&mut self, missing: BlockSet) {
        let blocks = self.applying.capacity();
        assert_eq!(missing.capacity(), blocks, "a set of another volume");
        self.claimed = BlockSet::new(blocks);
        self.undurable = BlockSet::new(blocks);
        self.overwritten = BlockSet::new(blocks);
        self.reported = BlockSet::new(blocks);
        self.refetch = BlockSet::new(blocks);
        self.missing = missing;
    }

    // ---- guest requests

    /// Whether `op` may run now; claims the missing blocks that it covers if so.
    pub(super) fn decide(&mut self, op: &mut Op) -> Decision {
        let touched = op.blocks_touched();
        if !self.applying.is_empty() && self.applying.intersects(touched) {
            return Decision::Wait;
        }
        if !self.missing.intersects(touched) {
            return Decision::Go;
        }
        let needs = |run: BlockRange| self.missing.intersects(run);
        if op.blocks_needed().into_iter().any(needs) {
            return Decision::Wait;
        }
        let covered = op.blocks_covered();
        if self.claimed.intersects(covered) {
            return Decision::Wait;
        }
        for run in self.missing.runs_in(covered) {
            self.claimed.insert_range(run);
        }
        op.claims = true;
        Decision::Go
    }

    /// Number of blocks of `range` that a read has to wait for the source for; a block that the guest itself is writing is
    /// none of those.
    pub(super) fn count_awaited(&self, range: BlockRange) -> u64 {
        self.missing
            .count_in(range)
            .saturating_sub(self.claimed.count_in(range))
    }

    /// A covering write ended. Every missing block in what it covers is one that it had claimed: nothing becomes
    /// missing after the switch, and nobody else could claim it.
    pub(super) fn end_claim(&mut self, covered: BlockRange, outcome: Outcome) {
        let runs: Vec<_> = self.claimed.runs_in(covered).collect();
        for run in runs {
            self.claimed.remove_range(run);
            match outcome {
                Outcome::Done => {
                    self.overwritten.insert_range(run);
                    self.make_present(run);
                }
                Outcome::Failed => {
                    self.refetch.insert_range(run);
                    self.reported.insert_range(run);
                    self.faults.push_back(run);
                }
            }
        }
    }

    fn make_present(&mut self, run: BlockRange) {
        self.missing.remove_range(run);
        self.undurable.insert_range(run);
        self.reported.remove_range(run);
        self.refetch.remove_range(run);
    }

    // ---- faults

    /// Queues what `op` needs, unless it is on its way or was queued before.
    pub(super) fn report_faults(&mut self, op: &Op) {
        if op.kind == GuestOp::Trim {
            return;
        }
        for needed in op.blocks_needed() {
            let mut at = needed.start;
            while let Some(run) = self.missing.next_run(at, needed.end) {
                at = run.end;
                self.report(run);
            }
        }
    }

    fn report(&mut self, missing: BlockRange) {
        // Faults are a few blocks long, so block by block is fine.
        let mut fresh: Option<BlockRange> = None;
        for block in missing.iter() {
            let is_fresh = !self.claimed.contains(block)
                && !self.applying.contains(block)
                && self.reported.insert(block);
            match &mut fresh {
                Some(run) if is_fresh => run.end = block.0 + 1,
                Some(run) => {
                    self.faults.push_back(*run);
                    fresh = None;
                }
                None if is_fresh => fresh = Some(BlockRange::single(block)),
                None => {}
            }
        }
        self.faults.extend(fresh);
    }

    pub(super) fn poll_fault(&mut self) -> Option<BlockRange> {
        while let Some(front) = self.faults.front_mut() {
            match self.missing.next_run(front.start, front.end) {
                Some(run) => {
                    front.start = run.end;
                    return Some(run);
                }
                None => {
                    self.faults.pop_front();
                }
            }
        }
        None
    }

    pub(super) fn forget_reports(&mut self) {
        self.reported.clear();
        self.faults.clear();
        for run in self.refetch.runs() {
            self.reported.insert_range(run);
            self.faults.push_back(run);
        }
    }

    // ---- applies

    pub(super) fn begin_apply(&mut self, range: BlockRange, mode: Mode, broken: bool) -> ApplyPlan {
        self.last_token += 1;
        let token = ApplyToken(self.last_token);
        let fills = mode == Mode::PostCopy;
        if self.is_busy(range, self.waiting.len()) {
            self.waiting.push_back(Waiting {
                token,
                range,
                fills,
            });
            return ApplyPlan {
                token,
                range,
                wait: true,
                write: Vec::new(),
            };
        }
        self.start_apply(token, range, fills, mode, broken)
    }

    /// Whether an apply that runs, or one of the first `ahead` that wait, has a block of `range`.
    fn is_busy(&self, range: BlockRange, ahead: usize) -> bool {
        (!self.applying.is_empty() && self.applying.intersects(range))
            || self
                .waiting
                .iter()
                .take(ahead)
                .any(|w| w.range.overlaps(range))
    }

    fn start_apply(
        &mut self,
        token: ApplyToken,
        range: BlockRange,
        fills: bool,
        mode: Mode,
        broken: bool,
    ) -> ApplyPlan {
        let mut write = Vec::new();
        match mode {
            Mode::Incoming => write.push(range),
            Mode::PostCopy if broken => write.push(range),
            Mode::PostCopy if fills => {
                for run in self.missing.runs_in(range) {
                    self.push_unclaimed(run, &mut write);
                }
            }
            // The content of before the switch, or nobody asks for content any more.
            _ => {}
        }
        write.retain(|run| !run.is_empty());
        for run in &write {
            self.applying.insert_range(*run);
        }
        self.running.push(Running {
            token,
            range,
            write: write.clone(),
            fills,
        });
        ApplyPlan {
            token,
            range,
            wait: false,
            write,
        }
    }

    fn push_unclaimed(&self, run: BlockRange, write: &mut Vec<BlockRange>) {
        let mut at = run.start;
        for claimed in self.claimed.runs_in(run) {
            write.push(BlockRange::new(at, claimed.start));
            at = claimed.end;
        }
        write.push(BlockRange::new(at, run.end));
    }

    pub(super) fn poll_apply_ready(&mut self, mode: Mode, broken: bool) -> Option<ApplyPlan> {
        let ready =
            (0..self.waiting.len()).find(|&at| !self.is_busy(self.waiting[at].range, at))?;
        let Waiting {
            token,
            range,
            fills,
        } = self.waiting.remove(ready)?;
        Some(self.start_apply(token, range, fills, mode, broken))
    }

    /// Returns the blocks whose requests may go on now.
    pub(super) fn end_apply(&mut self, token: ApplyToken, outcome: Outcome) -> BlockRange {
        let at = self.running.iter().position(|r| r.token == token);
        let Some(at) = at else {
            panic!("{token:?} does not run");
        };
        let ended = self.running.swap_remove(at);
        for run in &ended.write {
            self.applying.remove_range(*run);
            if ended.fills && outcome == Outcome::Done {
                self.make_present(*run);
            }
        }
        ended.range
    }

    // ---- the rest

    pub(super) fn has_output(&self) -> bool {
        !self.faults.is_empty() || !self.waiting.is_empty()
    }

    pub(super) fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    pub(super) fn missing(&self) -> &BlockSet {
        &self.missing
    }

    pub(super) fn take_overwritten(&mut self) -> BlockSet {
        let empty = BlockSet::new(self.applying.capacity());
        if self.overwritten.is_empty() {
            return empty;
        }
        std::mem::replace(&mut self.overwritten, empty)
    }

    /// What became present and is not durable; `None` when there is nothing.
    pub(super) fn take_undurable(&mut self) -> Option<BlockSet> {
        if self.undurable.is_empty() {
            return None;
        }
        let empty = BlockSet::new(self.undurable.capacity());
        Some(std::mem::replace(&mut self.undurable, empty))
    }

    pub(super) fn put_back_undurable(&mut self, set: &BlockSet) {
        // Of another capacity once post-copy has ended: nobody asks any more then.
        if self.undurable.capacity() == set.capacity() {
            self.undurable.union_with(set);
        }
    }

    pub(super) fn set_finishing(&mut self) {
        self.finishing = true;
    }

    pub(super) fn may_finish(&self) -> bool {
        self.finishing && self.running.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let sets = [
            &self.missing,
            &self.claimed,
            &self.applying,
            &self.undurable,
            &self.overwritten,
            &self.reported,
            &self.refetch,
        ];
        sets.iter().map(|set| set.memory_bytes()).sum::<usize>()
            + self.faults.capacity() * size_of::<BlockRange>()
            + self.running.capacity() * size_of::<Running>()
    }
}
