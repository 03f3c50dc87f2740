//! Payloads from a peer, unpacked for a small volume: never more bytes than the blocks have.
#![no_main]

use flimcd_content::{Decoded, Decoder};
use flimcd_core::{BlockRange, VolumeSize, limits::MAX_BLOCKS_PER_MESSAGE};
use flimcd_wire::{Content, Entry};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, u16, u32, &[u8])| {
    let (kind, start, len, volume_bytes, payload) = input;
    let Ok(size) = VolumeSize::new(u64::from(volume_bytes)) else {
        return;
    };
    let range = BlockRange::new(u64::from(start), u64::from(start) + u64::from(len));
    let payload_len = u32::try_from(payload.len()).expect("the fuzzer's inputs are small");
    let content = match kind % 6 {
        3 => Content::Same,
        4 => Content::Copy,
        5 => Content::Invalid,
        0 => Content::Zero,
        1 => Content::Raw { len: payload_len },
        _ => Content::Zstd { len: payload_len },
    };
    let entry = Entry { range, content };
    let mut decoder = Decoder::new();
    match decoder.decode(&entry, payload, size) {
        Ok(Decoded::Bytes(bytes)) => assert_eq!(bytes.len() as u64, range.bytes(size).len()),
        Ok(Decoded::Same(fingerprint)) => {
            assert!(entry.is_whole_chunks() && range.len() <= MAX_BLOCKS_PER_MESSAGE);
            assert_eq!(fingerprint.as_bytes(), payload);
        }
        Ok(Decoded::Copy(fingerprint)) => {
            assert!(range.len() <= MAX_BLOCKS_PER_MESSAGE);
            assert_eq!(fingerprint.as_bytes(), payload);
        }
        Ok(Decoded::Zeroes) | Err(_) => {}
    }
});
