//! The frame decoder meets a hostile stream, cut into pieces anywhere. It must neither panic nor take
//! memory that no bytes arrived for, and what it lets through must survive a second round trip, and be used without harm.
//!
//! Half of the inputs are given a right header, so that all of them is a message.
#![no_main]

use bytes::BufMut;
use flimcd_core::limits::{MAX_BLOCKS_PER_MESSAGE, MAX_FRAME_BYTES};
use flimcd_wire::{Body, FrameDecoder, Message, SeedTable, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (piece, is_message, bytes) = input;
    let mut stream = Vec::with_capacity(bytes.len() + 16);
    if is_message {
        stream.put_u32_le(u32::try_from(bytes.len()).expect("the fuzzer's inputs are small"));
        // Kind, class, a reserved field, and the migration's number.
        stream.put_slice(&[2, 1, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    }
    stream.put_slice(bytes);
    let mut decoder = FrameDecoder::new();
    for part in stream.chunks(usize::from(piece) + 1) {
        decoder.buffer().put_slice(part);
        loop {
            match decoder.poll() {
                Ok(Some(body)) => {
                    if let Body::Frame(frame) = &body {
                        read(&frame.message);
                    }
                    let again = encode(&body);
                    assert!(again.len() <= MAX_FRAME_BYTES + 64);
                    let mut second = FrameDecoder::new();
                    second.buffer().put_slice(&again.head);
                    second.buffer().put_slice(&again.payload);
                    assert_eq!(second.poll().expect("encoded by us"), Some(body));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});

/// What its receiver does with a message first.
fn read(message: &Message) {
    match message {
        Message::Blocks(blocks) => {
            let payload: usize = blocks.parts().map(|(_, payload)| payload.len()).sum();
            assert_eq!(payload, blocks.payload.len());
        }
        Message::Probe(probe) => {
            assert!(probe.blocks.blocks() <= MAX_BLOCKS_PER_MESSAGE);
            assert_eq!(probe.prefixes().count() as u64, probe.blocks.blocks());
        }
        Message::Probed(probed) => {
            let (same, repeated) = (u64::from(probed.same_place), u64::from(probed.repeated));
            assert!(same + repeated <= probed.had.blocks());
        }
        Message::SeedPart(part) => {
            let mut table = SeedTable::new(10_000);
            if table.add(part) {
                assert_eq!(table.is_empty(), part.chunks.blocks() == 0);
            }
        }
        _ => {}
    }
}
