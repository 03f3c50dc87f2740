//! The source's agent: runs the source machine over a host, as the real agent does.

use std::collections::{BTreeMap, VecDeque};

use flimcd_core::{BlockRange, Epoch, MigrationId, Seq, Time, VolumeId};
use flimcd_migrate::{
    LinkEstimate, SourceAction, SourceConfig, SourceEvent, SourceMachine, SourcePhase, SourceStart,
    policy,
};
use flimcd_volume::rules::{Mode, Rules};
use flimcd_wire::{Class, Content, Message, SourceStage, VolumeOffer};

use crate::{
    flow::Persisting,
    host::{Io, Purpose, Stage, after},
    packing::{HowToPack, Kept},
    world::{Event, Site, World},
};

/// The source's epoch before the migration.
pub(crate) const EPOCH: Epoch = Epoch(7);

type Input = Box<dyn FnOnce(&mut SourceMachine, Time)>;

/// The agent's memory. Replaced when it is killed.
#[derive(Default)]
pub(crate) struct SourceAgent {
    pub(crate) machine: Option<SourceMachine>,
    inbox: VecDeque<Input>,
    busy: bool,
    timer: Option<Time>,
    /// Records that are asked for, the first of them being written.
    pub(crate) persisting: Persisting,
    /// The machine waits for the guest's I/O to end.
    freezing: bool,
    /// Content that was read and waits for what the target says of it.
    pub(crate) kept: BTreeMap<Seq, Kept>,
}

impl World {
    /// The migration begins.
    pub(crate) fn start_migration(&mut self) {
        if !self.host(Site::Source).up {
            let later = after(self.now, &mut self.dice, 10_000, 100_000);
            return self.at(later, Event::StartMigration);
        }
        let host = self.host(Site::Source);
        host.set_stage(Stage::Owner { migrating: true });
        // Marks come first, then the look at what there is.
        host.rules.start_tracking();
        let data = host.data_blocks();
        // All of it, until the target has said what stands there.
        host.unacked.insert_range(host.size.all_blocks());
        host.unacked_is_valid = true;
        let base = self.standing.begin().map(|(base, _)| base);
        let changed = self.changed_at_source();
        self.make_source(SourceStart::Fresh { data, changed }, base);
    }

    fn make_source(&mut self, start: SourceStart, base: Option<MigrationId>) {
        let config = SourceConfig {
            migration: MigrationId(1),
            volumes: vec![VolumeOffer {
                id: VolumeId(2),
                name: "vm".parse().expect("a name"),
                size: self.plan.size,
                base,
            }],
            session: None,
            size: self.plan.size,
            epoch: EPOCH,
            incarnation: self.dice.next(),
        };
        let policy = policy::by_name(self.plan.strategy, &policy::PolicyOptions::default())
            .expect("a strategy that there is");
        self.trace(|| format!("source machine: {start:?}"));
        let mut machine = SourceMachine::new(config, policy, start, self.now);
        machine.set_sample(self.sample());
        let host = self.host(Site::Source);
        host.rules.set_read_log(true);
        machine.set_heat(&host.heat.read, &host.heat.write);
        self.source.machine = Some(machine);

        let life = self.host(Site::Source).life;
        self.at(self.now, Event::DirtyPoll { life });
        self.at(self.now, Event::Estimate { life });
        if self.net.up[Site::Source.index()] {
            self.source_input(|machine, now| machine.handle_link_up(now));
        }
        self.source_input(|_, _| {});
    }

    /// The agent was started again.
    pub(crate) fn source_starts(&mut self) {
        let size = self.plan.size;
        let host = self.host(Site::Source);
        let record = host.start();
        if !host.unacked_is_valid {
            host.unacked.insert_range(size.all_blocks());
            host.unacked_is_valid = true;
        }
        let unacked = host.unacked.clone();
        let (mode, stage) = match record.stage {
            Stage::Owner { migrating: false } => (Mode::Owner, None),
            Stage::Owner { migrating: true } => (Mode::Owner, Some(SourceStage::Owner)),
            Stage::Prepared(epoch) => (Mode::Frozen, Some(SourceStage::Prepared(epoch))),
            Stage::Released(epoch) => (Mode::Released, Some(SourceStage::Released(epoch))),
            Stage::Retired => (Mode::Released, None),
            other => return self.fail(format!("the source's record says {other:?}")),
        };
        host.rules = Rules::new(size, mode);
        if stage.is_some() && mode != Mode::Released {
            host.rules.start_tracking();
        }
        self.mutate(Site::Source);
        if let Some(stage) = stage {
            self.make_source(SourceStart::Resume { stage, unacked }, None);
        }
    }

    /// Calls the machine and does everything that follows.
    pub(crate) fn source_input(&mut self, input: impl FnOnce(&mut SourceMachine, Time) + 'static) {
        self.source.inbox.push_back(Box::new(input));
        if std::mem::replace(&mut self.source.busy, true) {
            return;
        }
        while let Some(input) = self.source.inbox.pop_front() {
            let Some(machine) = &mut self.source.machine else {
                continue;
            };
            input(machine, self.now);
            while let Some(action) = self.source.machine.as_mut().and_then(|m| m.poll_action()) {
                self.source_action(action);
            }
            self.source_transmits();
            while let Some(event) = self.source.machine.as_mut().and_then(|m| m.poll_event()) {
                self.source_event(&event);
            }
        }
        self.source.busy = false;
        let timer = self
            .source
            .machine
            .as_ref()
            .and_then(SourceMachine::poll_timeout);
        if let Some(at) = timer
            && self.source.timer != Some(at)
        {
            let life = self.host(Site::Source).life;
            self.at(
                at.max(self.now),
                Event::Timer {
                    site: Site::Source,
                    life,
                },
            );
        }
        self.source.timer = timer;
    }

    /// Hands messages to the link as long as it has room.
    pub(crate) fn source_transmits(&mut self) {
        loop {
            let Some(machine) = &mut self.source.machine else {
                return;
            };
            let net = &self.net;
            let room = |class: Class| net.has_room(Site::Source, class);
            let Some((class, message)) = machine.poll_transmit(&room) else {
                return;
            };
            self.check_sent(&message);
            self.transmit(Site::Source, class, message);
        }
    }

    fn check_sent(&mut self, message: &Message) {
        match message {
            Message::Blocks(blocks) => {
                let has = |content| blocks.entries.iter().any(|entry| entry.content == content);
                if has(Content::Same) {
                    self.cover("sent as the same");
                }
                if has(Content::Copy) {
                    self.cover("sent as copies");
                }
                if let Some(block) = self.resend.sent(blocks) {
                    let seq = blocks.seq;
                    self.fail(format!(
                        "block {} arrived and is sent again, in {seq:?}",
                        block.0
                    ));
                }
            }
            Message::Switch { stale, .. } => {
                for (start, end) in stale.0.runs() {
                    for seq in start..end {
                        self.cover("stale content at the switch");
                        self.resend.given_up(Seq(seq));
                    }
                }
            }
            _ => {}
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        self.trace(|| format!("source action: {action:?}"));
        let size = self.plan.size;
        match action {
            SourceAction::Read {
                seq,
                range,
                compress,
                same,
                probe,
            } => {
                self.host(Site::Source).rules.begin_send(range);
                self.resend.read(seq, range);
                let how = HowToPack {
                    compress,
                    same,
                    probe,
                };
                let purpose = Purpose::Send { seq, range, how };
                self.submit(Site::Source, Io::Read(range.bytes(size)), purpose);
            }
            SourceAction::MarkClean(ranges) => {
                let host = self.host(Site::Source);
                for block in ranges.into_iter().flat_map(BlockRange::iter) {
                    if !host.rules.is_dirty(BlockRange::single(block)) {
                        host.unacked.remove(block);
                    }
                }
            }
            SourceAction::Freeze => {
                self.host(Site::Source).rules.freeze();
                self.source.freezing = true;
                self.pump(Site::Source);
            }
            SourceAction::Thaw => {
                self.source.freezing = false;
                self.host(Site::Source).rules.thaw();
                self.pump(Site::Source);
            }
            SourceAction::Persist(record) => self.persist(record),
            SourceAction::Release => {
                self.host(Site::Source).rules.release();
                self.pump(Site::Source);
            }
            SourceAction::Pack { seq, had } => self.pack(seq, &had),
            SourceAction::Forget(seq) => self.forget(seq),
            SourceAction::SetPacing(_) => {}
            SourceAction::Mirror(is_on) => {
                let host = self.host(Site::Source);
                let lacking = is_on.then(|| host.unacked.clone());
                host.rules.set_mirroring(lacking);
                self.pump(Site::Source);
            }
            SourceAction::Acked(ranges) => self.acked(&ranges),
            SourceAction::LimitWrites(limit) => {
                let now = self.now;
                self.host(Site::Source).rules.set_write_limit(limit, now);
                self.pump(Site::Source);
            }
        }
    }

    /// The target has these: writes to them need not wait any more. It really has them.
    fn acked(&mut self, ranges: &[BlockRange]) {
        let size = self.plan.size;
        let mut clean = Vec::new();
        for range in ranges {
            self.host(Site::Source).rules.clean_runs(*range, &mut clean);
        }
        // What a target had written when it died may be gone, and is then sent again.
        let is_first_life = self.host(Site::Target).life == 1;
        for block in clean.into_iter().flat_map(BlockRange::iter) {
            let bytes = BlockRange::single(block).bytes(size);
            let source = self.host(Site::Source).disk.bytes(bytes).to_vec();
            if is_first_life && self.host(Site::Target).disk.bytes(bytes) != source {
                return self.fail(format!(
                    "block {} is acknowledged and is not there",
                    block.0
                ));
            }
        }
        self.host(Site::Source).rules.acked(ranges);
        self.pump(Site::Source);
    }

    /// Tells the machine when a frozen volume has no I/O in flight any more.
    pub(crate) fn check_drained(&mut self) {
        let host = &mut self.hosts[Site::Source.index()];
        if self.source.freezing && host.rules.is_drained() {
            self.source.freezing = false;
            let dirty = host.rules.take_dirty();
            self.source_input(move |machine, now| machine.handle_frozen(now, &dirty));
        }
    }

    /// Drains the dirty marks into the machine.
    pub(crate) fn dirty_poll(&mut self, life: u64) {
        let phase = self.source_phase();
        if phase.is_none_or(|phase| !phase.wants_dirty()) {
            return;
        }
        let now = self.now;
        self.host(Site::Source).rules.refill_writes(now);
        self.pump(Site::Source);
        self.tell_source_reads();
        let dirty = self.host(Site::Source).rules.take_dirty();
        if !dirty.is_empty() {
            self.source_input(move |machine, now| machine.handle_dirtied(now, &dirty));
        }
        let next = after(self.now, &mut self.dice, 20_000, 50_000);
        self.at(next, Event::DirtyPoll { life });
    }

    /// Tells the machine what the link does.
    pub(crate) fn tell_estimate(&mut self, life: u64) {
        if !self.plan.net.estimates {
            return;
        }
        let (rate, rtt) = self.net.estimate();
        let estimate = LinkEstimate {
            rate_bytes_per_sec: Some(rate),
            rtt: Some(rtt),
        };
        self.source_input(move |machine, now| machine.handle_estimate(now, estimate));
        let next = after(self.now, &mut self.dice, 100_000, 200_000);
        self.at(next, Event::Estimate { life });
    }

    /// Where the machine stands.
    pub(crate) fn source_phase(&self) -> Option<SourcePhase> {
        self.source.machine.as_ref().map(SourceMachine::phase)
    }

    fn source_event(&mut self, event: &SourceEvent) {
        self.trace(|| format!("source: {event:?}"));
        if matches!(event, SourceEvent::Phase(_)) {
            self.aim();
        }
        match event {
            SourceEvent::Phase(phase) => self.cover(match phase {
                SourcePhase::Connecting => "source Connecting",
                SourcePhase::PreCopy => "source PreCopy",
                SourcePhase::Stopping => "source Stopping",
                SourcePhase::Draining => "source Draining",
                SourcePhase::Preparing => "source Preparing",
                SourcePhase::Switching => "source Switching",
                SourcePhase::PostCopy => "source PostCopy",
                SourcePhase::Retiring => "source Retiring",
                SourcePhase::Returning => "source Returning",
                SourcePhase::Completed => "source Completed",
                SourcePhase::Cancelled => "source Cancelled",
                SourcePhase::Failed => "source Failed",
            }),
            SourceEvent::Note(_) => self.cover("source note"),
            _ => {}
        }
    }
}
