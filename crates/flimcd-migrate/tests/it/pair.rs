//! A source machine and a target machine with everything around them as small as it can be: an image is a number per block, I/O
//! takes no time, records are variables. What takes time is the link, which has a lane for each class.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use flimcd_core::{
    BLOCK_SIZE, BlockIndex, BlockRange, BlockSet, ChunkIndex, Epoch, MigrationId, Seq, SeqSet,
    Time, VolumeId, VolumeSize,
};
use flimcd_migrate::{
    DiskError, LinkEstimate, SealLimits, SeedChoice, SourceAction, SourceConfig, SourceEvent,
    SourceMachine, SourcePhase, SourceRecord, SourceStart, Switchover, TargetAction, TargetConfig,
    TargetEvent, TargetMachine, TargetPhase, TargetStart, policy,
};
use flimcd_wire::{
    Base, Blocks, ChunkPrefix, Class, Content, HeatPart, Message, Runs, SampleChunk, SeedId,
    SeedTable, SourceStage, TargetStage, VolumeOffer,
};

use crate::store::{Read, Store, fingerprint};

/// Blocks of the volume.
pub(crate) const BLOCKS: u64 = 64;
/// One way.
pub(crate) const DELAY: Duration = Duration::from_millis(10);
/// Between two messages of one lane.
const PACE: Duration = Duration::from_micros(200);

/// Little enough for several rounds.
const SEAL_LIMITS: SealLimits = SealLimits {
    bytes: 8 * BLOCK_SIZE,
    bytes_max: BLOCKS * BLOCK_SIZE,
    patience: Duration::from_secs(1),
};

/// No test takes so long.
const ENDLESS: Duration = Duration::from_secs(3600);

/// What has been put on a lane and when it arrives.
type Lane = VecDeque<(Time, Message)>;

/// See the module.
pub(crate) struct Pair {
    pub(crate) now: Time,
    strategy: &'static str,
    pub(crate) source: SourceMachine,
    pub(crate) target: TargetMachine,
    to_target: BTreeMap<Class, Lane>,
    to_source: BTreeMap<Class, Lane>,
    link_up: bool,
    incarnation: u64,

    /// The source's volume.
    pub(crate) image: Vec<u64>,
    pub(crate) dirty: BlockSet,
    pub(crate) unacked: BlockSet,
    /// Whether the guest is served at the source.
    pub(crate) serving: bool,
    pub(crate) record: SourceRecord,

    /// The target's volume.
    pub(crate) arrived: Vec<u64>,
    pub(crate) missing: BlockSet,
    pub(crate) owner: Option<Epoch>,
    complete: bool,
    refused: Option<Epoch>,
    pub(crate) discarded: bool,
    /// Blocks that a guest at the target waits for.
    waiting: Vec<BlockRange>,
    /// The target's disk fails when it should take the volume over.
    pub(crate) take_over_fails: bool,

    /// An image at the target: what its table says, and what is really there.
    pub(crate) seed: Option<(Vec<u64>, Vec<u64>)>,

    /// What the target has elsewhere.
    pub(crate) store: Store,
    /// What the source has read and not packed.
    reads: BTreeMap<Seq, Read>,
    /// The target does not say what it has.
    pub(crate) is_silent: bool,
    /// The target's disk does nothing for now.
    pub(crate) is_slow: bool,
    waiting_applies: Vec<TargetAction>,

    /// Everything that went to the link with content.
    pub(crate) sent: Vec<(Class, Blocks)>,
    /// Messages that arrived, by anyone.
    pub(crate) delivered: usize,
    /// What a block was when it last arrived; emptied by crashes.
    known: BTreeMap<u64, u64>,
    /// Messages that the source has given up because some of their blocks were outdated at the switch.
    given_up: SeqSet,
    /// The guest's writes wait for the target.
    pub(crate) mirrors: bool,
    /// What the source has told to be at the target meanwhile.
    pub(crate) acked: Vec<BlockRange>,
    /// What the target was told to be hot.
    pub(crate) heat: Vec<HeatPart>,
    /// It is an increment of a replica.
    replicates: bool,
    /// The source's volume when its guest stood last.
    pub(crate) frozen: Option<Vec<u64>>,
    /// The target's volume when it became a copy of one moment.
    pub(crate) sealed: Option<Vec<u64>>,
    pub(crate) source_events: Vec<SourceEvent>,
    pub(crate) target_events: Vec<TargetEvent>,
}

fn size() -> VolumeSize {
    VolumeSize::new(BLOCKS * BLOCK_SIZE).unwrap()
}

fn source(strategy: &str, incarnation: u64, start: SourceStart, now: Time) -> SourceMachine {
    let config = SourceConfig {
        migration: MigrationId(1),
        volumes: vec![VolumeOffer {
            id: VolumeId(1),
            name: "vm".parse().unwrap(),
            size: size(),
            base: None,
        }],
        session: None,
        size: size(),
        epoch: Epoch(1),
        incarnation,
    };
    let mut machine = SourceMachine::new(
        config,
        policy::by_name(strategy, &policy::PolicyOptions::default()).unwrap(),
        start,
        now,
    );
    machine.handle_estimate(
        now,
        LinkEstimate {
            rate_bytes_per_sec: Some(1_000_000),
            rtt: Some(DELAY * 2),
        },
    );
    machine
}

fn set_of(blocks: impl Iterator<Item = u64>) -> BlockSet {
    let mut set = BlockSet::new(BLOCKS);
    for block in blocks {
        set.insert(BlockIndex(block));
    }
    set
}

fn target(incarnation: u64, start: TargetStart, now: Time) -> TargetMachine {
    target_on(incarnation, start, Base::Zeroes, now)
}

fn target_on(incarnation: u64, start: TargetStart, base: Base, now: Time) -> TargetMachine {
    let config = TargetConfig {
        migration: MigrationId(1),
        size: size(),
        waits_for_vm: false,
        incarnation,
        bases: vec![base],
    };
    TargetMachine::new(config, start, now)
}

fn disk_error() -> DiskError {
    DiskError {
        no_space: false,
        text: "broken".to_owned(),
    }
}

impl Pair {
    /// A volume full of data, the link down, nothing granted.
    pub(crate) fn new(strategy: &'static str) -> Self {
        let data = BlockSet::full(BLOCKS);
        let start = SourceStart::Fresh {
            data: data.clone(),
            changed: None,
        };
        Self {
            now: Time::ZERO,
            strategy,
            source: source(strategy, 1, start, Time::ZERO),
            target: target(2, TargetStart::Fresh, Time::ZERO),
            to_target: BTreeMap::new(),
            to_source: BTreeMap::new(),
            link_up: false,
            incarnation: 2,
            image: (1..=BLOCKS).collect(),
            dirty: BlockSet::new(BLOCKS),
            unacked: data,
            serving: true,
            record: SourceRecord::Owner,
            arrived: vec![0; 64],
            missing: BlockSet::new(BLOCKS),
            owner: None,
            complete: false,
            refused: None,
            discarded: false,
            waiting: Vec::new(),
            take_over_fails: false,
            seed: None,
            store: Store::default(),
            reads: BTreeMap::new(),
            is_silent: false,
            is_slow: false,
            waiting_applies: Vec::new(),
            sent: Vec::new(),
            delivered: 0,
            known: BTreeMap::new(),
            given_up: SeqSet::new(),
            mirrors: false,
            acked: Vec::new(),
            heat: Vec::new(),
            replicates: false,
            frozen: None,
            sealed: None,
            source_events: Vec::new(),
            target_events: Vec::new(),
        }
    }

    /// The same, with an image at the target, as its table has it and as it is.
    pub(crate) fn with_seed(strategy: &'static str, table: Vec<u64>, is: Vec<u64>) -> Self {
        let mut pair = Self::new(strategy);
        pair.seed = Some((table, is));
        pair.set_sample();
        pair
    }

    fn set_sample(&mut self) {
        let sample = (0..BLOCKS / 16).map(|chunk| SampleChunk {
            chunk: ChunkIndex(chunk),
            prefix: ChunkPrefix::of(&fingerprint(chunk_of(&self.image, chunk))),
        });
        self.source.set_sample(sample.collect());
    }

    /// A volume of which a copy of some time stands at the target; the offer knows what has changed since.
    pub(crate) fn on_copy(strategy: &'static str, copy: Vec<u64>, base: Base) -> Self {
        let mut pair = Self::new(strategy);
        let changed = (0..BLOCKS).filter(|&block| {
            let at = usize::try_from(block).unwrap();
            copy[at] != pair.image[at]
        });
        let start = SourceStart::Fresh {
            data: BlockSet::full(BLOCKS),
            changed: Some(set_of(changed)),
        };
        pair.source = source(strategy, 1, start, Time::ZERO);
        pair.target = target_on(2, TargetStart::Fresh, base, Time::ZERO);
        pair.arrived = copy;
        pair
    }

    /// An increment of a replica, with the link up.
    pub(crate) fn replicating(strategy: &'static str) -> Self {
        let mut pair = Self::new(strategy);
        pair.replicates = true;
        pair.source.replicate(SEAL_LIMITS);
        pair.link_up();
        pair
    }

    /// The same, under way: the link is up and the switch is granted.
    pub(crate) fn started(strategy: &'static str) -> Self {
        let mut pair = Self::new(strategy);
        pair.link_up();
        pair.source
            .handle_switchover(pair.now, Switchover::WhenReady);
        pair
    }

    // ---- what a test does

    pub(crate) fn link_up(&mut self) {
        self.link_up = true;
        self.source.handle_link_up(self.now);
        self.target.handle_link_up(self.now);
    }

    /// Loses everything on its way.
    pub(crate) fn link_down(&mut self) {
        if std::mem::replace(&mut self.link_up, false) {
            self.source.handle_link_down(self.now);
            self.target.handle_link_down(self.now);
        }
        self.to_target.clear();
        self.to_source.clear();
    }

    /// The guest writes a block, wherever it is served.
    pub(crate) fn write(&mut self, block: u64, value: u64) {
        let at = usize::try_from(block).unwrap();
        if self.owner.is_some() {
            self.arrived[at] = value;
            if self.missing.remove(BlockIndex(block)) {
                let mut overwritten = BlockSet::new(BLOCKS);
                overwritten.insert(BlockIndex(block));
                self.target.handle_overwritten(self.now, &overwritten);
                self.target.handle_missing(self.now, self.missing.count());
            }
        } else {
            assert!(self.serving, "nobody serves the guest");
            self.image[at] = value;
            self.dirty.insert(BlockIndex(block));
            self.unacked.insert(BlockIndex(block));
        }
    }

    /// The guest at the target reads blocks, and waits for them if it must.
    pub(crate) fn read_at_target(&mut self, range: BlockRange) {
        if self.missing.intersects(range) {
            self.waiting.push(range);
            let runs: Vec<_> = self.missing.runs_in(range).collect();
            for run in runs {
                self.target.handle_fault(self.now, run);
            }
        }
    }

    pub(crate) fn restart_source(&mut self) {
        self.link_down();
        self.reads.clear();
        self.known.clear();
        let stage = match self.record {
            SourceRecord::Owner => SourceStage::Owner,
            SourceRecord::Prepared(epoch) => SourceStage::Prepared(epoch),
            SourceRecord::Released(epoch) => SourceStage::Released(epoch),
            SourceRecord::Retired(_) => return,
        };
        self.serving = self.record == SourceRecord::Owner;
        self.incarnation += 1;
        self.given_up = SeqSet::new();
        let start = SourceStart::Resume {
            stage,
            unacked: self.unacked.clone(),
        };
        self.source = source(self.strategy, self.incarnation, start, self.now);
        if self.seed.is_some() {
            self.set_sample();
        }
        if self.replicates {
            self.source.replicate(SEAL_LIMITS);
        }
        self.source
            .handle_switchover(self.now, Switchover::WhenReady);
    }

    pub(crate) fn restart_target(&mut self) {
        self.link_down();
        self.store.forget();
        self.known.clear();
        self.waiting.clear();
        let stage = match (self.owner, self.complete) {
            _ if self.sealed.is_some() => TargetStage::Complete(Epoch(2)),
            (Some(epoch), true) => TargetStage::Complete(epoch),
            (Some(epoch), false) => TargetStage::Owner(epoch),
            (None, _) => TargetStage::Incoming,
        };
        self.incarnation += 1;
        let start = TargetStart::Resume {
            stage,
            refused: self.refused,
            missing_blocks: self.missing.count(),
        };
        self.target = target(self.incarnation, start, self.now);
    }

    /// Goes on until nothing is left to do, or the two have nothing more to say for ten seconds.
    pub(crate) fn drive(&mut self) {
        let quiet = self.now + Duration::from_secs(30);
        self.drive_until(|pair| pair.now > quiet || pair.is_over());
    }

    /// Goes on until so many messages have arrived in all, or everything is over.
    pub(crate) fn drive_messages(&mut self, delivered: usize) {
        let late = self.now + Duration::from_secs(30);
        self.drive_until(|pair| pair.delivered >= delivered || pair.is_over() || pair.now > late);
    }

    pub(crate) fn drive_until(&mut self, done: impl Fn(&Self) -> bool) {
        loop {
            self.settle();
            if done(self) || !self.step() {
                return;
            }
            assert!(
                self.now < Time::ZERO + ENDLESS,
                "what is waited for never comes"
            );
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.source.phase().is_final() && self.target.is_final()
    }

    /// Both have ended well and the images are what the guest made them.
    #[track_caller]
    pub(crate) fn assert_completed(&self) {
        assert_eq!(self.source.phase(), SourcePhase::Completed);
        assert_eq!(self.target.phase(), TargetPhase::Complete);
        assert_eq!(self.owner, Some(Epoch(2)));
        assert!(!self.serving, "two sites serve the guest");
        assert!(self.missing.is_empty());
        assert_eq!(self.record, SourceRecord::Retired(Epoch(2)));
    }

    /// The guest is where it was, and the target has forgotten everything.
    #[track_caller]
    pub(crate) fn assert_at_source(&self) {
        assert!(self.serving, "nobody serves the guest");
        assert_eq!(self.owner, None);
        assert_eq!(self.record, SourceRecord::Owner);
    }

    // ---- the drivers

    /// Does everything that needs no time.
    fn settle(&mut self) {
        loop {
            let mut calm = true;
            while let Some(action) = self.source.poll_action() {
                calm = false;
                self.source_action(action);
            }
            while let Some(action) = self.target.poll_action() {
                calm = false;
                self.target_action(action);
            }
            if self.source.poll_capture().is_some() {
                calm = false;
                assert!(!self.serving, "captured while the guest writes");
                self.frozen = Some(self.image.clone());
                self.source.handle_captured(self.now, 7, Ok(()));
            }
            if let Some(seal) = self.target.poll_seal() {
                calm = false;
                self.sealed = Some(self.arrived.clone());
                self.target.handle_sealed(self.now, seal, Ok(()));
            }
            if !self.is_slow {
                for action in std::mem::take(&mut self.waiting_applies) {
                    calm = false;
                    self.target_action(action);
                }
            }
            self.source_events
                .extend(std::iter::from_fn(|| self.source.poll_event()));
            self.target_events
                .extend(std::iter::from_fn(|| self.target.poll_event()));
            calm &= !self.transmit();
            if calm {
                return;
            }
        }
    }

    fn transmit(&mut self) -> bool {
        let mut any = false;
        while let Some((class, message)) = self.source.poll_transmit(&|_| true) {
            if let Message::Blocks(blocks) = &message {
                self.check_sent(blocks);
                self.sent.push((class, blocks.clone()));
            }
            if let Message::Switch { stale, .. } = &message {
                self.given_up.union_with(&stale.0);
                let given_up = |(_, blocks): &&(Class, Blocks)| stale.0.contains(blocks.seq);
                for (_, blocks) in self.sent.iter().filter(given_up) {
                    for (block, _) in content(blocks) {
                        self.known.remove(&block);
                    }
                }
            }
            put(self.to_target.entry(class).or_default(), self.now, message);
            any = true;
        }
        while let Some((class, message)) = self.target.poll_transmit(&|_| true) {
            put(self.to_source.entry(class).or_default(), self.now, message);
            any = true;
        }
        any
    }

    /// A block that arrived as it is must not be sent again.
    fn check_sent(&self, blocks: &Blocks) {
        for (block, value) in content(blocks) {
            assert_ne!(
                self.known.get(&block),
                Some(&value),
                "block {block} is sent again in {:?}",
                blocks.seq
            );
        }
    }

    /// Lets the next thing happen; false when there is none.
    fn step(&mut self) -> bool {
        let arrivals = self.to_target.values().chain(self.to_source.values());
        let next_arrival = arrivals
            .filter_map(|lane| lane.front())
            .map(|(at, _)| *at)
            .min();
        let timers = [self.source.poll_timeout(), self.target.poll_timeout()];
        let next_timer = timers.into_iter().flatten().min();
        let Some(next) = next_arrival.into_iter().chain(next_timer).min() else {
            return false;
        };
        self.now = self.now.max(next);
        if let Some(message) = take(&mut self.to_target, self.now) {
            self.delivered += 1;
            if let Message::Blocks(blocks) = &message
                && !self.given_up.contains(blocks.seq)
            {
                self.known.extend(content(blocks));
            }
            self.target.handle_message(self.now, message);
        } else if let Some(message) = take(&mut self.to_source, self.now) {
            self.delivered += 1;
            self.source.handle_message(self.now, message);
        } else {
            if self.source.poll_timeout().is_some_and(|at| at <= self.now) {
                self.drain_dirty();
                self.source.handle_timeout(self.now);
            }
            if self.target.poll_timeout().is_some_and(|at| at <= self.now) {
                self.target.handle_timeout(self.now);
            }
        }
        true
    }

    fn take_dirty(&mut self) -> BlockSet {
        std::mem::replace(&mut self.dirty, BlockSet::new(BLOCKS))
    }

    /// Tells the machine what the guest has written.
    pub(crate) fn drain_dirty(&mut self) {
        if self.source.phase().wants_dirty() && !self.dirty.is_empty() {
            let dirty = self.take_dirty();
            self.source.handle_dirtied(self.now, &dirty);
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        match action {
            SourceAction::Read {
                seq,
                range,
                same,
                probe,
                ..
            } => {
                let at = |block| usize::try_from(block).unwrap();
                let image = if self.source.reads_capture() {
                    self.frozen.as_ref().expect("captured before it is read")
                } else {
                    self.dirty.remove_range(range);
                    &self.image
                };
                let values = image[at(range.start)..at(range.end)].to_vec();
                let read = Read::new(range, values, &same);
                match read.probe(seq).filter(|_| probe) {
                    Some(probe) => {
                        self.reads.insert(seq, read);
                        self.source.handle_examined(self.now, probe);
                    }
                    None => {
                        let packed = read.pack(&Runs::default());
                        self.source.handle_read(self.now, seq, Ok(packed));
                    }
                }
            }
            SourceAction::Pack { seq, had } => {
                let read = self.reads.remove(&seq).expect("read, and not forgotten");
                self.source.handle_read(self.now, seq, Ok(read.pack(&had)));
            }
            SourceAction::Forget(seq) => assert!(self.reads.remove(&seq).is_some()),
            SourceAction::MarkClean(ranges) => {
                for block in ranges.into_iter().flat_map(BlockRange::iter) {
                    if !self.dirty.contains(block) {
                        self.unacked.remove(block);
                    }
                }
            }
            SourceAction::Freeze => {
                self.serving = false;
                let dirty = self.take_dirty();
                self.source.handle_frozen(self.now, &dirty);
            }
            SourceAction::Thaw => {
                assert_eq!(self.owner, None, "the guest would run at both sites");
                self.serving = true;
            }
            SourceAction::Persist(record) => {
                self.record = record;
                self.source.handle_persisted(self.now, record, Ok(()));
            }
            SourceAction::Release => assert!(!self.serving, "released while it serves the guest"),
            SourceAction::SetPacing(_) | SourceAction::LimitWrites(_) => {}
            SourceAction::Mirror(is_on) => self.mirrors = is_on,
            SourceAction::Acked(runs) => self.acked.extend(runs),
        }
    }

    fn target_action(&mut self, action: TargetAction) {
        match action {
            TargetAction::Apply { .. } if self.is_slow => self.waiting_applies.push(action),
            TargetAction::Apply { id, blocks } => {
                let mut values = content(&blocks);
                for (entry, payload) in blocks.parts() {
                    let found = match entry.content {
                        Content::Same => {
                            let is = &self.seed.as_ref().expect("nothing else is the same").1;
                            let at = |block| usize::try_from(block).unwrap();
                            let is = is[at(entry.range.start)..at(entry.range.end)].to_vec();
                            Some(is).filter(|is| fingerprint(is)[..] == payload[..])
                        }
                        Content::Copy => self.store.copy(blocks.seq, entry.range, &payload),
                        _ => continue,
                    };
                    let Some(found) = found else {
                        // All of the message comes again.
                        for block in blocks.ranges().flat_map(BlockRange::iter) {
                            self.known.remove(&block.0);
                        }
                        return self.target.handle_lacking(self.now, id);
                    };
                    values.extend((entry.range.start..).zip(found));
                }
                for (block, value) in values {
                    if self.owner.is_none() || self.missing.remove(BlockIndex(block)) {
                        self.arrived[usize::try_from(block).unwrap()] = value;
                    }
                }
                self.waiting.retain(|range| self.missing.intersects(*range));
                if self.owner.is_some() {
                    self.target.handle_missing(self.now, self.missing.count());
                }
                self.target.handle_applied(self.now, id, Ok(()));
            }
            TargetAction::Sync(id) => self.target.handle_synced(self.now, id, Ok(())),
            TargetAction::BecomeOwner { epoch, .. } if self.take_over_fails => {
                self.target.handle_owner(self.now, epoch, Err(disk_error()));
            }
            TargetAction::BecomeOwner { epoch, missing } => {
                assert!(!self.serving, "two sites serve the guest");
                assert_ne!(self.refused, Some(epoch), "refused, and owned all the same");
                self.owner = Some(epoch);
                self.missing = missing;
                self.target.handle_owner(self.now, epoch, Ok(()));
            }
            TargetAction::Refuse { epoch } => {
                self.refused = Some(epoch);
                self.target.handle_refused(self.now, epoch, Ok(()));
            }
            TargetAction::RequeueFaults => {
                for range in self.waiting.clone() {
                    let runs: Vec<_> = self.missing.runs_in(range).collect();
                    for run in runs {
                        self.target.handle_fault(self.now, run);
                    }
                }
            }
            TargetAction::AskForMissing { .. } => {
                let runs: Vec<_> = self.missing.runs().collect();
                for run in runs {
                    self.target.handle_fault(self.now, run);
                }
            }
            TargetAction::Complete { .. } => {
                self.complete = true;
                self.target.handle_completed(self.now, Ok(()));
            }
            TargetAction::Probe(probe) => {
                let probed = self.store.probe(&probe);
                self.target.handle_probed(self.now, probed);
            }
            TargetAction::ChooseSeed { .. } if self.is_silent => {}
            TargetAction::ChooseSeed { sample } => {
                let choice = self.seed.as_ref().map(|(says, _)| {
                    let mut table = SeedTable::new(BLOCKS / 16);
                    for chunk in 0..BLOCKS / 16 {
                        let prefix = ChunkPrefix::of(&fingerprint(chunk_of(says, chunk)));
                        table.set(ChunkIndex(chunk), Some(prefix));
                    }
                    assert_eq!(sample.len() as u64, BLOCKS / 16);
                    SeedChoice {
                        id: SeedId([1; 16]),
                        name: "base".to_owned(),
                        in_place: false,
                        table: table.into(),
                    }
                });
                self.target.handle_seed(self.now, choice);
            }
            TargetAction::Discard => self.discarded = true,
            TargetAction::KeepHeat(part) => self.heat.push(part),
        }
    }
}

fn put(lane: &mut Lane, now: Time, message: Message) {
    let at = lane
        .back()
        .map_or(now + DELAY, |(last, _)| (*last + PACE).max(now + DELAY));
    lane.push_back((at, message));
}

/// The next message that has arrived by now, most urgent class first.
fn take(lanes: &mut BTreeMap<Class, Lane>, now: Time) -> Option<Message> {
    let lane = lanes
        .values_mut()
        .filter(|lane| lane.front().is_some_and(|(at, _)| *at <= now))
        .min_by_key(|lane| lane.front().map(|(at, _)| *at))?;
    lane.pop_front().map(|(_, message)| message)
}

fn chunk_of(image: &[u64], chunk: u64) -> &[u64] {
    let first = usize::try_from(chunk * 16).unwrap();
    &image[first..first + 16]
}

/// The blocks of a message and what they hold, where it says so itself.
pub(crate) fn content(blocks: &Blocks) -> Vec<(u64, u64)> {
    blocks
        .parts()
        .filter(|(entry, _)| !matches!(entry.content, Content::Same | Content::Copy))
        .flat_map(|(entry, payload)| {
            let (words, _) = payload.as_chunks::<8>();
            let values: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
            (entry.range.start..).zip(values)
        })
        .collect()
}

/// How often each block was sent.
pub(crate) fn times_sent(pair: &Pair, block: u64) -> usize {
    let of_block =
        |(_, blocks): &&(Class, Blocks)| content(blocks).iter().any(|(b, _)| *b == block);
    pair.sent.iter().filter(of_block).count()
}

/// Numbers of the messages that carried a block.
pub(crate) fn seqs_of(pair: &Pair, block: u64) -> Vec<Seq> {
    let of_block =
        |(_, blocks): &&(Class, Blocks)| content(blocks).iter().any(|(b, _)| *b == block);
    pair.sent
        .iter()
        .filter(of_block)
        .map(|(_, blocks)| blocks.seq)
        .collect()
}
