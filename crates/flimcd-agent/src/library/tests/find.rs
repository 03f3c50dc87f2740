//! Finding blocks anywhere, and not finding what must not be found.

use super::*;
use flimcd_core::{BLOCK_SIZE, BlockIndex, BlockRange, Seq};
use flimcd_volume::ApplyData;
use flimcd_wire::{Content, Entry as WireEntry, Probe, Probed, Runs};
use std::os::unix::fs::FileExt;

/// A block of which the content says who it is.
fn block(number: u64) -> Vec<u8> {
    let mut block = vec![0x5a; 4096];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

/// An image of such blocks; zero is a hole.
fn image_of(path: &Path, blocks: &[u64]) {
    let file = File::create(path).unwrap();
    file.set_len(blocks.len() as u64 * BLOCK_SIZE).unwrap();
    for (at, &number) in (0..).zip(blocks) {
        if number > 0 {
            file.write_all_at(&block(number), at * BLOCK_SIZE).unwrap();
        }
    }
}

fn probe(seq: u64, first: u64, blocks: &[u64]) -> Probe {
    let prefixes = blocks.iter().flat_map(|&number| {
        Fingerprint::of_block(&block(number))
            .block_prefix()
            .0
            .to_le_bytes()
    });
    Probe {
        seq: Seq(seq),
        blocks: Runs::new([BlockRange::new(first, first + blocks.len() as u64)]),
        payload: prefixes.collect::<Vec<u8>>().into(),
    }
}

fn run_of(blocks: &[u64]) -> Fingerprint {
    let content: Vec<u8> = blocks.iter().flat_map(|&number| block(number)).collect();
    Fingerprint::of_run(&content)
}

fn had(probed: &Probed) -> Vec<BlockRange> {
    probed.had.iter().collect()
}

fn finder(at: &Fixture, tenant: &str) -> Finder {
    at.library.finder(&[tenant.to_owned()])
}

/// Writes content as what has arrived.
fn arrive(volumes: &VolumeSet, first: u64, blocks: &[u64]) -> (BlockRange, Vec<u8>) {
    let range = BlockRange::new(first, first + blocks.len() as u64);
    let bytes: Vec<u8> = blocks.iter().flat_map(|&number| block(number)).collect();
    let entry = WireEntry {
        range,
        content: Content::Raw {
            len: u32::try_from(bytes.len()).unwrap(),
        },
    };
    let write =
        |volume: &Volume, within: WireEntry| volume.apply(within.range, ApplyData::Bytes(&bytes));
    volumes.apply(entry, write).unwrap();
    (range, bytes)
}

#[test]
fn blocks_are_found_anywhere_and_taken_as_runs() {
    let at = Fixture::new();
    image_of(&at.path("base"), &[1, 2, 3, 0, 4, 5]);
    at.add(&at.request("base"));
    let volumes = at.arriving(&[2]);
    let finder = finder(&at, "default");
    let probed = finder.probe(None, &volumes, &probe(7, 10, &[5, 9, 3, 1, 8]));
    assert_eq!(
        had(&probed),
        [BlockRange::new(10, 11), BlockRange::new(12, 14)]
    );
    assert_eq!((probed.same_place, probed.repeated), (0, 0));
    let mut buffer = Vec::new();
    let mut copy = |seq, run: (u64, u64), expected| {
        let run = BlockRange::new(run.0, run.1);
        finder.copy(Seq(seq), None, &volumes, run, expected, &mut buffer)
    };
    assert!(copy(7, (12, 14), run_of(&[3, 1])).is_some());
    assert!(
        copy(7, (12, 14), run_of(&[3, 2])).is_none(),
        "other content"
    );
    assert!(copy(7, (11, 13), run_of(&[9, 3])).is_none(), "not promised");
    assert!(copy(8, (12, 14), run_of(&[3, 1])).is_none(), "not asked");
    finder.forget(Seq(7));
    assert!(copy(7, (12, 14), run_of(&[3, 1])).is_none(), "forgotten");
}

#[test]
fn what_has_arrived_is_found_again_until_it_is_overwritten() {
    let at = Fixture::new();
    let volumes = at.arriving(&[4]);
    let finder = finder(&at, "default");
    let (range, bytes) = arrive(&volumes, 3, &[1, 2]);
    finder.arrived(range, &bytes);
    let again = probe(1, 20, &[2, 1, 3]);
    let probed = finder.probe(None, &volumes, &again);
    assert_eq!(had(&probed), [BlockRange::new(20, 22)]);
    assert_eq!(probed.repeated, 2);
    let in_place = finder.probe(None, &volumes, &probe(2, 3, &[1]));
    assert_eq!((in_place.same_place, in_place.repeated), (1, 0));
    arrive(&volumes, 3, &[7, 2]);
    let run = BlockRange::new(20, 22);
    let copied = finder.copy(
        Seq(1),
        None,
        &volumes,
        run,
        run_of(&[2, 1]),
        &mut Vec::new(),
    );
    assert!(copied.is_none(), "it was written meanwhile");
    let probed = finder.probe(None, &volumes, &again);
    assert_eq!(had(&probed), [BlockRange::new(20, 21)]);
}

/// Neither bytes nor hits: for another tenant it is as if the image was not there.
#[test]
fn nothing_of_another_tenant_is_found() {
    let at = Fixture::new();
    image_of(&at.path("theirs"), &[1, 2, 3]);
    image_of(&at.path("everybody"), &[4]);
    let theirs = AddLibraryImage {
        tenant: Some("acme".to_owned()),
        ..at.request("theirs")
    };
    let everybody = AddLibraryImage {
        public: true,
        ..at.request("everybody")
    };
    at.add(&theirs);
    at.add(&everybody);
    let volumes = at.arriving(&[2]);
    let asked = probe(1, 0, &[1, 2, 3, 4]);
    let found = |tenant| had(&finder(&at, tenant).probe(None, &volumes, &asked));
    assert_eq!(found("acme"), [BlockRange::new(0, 4)]);
    assert_eq!(found("default"), [BlockRange::new(3, 4)]);
    let opened = at.library.indexed(&["default".to_owned()]);
    assert_eq!(opened.len(), 1, "it is not even opened");
    // Volumes of several tenants that move together are kept apart, too.
    let volumes = at.arriving(&[1, 1]);
    let tenants = ["acme".to_owned(), "default".to_owned()];
    let finder = at.library.finder(&tenants);
    let second = volumes.layout().all_blocks().nth(1).unwrap().start;
    let asked = |seq, first| finder.probe(None, &volumes, &probe(seq, first, &[1, 4, 9]));
    assert_eq!(had(&asked(1, 0)), [BlockRange::new(0, 2)]);
    let only_public = BlockRange::new(second + 1, second + 2);
    assert_eq!(had(&asked(2, second)), [only_public]);
    let (range, bytes) = arrive(&volumes, 5, &[9]);
    finder.arrived(range, &bytes);
    assert_eq!(had(&asked(3, second)), [only_public], "nor what has come");
    assert_eq!(had(&asked(4, 0)).len(), 1);
    assert_eq!(asked(4, 0).repeated, 1);
}

#[test]
fn an_image_that_changes_or_vanishes_under_its_index_is_no_longer_found() {
    let at = Fixture::new();
    image_of(&at.path("base"), &[1, 2, 3]);
    at.add(&at.request("base"));
    let volumes = at.arriving(&[2]);
    let finder = finder(&at, "default");
    let asked = probe(1, 8, &[1, 2, 3]);
    assert_eq!(had(&finder.probe(None, &volumes, &asked)).len(), 1);
    let run = BlockRange::new(8, 11);
    let taken = |expected| {
        let mut buffer = Vec::new();
        finder.copy(Seq(1), None, &volumes, run, expected, &mut buffer)
    };
    // Written in place, after it was asked for.
    image_of(&at.path("other"), &[1, 9, 3]);
    let file = File::options().write(true).open(at.path("base")).unwrap();
    file.write_all_at(&block(9), BLOCK_SIZE).unwrap();
    assert!(taken(run_of(&[1, 2, 3])).is_none());
    let probed = finder.probe(None, &volumes, &asked);
    let rest = [BlockRange::new(8, 9), BlockRange::new(10, 11)];
    assert_eq!(had(&probed), rest);
    // Cut short.
    file.set_len(BLOCK_SIZE + 100).unwrap();
    assert_eq!(had(&finder.probe(None, &volumes, &asked)), [rest[0]]);
    // A later migration does not use it at all.
    assert_eq!(at.library.indexed(&["default".to_owned()]).len(), 0);
    fs::remove_file(at.path("base")).unwrap();
    assert_eq!(at.library.indexed(&["default".to_owned()]).len(), 0);
}

/// An index that says a wrong place, as where two blocks have one prefix: it is read, compared and passed over.
#[test]
fn a_wrong_place_is_never_promised_or_taken() {
    let at = Fixture::new();
    image_of(&at.path("base"), &[1, 2, 3]);
    at.add(&at.request("base"));
    let volumes = at.arriving(&[2]);
    let prefix = |number| Fingerprint::of_block(&block(number)).block_prefix();
    let path = at.dir.path().join("forged");
    let root = Fingerprint::of(b"any");
    let mut forged = index::IndexBuilder::resume(&path, 0).unwrap();
    // Block 7 is nowhere; block 2 is at 1.
    forged.push(prefix(7), BlockIndex(1));
    forged.push(prefix(2), BlockIndex(1));
    forged.push(prefix(3), BlockIndex(1 << 39));
    forged.finish(root).unwrap();
    let indexed = Indexed {
        tenant: None,
        file: File::open(at.path("base")).unwrap(),
        index: ContentIndex::open(&path, root).unwrap(),
    };
    let finder = Finder::over(&["default".to_owned()], vec![indexed]);
    let probed = finder.probe(None, &volumes, &probe(1, 0, &[7, 2, 3]));
    assert_eq!(had(&probed), [BlockRange::new(1, 2)]);
    // A whole prefix that collides: promised, and not taken, because all 32 bytes count.
    let mut collides = *run_of(&[2]).as_bytes();
    collides[31] ^= 1;
    let run = BlockRange::new(1, 2);
    let expected = Fingerprint::from_bytes(collides);
    let mut buffer = Vec::new();
    let taken = finder.copy(Seq(1), None, &volumes, run, expected, &mut buffer);
    assert!(taken.is_none());
    let right = finder.copy(Seq(1), None, &volumes, run, run_of(&[2]), &mut buffer);
    assert!(right.is_some() && buffer == block(2));
}

/// Bits that flip anywhere in the files of the library: what is taken is right, or nothing is.
#[test]
fn flipped_bits_never_give_wrong_content() {
    let at = Fixture::new();
    let blocks: Vec<u64> = (1..=400).collect();
    image_of(&at.path("base"), &blocks);
    let name = at.add(&at.request("base"));
    let volumes = at.arriving(&[1]);
    let path = record::index_path(&at.library.dir, &Key::image(&name));
    let sound = fs::read(&path).unwrap();
    for step in 0..200usize {
        let mut bytes = sound.clone();
        let place = step * 7919 % bytes.len();
        bytes[place] ^= 1 << (step % 8);
        fs::write(&path, &bytes).unwrap();
        let finder = finder(&at, "default");
        let wanted = [1 + step as u64, 200, 1000];
        let probed = finder.probe(None, &volumes, &probe(1, 0, &wanted));
        for run in had(&probed) {
            let of =
                &wanted[usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap()];
            let mut buffer = Vec::new();
            let copied = finder.copy(Seq(1), None, &volumes, run, run_of(of), &mut buffer);
            assert!(copied.is_some(), "nobody has written it");
            let expected: Vec<u8> = of.iter().flat_map(|&number| block(number)).collect();
            assert!(buffer == expected);
        }
        at.read_all();
        fs::write(&path, &sound).unwrap();
    }
}
