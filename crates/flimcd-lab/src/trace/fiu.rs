//! The FIU I/O deduplication traces (Koller and Rangaswami, FAST 2010): one request a line,
//!
//! ```text
//! ts_ns pid process lba sectors R|W major minor md5
//! ```
//! with one MD5 for each 4,096 bytes, or one for each 512, written one after the other. The hashes of
//! what is written become numbers of contents, so that blocks that were equal are equal in a replay.

use std::{sync::Arc, time::Duration};

use super::collect::{BadRecord, Collector, excerpt, number};

pub(super) const FORMAT: &str = "FIU I/O deduplication";
/// MD5 of 4,096 and of 512 zeroes.
const ZERO_BLOCK: u128 = 0x620f_0b67_a91f_7f74_151b_c5be_745b_7110;
const ZERO_SECTOR: u128 = 0xbf61_9eac_0cdf_3f68_d496_ea93_4413_7e8b;
const SECTORS_PER_BLOCK: usize = 8;
/// Hexadecimal digits of an MD5.
const DIGITS: usize = 32;
/// Fields after the process, whose name may hold spaces.
const AFTER_NAME: usize = 6;

/// Takes one line.
pub(super) fn line(line: &str, collector: &mut Collector) -> Result<(), BadRecord> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    if fields.len() < 3 + AFTER_NAME {
        return Err(BadRecord::Fields {
            found: fields.len(),
            wanted: "9 (ts_ns pid process lba sectors R|W major minor md5)",
        });
    }
    let at = Duration::from_nanos(number("time", fields[0])?);
    let &[lba, sectors, kind, major, minor, hashes] = &fields[fields.len() - AFTER_NAME..] else {
        unreachable!("so many were asked for");
    };
    let is_write = match kind {
        "R" | "r" => false,
        "W" | "w" => true,
        other => return Err(BadRecord::Type(excerpt(other))),
    };
    let (sector, sectors) = (number("lba", lba)?, number("size", sectors)?);
    number("pid", fields[1])?;
    let bytes = sectors
        .checked_mul(512)
        .ok_or(BadRecord::Length(u64::MAX))?;
    let hashes = parse_hashes(hashes)?;
    let contents = blocks(&hashes, sectors)?;
    let (major, minor) = (number("major", major)?, number("minor", minor)?);
    let device = collector.device(&format!("{major}:{minor}"))?;
    // What was read says nothing of what the replay writes.
    let contents = contents.filter(|_| is_write).map(|contents| -> Arc<[u32]> {
        contents
            .into_iter()
            .map(|content| collector.content(content))
            .collect()
    });
    collector.push(at, is_write, (device, sector, bytes), contents)
}

fn parse_hashes(text: &str) -> Result<Vec<u128>, BadRecord> {
    let bad = || BadRecord::Hash(excerpt(text));
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || !text.len().is_multiple_of(DIGITS) {
        return Err(bad());
    }
    let hash = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok()?;
        u128::from_str_radix(digits, 16).ok()
    };
    let hashes: Option<Vec<u128>> = text.as_bytes().chunks(DIGITS).map(hash).collect();
    hashes.ok_or_else(bad)
}

/// The contents of the blocks, `None` each for zeroes; nothing for a request that is not of whole blocks.
fn blocks(hashes: &[u128], sectors: u64) -> Result<Option<Vec<Option<u128>>>, BadRecord> {
    let count = hashes.len();
    let is_whole = sectors.is_multiple_of(SECTORS_PER_BLOCK as u64);
    if count as u64 == sectors {
        let joined = |hashes: &[u128]| {
            let is_zero = hashes.iter().all(|hash| *hash == ZERO_SECTOR);
            (!is_zero).then(|| join(hashes))
        };
        return Ok(is_whole.then(|| hashes.chunks(SECTORS_PER_BLOCK).map(joined).collect()));
    }
    if count as u64 != sectors.div_ceil(SECTORS_PER_BLOCK as u64) {
        return Err(BadRecord::Hashes {
            hashes: count,
            sectors,
        });
    }
    let block = |hash: &u128| (*hash != ZERO_BLOCK).then_some(*hash);
    Ok(is_whole.then(|| hashes.iter().map(block).collect()))
}

/// One number for the sectors of a block.
fn join(hashes: &[u128]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for hash in hashes {
        hasher.update(&hash.to_be_bytes());
    }
    let mut first = [0; 16];
    hasher.finalize_xof().fill(&mut first);
    u128::from_be_bytes(first)
}
