//! What guests read and write: counted at each site, told to the machines, and carried along.

use std::time::Duration;

use flimcd_core::{BlockIndex, BlockRange, ByteRange, ChunkIndex, Heat, Time, VolumeSize};
use flimcd_migrate::LONG_HALF_LIFE;
use flimcd_volume::rules::Mode;
use flimcd_wire::{HeatKind, HeatPart};

use crate::{
    guest::Kind,
    world::{Event, Site, World},
};

/// How long the target's reads wait at most until its machine hears of them, in microseconds.
const TOLD_WITHIN_US: u64 = 10_000;

/// What is hot at a site. A file of the volume's directory: it survives the process, and is lost with the power.
#[derive(Clone, Debug)]
pub(crate) struct HostHeat {
    pub(crate) read: Heat,
    pub(crate) write: Heat,
}

impl HostHeat {
    pub(crate) fn new(size: VolumeSize) -> Self {
        let cold = || Heat::new(size, LONG_HALF_LIFE, Time::ZERO);
        Self {
            read: cold(),
            write: cold(),
        }
    }

    fn of(&mut self, kind: HeatKind) -> &mut Heat {
        match kind {
            HeatKind::Write => &mut self.write,
            HeatKind::Read | HeatKind::Invalid => &mut self.read,
        }
    }
}

impl World {
    /// A guest's request on `range`.
    pub(crate) fn count_heat(&mut self, site: Site, kind: Kind, range: ByteRange) {
        let now = self.now;
        let host = self.host(site);
        let kind = match kind {
            Kind::Read => HeatKind::Read,
            Kind::Write { .. } | Kind::Zero => HeatKind::Write,
            Kind::Trim | Kind::Flush => return,
        };
        if !matches!(host.rules.mode(), Mode::Incoming | Mode::Released) {
            let heat = host.heat.of(kind);
            for block in range.blocks_touched().iter() {
                heat.add(BlockIndex(block.0).chunk(), 1, now);
            }
        }
    }

    /// What the source's guest has read since the last time.
    pub(crate) fn tell_source_reads(&mut self) {
        let reads = self.reads_at(Site::Source);
        if !reads.is_empty() {
            self.cover("the source's guest reads");
            self.source_input(move |machine, now| machine.handle_reads(now, &reads));
        }
    }

    /// The target's guest may have read: has its machine told within some milliseconds.
    pub(crate) fn look_for_reads(&mut self) {
        if self.host(Site::Target).rules.poll_read_news() {
            let life = self.host(Site::Target).life;
            let soon = self.now + Duration::from_micros(self.now.0 / 1000 % TOLD_WITHIN_US);
            self.at(soon, Event::TellReads { life });
        }
    }

    /// What the target's guest has read since the last time.
    pub(crate) fn tell_target_reads(&mut self) {
        let reads = self.reads_at(Site::Target);
        if !reads.is_empty() {
            self.cover("the target's guest reads");
            self.target_input(move |machine, now| machine.handle_reads(now, &reads));
        }
    }

    fn reads_at(&mut self, site: Site) -> Vec<BlockRange> {
        let mut reads = Vec::new();
        self.host(site).rules.take_reads(&mut reads);
        reads
    }

    /// What was hot at the source.
    pub(crate) fn keep_heat(&mut self, part: &HeatPart) {
        let Some(heat) = part.heat(LONG_HALF_LIFE) else {
            return self.fail(format!("heat of {:?} makes no sense", part.kind));
        };
        self.cover(match part.kind {
            HeatKind::Write => "heat of writes kept",
            HeatKind::Read | HeatKind::Invalid => "heat of reads kept",
        });
        let host = self.host(Site::Target);
        host.heat.of(part.kind).merge(&heat, ChunkIndex(part.first));
    }
}
