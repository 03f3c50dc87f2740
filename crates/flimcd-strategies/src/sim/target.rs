//! The target's agent: what the machine asks for, done in virtual time.

use std::collections::VecDeque;

use flimcd_core::{BLOCK_SIZE, BlockRange, MigrationId, Time};
use flimcd_migrate::{
    ApplyId, TargetAction, TargetConfig, TargetEvent, TargetMachine, TargetStart,
};
use flimcd_volume::rules::{ApplyPlan, ApplyToken, Mode, Outcome};
use flimcd_wire::{Base, Blocks, Content, Probe, Probed, Runs};

use super::{
    content::Id,
    world::{Applying, Event, SYNC, Site, World},
};

/// How soon the machine is told what the guest reads, as in the agent.
const READS_TOLD: std::time::Duration = std::time::Duration::from_millis(10);

impl World {
    pub(super) fn make_target(&mut self, has_replica: bool) {
        let config = TargetConfig {
            migration: MigrationId(1),
            size: self.size,
            waits_for_vm: false,
            incarnation: 1,
            bases: vec![if has_replica {
                Base::Known
            } else {
                Base::Zeroes
            }],
        };
        self.target = Some(TargetMachine::new(config, TargetStart::Fresh, self.now));
    }

    /// Calls the machine and does what follows.
    pub(super) fn target_input(&mut self, input: impl FnOnce(&mut TargetMachine, Time)) {
        let Some(mut machine) = self.target.take() else {
            return;
        };
        input(&mut machine, self.now);
        let mut actions = Vec::new();
        while let Some(action) = machine.poll_action() {
            actions.push(action);
        }
        while let Some(event) = machine.poll_event() {
            if let TargetEvent::Failed(error) = event {
                self.fail(error.to_string());
            }
        }
        let timer = machine.poll_timeout();
        self.target = Some(machine);
        for action in actions {
            self.target_action(action);
        }
        self.target_transmits();
        self.set_timer(Site::Target, timer);
    }

    pub(super) fn target_transmits(&mut self) {
        loop {
            let Some(machine) = &mut self.target else {
                return;
            };
            let way = &self.ways[1];
            let Some((class, message)) = machine.poll_transmit(&|class| way.has_room(class)) else {
                return;
            };
            self.send(Site::Target, class, message);
        }
    }

    fn target_action(&mut self, action: TargetAction) {
        match action {
            TargetAction::Apply { id, blocks } => self.apply(id, &blocks),
            TargetAction::Sync(id) => self.after(SYNC, Event::Synced(id)),
            TargetAction::BecomeOwner { epoch, missing } => {
                self.host(Site::Target).rules.start_postcopy(missing);
                self.switched_at = Some(self.now);
                self.after(SYNC * 3, Event::Owned(epoch));
            }
            TargetAction::RequeueFaults => {
                self.host(Site::Target).rules.requeue_faults();
                self.pump(Site::Target);
            }
            TargetAction::AskForMissing { mut blocks } => {
                let missing = self.host(Site::Target).rules.missing();
                let mut asked = Vec::new();
                for mut run in missing.runs() {
                    run.end = run.end.min(run.start + blocks);
                    blocks -= run.len();
                    asked.push(run);
                    if blocks == 0 {
                        break;
                    }
                }
                self.target_input(|machine, now| {
                    for run in asked {
                        machine.handle_fault(now, run);
                    }
                });
            }
            TargetAction::Complete { .. } => self.after(SYNC, Event::Completed),
            TargetAction::ChooseSeed { .. } => {
                self.target_input(|machine, now| machine.handle_seed(now, None));
            }
            TargetAction::Probe(probe) => self.probe(&probe),
            TargetAction::KeepHeat(_) => {}
            TargetAction::Refuse { .. } | TargetAction::Discard => {
                self.fail("the target gave the migration up".to_owned());
            }
        }
    }

    /// The record says so: the guest goes on here.
    pub(super) fn owned(&mut self, epoch: flimcd_core::Epoch) {
        self.target_input(|machine, now| machine.handle_owner(now, epoch, Ok(())));
        self.tell_target();
        self.guest_moves();
    }

    fn probe(&mut self, probe: &Probe) {
        let image = &self.hosts[1].image;
        let (mut had, mut same_place, mut repeated) = (Vec::new(), 0u32, 0u32);
        for (block, prefix) in probe
            .blocks
            .iter()
            .flat_map(BlockRange::iter)
            .zip(probe.prefixes())
        {
            let id = Id::of_prefix(prefix.0);
            let is_same = image.get(block.0) == id;
            if is_same || image.find(id).is_some() {
                had.push(BlockRange::single(block));
                same_place += u32::from(is_same);
                repeated += u32::from(!is_same && self.profile.replica_differs.is_none());
            }
        }
        let probed = Probed {
            seq: probe.seq,
            had: Runs::new(had),
            same_place,
            repeated,
        };
        self.target_input(|machine, now| machine.handle_probed(now, probed));
    }

    // ---- content that arrives

    fn apply(&mut self, id: ApplyId, blocks: &Blocks) {
        let Some(ids) = self.sent.remove(&blocks.seq) else {
            return self.fail(format!("{:?} arrived and was not sent", blocks.seq));
        };
        let mut ids = VecDeque::from(ids);
        let applying = Applying {
            left: blocks.entries.len(),
            is_lacking: false,
        };
        self.messages.insert(id, applying);
        for entry in &blocks.entries {
            let count = usize::try_from(entry.range.len()).unwrap_or(0);
            let ids: VecDeque<Id> = ids.drain(..count).collect();
            let image = &self.hosts[1].image;
            let is_lacking = entry.content == Content::Copy
                && entry
                    .range
                    .iter()
                    .zip(&ids)
                    .any(|(block, &id)| image.get(block.0) != id && image.find(id).is_none());
            if is_lacking {
                if let Some(message) = self.messages.get_mut(&id) {
                    message.is_lacking = true;
                    message.left -= 1;
                }
                continue;
            }
            let plan = self.host(Site::Target).rules.begin_apply(entry.range);
            let fills = self.host(Site::Target).rules.mode() == Mode::PostCopy;
            self.applies
                .insert(plan.token, (id, entry.range, ids, fills));
            if !plan.wait {
                self.run_apply(&plan);
            }
        }
        self.consider_applied(id);
    }

    pub(super) fn run_apply(&mut self, plan: &ApplyPlan) {
        let Some((_, range, ids, _)) = self.applies.get_mut(&plan.token) else {
            return self.fail("an apply that nobody began may run".to_owned());
        };
        let range = *range;
        let mut writes = Vec::new();
        for (block, &id) in range.iter().zip(ids.iter()) {
            if plan.write.iter().any(|run| run.contains(block)) {
                writes.push((block.0, id));
            }
        }
        // What is read meanwhile waits, so that it may stand there from the beginning.
        let bytes = writes.iter().filter(|(_, id)| *id != Id::ZERO).count() as u64 * BLOCK_SIZE;
        for (block, id) in writes {
            self.host(Site::Target).image.put(block, id);
        }
        let at = self.disk_done(Site::Target, bytes);
        self.at(at, Event::Written(plan.token));
    }

    pub(super) fn written(&mut self, token: ApplyToken) {
        let Some((id, range, _, _)) = self.applies.remove(&token) else {
            return;
        };
        self.host(Site::Target)
            .rules
            .end_apply(token, Outcome::Done);
        let now = self.now;
        self.figures.arrived(now, range);
        if let Some(message) = self.messages.get_mut(&id) {
            message.left -= 1;
        }
        self.consider_applied(id);
        self.pump(Site::Target);
    }

    fn consider_applied(&mut self, id: ApplyId) {
        if self
            .messages
            .get(&id)
            .is_none_or(|message| message.left > 0)
        {
            return;
        }
        let Some(message) = self.messages.remove(&id) else {
            return;
        };
        self.target_input(|machine, now| {
            if message.is_lacking {
                machine.handle_lacking(now, id);
            } else {
                machine.handle_applied(now, id, Ok(()));
            }
        });
    }

    // ---- what the guest does here

    /// Tells the machine what its volume says: faults, what was overwritten, what is missing.
    pub(super) fn tell_target(&mut self) {
        let rules = &mut self.host(Site::Target).rules;
        if rules.mode() != Mode::PostCopy || self.resumed_at.is_none() {
            return;
        }
        let mut faults = Vec::new();
        while let Some(fault) = self.host(Site::Target).rules.poll_fault() {
            faults.push(fault);
        }
        let rules = &mut self.host(Site::Target).rules;
        let overwritten = rules.take_overwritten();
        let missing = rules.missing_count();
        let stats = rules.stats();
        self.target_input(|machine, now| {
            for fault in faults {
                machine.handle_fault(now, fault);
            }
            if !overwritten.is_empty() {
                machine.handle_overwritten(now, &overwritten);
            }
            machine.handle_guest_stats(now, stats.guest_reads, stats.guest_reads_missed);
            machine.handle_missing(now, missing);
        });
        if !std::mem::replace(&mut self.touched_due, true) {
            self.after(READS_TOLD, Event::TouchedDue);
        }
    }

    /// Tells the machine what the guest has read lately.
    pub(super) fn tell_reads(&mut self) {
        self.touched_due = false;
        let mut reads = Vec::new();
        self.host(Site::Target).rules.take_reads(&mut reads);
        self.target_input(|machine, now| machine.handle_reads(now, &reads));
    }
}
