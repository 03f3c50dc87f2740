//! What the target has at the same place, as the source knows it.
//!
//! ```text
//!             link up            SeedOffer            last part
//!  (no sample) ──► │ Asked ──────────────► Receiving ──────────► Known
//!                  │   │ nothing offered, or no answer in time: content goes without
//! ```
//! Content is held back while there is no answer, and while parts of the table come: sending a chunk costs a thousand times what its
//! part of the table does. Neither wait is without bound, and what a guest waits for is never held back.
//! After a link-up the target is asked again: it may have been restarted, and not have that image any more.

use std::{collections::BTreeSet, time::Duration};

use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ChunkIndex, Time, limits};
use flimcd_wire::{
    ChunkPrefix, Content, Entry, Message, SampleChunk, SeedOffer, SeedPart, SeedTable,
};

/// Content waits so long for an answer, and for the next part of the table.
const WAIT_MAX: Duration = Duration::from_secs(3);
/// Chunks that are read together whatever they hold: neighbours compress better together than alone, by a tenth.
const RUN_CHUNKS_MIN: u64 = 4;
/// Chunks that are read together at most: what fits one message.
const RUN_CHUNKS_MAX: u64 = limits::MAX_BLOCKS_PER_MESSAGE / BLOCKS_PER_CHUNK;
/// So many messages may come back before the image at the target is taken for another one.
const LACKING_MAX: u64 = 64;

/// See the module.
pub(super) struct Seeding {
    /// Chunks drawn at random; empty: nobody asks.
    sample: Vec<SampleChunk>,
    offer: Option<Received>,
    /// The offer was made on this link.
    is_current: bool,
    /// Content is held back until then, at the latest.
    hold_until: Option<Time>,
    lacking: u64,
    /// Chunks that are read together.
    run_chunks: u64,
}

/// An offer and what has come of its table.
struct Received {
    offer: SeedOffer,
    table: SeedTable,
    parts: BTreeSet<u32>,
}

impl Received {
    fn is_whole(&self) -> bool {
        self.parts.len() as u64 >= u64::from(self.offer.parts)
    }
}

/// What became of a message that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The first one.
    First,
    /// One of some.
    Again,
    /// One too many: nothing is the same any more.
    TooMany,
}

impl Seeding {
    pub(super) fn new() -> Self {
        Self {
            sample: Vec::new(),
            offer: None,
            is_current: false,
            hold_until: None,
            lacking: 0,
            run_chunks: RUN_CHUNKS_MIN,
        }
    }

    pub(super) fn set_sample(&mut self, sample: Vec<SampleChunk>) {
        self.sample = sample;
    }

    /// The question for a link that has come up.
    pub(super) fn ask(&mut self, now: Time) -> Option<Message> {
        self.is_current = false;
        if self.sample.is_empty() {
            return None;
        }
        self.hold_until = Some(now + WAIT_MAX);
        let whole = self.offer.as_ref().filter(|received| received.is_whole());
        Some(Message::SeedAsk {
            sample: self.sample.clone(),
            have: whole.map(|received| received.offer.id),
        })
    }

    /// The target has taken the migration up. What it takes for that is no part of the wait.
    pub(super) fn accepted(&mut self, now: Time) {
        if self.hold_until.is_some() {
            self.hold_until = Some(now + WAIT_MAX);
        }
    }

    /// The answer. Returns the name of a seed that was not known before.
    pub(super) fn offered(
        &mut self,
        now: Time,
        offer: Option<SeedOffer>,
        chunks: u64,
    ) -> Option<String> {
        let Some(offer) = offer else {
            self.offer = None;
            self.hold_until = None;
            return None;
        };
        self.is_current = true;
        if self
            .offer
            .as_ref()
            .is_some_and(|known| known.offer.id == offer.id)
        {
            self.go_on(now);
            return None;
        }
        let name = offer.name.clone();
        self.lacking = 0;
        self.offer = Some(Received {
            offer,
            table: SeedTable::new(chunks),
            parts: BTreeSet::new(),
        });
        self.go_on(now);
        Some(name)
    }

    /// A part of the table. False when it does not fit. One of another table is left alone.
    pub(super) fn part(&mut self, now: Time, part: &SeedPart) -> bool {
        let Some(received) = self.offer.as_mut().filter(|r| r.offer.id == part.id) else {
            return true;
        };
        if !received.table.add(part) {
            return false;
        }
        received.parts.insert(part.part);
        self.go_on(now);
        true
    }

    /// Waits for the next part, or no more.
    fn go_on(&mut self, now: Time) {
        let is_whole = self.offer.as_ref().is_none_or(Received::is_whole);
        self.hold_until = self
            .hold_until
            .filter(|_| !is_whole)
            .map(|_| now + WAIT_MAX);
    }

    /// Whether content has to wait.
    pub(super) fn holds(&self) -> bool {
        self.hold_until.is_some()
    }

    /// Looks at the time; true when a wait has just been given up.
    pub(super) fn expire(&mut self, now: Time) -> bool {
        self.hold_until.take_if(|until| *until <= now).is_some()
    }

    /// What the target has there, if `range` is a chunk.
    pub(super) fn same(&self, range: BlockRange) -> Option<ChunkPrefix> {
        let is_chunk =
            range.len() == BLOCKS_PER_CHUNK && range.start.is_multiple_of(BLOCKS_PER_CHUNK);
        let received = self
            .offer
            .as_ref()
            .filter(|_| is_chunk && self.is_current)?;
        received.table.get(BlockIndex(range.start).chunk())
    }

    /// What the target has in each chunk of `range`, if that is whole chunks and there is a seed.
    pub(super) fn same_in(&self, range: BlockRange) -> Vec<Option<ChunkPrefix>> {
        let is_whole = range.start.is_multiple_of(BLOCKS_PER_CHUNK)
            && range.end.is_multiple_of(BLOCKS_PER_CHUNK);
        if !is_whole || !self.is_current || self.offer.is_none() {
            return Vec::new();
        }
        let chunks = range.start / BLOCKS_PER_CHUNK..range.end / BLOCKS_PER_CHUNK;
        chunks
            .map(|chunk| self.same(ChunkIndex(chunk).blocks()))
            .collect()
    }

    /// Chunks to be read together: the longer the runs are that the target turns out to have, the more, because a run is one
    /// entry of one message.
    pub(super) fn run_chunks(&self) -> u64 {
        self.run_chunks
    }

    /// Content was packed. What is sent over a seed is no longer in it.
    pub(super) fn was_read(&mut self, entries: &[Entry]) {
        let Some(received) = &mut self.offer else {
            return;
        };
        let mut is_same = true;
        for entry in entries {
            if entry.content == Content::Same {
                continue;
            }
            is_same &= entry.content == Content::Zero;
            if received.offer.in_place {
                let range = entry.range;
                for chunk in range.start / BLOCKS_PER_CHUNK..range.end.div_ceil(BLOCKS_PER_CHUNK) {
                    received.table.set(ChunkIndex(chunk), None);
                }
            }
        }
        self.run_chunks = if is_same {
            (self.run_chunks * 2).min(RUN_CHUNKS_MAX)
        } else {
            (self.run_chunks / 2).max(RUN_CHUNKS_MIN)
        };
    }

    /// A message of these came back; with `for_good` it is not tried again.
    pub(super) fn lacks(&mut self, range: BlockRange, for_good: bool) -> Verdict {
        self.lacking += 1;
        if self.offer.is_none() {
            return Verdict::Again;
        }
        if for_good {
            self.clear(range);
        }
        if self.lacking > LACKING_MAX {
            self.offer = None;
            // Nor is it asked for again.
            self.sample.clear();
            return Verdict::TooMany;
        }
        if self.lacking == 1 {
            Verdict::First
        } else {
            Verdict::Again
        }
    }

    /// The target does not have these after all.
    pub(super) fn clear(&mut self, range: BlockRange) {
        let Some(received) = &mut self.offer else {
            return;
        };
        for chunk in range.start / BLOCKS_PER_CHUNK..range.end.div_ceil(BLOCKS_PER_CHUNK) {
            received.table.set(ChunkIndex(chunk), None);
        }
    }

    /// So many have come back that guests must not wait behind them.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.lacking > LACKING_MAX
    }

    /// Bytes of memory.
    pub(super) fn memory_bytes(&self) -> usize {
        self.offer
            .as_ref()
            .map_or(0, |received| received.table.memory_bytes())
    }
}
