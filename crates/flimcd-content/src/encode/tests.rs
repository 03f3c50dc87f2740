//! What is packed, unpacked again as a target does it.

use super::*;
use crate::{Compression, Decoded, Decoder};
use flimcd_core::{BLOCK_SIZE, BlockIndex, Seq, VolumeSize};
use flimcd_wire::{Blocks, ChunkPrefix};
use proptest::prelude::*;

/// Blocks of these kinds: 0 is zero, 1 packs well, any other does not and is the same for the same kind.
fn content(kinds: &[u8], last_len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for &kind in kinds {
        let mut state = u32::from(kind);
        for at in 0..4096u32 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.push(match kind {
                0 => 0,
                1 => (1 + at / 64).to_le_bytes()[0],
                _ => state.to_le_bytes()[3],
            });
        }
    }
    out.truncate(out.len() - 4096 + last_len);
    out
}

fn message(encoded: Encoded) -> Blocks {
    Blocks {
        seq: Seq(0),
        entries: encoded.entries,
        payload: encoded.payload,
    }
}

/// Puts a message together again, with what the target has for runs that are the same or copies.
fn unpack(
    message: &Blocks,
    size: VolumeSize,
    at: u64,
    has: impl Fn(BlockRange, Content) -> Option<Vec<u8>>,
) -> Result<Vec<u8>, TestCaseError> {
    let mut decoder = Decoder::new();
    let (mut at, mut back) = (at, Vec::new());
    for (entry, payload) in message.parts() {
        prop_assert_eq!(entry.range.start, at, "without gaps");
        at = entry.range.end;
        let decoded = decoder.decode(&entry, &payload, size);
        let bytes = match decoded.map_err(|error| TestCaseError::fail(error.to_string()))? {
            Decoded::Zeroes => vec![0; usize::try_from(entry.range.bytes(size).len()).unwrap()],
            Decoded::Bytes(bytes) => bytes.to_vec(),
            Decoded::Same(expected) | Decoded::Copy(expected) => {
                let has = has(entry.range, entry.content);
                let has = has.filter(|bytes| Fingerprint::of_run(bytes) == expected);
                has.ok_or_else(|| TestCaseError::fail(format!("{entry:?} is lacking")))?
            }
        };
        back.extend(bytes);
    }
    Ok(back)
}

fn runs(blocks: impl IntoIterator<Item = u64>) -> Runs {
    Runs::new(blocks.into_iter().map(|b| BlockRange::new(b, b + 1)))
}

fn contents(encoded: &Encoded) -> Vec<(u64, u64, Content)> {
    let entries = encoded.entries.iter();
    entries
        .map(|e| (e.range.start, e.range.end, e.content))
        .collect()
}

proptest! {
    #[test]
    fn what_is_packed_unpacks(kinds in prop::collection::vec(0u8..3, 1..40),
                              last_len in 1usize..=4096, first in 0u64..100, packed in any::<bool>()) {
        let bytes = content(&kinds, last_len);
        let range = BlockRange::new(first, first + kinds.len() as u64);
        let size = VolumeSize::new(first * BLOCK_SIZE + bytes.len() as u64).unwrap();
        let mode = if packed { Compression::DEFAULT } else { Compression::None };
        let mut encoder = Encoder::new(mode);
        let encoded = encoder.encode(range, &bytes);
        let examined = Examined::of(range, &bytes, &[]);
        prop_assert_eq!(examined.needs_probe(), kinds.iter().any(|kind| *kind > 0));
        prop_assert_eq!(&encoder.pack(&bytes, &examined, &Runs::default()), &encoded);
        let back = unpack(&message(encoded), size, first, |_, _| None)?;
        prop_assert!(back == bytes);
    }

    /// The seed differs in some chunks, its table names some of these wrongly (a collision), and the target has any blocks
    /// elsewhere, also ones that were not asked about.
    #[test]
    fn what_the_target_has_is_not_packed(
        kinds in prop::collection::vec(prop_oneof![2 => Just(0u8), 1 => Just(1u8), 3 => 2u8..9], 1..120),
        zero_chunks in any::<u8>(), last_len in 1usize..=4096, first_chunk in 0u64..9,
        seed in any::<u8>(), tables in any::<u8>(),
        had in prop::collection::vec(any::<bool>(), 130), in_chunks in any::<bool>(),
    ) {
        let mut kinds = kinds;
        for (chunk, kinds) in kinds.chunks_mut(16).enumerate() {
            if zero_chunks >> chunk & 0b11 == 0b11 {
                kinds.fill(0);
            }
        }
        let bytes = content(&kinds, last_len);
        let first = first_chunk * 16;
        let range = BlockRange::new(first, first + kinds.len() as u64);
        let size = VolumeSize::new(first * BLOCK_SIZE + bytes.len() as u64).unwrap();
        let in_seed = |chunk: usize| seed >> chunk & 1 == 1;
        let in_table = |chunk: usize| in_seed(chunk) && tables >> chunk & 1 == 1;
        let same: Vec<Option<ChunkPrefix>> = bytes.chunks(65536).enumerate().map(|(at, chunk)| {
            in_table(at).then(|| Fingerprint::of_run(chunk).prefix())
        }).collect();
        let same = if in_chunks { same } else { Vec::new() };
        let had_blocks = (first.saturating_sub(2)..).zip(&had).filter(|(_, had)| **had);
        let had_blocks: Vec<u64> = had_blocks.map(|(block, _)| block).collect();

        let examined = Examined::of(range, &bytes, &same);
        let kind_of = |block: u64| {
            let at = usize::try_from(block - first).unwrap();
            let chunk = at / 16;
            let whole = kinds.get(chunk * 16..chunk * 16 + 16);
            match whole {
                Some(whole) if in_chunks && in_table(chunk) && whole.iter().any(|k| *k > 0) => Content::Same,
                _ if kinds[at] == 0 => Content::Zero,
                _ => Content::Invalid,
            }
        };
        let asked: Vec<u64> = (range.start..range.end)
            .filter(|block| kind_of(*block) == Content::Invalid).collect();
        prop_assert_eq!(examined.needs_probe(), !asked.is_empty());
        let probe = examined.probe(Seq(5));
        prop_assert_eq!(probe.seq, Seq(5));
        let asks: Vec<u64> = probe.blocks.iter().flat_map(|r| r.start..r.end).collect();
        prop_assert_eq!(&asks, &asked);
        let bytes_of = |run: BlockRange| bytes_of(range, &bytes, run).to_vec();
        for (block, prefix) in asked.iter().zip(probe.prefixes()) {
            let block = bytes_of(BlockRange::single(BlockIndex(*block)));
            prop_assert_eq!(Fingerprint::of(&block).block_prefix(), prefix);
        }

        let mut encoder = Encoder::new(Compression::DEFAULT);
        let encoded = encoder.pack(&bytes, &examined, &runs(had_blocks.iter().copied()));
        for pair in encoded.entries.windows(2) {
            let kind = |entry: &Entry| std::mem::discriminant(&entry.content);
            let full = |entry: &Entry| matches!(entry.content, Content::Raw { .. } | Content::Zstd { .. });
            prop_assert!(kind(&pair[0]) != kind(&pair[1]) && !(full(&pair[0]) && full(&pair[1])), "{:?}", pair);
        }
        for entry in &encoded.entries {
            for block in entry.range.iter() {
                let expected = match kind_of(block.0) {
                    Content::Invalid if had_blocks.contains(&block.0) => Content::Copy,
                    kind => kind,
                };
                if expected == Content::Invalid {
                    let in_full = matches!(entry.content, Content::Raw { .. } | Content::Zstd { .. });
                    prop_assert!(in_full, "{:?}", entry);
                } else {
                    prop_assert_eq!(entry.content, expected, "{:?}", block);
                }
            }
        }
        let back = unpack(&message(encoded), size, first, |run, _| Some(bytes_of(run)))?;
        prop_assert!(back == bytes);
    }
}

#[test]
fn only_incompressible_content_is_raw_and_zeroes_are_free() {
    let kinds = |compression| {
        let encoded =
            Encoder::new(compression).encode(BlockRange::new(0, 3), &content(&[1, 0, 2], 4096));
        encoded
            .entries
            .iter()
            .map(|e| e.content)
            .collect::<Vec<_>>()
    };
    let raw = Content::Raw { len: 4096 };
    assert_eq!(kinds(Compression::None), [raw, Content::Zero, raw]);
    assert!(matches!(
        kinds(Compression::DEFAULT)[..],
        [
            Content::Zstd { len: ..2048 },
            Content::Zero,
            Content::Raw { len: 4096 }
        ]
    ));
}

#[test]
fn neighbouring_chunks_that_the_seed_has_are_one_entry() {
    let range = BlockRange::new(16, 80);
    let mut kinds = vec![2; 64];
    kinds[3] = 0;
    kinds[32..48].fill(0);
    let bytes = content(&kinds, 4096);
    let same: Vec<_> = bytes
        .chunks(65536)
        .map(|chunk| Some(Fingerprint::of_run(chunk).prefix()))
        .collect();
    let examined = Examined::of(range, &bytes, &same);
    assert!(!examined.needs_probe());
    let mut encoder = Encoder::new(Compression::DEFAULT);
    let encoded = encoder.pack(&bytes, &examined, &Runs::default());
    let expected = [
        (16, 48, Content::Same),
        (48, 64, Content::Zero),
        (64, 80, Content::Same),
    ];
    assert_eq!(contents(&encoded), expected);
    assert_eq!(encoded.payload.len(), 64);
    let first = Fingerprint::of_run(&bytes[..2 * 65536]);
    assert_eq!(encoded.payload[..32], *first.as_bytes());

    // A replica that is as it was costs next to nothing: a MiB is an entry and a fingerprint.
    let bytes = content(&[3; 256], 4096);
    let same = vec![Some(Fingerprint::of_run(&bytes[..65536]).prefix()); 16];
    let range = BlockRange::new(0, 256);
    let examined = Examined::of(range, &bytes, &same);
    let encoded = encoder.pack(&bytes, &examined, &Runs::default());
    assert_eq!(contents(&encoded), [(0, 256, Content::Same)]);
}

#[test]
fn another_seed_or_a_chunk_that_is_cut_is_not_the_same() {
    let mut encoder = Encoder::new(Compression::DEFAULT);
    let range = BlockRange::new(16, 32);
    let (bytes, other) = (content(&[2; 16], 4096), content(&[3; 16], 4096));
    let same = [Some(Fingerprint::of_run(&bytes).prefix())];
    let examined = Examined::of(range, &other, &same);
    assert!(examined.needs_probe());
    let packed = encoder.encode(range, &other);
    assert_eq!(encoder.pack(&other, &examined, &Runs::default()), packed);

    let cut = &bytes[..15 * 4096 + 1 - 4096];
    let same = [Some(Fingerprint::of_run(cut).prefix())];
    let range = BlockRange::new(16, 31);
    let examined = Examined::of(range, cut, &same);
    assert!(examined.needs_probe(), "the wire carries whole chunks only");

    // A short last block is no hindrance.
    let short = &bytes[..15 * 4096 + 1];
    let same = [Some(Fingerprint::of_run(short).prefix())];
    let examined = Examined::of(BlockRange::new(16, 32), short, &same);
    assert!(!examined.needs_probe());
}

/// Prints how fast content is looked at: `cargo test --release -p flimcd-content -- --ignored --nocapture speed`.
#[test]
#[ignore = "measures"]
#[expect(
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a measurement"
)]
fn speed_of_a_look() {
    let range = BlockRange::new(0, 256);
    let data = content(&(0..=255).map(|n| n | 2).collect::<Vec<_>>(), 4096);
    let zeroes = vec![0; 1 << 20];
    let half: Vec<u8> = content(&[0, 2].repeat(128), 4096);
    for (what, bytes) in [("data", &data), ("half zero", &half), ("zeroes", &zeroes)] {
        let same: Vec<_> = bytes
            .chunks(65536)
            .map(|chunk| Some(Fingerprint::of_run(chunk).prefix()))
            .collect();
        for (kind, same) in [("", &[][..]), (", with a seed", &same[..])] {
            let begun = std::time::Instant::now();
            let mut rounds = 0u32;
            while begun.elapsed().as_millis() < 1500 {
                let examined = Examined::of(range, std::hint::black_box(bytes), same);
                std::hint::black_box(examined.needs_probe());
                rounds += 1;
            }
            let rate = f64::from(rounds) * 1.048_576 / begun.elapsed().as_secs_f64();
            eprintln!("{what}{kind}: {rate:.0} MB/s");
        }
    }
}
