//! What is hot: counted from guests' requests, over restarts and moves.

use std::fs;

use flimcd_core::{BlockRange, ChunkIndex, Heat, Time};
use flimcd_volume::{ApplyData, HEAT_HALF_LIFE, HeatKind, RequestKind, device::IoBuf};

use super::{arriving, ask, create, incoming, open, owner, read, set, size, write};

fn counts(heat: &Heat) -> Vec<(u64, u64)> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole small counts, unless the machine slept for a minute"
    )]
    let count = |(chunk, count): (ChunkIndex, f64)| (chunk.0, count as u64);
    heat.chunks().map(count).collect()
}

#[test]
fn heat_is_counted_and_survives_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let volume = create(dir.path(), 64, owner(1));
    assert!(!volume.store_heat().unwrap(), "nothing to say");
    let mut port = volume.guest_port().unwrap();
    write(&mut port, 17, 1);
    for _ in 0..3 {
        read(&mut port, 17);
    }
    read(&mut port, 40);
    ask(&mut port, RequestKind::Trim, 50, IoBuf::empty())
        .result
        .unwrap();
    drop(port);
    let before = volume.memory_bytes();
    let heat = volume.heat();
    assert_eq!(counts(&heat.read), [(1, 3), (2, 1)]);
    assert_eq!(counts(&heat.write), [(1, 1)]);
    assert!(before >= 2 * 4096, "heat is part of what a volume takes");
    assert!(volume.store_heat().unwrap());
    assert!(!volume.store_heat().unwrap(), "nothing new");
    drop(volume);

    let volume = open(dir.path());
    let heat = volume.heat();
    assert_eq!(counts(&heat.read), [(1, 3), (2, 1)]);
    assert_eq!((heat.reads.requests, heat.writes.blocks), (4, 1));
    drop(volume);
    let file = dir.path().join("volumes/vm/heat");
    let mut bytes = fs::read(&file).unwrap();
    bytes[60] ^= 1;
    fs::write(&file, bytes).unwrap();
    let volume = open(dir.path());
    assert_eq!(counts(&volume.heat().read), [], "damaged is cold");
    let mut port = volume.guest_port().unwrap();
    read(&mut port, 0);
    drop(port);
    assert!(volume.store_heat().unwrap());
    drop(volume);
    assert_eq!(counts(&open(dir.path()).heat().read), [(0, 1)]);
}

#[test]
fn what_arrives_is_merged_and_reads_before_the_switch_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let volume = create(dir.path(), 64, incoming());
    volume.set_read_log(true);
    let mut port = volume.guest_port().unwrap();
    volume.set_peeking(true);
    let reply = {
        port.submit(flimcd_volume::GuestRequest {
            id: 1,
            kind: RequestKind::Read,
            offset: 0,
            length: 4096,
            fua: false,
            buf: IoBuf::zeroed(4096),
        });
        port.kick().unwrap();
        let peek = volume.poll_peek().unwrap();
        volume.answer_peek(peek.number, Some(&[0; 4096]));
        super::wait(&mut port)
    };
    reply.result.unwrap();
    volume.take_over(set(64, &[(4, 5)]), arriving(2)).unwrap();
    let mut brought = Heat::new(size(64), HEAT_HALF_LIFE, Time::ZERO);
    brought.add(ChunkIndex(3), 7, Time::ZERO);
    volume.merge_heat(HeatKind::Write, &brought);
    read(&mut port, 0);
    volume
        .apply(BlockRange::new(4, 5), ApplyData::Zeroes)
        .unwrap();
    read(&mut port, 4);
    let heat = volume.heat();
    assert_eq!(counts(&heat.read), [(0, 2)]);
    assert_eq!(counts(&heat.write), [(3, 7)]);
    let mut reads = Vec::new();
    volume.take_reads(&mut reads);
    assert_eq!(reads, [BlockRange::new(0, 1), BlockRange::new(4, 5)]);
}
