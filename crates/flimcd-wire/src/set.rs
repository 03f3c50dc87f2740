//! Sets of blocks and of sequence numbers on the wire.

use bytes::Bytes;
use flimcd_core::{BlockIndex, BlockRange, BlockSet, Seq, SeqSet, limits};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Ascending, disjoint, non-empty runs, sent as gaps and lengths. Decoding refuses anything else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(Vec<BlockRange>);

impl Runs {
    /// Runs that the caller has in ascending order without overlap; empty ones are left out.
    ///
    /// # Panics
    /// When they overlap or descend.
    pub fn new(runs: impl IntoIterator<Item = BlockRange>) -> Self {
        let runs: Vec<_> = runs.into_iter().filter(|run| !run.is_empty()).collect();
        assert!(
            runs.windows(2).all(|w| w[0].end <= w[1].start),
            "runs must ascend: {runs:?}"
        );
        Self(runs)
    }

    /// The runs.
    pub fn iter(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.0.iter().copied()
    }

    /// Number of blocks in all runs.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.iter().map(BlockRange::len).sum()
    }
}

impl Serialize for Runs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_runs(serializer, self.0.iter().map(|run| (run.start, run.end)))
    }
}

impl<'de> Deserialize<'de> for Runs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let runs = deserialize_runs(deserializer)?;
        Ok(Self(
            runs.into_iter()
                .map(|(start, end)| BlockRange::new(start, end))
                .collect(),
        ))
    }
}

/// A [`SeqSet`] on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeqRuns(pub SeqSet);

impl SeqRuns {
    /// The single number `seq`.
    #[must_use]
    pub fn single(seq: Seq) -> Self {
        Self([(seq.0, seq.0 + 1)].into_iter().collect())
    }
}

impl Serialize for SeqRuns {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_runs(serializer, self.0.runs())
    }
}

impl<'de> Deserialize<'de> for SeqRuns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(deserialize_runs(deserializer)?.into_iter().collect()))
    }
}

fn serialize_runs<S: Serializer>(
    serializer: S,
    runs: impl Iterator<Item = (u64, u64)>,
) -> Result<S::Ok, S::Error> {
    let mut at = 0;
    let flat: Vec<u64> = runs
        .flat_map(|(start, end)| {
            let gap = start - at;
            at = end;
            [gap, end - start]
        })
        .collect();
    flat.serialize(serializer)
}

fn deserialize_runs<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(u64, u64)>, D::Error> {
    let flat = Vec::<u64>::deserialize(d)?;
    if flat.len() % 2 != 0 || flat.len() / 2 > limits::MAX_RUNS_PER_MESSAGE {
        return Err(de::Error::custom("runs are cut short or too many"));
    }
    let mut at = 0u64;
    flat.chunks_exact(2)
        .map(|pair| {
            let start = at.checked_add(pair[0]);
            let end = start.and_then(|start| start.checked_add(pair[1]));
            match (start, end) {
                (Some(start), Some(end)) if start < end => {
                    at = end;
                    Ok((start, end))
                }
                _ => Err(de::Error::custom("an empty or endless run")),
            }
        })
        .collect()
}

/// Blocks covered by one [`SetPart::Bitmap`]: 32 KiB of bits, 1 GiB of volume.
const BITMAP_BLOCKS: u64 = 8 * 32 * 1024;

/// A part of a block set: whichever form is shorter where it lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetPart {
    /// Never sent.
    Invalid,
    /// A few runs.
    Runs(Runs),
    /// One bit per block from `first` on, lowest bit of the first byte first.
    Bitmap {
        /// Block of the first bit.
        first: u64,
        /// The bits.
        bits: Bytes,
    },
}

impl SetPart {
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Self::Invalid => false,
            Self::Runs(_) => true,
            Self::Bitmap { first, bits } => {
                bits.len() as u64 * 8 <= BITMAP_BLOCKS && *first <= limits::MAX_VOLUME_BYTES
            }
        }
    }

    /// Puts the part's blocks into `set`; false, with the set as it was or partly filled, when a
    /// block lies beyond it.
    #[must_use]
    pub fn add_to(&self, set: &mut BlockSet) -> bool {
        match self {
            Self::Invalid => false,
            Self::Runs(runs) => runs.iter().all(|run| {
                let fits = run.end <= set.capacity();
                if fits {
                    set.insert_range(run);
                }
                fits
            }),
            Self::Bitmap { first, bits } => {
                let blocks = bits.iter().zip(0u64..).flat_map(|(&byte, at)| {
                    (0..8u64)
                        .filter(move |bit| byte >> bit & 1 == 1)
                        .map(move |bit| first + at * 8 + bit)
                });
                blocks.into_iter().all(|block| {
                    let fits = block < set.capacity();
                    if fits {
                        set.insert(BlockIndex(block));
                    }
                    fits
                })
            }
        }
    }
}

/// Cuts a set into parts that each fit a frame. An empty set has no part.
#[must_use]
pub fn split_set(set: &BlockSet) -> Vec<SetPart> {
    let mut parts = Vec::new();
    let mut pending = Vec::new();
    let mut at = 0;
    while at < set.capacity() {
        let window = BlockRange::new(at, (at + BITMAP_BLOCKS).min(set.capacity()));
        at = window.end;
        // A run takes two to six bytes as gap and length.
        let runs: Vec<_> = set.runs_in(window).collect();
        if runs.len() as u64 * 4 > window.len() / 8 {
            parts.push(bitmap(window, &runs));
            continue;
        }
        pending.extend(runs);
        if pending.len() > limits::MAX_RUNS_PER_MESSAGE / 2 {
            parts.push(SetPart::Runs(Runs::new(std::mem::take(&mut pending))));
        }
    }
    if !pending.is_empty() {
        parts.push(SetPart::Runs(Runs::new(pending)));
    }
    parts
}

fn bitmap(window: BlockRange, runs: &[BlockRange]) -> SetPart {
    let len = usize::try_from(window.len().div_ceil(8)).expect("at most 32 KiB");
    let mut bits = vec![0u8; len];
    for block in runs.iter().flat_map(|run| run.iter()) {
        let bit = block.0 - window.start;
        bits[usize::try_from(bit / 8).expect("at most 32 KiB")] |= 1 << (bit % 8);
    }
    SetPart::Bitmap {
        first: window.start,
        bits: bits.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn split_sets_join_again(runs in prop::collection::vec((0u64..600_000, 1u64..500), 0..40),
                                 dense in any::<bool>()) {
            let mut set = BlockSet::new(600_500);
            for (start, len) in runs {
                set.insert_range(BlockRange::new(start, start + len));
            }
            if dense {
                for block in (262_144..524_288).step_by(2) {
                    set.insert(BlockIndex(block));
                }
            }
            let parts = split_set(&set);
            prop_assert_eq!(dense, parts.iter().any(|p| matches!(p, SetPart::Bitmap { .. })));
            let mut joined = BlockSet::new(600_500);
            for part in &parts {
                let bytes = postcard::to_allocvec(part).unwrap();
                prop_assert!(bytes.len() < limits::MAX_FRAME_BYTES / 2);
                let back: SetPart = postcard::from_bytes(&bytes).unwrap();
                prop_assert!(back.is_sound() && back.add_to(&mut joined));
            }
            prop_assert_eq!(joined, set);
        }
    }

    #[test]
    fn runs_that_make_no_sense_are_refused() {
        for flat in [
            vec![1u64],
            vec![1, 0],
            vec![u64::MAX, 2],
            vec![0, 1, u64::MAX, 1],
        ] {
            let bytes = postcard::to_allocvec(&flat).unwrap();
            assert!(postcard::from_bytes::<Runs>(&bytes).is_err(), "{flat:?}");
        }
    }

    #[test]
    fn blocks_beyond_the_volume_are_noticed() {
        let mut set = BlockSet::new(10);
        assert!(!SetPart::Runs(Runs::new([BlockRange::new(5, 11)])).add_to(&mut set));
        assert!(
            !SetPart::Bitmap {
                first: 8,
                bits: vec![0b100].into()
            }
            .add_to(&mut set)
        );
    }
}
