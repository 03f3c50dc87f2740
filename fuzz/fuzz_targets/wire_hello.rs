//! The greeting and its answer, from a peer that may send anything.
#![no_main]

use flimcd_wire::{decode_hello, decode_reply, encode_hello};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some((hello, version, used))) = decode_hello(bytes) {
        assert!(used <= bytes.len() && version != 0);
        let again = encode_hello(&hello);
        let (second, ..) = decode_hello(&again).expect("encoded by us").expect("whole");
        assert_eq!(second, hello);
    }
    if let Ok(Some((_, version, used))) = decode_reply(bytes) {
        assert!(used <= bytes.len() && version != 0);
    }
});
