//! What an increment still has to send of the moment at which its guest stood: taken into memory, so that the guest need not wait for the link.

use flimcd_core::{BLOCK_SIZE, BlockRange};
use std::{collections::BTreeMap, io};

use super::volumes::VolumeSet;

/// See the module.
pub(crate) struct Captured {
    /// Runs by their first block.
    runs: BTreeMap<u64, (BlockRange, Vec<u8>)>,
}

impl Captured {
    /// Reads these runs. Nobody may write to them meanwhile.
    pub(crate) fn take(volumes: &VolumeSet, wanted: &[BlockRange]) -> io::Result<Self> {
        let read = |&run: &BlockRange| Ok((run.start, (run, volumes.peek(run)?)));
        let runs = wanted.iter().map(read).collect::<io::Result<_>>()?;
        Ok(Self { runs })
    }

    /// Copies the bytes of `range`, which has to lie in one of the runs, to `buffer`.
    pub(crate) fn read(&self, range: BlockRange, buffer: &mut Vec<u8>) -> io::Result<()> {
        let found = self.runs.range(..=range.start).next_back();
        let (run, bytes) = found
            .map(|(_, found)| found)
            .filter(|(run, _)| range.end <= run.end)
            .ok_or_else(|| io::Error::other("blocks that were not captured"))?;
        let offset = |block: u64| usize::try_from((block - run.start) * BLOCK_SIZE);
        let start = offset(range.start).map_err(io::Error::other)?;
        let end = offset(range.end)
            .map_err(io::Error::other)?
            .min(bytes.len());
        buffer.clear();
        buffer.extend_from_slice(&bytes[start..end]);
        Ok(())
    }
}
