//! Content that arrives: unpacked, or taken from what is at the target already, and written.

use flimcd_content::{Decoded, zero_runs};
use flimcd_core::{BlockRange, Seq};
use flimcd_migrate::DiskError;
use flimcd_volume::{ApplyData, Volume};
use flimcd_wire::{Blocks, Entry, Probe, Probed};
use std::{
    io,
    sync::{Arc, OnceLock},
};

use super::{base::disk_error, volumes::VolumeSet, workers::Tools};
use crate::library::{Finder, Library, Seeds};

/// What became of a message's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// It is on the disk.
    All,
    /// What the message refers to is not here.
    Lacking,
}

/// Whose content the volumes may share, for each of them.
pub(super) fn tenants(volumes: &VolumeSet) -> Vec<String> {
    let tenant = |volume: &Arc<Volume>| volume.record().map(|record| record.tenant.clone());
    let all = volumes.all().iter();
    all.map(|volume| tenant(volume).unwrap_or_default())
        .collect()
}

/// Where content goes, and where it may come from beside the link.
pub(super) struct Sources {
    pub(super) volumes: Arc<VolumeSet>,
    pub(super) seeds: Option<Arc<Seeds>>,
    pub(super) finder: Arc<OnceLock<Finder>>,
}

impl Sources {
    /// Which of these blocks are here. Blocks for the disk.
    pub(super) fn probe(&self, library: &Library, probe: &Probe) -> Probed {
        let finder = (self.finder).get_or_init(|| library.finder(&tenants(&self.volumes)));
        finder.probe(self.seeds.as_deref(), &self.volumes, probe)
    }

    /// Unpacks and writes one message. Of one that refers to what is not here some may be written: it is what the source had, and
    /// comes again.
    pub(super) fn write_blocks(
        &self,
        tools: &mut Tools,
        blocks: &Blocks,
    ) -> Result<Written, DiskError> {
        for (entry, payload) in blocks.parts() {
            let written = self
                .write_entry(tools, blocks.seq, entry, &payload)
                .map_err(|error| {
                    disk_error(&format!("writing blocks {:?}", entry.range), &error)
                })?;
            if written == Written::Lacking {
                return Ok(Written::Lacking);
            }
        }
        if let Some(finder) = self.finder.get() {
            finder.forget(blocks.seq);
        }
        Ok(Written::All)
    }

    fn write_entry(
        &self,
        tools: &mut Tools,
        seq: Seq,
        entry: Entry,
        payload: &[u8],
    ) -> io::Result<Written> {
        self.volumes.apply(entry, |volume, within| {
            let decoded = tools.unpack.decode(&within, payload, volume.size());
            match decoded.map_err(io::Error::other)? {
                Decoded::Zeroes => {
                    volume.apply(within.range, ApplyData::Zeroes)?;
                }
                Decoded::Bytes(bytes) => {
                    volume.apply(within.range, ApplyData::Bytes(bytes))?;
                    if let Some(finder) = self.finder.get() {
                        finder.arrived(entry.range, bytes);
                    }
                }
                Decoded::Same(expected) => {
                    let Some(seeds) = &self.seeds else {
                        return Ok(Written::Lacking);
                    };
                    let found = seeds.read(entry.range, expected, &mut tools.buffer);
                    if found.is_none() {
                        return Ok(Written::Lacking);
                    }
                    if seeds.is_in_place(entry.range) {
                        volume.apply(within.range, ApplyData::Kept)?;
                    } else {
                        write_found(volume, within.range, &tools.buffer)?;
                    }
                }
                Decoded::Copy(expected) => {
                    let buffer = &mut tools.buffer;
                    let found = self.finder.get().and_then(|finder| {
                        let seeds = self.seeds.as_deref();
                        finder.copy(seq, seeds, &self.volumes, entry.range, expected, buffer)
                    });
                    if found.is_none() {
                        return Ok(Written::Lacking);
                    }
                    write_found(volume, within.range, &tools.buffer)?;
                }
            }
            Ok(Written::All)
        })
    }
}

/// Writes what was found at the target, from the very bytes that were found to be right.
fn write_found(volume: &Volume, range: BlockRange, bytes: &[u8]) -> io::Result<()> {
    for (range, bytes) in zero_runs(range, bytes) {
        volume.apply(range, bytes.map_or(ApplyData::Zeroes, ApplyData::Bytes))?;
    }
    Ok(())
}
