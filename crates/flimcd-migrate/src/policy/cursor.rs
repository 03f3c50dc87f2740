//! A position that goes round a volume.

use flimcd_core::{BlockIndex, BlockRange, BlockSet, ChunkIndex};

/// Walks the pending blocks in ascending order, chunk by chunk, and counts how often it came round.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    at: u64,
    rounds: u64,
}

impl Cursor {
    /// Times the end of the volume was passed.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Goes on from `block`.
    pub(super) fn jump(&mut self, block: BlockIndex) {
        self.at = block.0;
    }

    /// The next pending run inside one chunk for which `wanted` holds, going round at most once.
    pub(super) fn next(
        &mut self,
        pending: &BlockSet,
        mut wanted: impl FnMut(BlockRange) -> bool,
    ) -> Option<BlockRange> {
        let start = self.at;
        let mut wrapped = false;
        loop {
            let limit = if wrapped { start } else { pending.capacity() };
            let Some(run) = pending.next_run(self.at, limit) else {
                if wrapped {
                    return None;
                }
                wrapped = true;
                // Also when nothing is left to send: what gets dirty next is of the next round.
                self.rounds += u64::from(self.at > 0 || !pending.is_empty());
                self.at = 0;
                continue;
            };
            let run = run.intersect(BlockIndex(run.start).chunk().blocks());
            self.at = run.end;
            if wanted(run) {
                return Some(run);
            }
        }
    }
}

/// Chunks in an order of their own.
#[derive(Debug, Default)]
pub(super) struct Ordered {
    /// The first last.
    chunks: Vec<BlockIndex>,
}

impl Ordered {
    /// Chunks with something pending for which there is a key, those with the highest key first; at most `max`, of
    /// those that lie first.
    pub(super) fn by_key(
        pending: &BlockSet,
        max: usize,
        mut key: impl FnMut(ChunkIndex) -> Option<f64>,
    ) -> Self {
        let mut chunks: Vec<(f64, BlockIndex)> = Vec::new();
        let mut at = 0;
        while let Some(run) = pending.next_run(at, u64::MAX)
            && chunks.len() < max
        {
            let block = BlockIndex(run.start);
            chunks.extend(key(block.chunk()).map(|key| (key, block)));
            at = block.chunk().blocks().end;
        }
        chunks.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        Self {
            chunks: chunks.into_iter().map(|(_, block)| block).collect(),
        }
    }

    /// The next pending run of them inside one chunk. A chunk is over when nothing of it is pending.
    pub(super) fn next(&mut self, pending: &BlockSet) -> Option<BlockRange> {
        while let Some(&block) = self.chunks.last() {
            if let Some(run) = in_chunk(pending, block) {
                return Some(run);
            }
            self.chunks.pop();
        }
        None
    }
}

/// The first pending run of the chunk that `block` lies in.
fn in_chunk(pending: &BlockSet, block: BlockIndex) -> Option<BlockRange> {
    let chunk = block.chunk().blocks();
    pending.next_run(chunk.start, chunk.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_round_once_and_cuts_at_chunks() {
        let mut pending = BlockSet::new(100);
        pending.insert_range(BlockRange::new(10, 40));
        let mut cursor = Cursor::default();
        cursor.jump(BlockIndex(35));
        let mut got = Vec::new();
        while let Some(run) = cursor.next(&pending, |_| true) {
            pending.remove_range(run);
            got.push((run.start, run.end));
        }
        assert_eq!(got, [(35, 40), (10, 16), (16, 32), (32, 35)]);
        assert_eq!(cursor.rounds(), 2, "the end, and again with nothing left");
        assert_eq!(cursor.next(&pending, |_| true), None);
        assert_eq!(cursor.rounds(), 2, "nothing was sent since");
        pending.insert_range(BlockRange::new(0, 100));
        assert_eq!(
            cursor.next(&pending, |_| false),
            None,
            "nothing wanted, and it ends"
        );
    }
}
