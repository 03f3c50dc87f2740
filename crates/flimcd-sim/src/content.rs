//! What lies in a sector: a stamp that says which write put it there, its own position, and a pattern of both, so that
//! misplaced, mixed and torn content is told from everything that was ever written.

use crate::dice::mix;

/// Smallest unit that a disk writes as a whole.
pub(crate) const SECTOR: u64 = 512;
/// [`SECTOR`] as a length in memory.
pub(crate) const SECTOR_LEN: usize = 512;
/// Stamp of zeroes.
pub(crate) const ZERO: u64 = 0;
/// Stamp of what the image held in the beginning.
pub(crate) const INITIAL: u64 = 1;
/// Stamps from here on leave the same bytes in every block: what is written by them can be found elsewhere.
pub(crate) const COMMON: u64 = 1 << 60;
/// Sectors of a block.
const BLOCK_SECTORS: u64 = 8;

/// Fills the bytes of whole sectors from `sector` on; the last one may be short.
pub(crate) fn fill(bytes: &mut [u8], sector: u64, stamp: u64) {
    for (piece, sector) in bytes.chunks_mut(SECTOR_LEN).zip(sector..) {
        if stamp == ZERO {
            piece.fill(0);
        } else {
            fill_sector(piece, sector, stamp);
        }
    }
}

fn fill_sector(bytes: &mut [u8], sector: u64, stamp: u64) {
    let sector = if stamp >= COMMON {
        sector % BLOCK_SECTORS
    } else {
        sector
    };
    let seed = mix(stamp ^ sector.rotate_left(40));
    // Every third stamp does not compress.
    let step = if stamp.is_multiple_of(3) {
        0x9e37_79b9_7f4a_7c15
    } else {
        0
    };
    let mut state = seed;
    for word in bytes.chunks_mut(8) {
        state = state.wrapping_add(step);
        let value = if step == 0 { state } else { mix(state) };
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
    put(bytes, 0, stamp);
    put(bytes, 8, sector);
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// The stamp of a sector's bytes; `None` when they were never written as a whole.
pub(crate) fn stamp_of(bytes: &[u8], sector: u64) -> Option<u64> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Some(ZERO);
    }
    let stamp = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let mut want = [0; SECTOR_LEN];
    let want = &mut want[..bytes.len()];
    fill_sector(want, sector, stamp);
    (stamp != ZERO && want == bytes).then_some(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_who_wrote_it_and_where() {
        for stamp in [ZERO, INITIAL, 2, 3, 77_777] {
            let mut bytes = vec![0xee; 3 * SECTOR_LEN - 100];
            fill(&mut bytes, 40, stamp);
            for (piece, sector) in bytes.chunks(SECTOR_LEN).zip(40..) {
                assert_eq!(stamp_of(piece, sector), Some(stamp));
                if stamp != ZERO {
                    assert_eq!(stamp_of(piece, sector + 1), None, "misplaced");
                }
            }
            if stamp != ZERO {
                bytes[300] ^= 1;
                assert_eq!(stamp_of(&bytes[..SECTOR_LEN], 40), None, "torn");
            }
        }
    }

    #[test]
    fn common_content_is_the_same_in_every_block_and_at_no_other_place_in_it() {
        let filled = |sector| {
            let mut bytes = vec![0xee; SECTOR_LEN];
            fill(&mut bytes, sector, COMMON + 5);
            bytes
        };
        assert_eq!(filled(3), filled(83));
        assert_eq!(stamp_of(&filled(3), 83), Some(COMMON + 5));
        assert_eq!(stamp_of(&filled(3), 84), None, "misplaced");
    }
}
