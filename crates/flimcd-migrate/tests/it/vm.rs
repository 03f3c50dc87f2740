//! A running machine's move, with both hypervisors, the disks' migration and the link played at random: agents die,
//! the link breaks, machines die, at any step. At most one guest runs at any moment; when faults stop, exactly one does.

use std::{collections::VecDeque, time::Duration};

use flimcd_core::Time;
use flimcd_migrate::vm::{
    DisksCommand, DisksEnd, RamMode, Transfer, TransferState, VmSource, VmSourceAction,
    VmSourceConfig, VmSourcePhase, VmSourceStart, VmTarget, VmTargetAction, VmTargetPhase,
    VmTargetStart,
};
use flimcd_wire::{VmMessage, VmOpen};

/// Small, fast, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The durable record of the disks at the source.
#[derive(Clone, Copy, Debug, PartialEq)]
enum AtSource {
    Owner,
    Prepared,
    Released,
    /// Owner, and the migration is over.
    Ended,
}

/// The same at the target.
#[derive(Clone, Copy, Debug, PartialEq)]
enum AtTarget {
    Incoming,
    Owner,
    Refused,
}

/// A hypervisor at the target.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Machine {
    Listening,
    Loaded,
    Running,
}

struct World {
    dice: Dice,
    mode: RamMode,
    link_up: bool,
    source: Option<VmSource>,
    target: Option<VmTarget>,
    to_target: VecDeque<VmMessage>,
    to_source: VecDeque<VmMessage>,
    /// What the hypervisor at the source is.
    guest_runs: bool,
    source_gone: bool,
    transfer: Transfer,
    /// It stopped the guest, so it starts it when its transfer fails.
    stopped_itself: bool,
    stream: Option<u32>,
    /// The hypervisor at the target, and its attempt.
    machine: Option<(u32, Machine)>,
    pages_lost: bool,
    /// Pages followed the switch.
    followed: bool,
    at_source: AtSource,
    at_target: AtTarget,
    cancel_disks: bool,
    vm_ready: bool,
    target_ended: bool,
    last_attempt: u32,
    trace: Vec<String>,
    is_verbose: bool,
}

impl World {
    fn new(seed: u64, mode: RamMode, is_verbose: bool) -> Self {
        let mut world = Self {
            dice: Dice(seed),
            mode,
            link_up: false,
            source: None,
            target: None,
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            guest_runs: true,
            source_gone: false,
            transfer: Transfer::default(),
            stopped_itself: false,
            stream: None,
            machine: None,
            pages_lost: false,
            followed: false,
            at_source: AtSource::Owner,
            at_target: AtTarget::Incoming,
            cancel_disks: false,
            vm_ready: false,
            target_ended: false,
            last_attempt: 0,
            trace: Vec::new(),
            is_verbose,
        };
        world.source = Some(VmSource::new(world.config(), VmSourceStart::Fresh));
        world.target = Some(VmTarget::new(VmTargetStart::Fresh));
        world
    }

    fn config(&self) -> VmSourceConfig {
        VmSourceConfig {
            open: VmOpen {
                name: "vm".parse().unwrap(),
                description: String::new(),
            },
            ram: self.mode,
            downtime_max: Duration::from_millis(300),
            was_running: true,
        }
    }

    #[expect(
        clippy::print_stderr,
        reason = "a seed that failed tells what happened"
    )]
    fn say(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
        if self.is_verbose {
            eprintln!("{}", self.trace[self.trace.len() - 1]);
        }
    }

    // ---- faults -------------------------------------------------------------------------------

    fn cut(&mut self) {
        self.say("link cut");
        self.link_up = false;
        self.to_target.clear();
        self.to_source.clear();
        if let Some(source) = &mut self.source {
            source.handle_link_down();
        }
        if let Some(target) = &mut self.target {
            target.handle_link_down();
        }
    }

    fn connect(&mut self) {
        if self.link_up || self.source.is_none() || self.target.is_none() {
            return;
        }
        self.say("link up");
        self.link_up = true;
        self.source.as_mut().unwrap().handle_link_up();
        self.target.as_mut().unwrap().handle_link_up();
    }

    fn break_stream(&mut self) {
        if self.stream.take().is_none() {
            return;
        }
        match self.transfer.state {
            TransferState::Active | TransferState::PreSwitchover | TransferState::Device => {
                self.transfer.state = TransferState::Failed("stream".into());
                if std::mem::take(&mut self.stopped_itself) {
                    self.guest_runs = true;
                }
            }
            TransferState::Postcopy => {
                self.pages_lost = true;
                self.transfer.state = TransferState::PostcopyBroken;
            }
            _ => {}
        }
        if let Some((_, Machine::Listening)) = self.machine {
            self.machine = None;
        }
    }

    fn kill_source(&mut self) {
        self.say("source's agent dies");
        self.source = None;
        self.break_stream();
        self.cut();
    }

    fn kill_target(&mut self) {
        self.say("target's agent dies");
        self.target = None;
        self.break_stream();
        self.cut();
    }

    fn restart_source(&mut self) {
        if self.source.is_some() {
            return;
        }
        self.say(format!("source's agent starts: {:?}", self.at_source));
        let offered = matches!(self.at_source, AtSource::Prepared | AtSource::Released);
        let config = self.config();
        self.source = Some(VmSource::new(config, VmSourceStart::Resume { offered }));
        self.cancel_disks = false;
        let now = Time::ZERO;
        match self.at_source {
            AtSource::Ended => {
                let source = self.source.as_mut().unwrap();
                source.handle_disks_ended(now, DisksEnd::Cancelled);
            }
            AtSource::Released => self.source.as_mut().unwrap().handle_disks_moved(now),
            _ => {}
        }
    }

    fn restart_target(&mut self) {
        if self.target.is_some() {
            return;
        }
        self.say(format!(
            "target's agent starts: {:?} {:?}",
            self.at_target, self.machine
        ));
        self.vm_ready = false;
        let mut target = VmTarget::new(VmTargetStart::Resume {
            attempt: self.last_attempt,
            owned: self.at_target == AtTarget::Owner,
            loaded: matches!(self.machine, Some((_, Machine::Loaded))),
            running: matches!(self.machine, Some((_, Machine::Running))),
        });
        if self.target_ended {
            target.handle_ended();
        }
        self.target = Some(target);
    }

    fn kill_machine(&mut self) {
        if let Some((attempt, state)) = self.machine
            && state != Machine::Running
        {
            self.say("target's machine dies");
            self.machine = None;
            self.break_stream();
            if let Some(target) = &mut self.target {
                target.handle_broken(attempt, "it died");
            }
        }
    }

    // ---- what goes on by itself -----------------------------------------------------------------

    /// One thing that can happen without a fault. False if there is none.
    fn step(&mut self) -> bool {
        let first = self.dice.below(8);
        (0..8).any(|turn| match (first + turn) % 8 {
            0 => self.deliver_to_target(),
            1 => self.deliver_to_source(),
            2 => self.source_acts(),
            3 => self.target_acts(),
            4 => self.look_at_transfer(),
            5 => self.disks_move(),
            6 => self.disks_return(),
            _ => self.transfer_goes_on(),
        })
    }

    fn collect(&mut self) {
        if self.link_up {
            while let Some(message) = self.source.as_mut().and_then(VmSource::poll_transmit) {
                self.to_target.push_back(message);
            }
            while let Some(message) = self.target.as_mut().and_then(VmTarget::poll_transmit) {
                self.to_source.push_back(message);
            }
        }
    }

    fn deliver_to_target(&mut self) -> bool {
        self.collect();
        let Some(message) = self.to_target.pop_front() else {
            return false;
        };
        self.say(format!("► {message:?}"));
        self.target.as_mut().unwrap().handle_message(&message);
        true
    }

    fn deliver_to_source(&mut self) -> bool {
        self.collect();
        let Some(message) = self.to_source.pop_front() else {
            return false;
        };
        self.say(format!("◄ {message:?}"));
        let source = self.source.as_mut().unwrap();
        source.handle_message(Time::ZERO, message);
        source.handle_disks_ready(Time::ZERO, true);
        true
    }

    fn source_acts(&mut self) -> bool {
        let Some(action) = self.source.as_mut().and_then(VmSource::poll_action) else {
            return false;
        };
        self.say(format!("source: {action:?}"));
        let worked = self.source_does(&action);
        let source = self.source.as_mut().unwrap();
        if worked {
            source.handle_done(Time::ZERO, &action);
        } else {
            source.handle_refused(Time::ZERO, &action, "the machine refuses".into());
        }
        true
    }

    fn source_does(&mut self, action: &VmSourceAction) -> bool {
        use TransferState::{Active, Device, None as Idle, Postcopy, PreSwitchover};
        match action {
            VmSourceAction::Disks(DisksCommand::Switch) => {
                if self.at_source == AtSource::Owner {
                    assert!(
                        !self.guest_runs,
                        "the disks are handed over under a running guest"
                    );
                    self.at_source = AtSource::Prepared;
                }
            }
            VmSourceAction::Disks(DisksCommand::Cancel) => self.cancel_disks = true,
            VmSourceAction::Disks(DisksCommand::VmReady(_)) => panic!("not the source's"),
            VmSourceAction::Start { attempt, .. } => {
                let takes = self.machine == Some((*attempt, Machine::Listening));
                if !takes || self.transfer.state.is_under_way() {
                    return false;
                }
                self.stream = Some(*attempt);
                self.transfer = Transfer {
                    state: Active,
                    remaining_bytes: 1 << 30,
                    syncs: 1,
                    rate_bytes_per_sec: 1 << 20,
                };
            }
            VmSourceAction::Stop => {
                if self.stopped_itself {
                    return false;
                }
                self.guest_runs = false;
            }
            VmSourceAction::Finish => self.transfer.remaining_bytes = 0,
            VmSourceAction::StartPostcopy => {
                if self.transfer.state != Active {
                    return false;
                }
                self.transfer.remaining_bytes = 0;
                // Seen below: after Continue the rest follows.
                self.transfer.syncs = u64::MAX;
            }
            VmSourceAction::Continue => {
                if self.transfer.state != PreSwitchover {
                    return false;
                }
                self.transfer.state = Device;
            }
            VmSourceAction::EndTransfer => {
                if self.transfer.state == Postcopy {
                    self.pages_lost = true;
                }
                if self.transfer.state.is_under_way() {
                    self.break_stream();
                }
                self.stream = None;
                self.transfer.state = Idle;
            }
            VmSourceAction::Resume => self.guest_runs = !self.source_gone,
            VmSourceAction::Quit => self.source_gone = true,
        }
        true
    }

    fn target_acts(&mut self) -> bool {
        let Some(action) = self.target.as_mut().and_then(VmTarget::poll_action) else {
            return false;
        };
        self.say(format!("target: {action:?}"));
        match action {
            VmTargetAction::Disks(DisksCommand::VmReady(is_ready)) => self.vm_ready = is_ready,
            VmTargetAction::Disks(_) => panic!("not the target's"),
            VmTargetAction::Start { attempt } => {
                self.machine = Some((attempt, Machine::Listening));
                self.last_attempt = attempt;
                self.break_stream();
                self.machine = Some((attempt, Machine::Listening));
                self.target
                    .as_mut()
                    .unwrap()
                    .handle_listening(attempt, true);
            }
            VmTargetAction::Kill => {
                assert!(
                    !matches!(self.machine, Some((_, Machine::Running))),
                    "a running guest is killed"
                );
                self.machine = None;
                self.break_stream();
            }
            VmTargetAction::Run => {
                let attempt = self.target.as_ref().unwrap().attempt();
                if let Some((_, machine)) = &mut self.machine {
                    *machine = Machine::Running;
                    self.target.as_mut().unwrap().handle_running();
                } else {
                    let target = self.target.as_mut().unwrap();
                    target.handle_broken(attempt, "it died");
                }
            }
        }
        true
    }

    fn look_at_transfer(&mut self) -> bool {
        let transfer = self.transfer.clone();
        let Some(source) = self
            .source
            .as_mut()
            .filter(|source| source.wants_transfer())
        else {
            return false;
        };
        source.handle_transfer(Time::ZERO, transfer);
        false
    }

    /// The target takes an offer, and the source learns of it.
    fn disks_move(&mut self) -> bool {
        let offered = self.at_source == AtSource::Prepared && !self.cancel_disks;
        if self.link_up && offered && self.vm_ready && self.at_target == AtTarget::Incoming {
            self.say("disks are the target's");
            self.at_target = AtTarget::Owner;
            self.target.as_mut().unwrap().handle_disks_owned();
            return true;
        }
        if self.link_up && self.at_source == AtSource::Prepared && self.at_target == AtTarget::Owner
        {
            self.say("disks are released");
            self.at_source = AtSource::Released;
            self.source.as_mut().unwrap().handle_disks_moved(Time::ZERO);
            return true;
        }
        false
    }

    /// The disks' migration ends before the switch.
    fn disks_return(&mut self) -> bool {
        if !self.cancel_disks || self.source.is_none() {
            return false;
        }
        match (self.at_source, self.at_target) {
            (AtSource::Owner, _) => {}
            (AtSource::Prepared, AtTarget::Incoming) if self.link_up => {
                self.at_target = AtTarget::Refused;
            }
            (AtSource::Prepared, AtTarget::Refused) if self.link_up => {}
            _ => return false,
        }
        self.say("disks stay here");
        self.at_source = AtSource::Ended;
        self.cancel_disks = false;
        // The target hears of it, at the latest when the link is back.
        self.target_ended = true;
        if let Some(target) = &mut self.target {
            target.handle_ended();
        }
        let source = self.source.as_mut().unwrap();
        source.handle_disks_ended(Time::ZERO, DisksEnd::Cancelled);
        true
    }

    fn transfer_goes_on(&mut self) -> bool {
        use TransferState::{Active, Completed, Device, Postcopy, PreSwitchover};
        if self.stream.is_none() || !self.link_up {
            return false;
        }
        match self.transfer.state {
            Active if self.transfer.remaining_bytes == 0 => {
                if self.guest_runs {
                    self.stopped_itself = true;
                    self.guest_runs = false;
                }
                self.transfer.state = PreSwitchover;
            }
            Active => {
                self.transfer.syncs += 1;
                let left = [1 << 30, 1 << 30, 1 << 10, 0];
                let pick = self.dice.below(left.len() as u64);
                self.transfer.remaining_bytes = left[usize::try_from(pick).unwrap()];
            }
            Device => {
                let attempt = self.stream.unwrap();
                if self.machine != Some((attempt, Machine::Listening)) {
                    return false;
                }
                self.machine = Some((attempt, Machine::Loaded));
                self.transfer.state = if self.transfer.syncs == u64::MAX {
                    self.followed = true;
                    Postcopy
                } else {
                    Completed
                };
                if let Some(target) = &mut self.target {
                    target.handle_loaded(attempt);
                }
            }
            Postcopy => {
                self.transfer.state = Completed;
                self.stream = None;
            }
            _ => return false,
        }
        self.say(format!("transfer: {:?}", self.transfer));
        true
    }

    // ---- checks -------------------------------------------------------------------------------

    fn target_runs(&self) -> bool {
        matches!(self.machine, Some((_, Machine::Running)))
    }

    fn check(&self) {
        assert!(!(self.guest_runs && self.target_runs()), "two guests run");
        if self.guest_runs {
            assert_ne!(self.at_target, AtTarget::Owner, "a guest without its disks");
        }
        if self.target_runs() {
            assert_eq!(self.at_target, AtTarget::Owner, "a guest without its disks");
        }
    }
}

fn run(seed: u64, mode: RamMode, is_verbose: bool) -> (World, bool) {
    let mut world = World::new(seed, mode, is_verbose);
    let faults = world.dice.below(6);
    let mut left = faults;
    let steps = 20 + world.dice.below(120);
    for _ in 0..steps {
        if left > 0 && world.dice.one_in(12) {
            left -= 1;
            match world.dice.below(6) {
                0 => world.cut(),
                1 => world.kill_source(),
                2 => world.kill_target(),
                3 => world.kill_machine(),
                4 => {
                    if let Some(source) = &mut world.source {
                        source.handle_cancel(Time::ZERO);
                    }
                }
                _ => {
                    world.kill_source();
                    world.kill_target();
                }
            }
        }
        if world.dice.one_in(4) {
            world.restart_source();
            world.restart_target();
            world.connect();
        }
        world.step();
        world.check();
    }
    for _ in 0..2000 {
        world.restart_source();
        world.restart_target();
        world.connect();
        world.step();
        world.check();
    }
    (world, faults > 0)
}

fn seeds(mode: RamMode) {
    let (mut moved, mut stayed) = (0, 0);
    for seed in 0..20_000 {
        let outcome = std::panic::catch_unwind(|| run(seed, mode, false));
        let Ok((world, had_faults)) = outcome else {
            // Once more, telling what happens.
            run(seed, mode, true);
            unreachable!("seed {seed}, {mode:?} failed only once");
        };
        let explain = || format!("seed {seed}, {mode:?}:\n{}", world.trace.join("\n"));
        let source = world.source.as_ref().unwrap().phase();
        assert!(
            source.is_final(),
            "the move does not end: {source:?}, {}",
            explain()
        );
        // Pages were in two places, or may have been, when a machine or its stream was lost.
        let gave_up =
            matches!(source, VmSourcePhase::Failed(_)) && world.at_source == AtSource::Released;
        if world.pages_lost || (gave_up && world.followed) {
            continue;
        }
        assert!(
            world.guest_runs != world.target_runs(),
            "no guest runs: {}",
            explain()
        );
        let target = world.target.as_ref().unwrap().phase();
        if *source == VmSourcePhase::Completed {
            moved += 1;
            assert_eq!(target, VmTargetPhase::Completed, "{}", explain());
        } else {
            stayed += 1;
            assert_eq!(target, VmTargetPhase::Ended, "{}", explain());
            assert!(
                had_faults,
                "ended without a fault: {source:?} {}",
                explain()
            );
        }
    }
    assert!(
        moved > 1000 && stayed > 1000,
        "{moved} moved, {stayed} stayed"
    );
}

#[test]
fn precopy_leaves_exactly_one_guest() {
    seeds(RamMode::Precopy);
}

#[test]
fn postcopy_never_leaves_two_guests() {
    seeds(RamMode::Postcopy);
}

#[test]
fn either_way() {
    seeds(RamMode::Auto);
}
