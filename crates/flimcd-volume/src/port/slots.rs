//! The requests that a port has in flight, numbered so that the I/O queue can name them.

use std::collections::HashMap;

use flimcd_core::{BlockRange, ByteRange, VolumeSize};

use super::{GuestError, GuestReply, GuestRequest, RequestKind, start};
use crate::{
    device::{IoBuf, IoKind, IoOp},
    rules::{FlushPlan, Ticket},
};

/// What a request waits for.
#[derive(Debug)]
pub(super) enum Stage {
    /// The rules.
    Parked(Ticket),
    /// The target, or credit: its I/O has ended.
    Held(Ticket),
    /// Its I/O.
    Io(Ticket),
    /// The data sync of its flush, which is the plan's first step and was taken from it.
    Sync(FlushPlan),
    /// The rest of its flush, which runs elsewhere.
    Presence,
    /// Nothing: it is being replied to.
    Ended,
}

/// A request between submit and reply.
#[derive(Debug)]
pub(super) struct InFlight {
    id: u64,
    kind: RequestKind,
    pub(super) range: ByteRange,
    pub(super) fua: bool,
    /// Whether it was admitted in post-copy: a trim is run as zeroing then, and a write may make blocks present.
    pub(super) in_postcopy: bool,
    pub(super) stage: Stage,
    pub(super) buf: IoBuf,
}

impl InFlight {
    pub(super) fn data(
        request: GuestRequest,
        range: ByteRange,
        stage: Stage,
        in_postcopy: bool,
    ) -> Self {
        let writes = !matches!(request.kind, RequestKind::Read | RequestKind::Cache);
        Self {
            id: request.id,
            kind: request.kind,
            range,
            fua: request.fua && writes,
            in_postcopy,
            stage,
            buf: request.buf,
        }
    }

    pub(super) fn flush(request: GuestRequest, mut plan: FlushPlan) -> Self {
        start(&mut plan);
        Self {
            id: request.id,
            kind: request.kind,
            range: ByteRange::new(0, 0),
            fua: false,
            in_postcopy: false,
            stage: Stage::Sync(plan),
            buf: request.buf,
        }
    }

    /// The I/O to do; `None` when there is none.
    pub(super) fn io_op(&mut self, slot: usize) -> Option<IoOp> {
        let kind = match self.kind {
            RequestKind::Read => IoKind::Read,
            RequestKind::Write => IoKind::Write,
            RequestKind::WriteZeroes { punch } => IoKind::WriteZeroes { punch },
            RequestKind::Trim if self.in_postcopy => IoKind::WriteZeroes { punch: true },
            RequestKind::Trim => IoKind::Discard,
            RequestKind::Flush => IoKind::Sync,
            RequestKind::Cache => return None,
        };
        let buf = match kind {
            IoKind::Read | IoKind::Write => std::mem::take(&mut self.buf),
            _ => IoBuf::empty(),
        };
        Some(IoOp {
            id: slot as u64,
            kind,
            offset: self.range.start,
            length: self.range.len(),
            buf,
        })
    }

    /// The blocks that its I/O, now that it is done, may make present.
    pub(super) fn may_become_present(&self, size: VolumeSize) -> Option<BlockRange> {
        let writes = matches!(
            self.kind,
            RequestKind::Write | RequestKind::WriteZeroes { .. } | RequestKind::Trim
        );
        let is_candidate = self.in_postcopy && writes && matches!(self.stage, Stage::Io(_));
        is_candidate.then(|| self.range.blocks_covered(size))
    }

    /// Copies into a read's buffer what `bytes`, which stand at `start` in the volume, have of its range.
    pub(super) fn fill(&mut self, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        let part = ByteRange::new(start.max(self.range.start), end.min(self.range.end));
        if part.start >= part.end || self.kind != RequestKind::Read {
            return;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "less than the length of a slice"
        )]
        let at = |byte: u64, base: u64| (byte - base) as usize;
        let from = &bytes[at(part.start, start)..at(part.end, start)];
        let first = at(part.start, self.range.start);
        self.buf[first..first + from.len()].copy_from_slice(from);
    }

    pub(super) fn reply(self, result: Result<(), GuestError>) -> GuestReply {
        GuestReply {
            id: self.id,
            result,
            buf: self.buf,
        }
    }
}

/// The requests in flight.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    parked: HashMap<Ticket, usize>,
}

impl Slots {
    pub(super) fn insert(&mut self, request: InFlight) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(request);
            return slot;
        }
        self.slots.push(Some(request));
        self.slots.len() - 1
    }

    /// Inserts a request in stage [`Stage::Parked`].
    pub(super) fn park(&mut self, request: InFlight) {
        let Stage::Parked(ticket) = request.stage else {
            unreachable!("only parked requests are parked")
        };
        let slot = self.insert(request);
        self.parked.insert(ticket, slot);
    }

    /// The write in `slot` ended, and its guest does not hear of it yet.
    pub(super) fn hold(&mut self, slot: usize, ticket: Ticket) {
        self.get_mut(slot).stage = Stage::Held(ticket);
        self.parked.insert(ticket, slot);
    }

    #[expect(clippy::expect_used, reason = "the core names tickets once")]
    pub(super) fn unpark(&mut self, ticket: Ticket) -> usize {
        self.parked
            .remove(&ticket)
            .expect("a decided request was parked here")
    }

    #[expect(clippy::expect_used, reason = "queues complete a request once")]
    pub(super) fn get_mut(&mut self, slot: usize) -> &mut InFlight {
        self.slots[slot].as_mut().expect("a request in flight")
    }

    #[expect(clippy::expect_used, reason = "queues complete a request once")]
    pub(super) fn remove(&mut self, slot: usize) -> InFlight {
        self.free.push(slot);
        self.slots[slot].take().expect("a request in flight")
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn into_all(self) -> impl Iterator<Item = InFlight> {
        self.slots.into_iter().flatten()
    }
}
