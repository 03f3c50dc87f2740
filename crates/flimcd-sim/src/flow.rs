//! Sequences of I/O that must happen in an order: flushes, the records of the hand-over.

use std::collections::VecDeque;

use flimcd_core::{BlockSet, Epoch};
use flimcd_migrate::{DiskError, SourceRecord, SyncId};
use flimcd_volume::rules::{FlushPlan, FlushStep};

use crate::{
    guest::RequestId,
    host::{Io, Purpose, Record, Stage},
    world::{Event, Site, World},
};

/// A sequence under way.
pub(crate) enum Flow {
    /// The steps of a flush, in the order that the rules give.
    Flush { plan: FlushPlan, then: AfterFlush },
    /// The source's record. `Prepared` has the image synced first: what the target misses has to survive here.
    Persist { record: SourceRecord, synced: bool },
    /// The target takes over.
    BecomeOwner {
        epoch: Epoch,
        missing: BlockSet,
        step: TakeOver,
    },
    /// The target refuses for good.
    Refuse(Epoch),
    /// The target has everything.
    Complete(Epoch),
    /// The target forgets what arrived.
    Discard,
}

/// What follows a flush.
#[derive(Clone, Copy)]
pub(crate) enum AfterFlush {
    Guest(RequestId),
    Machine(SyncId),
    Complete(Epoch),
}

/// How far a take-over is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TakeOver {
    Begun,
    DataDurable,
    MissingDurable,
}

impl World {
    /// Begins a sequence.
    pub(crate) fn start_flow(&mut self, site: Site, flow: Flow) {
        let host = self.host(site);
        host.next_flow += 1;
        let id = host.next_flow;
        host.flows.insert(id, flow);
        self.step_flow(site, id);
    }

    /// Begins a flush.
    pub(crate) fn start_flush(&mut self, site: Site, then: AfterFlush) {
        let plan = self.host(site).rules.begin_flush();
        self.start_flow(site, Flow::Flush { plan, then });
    }

    fn flow_io(&mut self, site: Site, id: u64, io: Io) {
        self.submit(site, io, Purpose::Flow(id));
    }

    fn record_of(&mut self, site: Site, stage: Stage) -> Io {
        let record = self.host(site).record.visible;
        Io::Record(Record { stage, ..record })
    }

    /// Does the next step of a sequence.
    fn step_flow(&mut self, site: Site, id: u64) {
        let Some(flow) = self.host(site).flows.remove(&id) else {
            return;
        };
        let (flow, io) = match flow {
            Flow::Flush { mut plan, then } => {
                let Some(io) = self.step_flush(site, &mut plan) else {
                    self.host(site).rules.end_flush(plan, true);
                    return self.flushed(site, then, Ok(()));
                };
                (Flow::Flush { plan, then }, io)
            }
            Flow::Persist { record, synced } => {
                let io = match record {
                    SourceRecord::Prepared(_) if !synced => Io::Sync,
                    SourceRecord::Prepared(epoch) => self.record_of(site, Stage::Prepared(epoch)),
                    SourceRecord::Owner => self.record_of(site, Stage::Owner { migrating: false }),
                    SourceRecord::Released(epoch) => self.record_of(site, Stage::Released(epoch)),
                    SourceRecord::Retired(_) => self.record_of(site, Stage::Retired),
                };
                (Flow::Persist { record, synced }, io)
            }
            Flow::BecomeOwner {
                epoch,
                missing,
                step,
            } => {
                let io = match step {
                    TakeOver::Begun => Io::Sync,
                    TakeOver::DataDurable => Io::NewMissing(missing.clone()),
                    TakeOver::MissingDurable => self.record_of(site, Stage::Arriving(epoch)),
                };
                let flow = Flow::BecomeOwner {
                    epoch,
                    missing,
                    step,
                };
                (flow, io)
            }
            Flow::Refuse(epoch) => {
                let record = self.host(site).record.visible;
                let refused = record.refused.max(Some(epoch));
                (
                    Flow::Refuse(epoch),
                    Io::Record(Record { refused, ..record }),
                )
            }
            Flow::Complete(epoch) => {
                let io = self.record_of(site, Stage::Complete(epoch));
                (Flow::Complete(epoch), io)
            }
            Flow::Discard => (Flow::Discard, self.record_of(site, Stage::Gone)),
        };
        self.host(site).flows.insert(id, flow);
        self.flow_io(site, id, io);
    }

    /// The next I/O of a flush; `None` when it is done.
    fn step_flush(&mut self, site: Site, plan: &mut FlushPlan) -> Option<Io> {
        loop {
            match plan.next() {
                FlushStep::SyncData => return Some(Io::Sync),
                FlushStep::WritePresence(present) => {
                    if let Some(file) = &mut self.host(site).missing_file {
                        file.cache.subtract(present);
                    }
                }
                FlushStep::SyncPresence => return Some(Io::SyncMissing),
                FlushStep::Done => return None,
            }
        }
    }

    /// I/O of a sequence ended.
    pub(crate) fn flow_done(&mut self, site: Site, id: u64, result: Result<(), DiskError>) {
        let Some(flow) = self.host(site).flows.remove(&id) else {
            return;
        };
        let flow = match (flow, result) {
            (Flow::Flush { plan, then }, Err(error)) => {
                self.host(site).rules.end_flush(plan, false);
                return self.flushed(site, then, Err(error));
            }
            (Flow::Persist { record, synced }, Ok(()))
                if matches!(record, SourceRecord::Prepared(_)) && !synced =>
            {
                Flow::Persist {
                    record,
                    synced: true,
                }
            }
            (Flow::Persist { record, .. }, result) => return self.persisted(record, result),
            (
                Flow::BecomeOwner {
                    epoch,
                    missing,
                    step,
                },
                Ok(()),
            ) => {
                let step = match step {
                    TakeOver::Begun => TakeOver::DataDurable,
                    TakeOver::DataDurable => TakeOver::MissingDurable,
                    TakeOver::MissingDurable => return self.became_owner(epoch, missing),
                };
                Flow::BecomeOwner {
                    epoch,
                    missing,
                    step,
                }
            }
            (Flow::BecomeOwner { epoch, .. }, Err(error)) => {
                return self.target_input(move |machine, now| {
                    machine.handle_owner(now, epoch, Err(error));
                });
            }
            (Flow::Refuse(epoch), result) => {
                return self
                    .target_input(move |machine, now| machine.handle_refused(now, epoch, result));
            }
            (Flow::Complete(_), result) => {
                if result.is_ok() {
                    self.host(site).rules.finish_postcopy();
                }
                return self
                    .target_input(move |machine, now| machine.handle_completed(now, result));
            }
            (Flow::Discard, Ok(())) => return,
            // Nobody waits for it: again, until it is recorded.
            (Flow::Discard, Err(_)) => Flow::Discard,
            (flow @ Flow::Flush { .. }, Ok(())) => flow,
        };
        self.host(site).flows.insert(id, flow);
        self.step_flow(site, id);
    }

    fn flushed(&mut self, site: Site, then: AfterFlush, result: Result<(), DiskError>) {
        match then {
            AfterFlush::Guest(request) => self.guest_flushed(request, result.is_ok()),
            AfterFlush::Machine(id) => {
                self.target_input(move |machine, now| machine.handle_synced(now, id, result));
            }
            AfterFlush::Complete(epoch) => match result {
                Ok(()) => self.start_flow(site, Flow::Complete(epoch)),
                Err(error) => {
                    self.target_input(move |machine, now| {
                        machine.handle_completed(now, Err(error));
                    });
                }
            },
        }
    }

    /// Asks for the source's record to be written, after those that were asked for before.
    pub(crate) fn persist(&mut self, record: SourceRecord) {
        self.source.persisting.push_back(record);
        if self.source.persisting.len() == 1 {
            self.start_flow(
                Site::Source,
                Flow::Persist {
                    record,
                    synced: false,
                },
            );
        }
    }

    fn persisted(&mut self, record: SourceRecord, result: Result<(), DiskError>) {
        self.source.persisting.pop_front();
        if let Some(&next) = self.source.persisting.front() {
            self.start_flow(
                Site::Source,
                Flow::Persist {
                    record: next,
                    synced: false,
                },
            );
        }
        if record == SourceRecord::Owner && result.is_ok() {
            self.host(Site::Source).rules.stop_tracking();
        }
        self.source_input(move |machine, now| machine.handle_persisted(now, record, result));
    }

    fn became_owner(&mut self, epoch: Epoch, missing: BlockSet) {
        let host = self.host(Site::Target);
        host.missing_of_boot = Some(missing.clone());
        host.rules.start_postcopy(missing);
        self.target_input(move |machine, now| machine.handle_owner(now, epoch, Ok(())));
        self.pump(Site::Target);
    }
}

/// Records that the source's agent has been asked to write.
pub(crate) type Persisting = VecDeque<SourceRecord>;

impl World {
    /// Begins I/O, and has its end come as an event.
    pub(crate) fn submit(&mut self, site: Site, io: Io, purpose: Purpose) {
        let host = &mut self.hosts[site.index()];
        let (id, takes) = host.submit(io, purpose, &mut self.dice);
        let life = host.life;
        self.at(self.now + takes, Event::Io { site, life, id });
    }
}
