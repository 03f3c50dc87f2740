//! Everything that there is in one run, and the order in which it happens.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt,
    time::Duration,
};

use flimcd_core::{ByteRange, Time};
use flimcd_volume::rules::Mode;

use crate::{
    SimOptions,
    base::Standing,
    content::INITIAL,
    dice::Dice,
    elsewhere::Elsewhere,
    guest::Guest,
    host::{Host, Stage},
    model::Model,
    net::Net,
    packing::Encoders,
    plan::Plan,
    resend::Resend,
    seed::SeedImage,
    source::SourceAgent,
    target::TargetAgent,
};

/// One of the two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    Source,
    Target,
}

impl Site {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Target];

    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Source => 0,
            Self::Target => 1,
        }
    }

    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// I/O of a process ended.
    Io {
        site: Site,
        life: u64,
        id: u64,
    },
    /// The wire is free.
    Depart {
        from: Site,
        generation: u64,
    },
    /// A message arrives.
    Arrive {
        from: Site,
        lane: usize,
        generation: u64,
    },
    LinkUp {
        site: Site,
        generation: u64,
    },
    LinkDown {
        site: Site,
        generation: u64,
    },
    /// The agents try to connect.
    Connect,
    /// A machine's timer.
    Timer {
        site: Site,
        life: u64,
    },
    DirtyPoll {
        life: u64,
    },
    TellCounts {
        life: u64,
    },
    /// The target's guest has read.
    TellReads {
        life: u64,
    },
    Estimate {
        life: u64,
    },
    /// The target has looked for an image like the volume.
    SeedFound {
        life: u64,
    },
    /// The target has looked for the blocks of a probe.
    Looked {
        life: u64,
        number: u64,
    },
    StartMigration,
    AgentStarts {
        site: Site,
    },
    GuestNext,
    GuestConnect,
    GuestMove,
    /// The operator grants the switch, again and again.
    Grant,
    Cancel {
        site: Site,
    },
    Fault,
    /// A fault that is aimed at a phase.
    Strike,
    /// A link that flaps goes down once more.
    Flap {
        left: u32,
    },
    /// A disk works again.
    DiskHeals {
        site: Site,
    },
    /// Faults are over.
    Quiet,
}

struct Scheduled {
    time: Time,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
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
        (self.time, self.number).cmp(&(other.time, other.number))
    }
}

/// See the module.
pub(crate) struct World {
    pub(crate) now: Time,
    queue: BinaryHeap<Reverse<Scheduled>>,
    next_event: u64,
    pub(crate) dice: Dice,
    pub(crate) plan: Plan,
    pub(crate) options: SimOptions,
    pub(crate) net: Net,
    /// Whether somebody will try to connect.
    pub(crate) connecting: bool,
    pub(crate) hosts: [Host; 2],
    pub(crate) source: SourceAgent,
    pub(crate) target: TargetAgent,
    pub(crate) encoders: Encoders,
    /// The target's library.
    pub(crate) seed: Option<SeedImage>,
    /// What the target has at other places.
    pub(crate) elsewhere: Elsewhere,
    /// What stood at the target before.
    pub(crate) standing: Standing,
    pub(crate) guest: Guest,
    pub(crate) model: Model,
    pub(crate) resend: Resend,
    /// Requests that the guest still makes after the migration has ended.
    pub(crate) encore: Option<u64>,
    pub(crate) coverage: BTreeMap<&'static str, u64>,
    pub(crate) failure: Option<String>,
    trace: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, options: &SimOptions) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::draw(&mut dice, options);
        let host = |mode| Host::new(plan.size, plan.disk.clone(), mode);
        let mut hosts = [host(Mode::Owner), host(Mode::Incoming)];
        let mut model = Model::new(plan.size.bytes());
        let data = draw_data(&mut dice, &plan);
        let [source, target] = &mut hosts;
        let mut format = |range: ByteRange, stamp| {
            source.disk.format(range, stamp);
            model.format(range, stamp);
        };
        data.into_iter().for_each(|range| format(range, INITIAL));
        let mut elsewhere = Elsewhere::draw(seed, plan.size, |block, stamp| {
            format(block.bytes(plan.size), stamp);
        });
        elsewhere.fill(plan.size, &source.disk);
        let standing = Standing::draw(seed, plan.size, &source.disk, &mut target.disk);
        let seed = if standing.is_copy && !seed.is_multiple_of(4) {
            let (source, copy) = (&source.disk, &target.disk);
            Some(SeedImage::in_place(seed, plan.size, source, copy))
        } else {
            SeedImage::draw(seed, plan.size, &source.disk)
        };
        let mut world = Self {
            now: Time::ZERO,
            queue: BinaryHeap::new(),
            next_event: 0,
            options: options.clone(),
            net: Net::new(plan.net.clone()),
            connecting: false,
            hosts,
            source: SourceAgent::default(),
            target: TargetAgent::default(),
            encoders: Encoders::new(),
            seed,
            elsewhere,
            standing,
            guest: Guest::new(),
            model,
            resend: Resend::new(plan.size),
            encore: None,
            coverage: BTreeMap::new(),
            failure: None,
            trace: Vec::new(),
            dice,
            plan,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        let plan = self.plan.clone();
        self.trace(|| format!("{plan:#?}"));
        self.host(Site::Source)
            .set_stage(Stage::Owner { migrating: false });
        for site in Site::BOTH {
            self.mutate(site);
        }
        self.connect_in(Duration::from_millis(1));
        self.at(plan.start_at, Event::StartMigration);
        self.at(Time::ZERO, Event::GuestNext);
        self.at(plan.operator.switch_at, Event::Grant);
        if let Some((at, site)) = plan.operator.cancel_at {
            self.at(at, Event::Cancel { site });
        }
        self.at(plan.start_at, Event::Fault);
        self.at(plan.faults.quiet_at, Event::Quiet);
    }

    /// Breaks a rule on purpose, if that is what this run is about.
    pub(crate) fn mutate(&mut self, site: Site) {
        #[cfg(feature = "mutations")]
        {
            let mutation = match self.options.mutation {
                Some(crate::Mutation::Volume(mutation)) => Some(mutation),
                _ => None,
            };
            self.host(site).rules.set_mutation(mutation);
        }
        #[cfg(not(feature = "mutations"))]
        let _ = site;
    }

    pub(crate) fn host(&mut self, site: Site) -> &mut Host {
        &mut self.hosts[site.index()]
    }

    /// Something happens at `time`.
    pub(crate) fn at(&mut self, time: Time, event: Event) {
        self.next_event += 1;
        self.queue.push(Reverse(Scheduled {
            time,
            number: self.next_event,
            event,
        }));
    }

    /// Notes what happened, if anybody wants to know.
    pub(crate) fn trace(&mut self, text: impl FnOnce() -> String) {
        if self.options.trace {
            let text = text();
            self.trace.push(format!("{:>12.6} {text}", self.seconds()));
        }
    }

    fn seconds(&self) -> f64 {
        self.now.since(Time::ZERO).as_secs_f64()
    }

    pub(crate) fn take_trace(&mut self) -> Vec<String> {
        std::mem::take(&mut self.trace)
    }

    /// Counts that something was met.
    pub(crate) fn cover(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
    }

    /// A check failed; the first one counts.
    pub(crate) fn fail(&mut self, what: String) {
        self.trace(|| format!("FAILED: {what}"));
        self.failure.get_or_insert(what);
    }

    /// Does what comes next; false when nothing does.
    pub(crate) fn step(&mut self) -> bool {
        let Some(Reverse(Scheduled { time, event, .. })) = self.queue.pop() else {
            return false;
        };
        self.now = time;
        self.happen(event);
        true
    }

    fn lives(&self, site: Site, life: u64) -> bool {
        let host = &self.hosts[site.index()];
        host.up && host.life == life
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Io { site, life, id } if self.lives(site, life) => self.io_done(site, id),
            Event::Timer { site, life } if self.lives(site, life) => self.timer(site),
            Event::DirtyPoll { life } if self.lives(Site::Source, life) => self.dirty_poll(life),
            Event::TellCounts { life } if self.lives(Site::Target, life) => self.tell_counts(),
            Event::TellReads { life } if self.lives(Site::Target, life) => self.tell_target_reads(),
            Event::Estimate { life } if self.lives(Site::Source, life) => self.tell_estimate(life),
            Event::SeedFound { life } if self.lives(Site::Target, life) => self.seed_found(),
            Event::Looked { life, number } if self.lives(Site::Target, life) => self.looked(number),
            Event::Io { .. }
            | Event::Looked { .. }
            | Event::Timer { .. }
            | Event::DirtyPoll { .. }
            | Event::TellCounts { .. }
            | Event::TellReads { .. }
            | Event::Estimate { .. }
            | Event::SeedFound { .. } => {}
            Event::Depart { from, generation } => self.depart(from, generation),
            Event::Arrive {
                from,
                lane,
                generation,
            } => self.arrive(from, lane, generation),
            Event::LinkUp { site, generation } => self.link_up(site, generation),
            Event::LinkDown { site, generation } => self.link_down(site, generation),
            Event::Connect => self.connect(),
            Event::StartMigration => self.start_migration(),
            Event::AgentStarts { site } => self.agent_starts(site),
            Event::GuestNext => self.guest_next(),
            Event::GuestConnect => self.guest_connects(),
            Event::GuestMove => self.guest_moves(),
            Event::Grant => self.grant(),
            Event::Cancel { site } => self.cancel(site),
            Event::Fault => self.fault(),
            Event::Strike => self.strike(),
            Event::Flap { left } => self.flap(left),
            Event::DiskHeals { site } => self.disk_heals(site),
            Event::Quiet => self.quiet(),
        }
    }

    fn timer(&mut self, site: Site) {
        match site {
            Site::Source => {
                let due = self.source.machine.as_ref().and_then(|m| m.poll_timeout());
                if due.is_some_and(|at| at <= self.now) {
                    self.source_input(|machine, now| machine.handle_timeout(now));
                }
            }
            Site::Target => {
                let due = self.target.machine.as_ref().and_then(|m| m.poll_timeout());
                if due.is_some_and(|at| at <= self.now) {
                    self.target_input(|machine, now| machine.handle_timeout(now));
                }
            }
        }
    }

    fn grant(&mut self) {
        let quiet = self.now >= self.plan.faults.quiet_at;
        let when = if quiet {
            flimcd_migrate::Switchover::WhenReady
        } else {
            self.plan.operator.switch
        };
        self.source_input(move |machine, now| machine.handle_switchover(now, when));
        self.at(self.now + Duration::from_millis(400), Event::Grant);
    }

    fn cancel(&mut self, site: Site) {
        self.trace(|| format!("the operator cancels at the {site}"));
        match site {
            Site::Source => {
                self.cover("cancelled at the source");
                self.source_input(|machine, now| machine.handle_cancel(now));
            }
            Site::Target => {
                self.cover("cancelled at the target");
                self.target_input(|machine, now| machine.handle_cancel(now));
            }
        }
    }

    fn agent_starts(&mut self, site: Site) {
        if self.host(site).up {
            return;
        }
        self.trace(|| format!("the agent at the {site} starts"));
        match site {
            Site::Source => self.source_starts(),
            Site::Target => self.target_starts(),
        }
        self.connect_in(Duration::from_millis(20));
        if self.guest.at == site {
            self.guest_connects_soon();
        }
    }
}

/// Where the volume holds anything in the beginning.
fn draw_data(dice: &mut Dice, plan: &Plan) -> Vec<ByteRange> {
    let mut data = Vec::new();
    for chunk in (0..plan.size.chunks()).map(flimcd_core::ChunkIndex) {
        if dice.permille(plan.data_permille) {
            let range = chunk.blocks().bytes(plan.size);
            data.push(ByteRange::new(
                range.start,
                range.end.min(plan.size.bytes()),
            ));
        }
    }
    data
}
