//! A target in post-copy: guests, content that arrives, flushes and crashes in any order, over a disk and a presence file that
//! lose what was not synced.
//!
//! Content is one number per sector of 1 KiB. Every write has a number of its own. The guest's view of a
//! sector is the list of numbers that were ever written to it, and the first of them that a read may still return: writes that
//! overlap in time have no order.

use flimcd_core::{BlockRange, BlockSet, ByteRange, VolumeSize};

use super::Choices;
use crate::rules::{
    Admission, ApplyPlan, FlushPlan, FlushStep, GuestOp, Mode, Mutation, Outcome, Rules, Ticket,
};

const BLOCKS: u64 = 6;
const PER_BLOCK: usize = 4;
/// The last block is short.
const SECTORS: usize = 6 * PER_BLOCK - 1;
const SECTOR: u64 = 1024;
/// What lies under a missing block.
const GARBAGE: u32 = u32::MAX;

fn size() -> VolumeSize {
    VolumeSize::new(SECTORS as u64 * SECTOR).unwrap()
}

fn sectors_of(range: ByteRange) -> std::ops::Range<usize> {
    let sector = |byte: u64| usize::try_from(byte / SECTOR).unwrap();
    sector(range.start)..sector(range.end)
}

/// A sector as the disk has it: everything written to it, and which of that is surely durable.
#[derive(Clone)]
struct DiskSector {
    log: Vec<u32>,
    durable: usize,
}

impl DiskSector {
    fn new(content: u32) -> Self {
        Self {
            log: vec![content],
            durable: 0,
        }
    }

    fn live(&self) -> u32 {
        *self.log.last().unwrap()
    }
}

/// A sector as the guest knows it.
#[derive(Clone)]
struct Seen {
    written: Vec<u32>,
    /// First of `written` that a read may return.
    oldest: usize,
    /// The same after a crash.
    oldest_flushed: usize,
    in_flight: usize,
    /// First write of those that overlap in time with one in flight.
    group: usize,
}

impl Seen {
    fn new(content: u32) -> Self {
        Self {
            written: vec![content],
            oldest: 0,
            oldest_flushed: 0,
            in_flight: 0,
            group: 0,
        }
    }

    fn begin_write(&mut self, content: u32) {
        if self.in_flight == 0 {
            self.group = self.written.len();
        }
        self.in_flight += 1;
        self.written.push(content);
    }

    fn end_write(&mut self, done: bool) {
        self.in_flight -= 1;
        if done {
            self.oldest = self.oldest.max(self.group);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OpState {
    Parked,
    Admitted,
    Executed { ok: bool },
}

struct GuestRequest {
    ticket: Ticket,
    op: GuestOp,
    sectors: std::ops::Range<usize>,
    content: u32,
    state: OpState,
    /// What a read got, and from which write on it may have been.
    got: Vec<u32>,
    oldest: Vec<usize>,
}

struct Apply {
    plan: ApplyPlan,
    executed: Option<Outcome>,
}

struct Flush {
    plan: FlushPlan,
    /// What the guest may count on if it succeeds.
    promised: Vec<usize>,
    /// A data sync under way: what it covers.
    syncing: Option<Vec<usize>>,
    failed: bool,
    acknowledged: bool,
}

struct World {
    rules: Rules,
    mutation: Option<Mutation>,
    source: Vec<u32>,
    disk: Vec<DiskSector>,
    /// Presence file: missing bits as written and as durable.
    missing_live: BlockSet,
    missing_durable: BlockSet,
    seen: Vec<Seen>,
    guests: Vec<GuestRequest>,
    applies: Vec<Apply>,
    waiting: Vec<ApplyPlan>,
    flushes: Vec<Flush>,
    asked: Vec<BlockRange>,
    next_content: u32,
}

type Checked = Result<(), String>;

/// Runs a world until the choices are over, then brings it to its end.
pub(super) fn run(mut choices: Choices, mutation: Option<Mutation>) -> Checked {
    let source: Vec<u32> = (0..SECTORS)
        .map(|s| 1000 + u32::try_from(s).unwrap())
        .collect();
    let mut missing = BlockSet::new(BLOCKS);
    for block in 0..BLOCKS {
        if !choices.once_in(4) {
            missing.insert_range(BlockRange::new(block, block + 1));
        }
    }
    let mut world = World::boot(source.clone(), &source, missing, mutation, 10_000);
    while !choices.is_over() {
        world.step(&mut choices)?;
    }
    world.finish()
}

impl World {
    fn boot(
        source: Vec<u32>,
        content: &[u32],
        missing: BlockSet,
        mutation: Option<Mutation>,
        next_content: u32,
    ) -> Self {
        let is_missing =
            |sector: usize| missing.contains(flimcd_core::BlockIndex((sector / PER_BLOCK) as u64));
        let disk = (0..SECTORS)
            .map(|s| DiskSector::new(if is_missing(s) { GARBAGE } else { content[s] }))
            .collect();
        let seen = (0..SECTORS)
            .map(|s| Seen::new(if is_missing(s) { source[s] } else { content[s] }))
            .collect();
        let mut rules = Rules::new(size(), Mode::Incoming);
        rules.set_mutation(mutation);
        rules.start_postcopy(missing.clone());
        Self {
            rules,
            mutation,
            source,
            disk,
            missing_live: missing.clone(),
            missing_durable: missing,
            seen,
            guests: Vec::new(),
            applies: Vec::new(),
            waiting: Vec::new(),
            flushes: Vec::new(),
            asked: Vec::new(),
            next_content,
        }
    }

    fn step(&mut self, choices: &mut Choices) -> Checked {
        match choices.below(40) {
            0..8 => self.begin_guest(choices),
            8..16 => self.execute_guest(choices),
            16..22 => self.end_guest(choices)?,
            22..26 => self.arrive(choices),
            26..29 => self.execute_apply(choices),
            29..32 => self.end_apply(choices),
            32..34 => self.begin_flush(),
            34..38 => self.step_flush(choices),
            38 => self.cancel(choices),
            _ if choices.once_in(6) => self.crash(choices)?,
            _ => self.rules.requeue_faults(),
        }
        self.drain();
        Ok(())
    }

    /// Takes what the rules have to say.
    fn drain(&mut self) {
        while let Some((ticket, admission)) = self.rules.poll_woken() {
            let request = self.guests.iter_mut().find(|g| g.ticket == ticket).unwrap();
            assert!(matches!(admission, Admission::Go { .. }));
            request.state = OpState::Admitted;
        }
        while let Some(plan) = self.rules.poll_apply_ready() {
            self.waiting.retain(|waiting| waiting.token != plan.token);
            self.applies.push(Apply {
                plan,
                executed: None,
            });
        }
        while let Some(run) = self.rules.poll_fault() {
            self.asked.push(run);
        }
    }

    // ---- guests

    fn begin_guest(&mut self, choices: &mut Choices) {
        if self.guests.len() >= 6 {
            return;
        }
        let op = [
            GuestOp::Read,
            GuestOp::Write,
            GuestOp::Write,
            GuestOp::WriteZeroes,
            GuestOp::Trim,
        ][choices.below(5)];
        let start = choices.below(SECTORS);
        let end = (start + 1 + choices.below(9)).min(SECTORS);
        let range = ByteRange::new(start as u64 * SECTOR, end as u64 * SECTOR);
        let sectors = if op == GuestOp::Trim {
            sectors_of(range.blocks_covered(size()).bytes(size()))
        } else {
            start..end
        };
        self.next_content += 1;
        let content = self.next_content;
        let oldest = self.seen[sectors.clone()]
            .iter()
            .map(|s| s.oldest)
            .collect();
        let (ticket, state) = match self.rules.begin(op, range) {
            Admission::Go { ticket, .. } => (ticket, OpState::Admitted),
            Admission::Parked { ticket } => (ticket, OpState::Parked),
            Admission::Refused(_) | Admission::Answered => unreachable!("not released"),
        };
        if op != GuestOp::Read {
            for seen in &mut self.seen[sectors.clone()] {
                seen.begin_write(content);
            }
        }
        self.guests.push(GuestRequest {
            ticket,
            op,
            sectors,
            content,
            state,
            got: Vec::new(),
            oldest,
        });
    }

    fn pick_guest(&self, choices: &mut Choices, wanted: impl Fn(OpState) -> bool) -> Option<usize> {
        let found: Vec<_> = (0..self.guests.len())
            .filter(|&at| wanted(self.guests[at].state))
            .collect();
        found.get(choices.below(found.len())).copied()
    }

    fn execute_guest(&mut self, choices: &mut Choices) {
        let Some(at) = self.pick_guest(choices, |state| state == OpState::Admitted) else {
            return;
        };
        let ok = !choices.once_in(10);
        let request = &mut self.guests[at];
        request.state = OpState::Executed { ok };
        for sector in request.sectors.clone() {
            if request.op == GuestOp::Read {
                request.got.push(self.disk[sector].live());
            } else if ok || choices.once_in(2) {
                self.disk[sector].log.push(request.content);
            }
        }
    }

    fn end_guest(&mut self, choices: &mut Choices) -> Checked {
        let executed = |state| matches!(state, OpState::Executed { .. });
        let Some(at) = self.pick_guest(choices, executed) else {
            return Ok(());
        };
        let request = self.guests.swap_remove(at);
        let ok = request.state == OpState::Executed { ok: true };
        let outcome = if ok { Outcome::Done } else { Outcome::Failed };
        self.rules.finish(request.ticket, outcome);
        if request.op != GuestOp::Read {
            for seen in &mut self.seen[request.sectors] {
                seen.end_write(ok);
            }
            return Ok(());
        }
        if !ok {
            return Ok(());
        }
        for ((sector, got), oldest) in request.sectors.zip(&request.got).zip(&request.oldest) {
            if !self.seen[sector].written[*oldest..].contains(got) {
                return Err(format!(
                    "read {got} from sector {sector}, which may have {:?}",
                    &self.seen[sector].written[*oldest..]
                ));
            }
        }
        Ok(())
    }

    fn cancel(&mut self, choices: &mut Choices) {
        let Some(at) = self.pick_guest(choices, |state| state == OpState::Parked) else {
            return;
        };
        let request = self.guests.swap_remove(at);
        self.rules.cancel_parked(request.ticket);
        if request.op != GuestOp::Read {
            for seen in &mut self.seen[request.sectors] {
                seen.end_write(false);
            }
        }
    }

    // ---- content

    fn arrive(&mut self, choices: &mut Choices) {
        if self.applies.len() + self.waiting.len() >= 5 {
            return;
        }
        let range = match self.asked.pop() {
            Some(asked) if !choices.once_in(4) => asked,
            _ => {
                let start = choices.below(6) as u64;
                BlockRange::new(start, (start + 1 + choices.below(3) as u64).min(BLOCKS))
            }
        };
        let plan = self.rules.begin_apply(range);
        if plan.wait {
            self.waiting.push(plan);
        } else {
            self.applies.push(Apply {
                plan,
                executed: None,
            });
        }
    }

    fn execute_apply(&mut self, choices: &mut Choices) {
        let waiting = self.applies.iter_mut().filter(|a| a.executed.is_none());
        let mut waiting: Vec<_> = waiting.collect();
        let at = choices.below(waiting.len());
        let Some(apply) = waiting.get_mut(at) else {
            return;
        };
        let ok = !choices.once_in(8);
        for run in &apply.plan.write {
            for sector in sectors_of(run.bytes(size())) {
                let content = if ok { self.source[sector] } else { GARBAGE };
                self.disk[sector].log.push(content);
            }
        }
        apply.executed = Some(if ok { Outcome::Done } else { Outcome::Failed });
    }

    fn end_apply(&mut self, choices: &mut Choices) {
        let executed: Vec<_> = (0..self.applies.len())
            .filter(|&at| self.applies[at].executed.is_some())
            .collect();
        let Some(&at) = executed.get(choices.below(executed.len())) else {
            return;
        };
        let apply = self.applies.swap_remove(at);
        self.rules
            .end_apply(apply.plan.token, apply.executed.unwrap());
    }

    // ---- flushes and crashes

    fn begin_flush(&mut self) {
        if self.flushes.len() < 3 {
            self.flushes.push(Flush {
                plan: self.rules.begin_flush(),
                promised: self.seen.iter().map(|s| s.oldest).collect(),
                syncing: None,
                failed: false,
                acknowledged: false,
            });
        }
    }

    fn step_flush(&mut self, choices: &mut Choices) {
        if self.flushes.is_empty() {
            return;
        }
        let at = choices.below(self.flushes.len());
        let fails = choices.once_in(12);
        let flush = &mut self.flushes[at];
        if let Some(covered) = flush.syncing.take() {
            if fails {
                flush.failed = true;
            } else {
                for (sector, covered) in self.disk.iter_mut().zip(covered) {
                    sector.durable = sector.durable.max(covered);
                }
            }
        } else {
            match flush.plan.next() {
                FlushStep::SyncData => {
                    flush.syncing = Some(self.disk.iter().map(|s| s.log.len() - 1).collect());
                }
                FlushStep::WritePresence(_) | FlushStep::SyncPresence if fails => {
                    flush.failed = true;
                }
                FlushStep::WritePresence(set) => self.missing_live.subtract(set),
                FlushStep::SyncPresence => self.missing_durable = self.missing_live.clone(),
                FlushStep::Done => flush.acknowledged = true,
            }
        }
        if flush.failed || flush.acknowledged {
            let flush = self.flushes.swap_remove(at);
            self.rules.end_flush(flush.plan, flush.acknowledged);
            if flush.acknowledged {
                for (seen, promised) in self.seen.iter_mut().zip(flush.promised) {
                    seen.oldest_flushed = seen.oldest_flushed.max(promised);
                }
            }
        }
    }

    /// Power fails: each sector is one that it had since it was last durable, each presence bit old or new.
    fn crash(&mut self, choices: &mut Choices) -> Checked {
        let mut missing = self.missing_durable.clone();
        for block in 0..BLOCKS {
            let block = flimcd_core::BlockIndex(block);
            if !self.missing_live.contains(block) && choices.once_in(2) {
                missing.remove(block);
            }
        }
        let mut content = Vec::new();
        for (sector, disk) in self.disk.iter().enumerate() {
            let kept = disk.durable + choices.below(disk.log.len() - disk.durable);
            let block = flimcd_core::BlockIndex((sector / PER_BLOCK) as u64);
            let now = if missing.contains(block) {
                self.source[sector]
            } else {
                disk.log[kept]
            };
            let seen = &self.seen[sector];
            let allowed = &seen.written[seen.oldest_flushed..];
            if !allowed.contains(&now) {
                return Err(format!(
                    "after a crash sector {sector} has {now} (missing: {}), and flushed was {allowed:?}",
                    missing.contains(block)
                ));
            }
            content.push(now);
        }
        *self = Self::boot(
            std::mem::take(&mut self.source),
            &content,
            missing,
            self.mutation,
            self.next_content,
        );
        Ok(())
    }

    // ---- the end

    /// Everything that was begun ends, and what is missing arrives: then nobody may be left waiting.
    fn finish(mut self) -> Checked {
        for round in 0.. {
            if round > 1000 {
                return Err("it does not come to an end".into());
            }
            let mut none = Choices::new(Vec::new());
            self.execute_guest(&mut none);
            self.end_guest(&mut none)?;
            self.execute_apply(&mut none);
            self.end_apply(&mut none);
            self.step_flush(&mut none);
            self.drain();
            // Everything that waits must have been asked for: only what was asked for is sent, and only at the very end the rest.
            let idle = self.guests.iter().all(|g| g.state == OpState::Parked)
                && self.applies.is_empty()
                && self.flushes.is_empty();
            if !self.asked.is_empty() {
                self.arrive(&mut none);
            } else if idle && !self.guests.is_empty() {
                self.rules.requeue_faults();
                self.drain();
                if self.asked.is_empty() {
                    return Err("a guest waits for something that nobody asks for".into());
                }
            } else if idle && self.rules.missing_count() > 0 {
                let run = self.rules.missing().runs().next().unwrap();
                self.asked.push(run);
            } else if idle {
                break;
            }
        }
        self.rules.finish_postcopy();
        if self.rules.mode() != Mode::Owner || !self.rules.is_drained() {
            return Err("post-copy did not end".into());
        }
        for (sector, (disk, seen)) in self.disk.iter().zip(&self.seen).enumerate() {
            if !seen.written[seen.oldest..].contains(&disk.live()) {
                return Err(format!("sector {sector} ends as {}", disk.live()));
            }
        }
        Ok(())
    }
}
