//! Hashes of pieces of a volume, without the blocks that one side has written since.

use flimcd_content::Fingerprint;
use flimcd_core::{BLOCK_SIZE, BlockRange};
use flimcd_volume::Volume;
use flimcd_wire::CheckAsk;
use std::io;

/// Read at once: 1 MiB.
const READ_BLOCKS: u64 = 256;

/// The pieces of a question, read and hashed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    pub(super) hashes: Vec<Fingerprint>,
    /// Blocks that were left out, in ascending runs.
    pub(super) left_out: Vec<BlockRange>,
}

/// Reads what `ask` is about and hashes it. `leave_out` is asked for a range after that was read, and says what of it does not count; `None`
/// ends it, with `None`. Blocks for the disk.
pub(super) fn hash(
    volume: &Volume,
    ask: CheckAsk,
    mut leave_out: impl FnMut(BlockRange) -> io::Result<Option<Vec<BlockRange>>>,
) -> io::Result<Option<Pieces>> {
    let mut pieces = Pieces {
        hashes: Vec::new(),
        left_out: Vec::new(),
    };
    let mut blocks = Vec::new();
    let block_bytes = usize::try_from(BLOCK_SIZE).map_err(io::Error::other)?;
    let mut at = ask.range.start;
    while at < ask.range.end {
        let part = BlockRange::new(at, ask.range.end.min(at + READ_BLOCKS));
        let content = volume.peek(part)?;
        let Some(left_out) = leave_out(part)? else {
            return Ok(None);
        };
        let mut out = left_out.iter().copied().peekable();
        for (block, content) in (part.start..part.end).zip(content.chunks(block_bytes)) {
            if block > ask.range.start && (block - ask.range.start).is_multiple_of(ask.piece_blocks)
            {
                pieces.hashes.push(Fingerprint::over(&blocks));
                blocks.clear();
            }
            while out.next_if(|run| run.end <= block).is_some() {}
            if out.peek().is_none_or(|run| block < run.start) {
                blocks.push(Fingerprint::of_block(content));
            }
        }
        pieces.left_out.extend(left_out);
        at = part.end;
    }
    pieces.hashes.push(Fingerprint::over(&blocks));
    Ok(Some(pieces))
}

/// What of `runs`, which ascend, lies in `range`.
pub(super) fn within(runs: &[BlockRange], range: BlockRange) -> Vec<BlockRange> {
    runs.iter()
        .map(|run| run.intersect(range))
        .filter(|run| !run.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_volume::{
        ApplyData,
        device::{FileDevice, OpenOptions},
        rules::Mode,
    };
    use std::sync::Arc;

    const BLOCKS: u64 = 600;

    /// Blocks that all differ; the last one is short.
    fn volume() -> Arc<Volume> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(BLOCKS * BLOCK_SIZE - 1000).unwrap();
        let device = FileDevice::open(file.path(), &OpenOptions::default()).unwrap();
        let volume = Volume::ephemeral("vm".parse().unwrap(), Arc::new(device), Mode::Incoming);
        for block in 0..BLOCKS {
            put(&volume, block, &block.to_le_bytes());
        }
        volume
    }

    fn put(volume: &Volume, block: u64, start: &[u8]) {
        let range = BlockRange::new(block, block + 1);
        let mut bytes = vec![0; usize::try_from(range.bytes(volume.size()).len()).unwrap()];
        bytes[..start.len()].copy_from_slice(start);
        volume.apply(range, ApplyData::Bytes(&bytes)).unwrap();
    }

    fn hashes(volume: &Volume, start: u64, end: u64, piece: u64, out: &[BlockRange]) -> Pieces {
        let ask = CheckAsk {
            volume: 0,
            range: BlockRange::new(start, end),
            piece_blocks: piece,
        };
        let pieces = hash(volume, ask, |part| Ok(Some(within(out, part))));
        let pieces = pieces.unwrap().unwrap();
        assert_eq!(pieces.hashes.len() as u64, ask.pieces());
        pieces
    }

    #[test]
    fn pieces_are_runs_and_what_is_left_out_does_not_show() {
        let one = volume();
        let content = one.peek(BlockRange::new(0, BLOCKS)).unwrap();
        let whole = hashes(&one, 0, BLOCKS, BLOCKS, &[]);
        assert_eq!(whole.hashes, [Fingerprint::of_run(&content)]);
        let parts = hashes(&one, 0, BLOCKS, 16, &[]);
        let expected: Vec<_> = content.chunks(16 * 4096).map(Fingerprint::of_run).collect();
        assert_eq!(parts.hashes, expected);

        let other = volume();
        for block in [3, 255, 256, 599] {
            put(&other, block, b"written");
        }
        assert_ne!(hashes(&other, 0, BLOCKS, BLOCKS, &[]), whole);
        let written = [
            BlockRange::new(2, 4),
            BlockRange::new(250, 257),
            BlockRange::new(599, 600),
        ];
        for piece in [1, 16, 256, 600] {
            let left = hashes(&one, 0, BLOCKS, piece, &written);
            assert_eq!(left, hashes(&other, 0, BLOCKS, piece, &written), "{piece}");
            assert!(left.left_out.iter().map(|run| run.len()).sum::<u64>() == 10);
        }
        put(&other, 300, b"wrong");
        let (a, b) = (
            hashes(&one, 256, 512, 1, &written),
            hashes(&other, 256, 512, 1, &written),
        );
        let differ: Vec<_> = (0..256)
            .filter(|&at| a.hashes[at] != b.hashes[at])
            .collect();
        assert_eq!(differ, [44]);
    }

    #[test]
    fn it_ends_when_nobody_knows_any_more_what_to_leave_out() {
        let ask = CheckAsk {
            volume: 0,
            range: BlockRange::new(0, BLOCKS),
            piece_blocks: BLOCKS,
        };
        let mut calls = 0;
        let hashed = hash(&volume(), ask, |_| {
            calls += 1;
            Ok((calls < 3).then(Vec::new))
        });
        assert_eq!(hashed.unwrap(), None);
    }
}
