//! Everything that there is in a run, and the order in which it happens.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use flimcd_core::{BlockRange, Heat, Time, VolumeSize};
use flimcd_lab::load::catalog::Workload;
use flimcd_migrate::{ApplyId, LONG_HALF_LIFE, SourceMachine, SourceRecord, SyncId, TargetMachine};
use flimcd_volume::rules::{
    Admission, ApplyToken, Completion, GuestOp, Mode, Outcome, Rules, Ticket,
};
use flimcd_wire::{Class, Message};

use super::{
    content::{Id, Image, Profile},
    figures::Figures,
    guest::{Guest, Next},
    link::Direction,
};
use crate::{Cell, Phase, Prediction};

/// A disk: how long a request takes, and bytes per second of what is read or written for the migration.
const DISK_LATENCY: Duration = Duration::from_micros(100);
const DISK_BYTES_PER_SEC: f64 = 1e9;
/// Making something durable.
pub(super) const SYNC: Duration = Duration::from_millis(1);
/// How often dirty marks and reads are drained, as in the agent.
const DRAIN: Duration = Duration::from_millis(20);
/// How often the link's measurements are told.
const ESTIMATE: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    Source,
    Target,
}

/// What can happen next.
#[derive(Debug)]
pub(super) enum Event {
    /// A piece has left the wire.
    Left(Site),
    Arrive(Site, Message),
    /// Content was read at the source.
    Read(flimcd_core::Seq),
    Persisted(SourceRecord),
    /// A part of a message was written at the target.
    Written(ApplyToken),
    Synced(SyncId),
    Owned(flimcd_core::Epoch),
    Completed,
    Timer(Site),
    Drain,
    TouchedDue,
    Estimate,
    GuestNext,
    GuestIo(Site, u64, Ticket),
    Migrate,
}

struct Scheduled(Time, u64, Event);

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// A site's disk and volume.
pub(super) struct Host {
    pub(super) rules: Rules,
    pub(super) image: Image,
    /// When what is read or written for the migration is done.
    busy_until: Time,
    /// Requests that the rules have parked, and those whose answer is held.
    waiting: HashMap<Ticket, u64>,
}

/// A message whose content is being written.
pub(super) struct Applying {
    pub(super) left: usize,
    pub(super) is_lacking: bool,
}

/// See the module.
pub(super) struct World {
    pub(super) now: Time,
    queue: BinaryHeap<Reverse<Scheduled>>,
    next_event: u64,
    pub(super) cell: Cell,
    pub(super) size: VolumeSize,
    pub(super) profile: Profile,
    pub(super) hosts: [Host; 2],
    pub(super) ways: [Direction; 2],
    pub(super) source: Option<SourceMachine>,
    pub(super) target: Option<TargetMachine>,
    timers: [Option<Time>; 2],
    pub(super) heat: [Heat; 2],
    guest: Guest,
    guest_at: Option<Time>,
    /// Content that was read at the source, by message.
    pub(super) read: HashMap<flimcd_core::Seq, super::source::Pending>,
    pub(super) sent: HashMap<flimcd_core::Seq, Vec<Id>>,
    pub(super) freezing: bool,
    pub(super) unacked: flimcd_core::BlockSet,
    pub(super) messages: HashMap<ApplyId, Applying>,
    pub(super) applies: HashMap<ApplyToken, (ApplyId, BlockRange, VecDeque<Id>, bool)>,
    pub(super) touched_due: bool,
    /// What the guest has written last and was told, by block.
    truth: HashMap<u64, Id>,
    writing: HashMap<u64, u32>,
    pub(super) figures: Figures,
    pub(super) begin: Time,
    pub(super) frozen_at: Option<Time>,
    pub(super) switched_at: Option<Time>,
    pub(super) resumed_at: Option<Time>,
    pub(super) ended_at: Option<Time>,
    pub(super) predicted: Option<Prediction>,
    bytes_at_begin: u64,
    pub(super) error: Option<String>,
}

impl World {
    pub(super) fn new(cell: &Cell, load: Workload, profile: Profile, warm_up: Duration) -> Self {
        let size = VolumeSize::new(cell.size_bytes).expect("the caller has checked it");
        let blocks = size.blocks();
        let host = |mode, image| Host {
            rules: Rules::new(size, mode),
            image,
            busy_until: Time::ZERO,
            waiting: HashMap::new(),
        };
        let way = |seed| Direction::new(cell.link, seed);
        let begin = Time::ZERO + warm_up;
        let heat = || Heat::new(size, LONG_HALF_LIFE, Time::ZERO);
        let mut world = Self {
            now: Time::ZERO,
            queue: BinaryHeap::new(),
            next_event: 0,
            size,
            profile,
            hosts: [
                host(Mode::Owner, Image::source(profile, blocks)),
                host(Mode::Incoming, Image::target(profile, blocks)),
            ],
            ways: [way(cell.seed), way(cell.seed + 1)],
            source: None,
            target: None,
            timers: [None; 2],
            heat: [heat(), heat()],
            guest: Guest::new(load.requests, load.options, Time::ZERO),
            guest_at: None,
            read: HashMap::new(),
            sent: HashMap::new(),
            freezing: false,
            unacked: flimcd_core::BlockSet::new(blocks),
            messages: HashMap::new(),
            applies: HashMap::new(),
            touched_due: false,
            truth: HashMap::new(),
            writing: HashMap::new(),
            figures: Figures::new(begin, interval(cell), blocks),
            begin,
            frozen_at: None,
            switched_at: None,
            resumed_at: None,
            ended_at: None,
            predicted: None,
            bytes_at_begin: 0,
            error: None,
            cell: cell.clone(),
        };
        world.at(Time::ZERO, Event::GuestNext);
        world.at(begin, Event::Migrate);
        world
    }

    pub(super) fn at(&mut self, time: Time, event: Event) {
        self.next_event += 1;
        let time = time.max(self.now);
        self.queue
            .push(Reverse(Scheduled(time, self.next_event, event)));
    }

    pub(super) fn after(&mut self, time: Duration, event: Event) {
        self.at(self.now + time, event);
    }

    pub(super) fn host(&mut self, site: Site) -> &mut Host {
        &mut self.hosts[site as usize]
    }

    pub(super) fn fail(&mut self, why: String) {
        self.error.get_or_insert(why);
    }

    /// When a disk has read or written so much for the migration, after what it has to do before.
    pub(super) fn disk_done(&mut self, site: Site, bytes: u64) -> Time {
        #[expect(clippy::cast_precision_loss, reason = "a message is small")]
        let takes = Duration::from_secs_f64(bytes as f64 / DISK_BYTES_PER_SEC);
        let now = self.now;
        let host = self.host(site);
        host.busy_until = host.busy_until.max(now) + takes;
        host.busy_until + DISK_LATENCY
    }

    pub(super) fn phase(&self) -> Phase {
        if self.now < self.begin {
            Phase::Before
        } else if self.ended_at.is_some() {
            Phase::After
        } else if self.resumed_at.is_some() {
            Phase::Postcopy
        } else if self.frozen_at.is_some() {
            Phase::Switchover
        } else {
            Phase::Precopy
        }
    }

    pub(super) fn misses(&self) -> u64 {
        self.hosts[1].rules.stats().guest_reads_missed
    }

    /// Bytes per second that the link carries.
    pub(super) fn goodput(&self) -> f64 {
        self.ways[0].goodput()
    }

    /// Bytes that have left the source since the migration began.
    pub(super) fn bytes(&self) -> u64 {
        self.ways[0].bytes - self.bytes_at_begin
    }

    /// Runs until the migration is over, or `deadline` has come.
    pub(super) fn run(&mut self, deadline: Time) {
        while let Some(Reverse(Scheduled(time, _, event))) = self.queue.pop() {
            if time > deadline {
                return self.fail(format!(
                    "the migration has not ended after {:.0} s",
                    self.figures.seconds(deadline)
                ));
            }
            self.now = time;
            if time >= self.begin {
                let (phase, bytes, misses) = (self.phase(), self.bytes(), self.misses());
                self.figures.tick(time, phase, bytes, misses);
            }
            self.happen(event);
            if self.error.is_some() || self.is_over() {
                return;
            }
        }
        self.fail("nothing is left to happen".to_owned());
    }

    /// The migration has ended, and whoever waited for it has been answered.
    fn is_over(&self) -> bool {
        self.ended_at.is_some_and(|ended| {
            let mut waiting = self.guest.in_flight.values();
            waiting.all(|request| request.issued > ended)
        })
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Migrate => self.migrate(),
            Event::Left(site) => self.left(site),
            Event::Arrive(Site::Source, message) => {
                self.source_input(|machine, now| machine.handle_message(now, message));
            }
            Event::Arrive(Site::Target, message) => {
                self.target_input(|machine, now| machine.handle_message(now, message));
            }
            Event::Read(seq) => self.was_read(seq),
            Event::Persisted(record) => {
                self.source_input(|machine, now| machine.handle_persisted(now, record, Ok(())));
            }
            Event::Written(token) => self.written(token),
            Event::Synced(id) => {
                self.target_input(|machine, now| machine.handle_synced(now, id, Ok(())));
            }
            Event::Owned(epoch) => self.owned(epoch),
            Event::Completed => {
                self.host(Site::Target).rules.finish_postcopy();
                self.target_input(|machine, now| machine.handle_completed(now, Ok(())));
            }
            Event::Timer(site) => self.timer(site),
            Event::Drain => self.drain(),
            Event::TouchedDue => self.tell_reads(),
            Event::Estimate => self.estimate(),
            Event::GuestNext => {
                self.guest_at = None;
                self.guest_goes_on();
            }
            Event::GuestIo(site, request, ticket) => self.guest_io_done(site, request, ticket),
        }
    }

    // ---- the link

    pub(super) fn send(&mut self, from: Site, class: Class, message: Message) {
        if self.ways[from as usize].send(class, message) {
            self.start_wire(from);
        }
    }

    fn start_wire(&mut self, from: Site) {
        let now = self.now;
        if let Some(at) = self.ways[from as usize].next_piece(now) {
            self.at(at, Event::Left(from));
        }
    }

    fn left(&mut self, from: Site) {
        let now = self.now;
        if let Some(departed) = self.ways[from as usize].departed(now) {
            let to = match from {
                Site::Source => Site::Target,
                Site::Target => Site::Source,
            };
            let _ = departed.class;
            self.at(departed.arrival, Event::Arrive(to, departed.message));
        }
        match from {
            Site::Source => self.source_transmits(),
            Site::Target => self.target_transmits(),
        }
        self.start_wire(from);
    }

    fn estimate(&mut self) {
        let estimate = self.measured();
        self.source_input(|machine, now| machine.handle_estimate(now, estimate));
        self.after(ESTIMATE, Event::Estimate);
    }

    // ---- timers

    pub(super) fn set_timer(&mut self, site: Site, at: Option<Time>) {
        if let Some(at) = at
            && self.timers[site as usize] != Some(at)
        {
            self.at(at, Event::Timer(site));
        }
        self.timers[site as usize] = at;
    }

    fn timer(&mut self, site: Site) {
        if self.timers[site as usize].is_none_or(|at| at > self.now) {
            return;
        }
        self.timers[site as usize] = None;
        match site {
            Site::Source => self.source_input(|machine, now| machine.handle_timeout(now)),
            Site::Target => self.target_input(|machine, now| machine.handle_timeout(now)),
        }
    }

    pub(super) fn start_polling(&mut self) {
        self.bytes_at_begin = self.ways[0].bytes;
        self.after(DRAIN, Event::Drain);
        self.after(ESTIMATE, Event::Estimate);
    }

    /// Tells the source machine what its guest has done lately.
    fn drain(&mut self) {
        if self.switched_at.is_some() {
            return;
        }
        self.tell_source();
        self.after(DRAIN, Event::Drain);
    }

    // ---- the guest

    fn guest_goes_on(&mut self) {
        loop {
            let now = self.now;
            match self.guest.next(now) {
                Next::Now(request) => {
                    let site = if self.resumed_at.is_some() {
                        Site::Target
                    } else {
                        Site::Source
                    };
                    self.guest_asks(site, request);
                }
                Next::At(at) => {
                    if self.guest_at.is_none_or(|before| before > at) {
                        self.guest_at = Some(at);
                        self.at(at, Event::GuestNext);
                    }
                    return;
                }
                Next::Full => return,
                Next::Ended => {
                    return self.fail("the load ended before the migration".to_owned());
                }
            }
        }
    }

    fn guest_asks(&mut self, site: Site, number: u64) {
        let Some(request) = self.guest.in_flight.get(&number) else {
            return;
        };
        let (range, blocks, writes) = (request.range, request.blocks(), request.writes());
        let op = if writes {
            GuestOp::Write
        } else {
            GuestOp::Read
        };
        let now = self.now;
        let heat = &mut self.heat[usize::from(writes)];
        if site == Site::Source && self.source.is_none() {
            for block in blocks.iter() {
                heat.add(block.chunk(), 1, now);
            }
        }
        let before = self.misses();
        let admission = self.host(site).rules.begin(op, range);
        if now >= self.begin {
            let is_miss = self.misses() > before;
            self.figures.asked(blocks, writes, is_miss);
        }
        match admission {
            Admission::Go { ticket, .. } => self.guest_admitted(site, number, ticket),
            Admission::Parked { ticket } => {
                self.host(site).waiting.insert(ticket, number);
            }
            Admission::Refused(_) => self.guest.homeless.push_back(number),
            Admission::Answered => self.fail("a guest's read was answered ahead".to_owned()),
        }
        self.pump(site);
    }

    fn guest_admitted(&mut self, site: Site, number: u64, ticket: Ticket) {
        let Some(request) = self.guest.in_flight.get(&number) else {
            return;
        };
        if request.writes() {
            for block in request.blocks().iter() {
                *self.writing.entry(block.0).or_default() += 1;
                if site == Site::Source && self.source.is_some() {
                    self.unacked.insert(block);
                }
            }
        }
        let takes = Duration::from_secs_f64(request.range.len() as f64 / DISK_BYTES_PER_SEC);
        self.after(DISK_LATENCY + takes, Event::GuestIo(site, number, ticket));
    }

    fn guest_io_done(&mut self, site: Site, number: u64, ticket: Ticket) {
        let Some(request) = self.guest.in_flight.get(&number).cloned() else {
            return;
        };
        let blocks = request.blocks();
        if request.writes() {
            for (block, &id) in blocks.iter().zip(&request.content) {
                self.host(site).image.put(block.0, id);
                self.truth.insert(block.0, id);
                if let Some(count) = self.writing.get_mut(&block.0) {
                    *count -= 1;
                    if *count == 0 {
                        self.writing.remove(&block.0);
                    }
                }
            }
        } else {
            for block in blocks.iter().map(|block| block.0) {
                let expected = self.truth.get(&block).copied();
                let expected = expected.unwrap_or_else(|| self.hosts[0].image.get(block));
                let found = self.hosts[site as usize].image.get(block);
                if found != expected && !self.writing.contains_key(&block) {
                    return self.fail(format!(
                        "block {block} holds {found:?} and not {expected:?}"
                    ));
                }
            }
        }
        if self.host(site).rules.finish(ticket, Outcome::Done) == Completion::Held {
            self.host(site).waiting.insert(ticket, number);
        } else {
            self.guest_answered(number);
        }
        self.pump(site);
    }

    fn guest_answered(&mut self, number: u64) {
        let Some(request) = self.guest.in_flight.remove(&number) else {
            return;
        };
        let is_of_it = self.ended_at.is_none_or(|ended| request.issued <= ended);
        if self.now >= self.begin && is_of_it {
            let after = self.resumed_at.is_some();
            self.figures
                .answered(self.now, request.issued, request.writes(), after);
        }
        self.guest_goes_on();
    }

    /// Carries out what a volume's rules have decided.
    pub(super) fn pump(&mut self, site: Site) {
        loop {
            if let Some((ticket, admission)) = self.host(site).rules.poll_woken() {
                let Some(number) = self.host(site).waiting.remove(&ticket) else {
                    continue;
                };
                match admission {
                    Admission::Go { ticket, .. } => self.guest_admitted(site, number, ticket),
                    _ => self.guest.homeless.push_back(number),
                }
            } else if let Some(ticket) = self.host(site).rules.poll_released() {
                if let Some(number) = self.host(site).waiting.remove(&ticket) {
                    self.guest_answered(number);
                }
            } else if let Some(plan) = self.host(site).rules.poll_apply_ready() {
                self.run_apply(&plan);
            } else {
                break;
            }
        }
        match site {
            Site::Source => self.check_drained(),
            Site::Target => self.tell_target(),
        }
    }

    /// Blocks that the guest has written so far.
    pub(super) fn written_before(&self) -> Vec<flimcd_core::BlockIndex> {
        self.truth
            .keys()
            .map(|&block| flimcd_core::BlockIndex(block))
            .collect()
    }

    /// The guest goes on at the target.
    pub(super) fn guest_moves(&mut self) {
        self.resumed_at = Some(self.now);
        // What it waits for at the source it asks for again here.
        let mut waiting: Vec<u64> = self.hosts[0].waiting.drain().map(|(_, n)| n).collect();
        waiting.sort_unstable();
        self.guest.homeless.extend(waiting);
        while let Some(number) = self.guest.homeless.pop_front() {
            self.guest_asks(Site::Target, number);
        }
        self.guest_goes_on();
    }

    /// Requests that were due by now and not even made.
    pub(super) fn overdue(&mut self) -> u64 {
        let end = self.ended_at.unwrap_or(self.now);
        let unanswered = self.guest.in_flight.values();
        let unanswered = unanswered.filter(|request| request.due <= end);
        let unanswered = unanswered.count() as u64;
        self.guest.overdue(end) + unanswered
    }

    /// Every block that the guest wrote is at the target as it was written last, and so are the others, of which a volume of more
    /// than 4 GiB has only a part looked at.
    pub(super) fn check_end(&mut self) {
        let mut written = self.written_before();
        written.sort_unstable();
        let step = usize::try_from(self.size.blocks().div_ceil(1 << 20)).unwrap_or(1);
        let others = (0..self.size.blocks()).step_by(step);
        for block in written.iter().map(|block| block.0).chain(others) {
            let expected = self.truth.get(&block).copied();
            let expected = expected.unwrap_or_else(|| self.hosts[0].image.get(block));
            if self.hosts[1].image.get(block) != expected && !self.writing.contains_key(&block) {
                return self.fail(format!("block {block} is wrong at the end"));
            }
        }
    }
}

/// About five hundred intervals of what is expected, but none shorter than a tenth of a second.
fn interval(cell: &Cell) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let seconds = cell.size_bytes as f64 * 8.0 / cell.link.rate_bits_per_sec as f64;
    Duration::from_secs_f64((seconds / 500.0).max(0.1))
}
