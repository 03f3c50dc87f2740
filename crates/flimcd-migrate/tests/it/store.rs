//! What the two sites of a [`Pair`](crate::pair::Pair) have beside their volumes: what the source has read and not packed, and what
//! the target holds elsewhere.

use std::collections::BTreeMap;

use bytes::Bytes;
use flimcd_core::{BlockIndex, BlockRange, Seq};
use flimcd_wire::{BlockPrefix, ChunkPrefix, Content, Entry, Probe, Probed, Runs};

/// A fingerprint that is good enough for numbers.
pub(crate) fn fingerprint(values: &[u64]) -> [u8; 32] {
    let sum = values.iter().fold(7, |sum: u64, value| {
        sum.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(*value)
    });
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&sum.rotate_left(17).to_le_bytes());
    bytes
}

pub(crate) fn prefix(value: u64) -> BlockPrefix {
    BlockPrefix::of(&fingerprint(&[value]))
}

/// Content that was read and waits for the target's answer.
#[derive(Clone)]
pub(crate) struct Read {
    pub(crate) range: BlockRange,
    pub(crate) values: Vec<u64>,
    /// For each chunk whether the seed has it.
    same: Vec<bool>,
}

impl Read {
    pub(crate) fn new(range: BlockRange, values: Vec<u64>, same: &[Option<ChunkPrefix>]) -> Self {
        let is_same = |(chunk, same): (&[u64], &Option<ChunkPrefix>)| {
            *same == Some(ChunkPrefix::of(&fingerprint(chunk)))
        };
        let same = values.chunks(16).zip(same).map(is_same).collect();
        Self {
            range,
            values,
            same,
        }
    }

    fn is_same(&self, block: u64) -> bool {
        let chunk = usize::try_from((block - self.range.start) / 16).unwrap();
        self.same.get(chunk) == Some(&true)
    }

    fn of(&self, range: BlockRange) -> &[u64] {
        let at = |block| usize::try_from(block - self.range.start).unwrap();
        &self.values[at(range.start)..at(range.end)]
    }

    /// The question about all that is not the same, if there is anything.
    pub(crate) fn probe(&self, seq: Seq) -> Option<Probe> {
        let rest: Vec<u64> = (self.range.start..self.range.end)
            .filter(|block| !self.is_same(*block))
            .collect();
        let prefixes = rest.iter().map(|&block| {
            let value = self.of(BlockRange::new(block, block + 1))[0];
            prefix(value).0.to_le_bytes()
        });
        let payload: Vec<u8> = prefixes.flatten().collect();
        let blocks = Runs::new(rest.iter().map(|&b| BlockRange::new(b, b + 1)));
        (!rest.is_empty()).then(|| Probe {
            seq,
            blocks,
            payload: payload.into(),
        })
    }

    /// The message's content.
    pub(crate) fn pack(&self, had: &Runs) -> (Vec<Entry>, Bytes) {
        let kind = |block: u64| match self.is_same(block) {
            true => Content::Same,
            false if had.iter().any(|run| run.contains(BlockIndex(block))) => Content::Copy,
            false => Content::Raw { len: 0 },
        };
        let (mut entries, mut payload): (Vec<Entry>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut at = self.range.start;
        while at < self.range.end {
            let is = kind(at);
            let end = (at..self.range.end).find(|&block| kind(block) != is);
            let range = BlockRange::new(at, end.unwrap_or(self.range.end));
            let values = self.of(range);
            let (content, bytes) = match is {
                Content::Raw { .. } => {
                    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    let len = u32::try_from(bytes.len()).unwrap();
                    (Content::Raw { len }, bytes)
                }
                _ => (is, fingerprint(values).to_vec()),
            };
            entries.push(Entry { range, content });
            payload.extend(bytes);
            at = range.end;
        }
        (entries, payload.into())
    }
}

/// What the target has elsewhere, and what it has said of it.
#[derive(Clone, Default)]
pub(crate) struct Store {
    pub(crate) values: Vec<u64>,
    places: BTreeMap<Seq, BTreeMap<u64, usize>>,
}

impl Store {
    pub(crate) fn probe(&mut self, probe: &Probe) -> Probed {
        let mut places = BTreeMap::new();
        let blocks = probe.blocks.iter().flat_map(BlockRange::iter);
        for (block, wanted) in blocks.zip(probe.prefixes()) {
            let at = self
                .values
                .iter()
                .position(|&value| prefix(value) == wanted);
            places.extend(at.map(|at| (block.0, at)));
        }
        let had = Runs::new(places.keys().map(|&b| BlockRange::new(b, b + 1)));
        self.places.insert(probe.seq, places);
        Probed {
            seq: probe.seq,
            had,
            same_place: 0,
            repeated: 0,
        }
    }

    /// What a run was said to be, if it still is.
    pub(crate) fn copy(&self, seq: Seq, run: BlockRange, expected: &[u8]) -> Option<Vec<u64>> {
        let places = self.places.get(&seq)?;
        let values: Option<Vec<u64>> = run
            .iter()
            .map(|block| places.get(&block.0).map(|&at| self.values[at]))
            .collect();
        values.filter(|values| fingerprint(values)[..] == *expected)
    }

    /// The agent died.
    pub(crate) fn forget(&mut self) {
        self.places.clear();
    }
}
