//! The source's agent: what the machine asks for, done in virtual time.

use bytes::Bytes;
use flimcd_core::{BLOCK_SIZE, BlockRange, Epoch, MigrationId, Seq, Time, VolumeId};
use flimcd_migrate::{
    LinkEstimate, SourceAction, SourceConfig, SourceEvent, SourceMachine, SourceStart, Switchover,
    policy::{self, Part, PolicyOptions},
};
use flimcd_wire::{Content, Entry, Probe, Runs, VolumeOffer};

use super::{
    content::Id,
    world::{Event, SYNC, Site, World},
};
use crate::Prediction;

/// The migration that has left the replica.
const BEFORE: MigrationId = MigrationId(7);
/// Bytes of a fingerprint.
const FINGERPRINT: u32 = 32;

/// Content that was read and not packed.
pub(super) struct Pending {
    range: BlockRange,
    compress: bool,
    probe: bool,
    ids: Vec<Id>,
}

impl World {
    /// The migration begins.
    pub(super) fn migrate(&mut self) {
        let options = PolicyOptions {
            without: self.without(),
            switch_at: self.cell.switch_at,
            ..PolicyOptions::default()
        };
        let policy = match policy::by_name(&self.cell.strategy, &options) {
            Ok(policy) => policy,
            Err(error) => return self.fail(error.to_string()),
        };
        let blocks = self.size.blocks();
        let has_replica = self.profile.replica_differs.is_some();
        let mut data = self.profile.data(blocks);
        let mut changed = self.profile.differing(blocks);
        for block in self.written_before() {
            data.insert(block);
            changed.insert(block);
        }
        let config = SourceConfig {
            migration: MigrationId(1),
            volumes: vec![VolumeOffer {
                id: VolumeId(1),
                name: "volume".parse().expect("a name"),
                size: self.size,
                base: has_replica.then_some(BEFORE),
            }],
            size: self.size,
            session: None,
            epoch: Epoch(1),
            incarnation: 1,
        };
        self.unacked = data.clone();
        let start = SourceStart::Fresh {
            data,
            changed: has_replica.then_some(changed),
        };
        let rules = &mut self.host(Site::Source).rules;
        rules.start_tracking();
        rules.set_read_log(true);
        self.host(Site::Target).rules.set_read_log(true);
        let mut machine = SourceMachine::new(config, policy, start, self.now);
        let [reads, writes] = &mut self.heat;
        for heat in [&mut *reads, &mut *writes] {
            heat.decay(self.now);
        }
        machine.set_heat(reads, writes);
        self.source = Some(machine);
        self.make_target(has_replica);
        self.start_polling();
        let estimate = self.measured();
        self.target_input(|machine, now| machine.handle_link_up(now));
        self.source_input(|machine, now| {
            machine.handle_estimate(now, estimate);
            machine.handle_switchover(now, Switchover::WhenReady);
            machine.handle_link_up(now);
        });
    }

    fn without(&self) -> Vec<Part> {
        let parts = self.cell.without.iter();
        parts.filter_map(|part| part.parse().ok()).collect()
    }

    pub(super) fn measured(&self) -> LinkEstimate {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive rate"
        )]
        let rate = self.ways[0].goodput() as u64;
        LinkEstimate {
            rate_bytes_per_sec: Some(rate),
            rtt: Some(std::time::Duration::from_secs_f64(
                self.cell.link.rtt_ms / 1000.0,
            )),
        }
    }

    /// Calls the machine and does what follows.
    pub(super) fn source_input(&mut self, input: impl FnOnce(&mut SourceMachine, Time)) {
        let Some(mut machine) = self.source.take() else {
            return;
        };
        input(&mut machine, self.now);
        let mut actions = Vec::new();
        while let Some(action) = machine.poll_action() {
            actions.push(action);
        }
        let mut events = Vec::new();
        while let Some(event) = machine.poll_event() {
            events.push(event);
        }
        let timer = machine.poll_timeout();
        self.source = Some(machine);
        for action in actions {
            self.source_action(action);
        }
        self.source_transmits();
        for event in events {
            self.source_event(event);
        }
        self.set_timer(Site::Source, timer);
    }

    pub(super) fn source_transmits(&mut self) {
        loop {
            let Some(machine) = &mut self.source else {
                return;
            };
            let way = &self.ways[0];
            let Some((class, message)) = machine.poll_transmit(&|class| way.has_room(class)) else {
                return;
            };
            self.send(Site::Source, class, message);
        }
    }

    fn source_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::SwitchedOver => {}
            SourceEvent::Predicted(predicted) => {
                self.predicted = Some(Prediction {
                    bytes: predicted.bytes,
                    misses: predicted.misses,
                    seconds: predicted.duration.as_secs_f64(),
                });
            }
            SourceEvent::Completed => self.ended_at = Some(self.now),
            SourceEvent::Failed(error) => self.fail(error.to_string()),
            SourceEvent::Cancelled => self.fail("it was cancelled".to_owned()),
            _ => {}
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        match action {
            SourceAction::Read {
                seq,
                range,
                compress,
                same: _,
                probe,
            } => {
                self.host(Site::Source).rules.begin_send(range);
                let pending = Pending {
                    range,
                    compress,
                    probe,
                    ids: Vec::new(),
                };
                self.read.insert(seq, pending);
                let at = self.disk_done(Site::Source, range.len() * BLOCK_SIZE);
                self.at(at, Event::Read(seq));
            }
            SourceAction::Pack { seq, had } => self.pack(seq, &had),
            SourceAction::Forget(seq) => drop(self.read.remove(&seq)),
            SourceAction::MarkClean(ranges) => {
                let mut clean = Vec::new();
                for range in ranges {
                    self.host(Site::Source).rules.clean_runs(range, &mut clean);
                }
                for range in clean {
                    self.unacked.remove_range(range);
                }
            }
            SourceAction::Freeze => {
                self.frozen_at = Some(self.now);
                self.freezing = true;
                self.host(Site::Source).rules.freeze();
                self.pump(Site::Source);
            }
            SourceAction::Thaw => self.host(Site::Source).rules.thaw(),
            SourceAction::Persist(record) => self.after(SYNC, Event::Persisted(record)),
            SourceAction::Release => {
                self.host(Site::Source).rules.release();
                self.pump(Site::Source);
            }
            SourceAction::SetPacing(is_on) => {
                self.ways[0].is_paced = is_on && !self.cell.without.iter().any(|w| w == "pacing");
            }
            SourceAction::Mirror(is_on) => {
                let lacking = is_on.then(|| self.unacked.clone());
                self.host(Site::Source).rules.set_mirroring(lacking);
                self.pump(Site::Source);
            }
            SourceAction::Acked(ranges) => {
                self.host(Site::Source).rules.acked(&ranges);
                self.pump(Site::Source);
            }
            SourceAction::LimitWrites(limit) => {
                let now = self.now;
                self.host(Site::Source).rules.set_write_limit(limit, now);
                self.pump(Site::Source);
            }
        }
    }

    /// The content stands in memory.
    pub(super) fn was_read(&mut self, seq: Seq) {
        let Some(mut pending) = self.read.remove(&seq) else {
            return;
        };
        let host = &mut self.hosts[0];
        host.rules.end_send(pending.range);
        let ids = pending.range.iter().map(|block| host.image.get(block.0));
        pending.ids = ids.collect();
        let asks: Vec<(u64, Id)> = pending
            .range
            .iter()
            .zip(&pending.ids)
            .filter(|&(_, &id)| id != Id::ZERO)
            .map(|(block, &id)| (block.0, id))
            .collect();
        if !pending.probe || asks.is_empty() {
            self.read.insert(seq, pending);
            return self.pack(seq, &Runs::default());
        }
        let runs = asks
            .iter()
            .map(|&(block, _)| BlockRange::new(block, block + 1));
        let prefixes = asks.iter().flat_map(|(_, id)| id.prefix().to_le_bytes());
        let probe = Probe {
            seq,
            blocks: Runs::new(joined(runs)),
            payload: prefixes.collect::<Vec<_>>().into(),
        };
        self.read.insert(seq, pending);
        self.source_input(|machine, now| machine.handle_examined(now, probe));
    }

    fn pack(&mut self, seq: Seq, had: &Runs) {
        let Some(pending) = self.read.remove(&seq) else {
            return;
        };
        let mut entries: Vec<Entry> = Vec::new();
        for (block, &id) in pending.range.iter().zip(&pending.ids) {
            let content = if id == Id::ZERO {
                Content::Zero
            } else if had.iter().any(|run| run.contains(block)) {
                Content::Copy
            } else if pending.compress {
                Content::Zstd {
                    len: self.profile.packed_len(id),
                }
            } else {
                Content::Raw { len: 4096 }
            };
            match (entries.last_mut(), content) {
                (Some(last), content) if joins(last, content) => {
                    last.range.end += 1;
                    match (&mut last.content, content) {
                        (Content::Zstd { len }, Content::Zstd { len: more })
                        | (Content::Raw { len }, Content::Raw { len: more }) => *len += more,
                        _ => {}
                    }
                }
                _ => entries.push(Entry {
                    range: BlockRange::single(block),
                    content,
                }),
            }
        }
        let bytes: u32 = entries
            .iter()
            .map(|entry| match entry.content {
                Content::Zstd { len } | Content::Raw { len } => len,
                Content::Copy | Content::Same => FINGERPRINT,
                Content::Zero | Content::Invalid => 0,
            })
            .sum();
        self.sent.insert(seq, pending.ids);
        let payload = zeroes(bytes);
        self.source_input(|machine, now| machine.handle_read(now, seq, Ok((entries, payload))));
    }

    /// Tells the machine what its guest has read and written lately.
    pub(super) fn tell_source(&mut self) {
        let now = self.now;
        let rules = &mut self.host(Site::Source).rules;
        rules.refill_writes(now);
        let mut reads = Vec::new();
        rules.take_reads(&mut reads);
        let dirty = rules.take_dirty();
        self.source_input(|machine, now| {
            machine.handle_reads(now, &reads);
            if !dirty.is_empty() {
                machine.handle_dirtied(now, &dirty);
            }
        });
        self.pump(Site::Source);
    }

    pub(super) fn check_drained(&mut self) {
        if self.freezing && self.host(Site::Source).rules.is_drained() {
            self.freezing = false;
            let dirty = self.host(Site::Source).rules.take_dirty();
            self.source_input(|machine, now| machine.handle_frozen(now, &dirty));
        }
    }
}

fn joins(last: &Entry, content: Content) -> bool {
    std::mem::discriminant(&last.content) == std::mem::discriminant(&content)
}

/// Joins neighbouring runs, which ascend.
fn joined(runs: impl Iterator<Item = BlockRange>) -> Vec<BlockRange> {
    let mut joined: Vec<BlockRange> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => joined.push(run),
        }
    }
    joined
}

/// So many bytes that nobody looks at.
fn zeroes(len: u32) -> Bytes {
    static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
    Bytes::from_static(&ZEROES[..(len as usize).min(1 << 20)])
}
