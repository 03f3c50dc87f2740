//! The fingerprint tree of a volume or image.
//!
//! ```text
//!                    root                     level 2
//!         ┌───────────┴──── … 64               a node is the BLAKE3 of its children's fingerprints
//!        node              node               level 1: 4 MiB
//!   ┌─────┼──── … 64   ┌────┴─── …
//!  leaf  leaf         leaf  leaf              level 0: a chunk, 64 KiB
//! ```
//! A leaf that is all zero has no fingerprint, and neither has a node with nothing else below it: long runs of zeroes cost
//! nothing at any level. Equal roots mean equal content; two trees are compared top down, and equal nodes need no
//! look below. The levels above the leaves take a 64th of theirs: 8 MiB per TiB of volume. The leaves themselves are kept by
//! whoever has a file for them.

use crate::Fingerprint;

/// Children of a node.
pub const FAN_OUT: usize = 64;

/// The levels above the leaves; see the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FingerprintTree {
    /// From the parents of the leaves up to the root.
    levels: Vec<Vec<Option<Fingerprint>>>,
}

impl FingerprintTree {
    /// The root; `None` when all leaves are zero or there are none.
    #[must_use]
    pub fn root(&self) -> Option<Fingerprint> {
        *self.levels.last()?.first()?
    }

    /// A level's nodes: 0 are the parents of the leaves. Empty above the root.
    #[must_use]
    pub fn level(&self, level: usize) -> &[Option<Fingerprint>] {
        self.levels.get(level).map_or(&[], Vec::as_slice)
    }

    /// The tree over these leaves, in their order.
    pub fn over(leaves: impl IntoIterator<Item = Option<Fingerprint>>) -> Self {
        let mut builder = TreeBuilder::default();
        for leaf in leaves {
            builder.push(leaf);
        }
        builder.finish()
    }
}

/// Makes a tree while leaves come one after the other. Needs no memory for the leaves.
#[derive(Debug, Default)]
pub struct TreeBuilder {
    first: Vec<Option<Fingerprint>>,
    /// Children of the node that is not whole.
    open: Vec<Option<Fingerprint>>,
}

impl TreeBuilder {
    /// The next leaf.
    pub fn push(&mut self, leaf: Option<Fingerprint>) {
        self.open.push(leaf);
        if self.open.len() == FAN_OUT {
            self.first.push(node(&self.open));
            self.open.clear();
        }
    }

    /// All leaves were pushed.
    #[must_use]
    pub fn finish(mut self) -> FingerprintTree {
        if !self.open.is_empty() {
            self.first.push(node(&self.open));
        }
        if self.first.is_empty() {
            return FingerprintTree::default();
        }
        let mut levels = vec![self.first];
        while let Some(below) = levels.last().filter(|below| below.len() > 1) {
            let level = below.chunks(FAN_OUT).map(node).collect();
            levels.push(level);
        }
        FingerprintTree { levels }
    }
}

/// The fingerprint of a node. How many children there are counts, so that no two shapes have the same one.
fn node(children: &[Option<Fingerprint>]) -> Option<Fingerprint> {
    if children.iter().all(Option::is_none) {
        return None;
    }
    let bytes: Vec<u8> = children
        .iter()
        .flat_map(|child| child.map_or([0; Fingerprint::BYTES], |child| *child.as_bytes()))
        .collect();
    Some(Fingerprint::of(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(value: u8) -> Option<Fingerprint> {
        (value > 0).then(|| Fingerprint::of(&[value]))
    }

    proptest! {
        #[test]
        fn a_changed_leaf_changes_its_path_and_nothing_else(
            leaves in prop::collection::vec(0u8..3, 1..9000), at in any::<prop::sample::Index>(), value in 3u8..9,
        ) {
            let at = at.index(leaves.len());
            let before = FingerprintTree::over(leaves.iter().map(|&value| leaf(value)));
            let mut changed = leaves.clone();
            changed[at] = value;
            let after = FingerprintTree::over(changed.iter().map(|&value| leaf(value)));
            prop_assert_ne!(before.root(), after.root());
            let (mut path, mut level) = (at / FAN_OUT, 0);
            while !before.level(level).is_empty() {
                let (old, new) = (before.level(level), after.level(level));
                for node in 0..old.len() {
                    prop_assert_eq!(old[node] == new[node], node != path, "level {}", level);
                }
                (path, level) = (path / FAN_OUT, level + 1);
            }
        }
    }

    #[test]
    fn zeroes_have_no_fingerprint_at_any_level() {
        assert_eq!(FingerprintTree::over([]).root(), None);
        let zeroes = FingerprintTree::over(vec![None; 5000]);
        assert_eq!((zeroes.root(), zeroes.level(0).len()), (None, 79));
        let one = |len: usize| FingerprintTree::over((0..len).map(|at| leaf(u8::from(at == 0))));
        assert_ne!(one(2).root(), one(3).root(), "the length counts");
    }
}
