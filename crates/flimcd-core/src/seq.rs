//! Sequence numbers of messages and sets of them.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Number of a message with content, unique within one run of the source machine, growing by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Seq(pub u64);

/// A set of sequence numbers as runs. Nearly contiguous in practice, so it stays small.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SeqSet {
    /// First number to one past the last, disjoint and not adjacent.
    runs: BTreeMap<u64, u64>,
}

impl SeqSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `seq`; false when it was there.
    pub fn insert(&mut self, seq: Seq) -> bool {
        if self.contains(seq) {
            return false;
        }
        self.insert_run(seq.0, seq.0 + 1);
        true
    }

    /// Adds `start..end`.
    pub fn insert_run(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        // Everything that touches start..end is merged into it.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.runs.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.runs.insert(start, end);
    }

    /// Adds all of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (start, end) in other.runs() {
            self.insert_run(start, end);
        }
    }

    /// Removes `seq`; false when it was not there.
    pub fn remove(&mut self, seq: Seq) -> bool {
        let run = self
            .runs
            .range(..=seq.0)
            .next_back()
            .map(|(&start, &end)| (start, end));
        let Some((start, end)) = run.filter(|(_, end)| seq.0 < *end) else {
            return false;
        };
        self.runs.remove(&start);
        self.insert_run(start, seq.0);
        self.insert_run(seq.0 + 1, end);
        true
    }

    /// Removes every number below `floor`.
    pub fn remove_below(&mut self, floor: Seq) {
        let above = self.runs.split_off(&floor.0);
        if let Some((_, &end)) = self.runs.last_key_value()
            && end > floor.0
        {
            self.runs = BTreeMap::from([(floor.0, end)]);
        } else {
            self.runs.clear();
        }
        self.runs.extend(above);
    }

    /// Whether `seq` is in it.
    #[must_use]
    pub fn contains(&self, seq: Seq) -> bool {
        self.runs
            .range(..=seq.0)
            .next_back()
            .is_some_and(|(_, &end)| seq.0 < end)
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs `start..end`, ascending, disjoint and not adjacent.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(&s, &e)| (s, e))
    }
}

impl FromIterator<(u64, u64)> for SeqSet {
    fn from_iter<I: IntoIterator<Item = (u64, u64)>>(runs: I) -> Self {
        let mut set = Self::new();
        for (start, end) in runs {
            set.insert_run(start, end);
        }
        set
    }
}

impl fmt::Debug for SeqSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.runs().map(|(s, e)| s..e))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in prop::collection::vec((0u8..4, 0u64..60, 0u64..10), 0..60)) {
            let (mut got, mut want) = (SeqSet::new(), BTreeSet::new());
            for (op, start, len) in ops {
                match op {
                    0 => prop_assert_eq!(got.insert(Seq(start)), want.insert(start)),
                    1 => {
                        got.insert_run(start, start + len);
                        want.extend(start..start + len);
                    }
                    2 => prop_assert_eq!(got.remove(Seq(start)), want.remove(&start)),
                    _ => {
                        got.remove_below(Seq(start));
                        want.retain(|&s| s >= start);
                    }
                }
                for s in 0..75 {
                    prop_assert_eq!(got.contains(Seq(s)), want.contains(&s));
                }
                let runs: Vec<_> = got.runs().collect();
                prop_assert!(runs.windows(2).all(|w| w[0].1 < w[1].0));
            }
        }
    }
}
