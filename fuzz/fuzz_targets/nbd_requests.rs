#![no_main]
//! Random bytes as a client's requests, in random pieces: no panic, no memory beyond the bounds, and nothing that does
//! not fit the export comes out.

use flimcd_nbd::{
    handshake::{Agreed, ExportInfo},
    receive::{Command, Received, Receiver},
};
use flimcd_volume::device::BufPool;
use libfuzzer_sys::fuzz_target;

const REQUEST_MAX: u32 = 1 << 20;

fuzz_target!(|input: (u64, bool, bool, bool, u16, Vec<u8>)| {
    let (size, structured, allocation, read_only, piece, bytes) = input;
    let info = ExportInfo {
        size: size % (64 << 40) + 1,
        read_only,
        block_size_min: 1,
        block_size_preferred: 4096,
        request_bytes_max: REQUEST_MAX,
    };
    let agreed = Agreed { name: String::new(), info, structured, allocation };
    let (head, mut rest) = bytes.split_at(usize::from(piece).min(bytes.len()));
    let mut receiver = Receiver::new(agreed, head);
    let mut pool = BufPool::new(1 << 20);
    loop {
        loop {
            let request = match receiver.next(&mut pool) {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(Received::Refused { .. })) => continue,
                Ok(Some(Received::Request(request))) => request,
            };
            let is_write = matches!(request.command, Command::Write { .. });
            assert_eq!(request.payload.len(), if is_write { request.length as usize } else { 0 });
            if matches!(request.command, Command::Disconnect | Command::Flush) {
                continue;
            }
            assert!(request.length > 0 && request.offset + u64::from(request.length) <= info.size);
            assert!(!is_write || (!read_only && request.length <= REQUEST_MAX));
            pool.give(request.payload);
        }
        if rest.is_empty() {
            return;
        }
        let (payload, inbox) = receiver.space();
        let mut filled = 0;
        for part in [payload, inbox] {
            let count = part.len().min(rest.len()).min(usize::from(piece) + 1 - filled);
            part[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            filled += count;
            if count < part.len() {
                break;
            }
        }
        receiver.filled(filled);
    }
});
