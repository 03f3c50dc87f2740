//! A server's requests: several streams side by side, each of which goes on where it was.
//!
//! ```text
//!  read or written, and what for (by the mixes) ─► one of its streams ─► the next blocks of it
//!         ▲ 3 of 4 requests stay with the stream of the one before
//! ```

use std::collections::VecDeque;

use flimcd_core::BLOCK_SIZE;

use super::{
    super::{DiskOp, PlannedOp, RequestSource},
    layout::{Group, Layout, Run},
    server::{Server, blocks},
};
use crate::rng::Rng;

/// Share of the requests that stay with the stream of the one before.
const STAY: f64 = 0.75;
/// Files that are read at the same time, and that are written.
const READERS: usize = 6;
const WRITERS: usize = 4;
/// Strided streams that read, and that write.
const STRIDED: usize = 2;
/// Groups of files that count as used lately.
const RECENT_GROUPS: usize = 32;
/// Written blocks that count as written lately, and their mean age in writes to such blocks when they are read.
const RECENT_BLOCKS: usize = 1024;
const RECENT_AGE: f64 = 64.0;
/// Share of the files written that were written lately.
const REWRITE_SHARE: f64 = 0.4;
/// Share of the appends to a log that write its last block again.
const LOG_AGAIN: f64 = 0.6;
/// Skew of the hot blocks.
const ZIPF_EXPONENT: f64 = 0.9;
/// A flush after so many writes.
const FLUSH_EVERY_WRITES: u32 = 64;
/// Distinguishes these draws from those of other sources with the same seed.
const SALT: u64 = 0x7365_7276_6572_7321;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Journal,
    Log,
    HotWrite,
    FileWrite,
    StridedWrite,
    FileRead,
    StridedRead,
    RecentRead,
    HotRead,
}

/// Files that are gone through, one after the other.
#[derive(Debug, Default)]
struct FileStream {
    group: usize,
    file: usize,
    at: u64,
}

/// An area gone through in steps.
#[derive(Clone, Copy, Debug)]
struct Strided {
    area: Run,
    step: u64,
    at: u64,
}

/// Groups in the order in which they are due again, and those used lately.
#[derive(Debug, Default)]
struct Turn {
    next: usize,
    recent: VecDeque<usize>,
}

impl Turn {
    /// The group that was not used for longest, or one that was used lately.
    fn choose(&mut self, groups: usize, fresh: f64, rng: &mut Rng) -> usize {
        if !self.recent.is_empty() && !rng.chance(fresh) {
            let pick = usize::try_from(rng.below(self.recent.len() as u64)).unwrap_or(0);
            return self.recent[pick];
        }
        let group = self.next % groups;
        self.next = (group + 1) % groups;
        self.recent.push_back(group);
        if self.recent.len() > RECENT_GROUPS {
            self.recent.pop_front();
        }
        group
    }
}

/// Chooses hot blocks: the first are the hottest.
#[derive(Debug)]
struct Hot(Vec<f64>);

impl Hot {
    fn new(count: usize) -> Self {
        let mut sum = 0.0;
        let sums = (1..=count).map(|rank| {
            #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
            let weight = (rank as f64).powf(-ZIPF_EXPONENT);
            sum += weight;
            sum
        });
        Self(sums.collect())
    }

    fn choose(&self, rng: &mut Rng) -> usize {
        let draw = rng.unit() * self.0.last().copied().unwrap_or(0.0);
        let rank = self.0.partition_point(|sum| *sum <= draw);
        rank.min(self.0.len().saturating_sub(1))
    }
}

/// Endless requests of a [`Server`], without times.
#[derive(Debug)]
pub(super) struct ServerSource {
    server: Server,
    rng: Rng,
    layout: Layout,
    /// Kinds with the sum of the weights so far; the last is 1.
    kinds: Vec<(Kind, f64)>,
    last: (Kind, usize),
    journal: (usize, u64),
    logs: Vec<u64>,
    hot_written: Hot,
    hot_read: Hot,
    writers: Vec<FileStream>,
    readers: Vec<FileStream>,
    to_write: Turn,
    to_read: Turn,
    strided_writes: Vec<Strided>,
    strided_reads: Vec<Strided>,
    recent: VecDeque<u64>,
    writes_since_flush: u32,
}

impl ServerSource {
    pub(super) fn new(server: &Server, size_bytes: u64, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ SALT);
        let layout = Layout::new(server, size_bytes / BLOCK_SIZE, &mut rng);
        let strided = Strided {
            area: Run { start: 0, len: 0 },
            step: 1,
            at: 0,
        };
        let streams = |count| {
            (0..count).map(|_| FileStream {
                // Beyond any file, so that each begins with a group of its own.
                file: usize::MAX,
                ..FileStream::default()
            })
        };
        Self {
            kinds: kinds(server),
            last: (Kind::Journal, 0),
            journal: (0, 0),
            logs: vec![0; layout.logs.len()],
            hot_written: Hot::new(layout.hot_written.len()),
            hot_read: Hot::new(layout.hot_read.len()),
            writers: streams(WRITERS).collect(),
            readers: streams(READERS).collect(),
            to_write: Turn::default(),
            to_read: Turn::default(),
            strided_writes: vec![strided; STRIDED],
            strided_reads: vec![strided; STRIDED],
            recent: VecDeque::new(),
            writes_since_flush: 0,
            server: server.clone(),
            rng,
            layout,
        }
    }

    fn choose(&mut self) -> (Kind, usize) {
        if self.rng.chance(STAY) {
            return self.last;
        }
        let draw = self.rng.unit();
        let place = self.kinds.partition_point(|(_, sum)| *sum <= draw);
        let kind = self.kinds[place.min(self.kinds.len() - 1)].0;
        let streams = match kind {
            Kind::Log => self.logs.len(),
            Kind::FileWrite => WRITERS,
            Kind::FileRead => READERS,
            Kind::StridedRead | Kind::StridedWrite => STRIDED,
            Kind::Journal | Kind::HotWrite | Kind::RecentRead | Kind::HotRead => 1,
        };
        let stream = usize::try_from(self.rng.below(streams as u64)).unwrap_or(0);
        self.last = (kind, stream);
        self.last
    }

    fn next_run(&mut self, kind: Kind, stream: usize) -> Run {
        let Self { layout, rng, .. } = self;
        match kind {
            Kind::Journal => {
                let (area, at) = &mut self.journal;
                let run = part(
                    layout.journal[*area],
                    *at,
                    self.server.writes.journal_blocks,
                );
                *at += run.len;
                if *at >= layout.journal[*area].len {
                    (*area, *at) = ((*area + 1) % layout.journal.len(), 0);
                }
                run
            }
            Kind::Log => {
                let (area, at) = (layout.logs[stream], &mut self.logs[stream]);
                if !rng.chance(LOG_AGAIN) {
                    *at = (*at + 1) % area.len;
                }
                part(area, *at, 1)
            }
            Kind::HotWrite => single(layout.hot_written[self.hot_written.choose(rng)]),
            Kind::HotRead => single(layout.hot_read[self.hot_read.choose(rng)]),
            Kind::FileWrite => next_of_files(
                &mut self.writers[stream],
                &mut self.to_write,
                &layout.written,
                (self.server.writes.file_blocks, 1.0 - REWRITE_SHARE),
                rng,
            ),
            Kind::FileRead => next_of_files(
                &mut self.readers[stream],
                &mut self.to_read,
                &layout.read,
                (self.server.reads.file_blocks, self.server.reads.fresh),
                rng,
            ),
            Kind::StridedWrite => next_strided(
                &mut self.strided_writes[stream],
                &layout.written_extents,
                8,
                rng,
            ),
            Kind::StridedRead => {
                let step = 2 << rng.below(3);
                next_strided(
                    &mut self.strided_reads[stream],
                    &layout.read_extents,
                    step,
                    rng,
                )
            }
            Kind::RecentRead => match recent(&self.recent, rng) {
                Some(block) => single(block),
                None => single(layout.hot_read[self.hot_read.choose(rng)]),
            },
        }
    }

    fn wrote(&mut self, run: Run) {
        self.writes_since_flush += 1;
        if self.layout.is_shared(run.start) {
            self.recent.push_back(run.start);
            if self.recent.len() > RECENT_BLOCKS {
                self.recent.pop_front();
            }
        }
    }
}

impl RequestSource for ServerSource {
    fn next_op(&mut self) -> Option<PlannedOp> {
        if self.writes_since_flush >= FLUSH_EVERY_WRITES {
            self.writes_since_flush = 0;
            return Some(PlannedOp::FLUSH);
        }
        let (kind, stream) = self.choose();
        let run = self.next_run(kind, stream);
        let op = match kind {
            Kind::FileRead | Kind::StridedRead | Kind::RecentRead | Kind::HotRead => DiskOp::Read,
            _ => {
                self.wrote(run);
                DiskOp::Write
            }
        };
        Some(PlannedOp {
            op,
            offset: run.start * BLOCK_SIZE,
            length: u32::try_from(run.len * BLOCK_SIZE).unwrap_or(u32::MAX),
            due: None,
            content: None,
        })
    }
}

/// Probabilities of the kinds by request, from their shares of the bytes.
fn kinds(server: &Server) -> Vec<(Kind, f64)> {
    let (writes, reads) = (&server.writes, &server.reads);
    let (read, write) = (server.read_bytes_share, 1.0 - server.read_bytes_share);
    let weights = [
        (
            Kind::Journal,
            write * writes.journal / blocks(writes.journal_blocks),
        ),
        (Kind::Log, write * writes.logs),
        (Kind::HotWrite, write * writes.hot),
        (
            Kind::FileWrite,
            write * writes.files / blocks(writes.file_blocks),
        ),
        (Kind::StridedWrite, write * writes.strided),
        (
            Kind::FileRead,
            read * reads.files / blocks(reads.file_blocks),
        ),
        (Kind::StridedRead, read * reads.strided),
        (Kind::RecentRead, read * reads.recent),
        (Kind::HotRead, read * reads.hot),
    ];
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0.0;
    let sums = weights.into_iter().map(|(kind, weight)| {
        sum += weight / total;
        (kind, sum)
    });
    sums.collect()
}

const fn single(block: u64) -> Run {
    Run {
        start: block,
        len: 1,
    }
}

/// At most `len` blocks of `area`, from `at` on.
fn part(area: Run, at: u64, len: u64) -> Run {
    Run {
        start: area.start + at,
        len: len.min(area.len - at),
    }
}

fn next_of_files(
    stream: &mut FileStream,
    turn: &mut Turn,
    groups: &[Group],
    (len, fresh): (u64, f64),
    rng: &mut Rng,
) -> Run {
    let file = match groups[stream.group].get(stream.file) {
        Some(file) => *file,
        None => {
            stream.group = turn.choose(groups.len(), fresh, rng);
            (stream.file, stream.at) = (0, 0);
            groups[stream.group][0]
        }
    };
    let run = part(file, stream.at, len);
    stream.at += run.len;
    if stream.at >= file.len {
        (stream.file, stream.at) = (stream.file + 1, 0);
    }
    run
}

fn next_strided(stream: &mut Strided, areas: &[Run], step: u64, rng: &mut Rng) -> Run {
    if stream.at >= stream.area.len {
        let area = areas[usize::try_from(rng.below(areas.len() as u64)).unwrap_or(0)];
        let at = rng.below(step.min(area.len));
        *stream = Strided { area, step, at };
    }
    let run = part(stream.area, stream.at, 1);
    stream.at += stream.step;
    run
}

/// A block that was written lately: the longer ago, the less likely.
fn recent(blocks: &VecDeque<u64>, rng: &mut Rng) -> Option<u64> {
    let age = -(1.0 - rng.unit()).ln() * RECENT_AGE;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive number"
    )]
    let age = age as usize;
    let newest = blocks.len().checked_sub(1)?;
    blocks.get(newest.saturating_sub(age)).copied()
}
