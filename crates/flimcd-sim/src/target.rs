//! The target's agent: runs the target machine over a host, as the real agent does.

use std::collections::{BTreeMap, VecDeque};

use flimcd_content::Decoder;
use flimcd_core::{MigrationId, Time};
use flimcd_migrate::{
    ApplyId, TargetAction, TargetConfig, TargetEvent, TargetMachine, TargetPhase, TargetStart,
};
use flimcd_volume::rules::{ApplyToken, Mode, Rules};
use flimcd_wire::{
    Accept, Class, ErrorCode, Message, SeqRuns, SourceStage, TargetStage, WireError,
};

use crate::{
    arrive,
    elsewhere::Finder,
    flow::{AfterFlush, Flow, TakeOver},
    host::{Record, Stage, after},
    world::{Event, Site, World},
};

type Input = Box<dyn FnOnce(&mut TargetMachine, Time)>;

/// The agent's memory. Replaced when it is killed.
#[derive(Default)]
pub(crate) struct TargetAgent {
    pub(crate) machine: Option<TargetMachine>,
    inbox: VecDeque<Input>,
    busy: bool,
    timer: Option<Time>,
    pub(crate) messages: BTreeMap<ApplyId, arrive::Message>,
    pub(crate) applies: BTreeMap<ApplyToken, arrive::Apply>,
    pub(crate) finder: Finder,
    pub(crate) decoder: Decoder,
    /// How many blocks are missing, as the machine was told.
    pub(crate) told_missing: Option<u64>,
    /// It will be told how many blocks are missing.
    pub(crate) will_tell: bool,
}

impl World {
    fn make_target(&mut self, start: TargetStart) {
        let config = TargetConfig {
            migration: MigrationId(1),
            size: self.plan.size,
            waits_for_vm: false,
            incarnation: self.dice.next(),
            bases: self.bases(),
        };
        self.trace(|| format!("target machine: {start:?}"));
        self.target.machine = Some(TargetMachine::new(config, start, self.now));
        self.host(Site::Target).rules.set_read_log(true);
        if self.net.up[Site::Target.index()] {
            self.target_input(|machine, now| machine.handle_link_up(now));
        }
        self.target_input(|_, _| {});
        self.pump(Site::Target);
    }

    /// The agent was started again.
    pub(crate) fn target_starts(&mut self) {
        let size = self.plan.size;
        let host = self.host(Site::Target);
        let record = host.start();
        let complete = matches!(record.stage, Stage::Complete(_));
        let mode = if complete {
            Mode::Owner
        } else {
            Mode::Incoming
        };
        host.rules = Rules::new(size, mode);
        if matches!(record.stage, Stage::Arriving(_)) {
            let of_boot = host.missing_of_boot.clone();
            let of_disk = || host.missing_file.as_ref().map(|file| file.cache.clone());
            let Some(missing) = of_boot.or_else(of_disk) else {
                return self.fail("owned, but nobody knows what is missing".to_owned());
            };
            host.missing_of_boot = Some(missing.clone());
            host.rules.start_postcopy(missing);
        }
        self.mutate(Site::Target);
        if !matches!(record.stage, Stage::None | Stage::Gone) {
            self.resume_target(record);
        }
    }

    fn resume_target(&mut self, record: Record) {
        let stage = match record.stage {
            Stage::Incoming => TargetStage::Incoming,
            Stage::Arriving(epoch) => TargetStage::Owner(epoch),
            Stage::Complete(epoch) => TargetStage::Complete(epoch),
            other => return self.fail(format!("the target's record says {other:?}")),
        };
        let missing_blocks = self.host(Site::Target).rules.missing_count();
        self.make_target(TargetStart::Resume {
            stage,
            refused: record.refused,
            missing_blocks,
        });
    }

    /// A message for the target arrives.
    pub(crate) fn target_message(&mut self, message: Message) {
        if self.target.machine.is_none() {
            let record = self.host(Site::Target).record.visible;
            match (&message, record.stage) {
                (_, Stage::Gone) => return self.answer_ended(&message),
                (Message::Open(open), Stage::None) => {
                    self.look_at_base(open);
                    self.host(Site::Target).set_stage(Stage::Incoming);
                    self.make_target(TargetStart::Fresh);
                }
                (Message::Open(_), _) => self.resume_target(record),
                _ => {}
            }
        }
        if let Message::Blocks(blocks) = &message {
            self.resend.delivered(blocks.seq);
        }
        self.target_input(|machine, now| machine.handle_message(now, message));
    }

    /// A source asks about a migration that ended here before a restart: only the tombstone knows of it.
    fn answer_ended(&mut self, message: &Message) {
        let send = |world: &mut Self, message| {
            world.transmit(Site::Target, Class::Control, message);
        };
        match message {
            Message::Open(open) => {
                if matches!(open.stage, SourceStage::Prepared(_)) {
                    let accept = Accept {
                        incarnation: self.dice.next(),
                        received: SeqRuns::default(),
                        stage: TargetStage::Incoming,
                        bases: Vec::new(),
                    };
                    send(self, Message::Accept(accept));
                }
                let error = WireError::new(ErrorCode::CANCELLED, "it has ended at the target");
                send(self, Message::Failed(error));
            }
            Message::Switch { epoch, .. } | Message::CancelSwitch { epoch } => {
                send(self, Message::SwitchRefused { epoch: *epoch });
            }
            _ => {}
        }
    }

    /// Calls the machine and does everything that follows.
    pub(crate) fn target_input(&mut self, input: impl FnOnce(&mut TargetMachine, Time) + 'static) {
        self.target.inbox.push_back(Box::new(input));
        if std::mem::replace(&mut self.target.busy, true) {
            return;
        }
        while let Some(input) = self.target.inbox.pop_front() {
            let Some(machine) = &mut self.target.machine else {
                continue;
            };
            input(machine, self.now);
            while let Some(action) = self.target.machine.as_mut().and_then(|m| m.poll_action()) {
                self.target_action(action);
            }
            self.target_transmits();
            while let Some(event) = self.target.machine.as_mut().and_then(|m| m.poll_event()) {
                self.target_event(&event);
            }
        }
        self.target.busy = false;
        let timer = self
            .target
            .machine
            .as_ref()
            .and_then(TargetMachine::poll_timeout);
        if let Some(at) = timer
            && self.target.timer != Some(at)
        {
            let life = self.host(Site::Target).life;
            self.at(
                at.max(self.now),
                Event::Timer {
                    site: Site::Target,
                    life,
                },
            );
        }
        self.target.timer = timer;
    }

    /// Hands messages to the link as long as it has room.
    pub(crate) fn target_transmits(&mut self) {
        loop {
            let Some(machine) = &mut self.target.machine else {
                return;
            };
            let net = &self.net;
            let room = |class: Class| net.has_room(Site::Target, class);
            let Some((class, message)) = machine.poll_transmit(&room) else {
                return;
            };
            if let Message::Demand { runs } = &message {
                for run in runs.iter() {
                    self.resend.asked_for(run);
                }
            }
            self.transmit(Site::Target, class, message);
        }
    }

    fn target_action(&mut self, action: TargetAction) {
        self.trace(|| match &action {
            TargetAction::Apply { id, blocks } => {
                let ranges: Vec<_> = blocks.ranges().collect();
                format!("target action: {id:?} of {:?}, {ranges:?}", blocks.seq)
            }
            other => format!("target action: {other:?}"),
        });
        let site = Site::Target;
        match action {
            TargetAction::Apply { id, blocks } => self.apply_message(id, blocks),
            TargetAction::Sync(id) => self.start_flush(site, AfterFlush::Machine(id)),
            TargetAction::BecomeOwner { epoch, missing } => {
                let step = TakeOver::Begun;
                self.start_flow(
                    site,
                    Flow::BecomeOwner {
                        epoch,
                        missing,
                        step,
                    },
                );
            }
            TargetAction::Refuse { epoch } => self.start_flow(site, Flow::Refuse(epoch)),
            TargetAction::RequeueFaults => {
                self.host(site).rules.requeue_faults();
                self.pump(site);
            }
            TargetAction::AskForMissing { blocks } => self.ask_for_missing(blocks),
            TargetAction::Complete { epoch } => self.start_flush(site, AfterFlush::Complete(epoch)),
            TargetAction::ChooseSeed { .. } => self.choose_seed(),
            TargetAction::Probe(probe) => self.probe(probe),
            TargetAction::KeepHeat(part) => self.keep_heat(&part),
            TargetAction::Discard => self.start_flow(site, Flow::Discard),
        }
    }

    fn ask_for_missing(&mut self, mut blocks: u64) {
        self.cover("target asked for missing blocks by itself");
        let runs: Vec<_> = self.host(Site::Target).rules.missing().runs().collect();
        for mut run in runs {
            run.end = run.end.min(run.start + blocks);
            blocks -= run.len();
            self.target_input(move |machine, now| machine.handle_fault(now, run));
            if blocks == 0 {
                break;
            }
        }
    }

    /// Where the machine stands.
    pub(crate) fn target_phase(&self) -> Option<TargetPhase> {
        self.target.machine.as_ref().map(TargetMachine::phase)
    }

    fn target_event(&mut self, event: &TargetEvent) {
        self.trace(|| format!("target: {event:?}"));
        if matches!(event, TargetEvent::Phase(_)) {
            self.aim();
        }
        match event {
            TargetEvent::Phase(phase) => self.cover(match phase {
                TargetPhase::Incoming => "target Incoming",
                TargetPhase::Switching => "target Switching",
                TargetPhase::Refusing => "target Refusing",
                TargetPhase::PostCopy => "target PostCopy",
                TargetPhase::Completing => "target Completing",
                TargetPhase::Complete => "target Complete",
                TargetPhase::Cancelled => "target Cancelled",
                TargetPhase::Failed => "target Failed",
                TargetPhase::Sealed => "target Sealed",
            }),
            TargetEvent::Note(_) => self.cover("target note"),
            TargetEvent::Arrived(_) if self.plan.guest.moves_early => {
                let at = after(self.now, &mut self.dice, 0, 50_000);
                self.at(at, Event::GuestMove);
            }
            _ => {}
        }
    }
}
