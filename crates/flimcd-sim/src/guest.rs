//! The guest: several requests in flight at whichever site it runs, sent again or given up after its connection broke, and
//! a virtual machine that dies with the power of the site it runs at. It decides what it asks for; what it may be answered
//! is the model's business.

use std::collections::BTreeMap;

use flimcd_core::{BLOCK_SIZE, ByteRange};

use crate::{
    content::{SECTOR, ZERO},
    host::{after, trimmed},
    model::ReadId,
    world::{Event, Site, World},
};

/// Name of a request; a request that is sent again has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestId(pub(crate) u64);

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    /// `durable`: with FUA.
    Write {
        stamp: u64,
        durable: bool,
    },
    Zero,
    Trim,
    Flush,
}

impl Kind {
    /// Whether it changes content.
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero | Self::Trim)
    }

    fn stamp(self) -> u64 {
        match self {
            Self::Write { stamp, .. } => stamp,
            _ => ZERO,
        }
    }
}

/// How a volume answers.
pub(crate) enum Answer {
    Done(Vec<u8>),
    Error,
    /// The volume is at the other site.
    Moved,
}

struct Request {
    kind: Kind,
    range: ByteRange,
    /// When it began, in the model's time.
    start: u64,
    read: Option<ReadId>,
}

/// See the module.
pub(crate) struct Guest {
    /// The site where it runs.
    pub(crate) at: Site,
    /// Whether the virtual machine runs.
    running: bool,
    /// Whether it has a connection to the volume.
    attached: bool,
    requests: BTreeMap<RequestId, Request>,
    next_request: u64,
    next_stamp: u64,
    /// Requests answered.
    pub(crate) answered: u64,
    /// It issues no more.
    pub(crate) stopped: bool,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self {
            at: Site::Source,
            running: true,
            attached: true,
            requests: BTreeMap::new(),
            next_request: 0,
            next_stamp: crate::content::INITIAL,
            answered: 0,
            stopped: false,
        }
    }

    /// What a request asks for, unless it was given up.
    pub(crate) fn what(&self, request: RequestId) -> Option<(Kind, ByteRange)> {
        self.requests.get(&request).map(|r| (r.kind, r.range))
    }

    /// Whether every request has been answered.
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    fn insert(&mut self, request: Request) -> RequestId {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        self.requests.insert(id, request);
        id
    }
}

impl World {
    /// The time has come for another request.
    pub(crate) fn guest_next(&mut self) {
        if self.guest.stopped {
            return;
        }
        let (low, high) = self.plan.guest.think_us;
        // A guest that never rests would keep some strategies from ever being ready.
        let rest = if self.now > self.plan.faults.quiet_at {
            4
        } else {
            1
        };
        let next = after(self.now, &mut self.dice, low * rest, high * rest);
        self.at(next, Event::GuestNext);
        if self.guest.running && self.guest.requests.len() < self.plan.guest.depth {
            self.guest_issue();
        }
    }

    fn guest_issue(&mut self) {
        let kind = self.guest_kind();
        let range = self.guest_range(kind);
        if kind != Kind::Flush && range.is_empty() {
            return;
        }
        let (start, read) = match kind {
            Kind::Read => (0, Some(self.model.begin_read(range))),
            Kind::Flush => (self.model.now(), None),
            _ => (
                self.model
                    .begin_write(self.effect(kind, range), kind.stamp()),
                None,
            ),
        };
        let id = self.guest.insert(Request {
            kind,
            range,
            start,
            read,
        });
        self.trace(|| format!("guest {id:?}: {kind:?} {}", describe(range)));
        self.guest_send(id);
    }

    /// The bytes that a request changes.
    fn effect(&self, kind: Kind, range: ByteRange) -> ByteRange {
        if kind == Kind::Trim {
            trimmed(range, self.plan.size)
        } else {
            range
        }
    }

    fn guest_kind(&mut self) -> Kind {
        let plan = &self.plan.guest;
        if self.dice.permille(plan.flush_permille) {
            return Kind::Flush;
        }
        if self.dice.permille(plan.reads_permille) {
            return Kind::Read;
        }
        match self.dice.below(20) {
            0 => Kind::Zero,
            1 => Kind::Trim,
            n => {
                self.guest.next_stamp += 1;
                Kind::Write {
                    stamp: self.elsewhere.common().unwrap_or(self.guest.next_stamp),
                    durable: n == 2,
                }
            }
        }
    }

    fn guest_range(&mut self, kind: Kind) -> ByteRange {
        if kind == Kind::Flush {
            return ByteRange::new(0, 0);
        }
        let size = self.plan.size;
        let blocks = if self.dice.permille(800) {
            self.plan.guest.hot_blocks
        } else {
            size.blocks()
        };
        let block = self.dice.below(blocks) * BLOCK_SIZE;
        let (start, len) = match self.dice.below(10) {
            0..=4 => (block, BLOCK_SIZE * self.dice.between(1, 2)),
            5 => (block, BLOCK_SIZE * self.dice.between(3, 16)),
            _ => {
                let start = block + self.dice.below(8) * SECTOR;
                (start, self.dice.between(1, 24) * SECTOR)
            }
        };
        let end = (start + len).min(size.bytes());
        ByteRange::new(start.min(end), end)
    }

    fn guest_send(&mut self, id: RequestId) {
        let at = self.guest.at;
        if self.guest.attached && self.host(at).up {
            self.volume_request(at, id);
        }
    }

    /// A request was answered.
    pub(crate) fn answer(&mut self, id: RequestId, answer: Answer) {
        if matches!(answer, Answer::Moved) {
            return self.guest_moves();
        }
        let Some(request) = self.guest.requests.remove(&id) else {
            return;
        };
        self.guest.answered += 1;
        let Request {
            kind,
            range,
            start,
            read,
        } = request;
        let certain = matches!(answer, Answer::Done(_));
        self.trace(|| format!("guest {id:?}: {}", if certain { "done" } else { "error" }));
        let effect = self.effect(kind, range);
        match (kind, answer) {
            (Kind::Read, Answer::Done(bytes)) => {
                let read = read.expect("reads have one");
                if let Err(wrong) = self.model.end_read(read, &bytes) {
                    self.fail(format!("wrong read at the {}: {wrong}", self.guest.at));
                }
            }
            (Kind::Flush, Answer::Done(_)) => self.model.end_flush(start),
            (Kind::Read | Kind::Flush, _) => self.give_up(read),
            (Kind::Trim, _) => self.model.end_write(effect, ZERO, start, false),
            (Kind::Write { .. } | Kind::Zero, _) => {
                self.model.end_write(effect, kind.stamp(), start, certain);
                if certain && matches!(kind, Kind::Write { durable: true, .. }) {
                    self.model.end_durable_write(effect, kind.stamp(), start);
                }
            }
        }
    }

    fn give_up(&mut self, read: Option<ReadId>) {
        if let Some(read) = read {
            self.model.forget_read(read);
        }
    }

    /// The guest goes on at the target, with everything that was not answered.
    pub(crate) fn guest_moves(&mut self) {
        if self.guest.at == Site::Target {
            return;
        }
        self.cover("guest moved");
        self.trace(|| "guest moves to the target".to_owned());
        self.guest.at = Site::Target;
        self.guest.attached = false;
        let source = self.host(Site::Source);
        if source.up {
            let parked = std::mem::take(&mut source.parked);
            for ticket in parked.into_keys() {
                source.rules.cancel_parked(ticket);
            }
            for ticket in std::mem::take(&mut source.held).into_keys() {
                source.rules.forget_held(ticket);
            }
        }
        self.guest_connects_soon();
    }

    /// The guest tries to connect in a moment, if it has to.
    pub(crate) fn guest_connects_soon(&mut self) {
        let at = after(self.now, &mut self.dice, 100, 40_000);
        self.at(at, Event::GuestConnect);
    }

    /// The guest connects, and sends what was not answered again.
    pub(crate) fn guest_connects(&mut self) {
        let at = self.guest.at;
        if self.guest.attached || !self.host(at).up {
            return;
        }
        self.guest.attached = true;
        self.guest.running = true;
        for (_, mut request) in std::mem::take(&mut self.guest.requests) {
            if request.kind == Kind::Flush {
                request.start = self.model.now();
            }
            self.guest.insert(request);
        }
        let again: Vec<_> = self.guest.requests.keys().copied().collect();
        for id in again {
            if self.guest.attached && self.guest.requests.contains_key(&id) {
                self.guest_send(id);
            }
        }
    }

    /// The agent that served the guest is gone.
    pub(crate) fn guest_disconnected(&mut self) {
        self.guest.attached = false;
        let ids: Vec<_> = self.guest.requests.keys().copied().collect();
        for id in ids {
            if self.dice.permille(self.plan.guest.abandon_permille) {
                self.cover("guest request abandoned");
                self.abandon(id);
            }
        }
    }

    fn abandon(&mut self, id: RequestId) {
        let Some(request) = self.guest.requests.remove(&id) else {
            return;
        };
        self.guest.answered += 1;
        self.give_up(request.read);
        if request.kind.writes() {
            let effect = self.effect(request.kind, request.range);
            self.model
                .end_write(effect, request.kind.stamp(), request.start, false);
        }
    }

    /// The site that the guest runs at lost its power.
    pub(crate) fn guest_lost_power(&mut self) {
        self.guest.attached = false;
        self.guest.running = false;
        self.guest.requests.clear();
        self.model.lose_power();
    }
}

fn describe(range: ByteRange) -> String {
    format!(
        "sectors {}..{}",
        range.start / SECTOR,
        range.end.div_ceil(SECTOR)
    )
}
