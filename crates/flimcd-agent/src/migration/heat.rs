//! What guests read and what is hot, on the way between the volumes and the machines. A machine knows one range of blocks;
//! each volume counts for itself.

use flimcd_core::{BLOCKS_PER_CHUNK, BlockRange, ChunkIndex, Heat, Time};
use flimcd_volume::{HEAT_HALF_LIFE, HeatKind};
use flimcd_wire as wire;
use std::time::Duration;

use super::volumes::VolumeSet;

/// How long reads at the target are collected before its machine hears of them.
pub(super) const READS_DELAY: Duration = Duration::from_millis(5);

/// What is hot in all volumes of a migration: reads and writes, by the chunks of their layout.
pub(crate) struct HeatTogether {
    pub(crate) reads: Heat,
    pub(crate) writes: Heat,
}

impl VolumeSet {
    /// Whether the volumes keep a log of what their guests read.
    pub(crate) fn set_read_log(&self, is_on: bool) {
        for volume in self.all() {
            volume.set_read_log(is_on);
        }
    }

    /// What guests have read since the last call, in order of time for each volume.
    pub(crate) fn take_reads(&self) -> Vec<BlockRange> {
        let mut reads = Vec::new();
        for (volume, blocks) in self.all().iter().zip(self.layout().all_blocks()) {
            let first = reads.len();
            volume.take_reads(&mut reads);
            for read in &mut reads[first..] {
                *read = BlockRange::new(read.start + blocks.start, read.end + blocks.start);
            }
        }
        reads
    }

    /// What is hot.
    pub(crate) fn heat(&self) -> HeatTogether {
        let cold = || Heat::new(self.layout().size(), HEAT_HALF_LIFE, Time::ZERO);
        let (mut reads, mut writes) = (cold(), cold());
        for (volume, blocks) in self.all().iter().zip(self.layout().all_blocks()) {
            // Each begins at a chunk's first block.
            let first = ChunkIndex(blocks.start / BLOCKS_PER_CHUNK);
            let heat = volume.heat();
            reads.merge(&heat.read, first);
            writes.merge(&heat.write, first);
        }
        HeatTogether { reads, writes }
    }

    /// Adds what was hot at the source to the volumes' own. False for what makes no sense; it changes nothing then.
    pub(crate) fn keep_heat(&self, part: &wire::HeatPart) -> bool {
        let kind = match part.kind {
            wire::HeatKind::Read => HeatKind::Read,
            wire::HeatKind::Write => HeatKind::Write,
            wire::HeatKind::Invalid => return false,
        };
        let Some(heat) = part.heat(HEAT_HALF_LIFE) else {
            return false;
        };
        for (volume, blocks) in self.all().iter().zip(self.layout().all_blocks()) {
            let first = blocks.start / BLOCKS_PER_CHUNK;
            let chunks = first..first + volume.size().chunks();
            let mut own = Heat::new(volume.size(), HEAT_HALF_LIFE, Time::ZERO);
            let mut any = false;
            for (chunk, count) in heat.chunks() {
                let chunk = chunk.0.saturating_add(part.first);
                if chunks.contains(&chunk) {
                    own.add_count(ChunkIndex(chunk - first), count);
                    any = true;
                }
            }
            if any {
                volume.merge_heat(kind, &own);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_volume::{
        GuestRequest, RequestKind, Volume,
        device::{FileDevice, IoBuf, OpenOptions},
        rules::Mode,
    };
    use std::{path::Path, sync::Arc};

    /// Laid out as blocks 0..3, 16..48 and 64..65: chunks 0, 1 and 2, and 4.
    const SIZES: [u64; 3] = [2 * 4096 + 512, 32 * 4096, 512];

    fn volumes(dir: &Path) -> Arc<VolumeSet> {
        let make = |(index, &size): (usize, &u64)| {
            let path = dir.join(format!("{index}"));
            std::fs::File::create(&path)
                .and_then(|file| file.set_len(size))
                .unwrap();
            let device = FileDevice::open(path, &OpenOptions::default()).unwrap();
            let name = format!("disk{index}").parse().unwrap();
            Volume::ephemeral(name, Arc::new(device), Mode::Owner)
        };
        VolumeSet::new(SIZES.iter().enumerate().map(make).collect()).unwrap()
    }

    fn ask(volumes: &VolumeSet, volume: usize, kind: RequestKind, block: u64) {
        let mut port = volumes.all()[volume].guest_port().unwrap();
        port.submit(GuestRequest {
            id: 1,
            kind,
            offset: block * 4096,
            length: 512,
            fua: false,
            buf: IoBuf::zeroed(512),
        });
        // Dropping the port waits for what it has begun.
        port.kick().unwrap();
    }

    fn counts(heat: &Heat) -> Vec<(u64, f64)> {
        heat.chunks()
            .map(|(chunk, count)| (chunk.0, count))
            .collect()
    }

    #[test]
    fn reads_and_heat_are_those_of_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        volumes.set_read_log(true);
        for (volume, block) in [(0, 2), (1, 0), (1, 31), (2, 0)] {
            ask(&volumes, volume, RequestKind::Read, block);
        }
        ask(&volumes, 1, RequestKind::Write, 17);
        let reads = volumes.take_reads();
        let expected = [2, 16, 47, 64].map(|block| BlockRange::new(block, block + 1));
        assert_eq!(reads, expected);
        assert!(volumes.take_reads().is_empty());
        let heat = volumes.heat();
        assert_eq!(
            counts(&heat.reads),
            [(0, 1.0), (1, 1.0), (2, 1.0), (4, 1.0)]
        );
        assert_eq!(counts(&heat.writes), [(2, 1.0)]);
    }

    #[test]
    fn what_was_hot_at_the_source_comes_to_its_volumes() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (source, target) = (volumes(dir.path()), volumes(other.path()));
        for block in [0, 16, 17] {
            ask(&source, 1, RequestKind::Read, block);
        }
        ask(&source, 0, RequestKind::Write, 1);
        ask(&target, 1, RequestKind::Read, 16);
        let heat = source.heat();
        let parts = wire::HeatPart::of(&heat.reads, wire::HeatKind::Read);
        let writes = wire::HeatPart::of(&heat.writes, wire::HeatKind::Write);
        for part in parts.iter().chain(&writes) {
            assert!(target.keep_heat(part));
        }
        let kept = target.heat();
        assert_eq!(counts(&kept.reads), [(1, 1.0), (2, 3.0)]);
        assert_eq!(counts(&kept.writes), [(0, 1.0)]);
        let bad = wire::HeatPart {
            payload: vec![7].into(),
            ..parts[0].clone()
        };
        assert!(!target.keep_heat(&bad));
        // Of chunks that are in no volume.
        let far = wire::HeatPart {
            first: wire::HEAT_PART_CHUNKS,
            ..parts[0].clone()
        };
        assert!(target.keep_heat(&far));
        assert_eq!(counts(&target.heat().reads), counts(&kept.reads));
    }
}
