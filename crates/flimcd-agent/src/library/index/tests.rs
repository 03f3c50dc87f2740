use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn root() -> Fingerprint {
    Fingerprint::of(b"root")
}

/// Made in pieces, and stopped and gone on with after each.
fn build(path: &Path, entries: &[(u64, u64)], piece: usize) -> ContentIndex {
    let mut kept = 0;
    for entries in entries.chunks(piece) {
        let mut builder = IndexBuilder::resume(path, kept).unwrap();
        for &(prefix, block) in entries {
            builder.push(BlockPrefix(prefix), BlockIndex(block));
        }
        kept = builder.keep().unwrap();
        builder.push(BlockPrefix(77), BlockIndex(1));
    }
    let builder = IndexBuilder::resume(path, kept).unwrap();
    builder.finish(root()).unwrap();
    ContentIndex::open(path, root()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_block_is_found_and_nothing_else(
        entries in prop::collection::vec((prop_oneof![0u64..40, any::<u64>()], 0u64..1 << 40), 0..2000),
        others in prop::collection::vec(any::<u64>(), 20), run in 1usize..900,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let index = build(&dir.path().join("index"), &entries, run);
        let mut lowest = BTreeMap::new();
        for &(prefix, block) in &entries {
            lowest.entry(prefix).and_modify(|low: &mut u64| *low = block.min(*low)).or_insert(block);
        }
        prop_assert_eq!(index.entries(), lowest.len() as u64);
        for prefix in lowest.keys().copied().chain(0..50).chain(others) {
            let expected = lowest.get(&prefix).copied().map(BlockIndex);
            prop_assert_eq!(index.lookup(BlockPrefix(prefix)), expected, "{}", prefix);
        }
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    /// Whatever is changed in the file, nothing is found under a prefix that is not the one that was looked for.
    #[test]
    fn damage_is_refused_or_harmless(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let entries: Vec<_> = (0..1000u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n)).collect();
        drop(build(&path, &entries, 300));
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(index) = ContentIndex::open(&path, root()) {
            prop_assert!(!cut);
            let found = entries.iter().filter(|(prefix, _)| index.lookup(BlockPrefix(*prefix)).is_some());
            let found = found.count();
            let in_entries = (4096..4096 + 1000 * ENTRY_BYTES).contains(&at);
            prop_assert!(found > 600 || !in_entries, "{} found", found);
        } else {
            prop_assert!(cut || at < HEAD);
        }
    }
}

#[test]
fn what_it_costs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let blocks = 1u64 << 18;
    let entries: Vec<_> = (0..blocks)
        .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n))
        .collect();
    let index = build(&path, &entries, 1 << 16);
    let content = blocks * 4096;
    let disk = std::fs::metadata(&path).unwrap().len();
    assert!(disk * 1000 < content * 4, "{disk} bytes: at most 0.4%");
    let per_tib = index.memory_bytes() as u64 * ((1 << 40) / content);
    assert!(per_tib < 8 << 20, "{per_tib} bytes resident per TiB");
}

#[test]
fn the_index_of_another_content_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    drop(build(&path, &[(1, 2)], 10));
    let error = ContentIndex::open(&path, Fingerprint::of(b"other")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}
