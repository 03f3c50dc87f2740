//! Which chunk a guest has read after which: files that lie in pieces, indexes and what they point to.
//!
//! Learned at the source, from reads in order of time, while the guest still runs there. A chunk keeps two candidates, of which the
//! second replaces the first when it is seen again. The table is bounded; what has not been used for longest in its bucket goes.

use flimcd_core::ChunkIndex;

/// Entries: 12 bytes each, 768 KiB.
const ENTRIES: usize = 1 << 16;
/// No chunk.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    chunk: u32,
    /// The one seen last, and the one seen before it.
    next: [u32; 2],
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Successors {
    /// Taken when the first thing is learned.
    entries: Vec<Entry>,
    last: Option<u32>,
}

impl Successors {
    /// The guest reads a chunk.
    pub(super) fn read(&mut self, chunk: ChunkIndex) {
        let Ok(chunk) = u32::try_from(chunk.0) else {
            return;
        };
        let before = self.last.replace(chunk);
        // The same chunk, and the one after it, need no table.
        let Some(before) = before.filter(|&before| before != chunk && before + 1 != chunk) else {
            return;
        };
        if self.entries.is_empty() {
            let empty = Entry {
                chunk: NONE,
                next: [NONE; 2],
            };
            self.entries = vec![empty; ENTRIES];
        }
        let entry = &mut self.entries[slot(before)];
        if entry.chunk != before {
            *entry = Entry {
                chunk: before,
                next: [chunk, NONE],
            };
        } else if entry.next[0] != chunk {
            entry.next = [chunk, entry.next[0]];
        }
    }

    /// What has been read after the chunk, the likelier first.
    pub(super) fn of(&self, chunk: ChunkIndex) -> impl Iterator<Item = ChunkIndex> + use<> {
        let wanted = u32::try_from(chunk.0).unwrap_or(NONE);
        let entry = self.entries.get(slot(wanted)).copied();
        entry
            .filter(|entry| entry.chunk == wanted && wanted != NONE)
            .into_iter()
            .flat_map(|entry| entry.next)
            .filter(|&next| next != NONE)
            .map(|next| ChunkIndex(u64::from(next)))
    }
}

fn slot(chunk: u32) -> usize {
    // Fibonacci hashing: neighbours do not share a slot.
    (chunk.wrapping_mul(0x9e37_79b1) >> 16) as usize % ENTRIES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(successors: &Successors, chunk: u64) -> Vec<u64> {
        successors
            .of(ChunkIndex(chunk))
            .map(|chunk| chunk.0)
            .collect()
    }

    #[test]
    fn what_followed_is_found_and_the_latest_comes_first() {
        let mut successors = Successors::default();
        assert!(of(&successors, 5).is_empty());
        for chunk in [5, 100, 5, 5, 200, 5, 6, 7] {
            successors.read(ChunkIndex(chunk));
        }
        assert_eq!(of(&successors, 5), [200, 100]);
        assert_eq!(of(&successors, 100), [5]);
        assert!(of(&successors, 6).is_empty(), "neighbours need no table");
    }
}
