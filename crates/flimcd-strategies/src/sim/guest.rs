//! The guest: an open loop of requests with a bounded number in flight, and what it sees of its disk.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use flimcd_core::{BLOCK_SIZE, BlockRange, ByteRange, Time};
use flimcd_lab::load::{DiskOp, LoadOptions, PlannedOp, RequestSource, ZERO_CONTENT};

use super::content::{Id, mix};

/// A request under way.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) op: DiskOp,
    pub(super) range: ByteRange,
    /// What a write puts into each block that it touches.
    pub(super) content: Vec<Id>,
    pub(super) due: Time,
    pub(super) issued: Time,
}

impl Request {
    pub(super) fn blocks(&self) -> BlockRange {
        self.range.blocks_touched()
    }

    pub(super) fn writes(&self) -> bool {
        matches!(self.op, DiskOp::Write | DiskOp::WriteZeroes)
    }
}

/// See the module.
pub(super) struct Guest {
    source: Box<dyn RequestSource>,
    options: LoadOptions,
    speed_to: Time,
    next: Option<PlannedOp>,
    pub(super) in_flight: BTreeMap<u64, Request>,
    next_number: u64,
    writes: u64,
    /// Requests that the site they were put to has refused, because the volume has moved.
    pub(super) homeless: VecDeque<u64>,
}

/// What the guest does next.
pub(super) enum Next {
    /// This request, now.
    Now(u64),
    /// Nothing before this time.
    At(Time),
    /// Nothing before an answer.
    Full,
    Ended,
}

impl Guest {
    pub(super) fn new(source: Box<dyn RequestSource>, options: LoadOptions, start: Time) -> Self {
        Self {
            source,
            options,
            speed_to: start,
            next: None,
            in_flight: BTreeMap::new(),
            next_number: 0,
            writes: 0,
            homeless: VecDeque::new(),
        }
    }

    /// When a request is due.
    fn due(&self, op: &PlannedOp) -> Time {
        self.speed_to + op.due.unwrap_or(Duration::ZERO)
    }

    /// What there is to do now.
    pub(super) fn next(&mut self, now: Time) -> Next {
        loop {
            if self.next.is_none() {
                self.next = self.source.next_op();
            }
            let Some(op) = &self.next else {
                return Next::Ended;
            };
            if op.op == DiskOp::Flush {
                self.next = None;
                continue;
            }
            let due = self.due(op);
            if due > now {
                return Next::At(due);
            }
            if self.in_flight.len() >= self.options.queue_depth as usize {
                return Next::Full;
            }
            let Some(op) = self.next.take() else {
                return Next::Ended;
            };
            let range = ByteRange::new(op.offset, op.offset + u64::from(op.length));
            let content = self.content(&op, range.blocks_touched());
            self.next_number += 1;
            let request = Request {
                op: op.op,
                range,
                content,
                due,
                issued: now,
            };
            self.in_flight.insert(self.next_number, request);
            return Next::Now(self.next_number);
        }
    }

    fn content(&mut self, op: &PlannedOp, blocks: BlockRange) -> Vec<Id> {
        if op.op != DiskOp::Write {
            return vec![
                Id::ZERO;
                if op.op == DiskOp::WriteZeroes {
                    usize::try_from(blocks.len()).unwrap_or(0)
                } else {
                    0
                }
            ];
        }
        if let Some(recorded) = &op.content
            && recorded.len() as u64 * BLOCK_SIZE == u64::from(op.length)
        {
            let id = |&number: &u32| match number {
                ZERO_CONTENT => Id::ZERO,
                number => Id::repeated(u64::from(number)),
            };
            return recorded.iter().map(id).collect();
        }
        let mut content = Vec::new();
        for block in blocks.iter() {
            self.writes += 1;
            let draw = mix(self.options.seed ^ mix(block.0) ^ self.writes);
            let repeated = self
                .options
                .duplicates
                .and_then(|duplicates| duplicates.draw(draw));
            content.push(match repeated {
                Some(number) => Id::repeated(number),
                None => Id::fresh(self.writes),
            });
        }
        content
    }

    /// Requests that would have been made until `now` and were not.
    pub(super) fn overdue(&mut self, now: Time) -> u64 {
        let mut count = 0;
        while let Some(op) = self.next.take().or_else(|| self.source.next_op()) {
            if self.due(&op) > now {
                break;
            }
            count += u64::from(op.op != DiskOp::Flush);
        }
        count
    }
}

/// Every request that is due until `end`, in order.
pub(super) fn until(
    source: Box<dyn RequestSource>,
    options: LoadOptions,
    end: Time,
) -> impl Iterator<Item = Request> {
    let mut guest = Guest::new(source, options, Time::ZERO);
    std::iter::from_fn(move || match guest.next(end) {
        Next::Now(number) => guest.in_flight.remove(&number),
        Next::At(_) | Next::Full | Next::Ended => None,
    })
}
