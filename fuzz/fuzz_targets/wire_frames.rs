//! The frame decoder meets a hostile stream, cut into pieces anywhere. It must neither panic nor take
//! memory that no bytes arrived for, and what it lets through must survive a second round trip.
#![no_main]

use bytes::BufMut;
use flimcd_core::limits::MAX_FRAME_BYTES;
use flimcd_wire::{FrameDecoder, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, stream) = input;
    let mut decoder = FrameDecoder::new();
    for part in stream.chunks(usize::from(piece) + 1) {
        decoder.buffer().put_slice(part);
        loop {
            match decoder.poll() {
                Ok(Some(body)) => {
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
