#![no_main]
//! Random bytes as a client's side of the handshake: no panic, and answers in proportion to the questions.

use flimcd_nbd::handshake::{Catalogue, ExportInfo, Negotiation};
use libfuzzer_sys::fuzz_target;

struct Two;

impl Catalogue for Two {
    fn names(&self) -> Vec<String> {
        vec!["a".to_owned(), "disk".to_owned()]
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name == "a" || name == "disk").then_some(ExportInfo {
            size: 1 << 30,
            read_only: name == "a",
            block_size_min: 512,
            block_size_preferred: 4096,
            request_bytes_max: 32 << 20,
        })
    }
}

fuzz_target!(|input: (u16, Vec<u8>)| {
    let (piece, mut bytes) = input;
    // Past the flags, or nearly every input ends there.
    bytes.splice(0..0, [0, 0, 0, 3]);
    let mut negotiation = Negotiation::new();
    let (mut arrived, mut out) = (Vec::new(), Vec::new());
    negotiation.greet(&mut out);
    for part in bytes.chunks(usize::from(piece) + 1) {
        arrived.extend_from_slice(part);
        match negotiation.advance(&arrived, &Two, &mut out) {
            Ok((used, None)) => drop(arrived.drain(..used)),
            Ok((used, Some(agreed))) => {
                assert!(used <= arrived.len());
                assert!(Two.find(&agreed.name).is_some());
                assert!(agreed.structured || !agreed.allocation);
                return;
            }
            Err(_) => return,
        }
        assert!(out.len() <= 1000 + bytes.len() * 20);
    }
});
