//! A source: guests write while blocks are read and sent, the agent dies now and then, and at the end the guest is stopped. What
//! is not reported as dirty must be at the target.

use flimcd_core::{BlockIndex, BlockRange, BlockSet, ByteRange, VolumeSize};

use super::Choices;
use crate::rules::{Admission, GuestOp, Mode, Mutation, Outcome, Rules, Ticket};

const BLOCKS: u64 = 5;
const PER_BLOCK: usize = 2;
const SECTORS: usize = 5 * PER_BLOCK;
const SECTOR: u64 = 2048;

fn size() -> VolumeSize {
    VolumeSize::new(SECTORS as u64 * SECTOR).unwrap()
}

struct Write {
    ticket: Ticket,
    sectors: std::ops::Range<usize>,
    content: u32,
    parked: bool,
    executed: bool,
}

/// A block on its way to the target.
struct Send {
    block: BlockIndex,
    /// Its content, once read.
    content: Option<Vec<u32>>,
    /// Whether the rules know that the read has ended.
    ended: bool,
}

struct World {
    rules: Rules,
    mutation: Option<Mutation>,
    disk: Vec<u32>,
    target: Vec<u32>,
    writes: Vec<Write>,
    sends: Vec<Send>,
    /// What has to be sent, as the one who sends knows it.
    pending: BlockSet,
    /// What the target may lack, as it survives the death of the agent.
    unacked: BlockSet,
    next_content: u32,
}

type Checked = Result<(), String>;

pub(super) fn run(mut choices: Choices, mutation: Option<Mutation>) -> Checked {
    let mut world = World {
        rules: Rules::new(size(), Mode::Owner),
        mutation,
        disk: vec![1; SECTORS],
        target: vec![0; SECTORS],
        writes: Vec::new(),
        sends: Vec::new(),
        pending: BlockSet::full(BLOCKS),
        unacked: BlockSet::full(BLOCKS),
        next_content: 1,
    };
    world.rules.set_mutation(mutation);
    world.begin_write(&mut choices);
    world.begin_write(&mut choices);
    world.rules.start_tracking();
    while !choices.is_over() {
        world.step(&mut choices)?;
    }
    world.switch()
}

fn sectors(block: BlockIndex) -> std::ops::Range<usize> {
    let first = usize::try_from(block.0).unwrap() * PER_BLOCK;
    first..first + PER_BLOCK
}

impl World {
    fn step(&mut self, choices: &mut Choices) -> Checked {
        match choices.below(34) {
            0..5 => self.begin_write(choices),
            5..10 => self.execute_write(choices),
            10..15 => self.end_write(choices),
            15..18 => self.take_dirty(),
            18..21 => self.begin_send(choices),
            21..23 => self.read(choices),
            23..25 => self.end_read(choices),
            25..28 => self.end_send(choices),
            28 => self.freeze_and_thaw(choices),
            29 if choices.once_in(4) => return self.die(),
            _ => {}
        }
        self.drain();
        Ok(())
    }

    fn drain(&mut self) {
        while let Some((ticket, admission)) = self.rules.poll_woken() {
            let Admission::Go { newly_dirty, .. } = admission else {
                unreachable!("not released")
            };
            let at = self.writes.iter().position(|w| w.ticket == ticket).unwrap();
            self.writes[at].parked = false;
            self.note(newly_dirty, at);
        }
    }

    /// What a volume does before it submits a write.
    fn note(&mut self, newly_dirty: bool, at: usize) {
        if newly_dirty {
            let sectors = &self.writes[at].sectors;
            let range = ByteRange::new(sectors.start as u64 * SECTOR, sectors.end as u64 * SECTOR);
            self.unacked.insert_range(range.blocks_touched());
        }
    }

    fn begin_write(&mut self, choices: &mut Choices) {
        if self.writes.len() >= 4 {
            return;
        }
        let start = choices.below(SECTORS);
        let end = (start + 1 + choices.below(4)).min(SECTORS);
        self.next_content += 1;
        let range = ByteRange::new(start as u64 * SECTOR, end as u64 * SECTOR);
        let (ticket, newly_dirty, parked) = match self.rules.begin(GuestOp::Write, range) {
            Admission::Go {
                ticket,
                newly_dirty,
            } => (ticket, newly_dirty, false),
            Admission::Parked { ticket } => (ticket, false, true),
            Admission::Refused(_) | Admission::Answered => unreachable!("not released"),
        };
        self.writes.push(Write {
            ticket,
            sectors: start..end,
            content: self.next_content,
            parked,
            executed: false,
        });
        self.note(newly_dirty, self.writes.len() - 1);
    }

    fn pick_write(&self, choices: &mut Choices, executed: bool) -> Option<usize> {
        let found: Vec<_> = (0..self.writes.len())
            .filter(|&at| !self.writes[at].parked && self.writes[at].executed == executed)
            .collect();
        found.get(choices.below(found.len())).copied()
    }

    fn execute_write(&mut self, choices: &mut Choices) {
        if let Some(at) = self.pick_write(choices, false) {
            let write = &mut self.writes[at];
            write.executed = true;
            self.disk[write.sectors.clone()].fill(write.content);
        }
    }

    fn end_write(&mut self, choices: &mut Choices) {
        if let Some(at) = self.pick_write(choices, true) {
            let write = self.writes.swap_remove(at);
            let failed = choices.once_in(8);
            let outcome = if failed {
                Outcome::Failed
            } else {
                Outcome::Done
            };
            self.rules.finish(write.ticket, outcome);
        }
    }

    fn take_dirty(&mut self) {
        self.pending.union_with(&self.rules.take_dirty());
    }

    fn begin_send(&mut self, choices: &mut Choices) {
        let start = choices.below(5) as u64;
        let run = self.pending.next_run(start, BLOCKS);
        let Some(block) = run.map(|run| BlockIndex(run.start)) else {
            return;
        };
        if self.sends.iter().all(|send| send.block != block) {
            self.pending.remove(block);
            self.rules.begin_send(BlockRange::single(block));
            self.sends.push(Send {
                block,
                content: None,
                ended: false,
            });
        }
    }

    fn read(&mut self, choices: &mut Choices) {
        let unread: Vec<_> = (0..self.sends.len())
            .filter(|&at| self.sends[at].content.is_none())
            .collect();
        if let Some(&at) = unread.get(choices.below(unread.len())) {
            let send = &mut self.sends[at];
            send.content = Some(self.disk[sectors(send.block)].to_vec());
        }
    }

    fn end_read(&mut self, choices: &mut Choices) {
        let read: Vec<_> = (0..self.sends.len())
            .filter(|&at| self.sends[at].content.is_some() && !self.sends[at].ended)
            .collect();
        if let Some(&at) = read.get(choices.below(read.len())) {
            let send = &mut self.sends[at];
            send.ended = true;
            self.rules.end_send(BlockRange::single(send.block));
        }
    }

    fn end_send(&mut self, choices: &mut Choices) {
        let read: Vec<_> = (0..self.sends.len())
            .filter(|&at| self.sends[at].ended)
            .collect();
        let Some(&at) = read.get(choices.below(read.len())) else {
            return;
        };
        let send = self.sends.swap_remove(at);
        if choices.once_in(6) {
            // Lost: whoever sends keeps what was not acknowledged.
            self.pending.insert(send.block);
            return;
        }
        self.target[sectors(send.block)].copy_from_slice(&send.content.unwrap());
        if !self.pending.contains(send.block) {
            let mut clean = Vec::new();
            self.rules
                .clean_runs(BlockRange::single(send.block), &mut clean);
            for run in clean {
                self.unacked.remove_range(run);
            }
        }
    }

    fn freeze_and_thaw(&mut self, choices: &mut Choices) {
        if self.rules.mode() == Mode::Owner {
            self.rules.freeze();
        }
        if choices.once_in(2) {
            self.rules.thaw();
        }
    }

    /// The agent is killed and starts again: the image and the record of unacknowledged blocks are what is left.
    fn die(&mut self) -> Checked {
        self.check(&self.unacked.clone(), "the agent died")?;
        self.rules = Rules::new(size(), Mode::Owner);
        self.rules.set_mutation(self.mutation);
        self.rules.start_tracking();
        self.writes.clear();
        self.sends.clear();
        self.pending = self.unacked.clone();
        Ok(())
    }

    /// The guest is stopped: what the target has not got is known.
    fn switch(mut self) -> Checked {
        let mut none = Choices::new(Vec::new());
        if self.rules.mode() == Mode::Owner {
            self.rules.freeze();
        }
        while !self.rules.is_drained() {
            self.execute_write(&mut none);
            self.end_write(&mut none);
        }
        self.take_dirty();
        while !self.sends.is_empty() {
            self.read(&mut none);
            self.end_read(&mut none);
            self.end_send(&mut none);
        }
        self.rules.release();
        self.check(&self.pending.clone(), "the guest was stopped")
    }

    /// Every block outside of `lacking` is at the target as it is here.
    fn check(&self, lacking: &BlockSet, when: &str) -> Checked {
        for block in BlockRange::new(0, BLOCKS).iter() {
            let sectors = sectors(block);
            if !lacking.contains(block) && self.disk[sectors.clone()] != self.target[sectors] {
                return Err(format!("{when}, and the target lacks {block:?} unnoticed"));
            }
        }
        Ok(())
    }
}
