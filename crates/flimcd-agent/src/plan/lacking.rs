//! What a migration would look at, by what stands at the target: the same table as in the source's machine.

use flimcd_core::{BlockRange, BlockSet, MigrationId, SiteName};
use flimcd_volume::Volume;
use flimcd_wire::{Base, VolumeOffer};
use std::{io, sync::Arc};

use crate::{api::PlanBase, migration::volumes::VolumeSet};

/// What the target lacks on each kind of base.
pub(super) struct Lacking {
    /// On zeroes.
    data: BlockSet,
    /// On the copy that this migration left, volume by volume.
    changed: Vec<Option<(MigrationId, BlockSet)>>,
}

impl Lacking {
    /// Blocks for the disk, and changes nothing.
    pub(super) fn of(volumes: &VolumeSet, peer: &SiteName) -> io::Result<Self> {
        let mut data = BlockSet::new(volumes.layout().size().blocks());
        let mut changed = Vec::new();
        for (volume, place) in volumes.all().iter().zip(volumes.layout().all_blocks()) {
            for run in volume.data_blocks()?.runs() {
                data.insert_range(shifted(run, place));
            }
            changed.push(changed_since(volume, peer)?);
        }
        Ok(Self {
            data: volumes.whole_chunks(&data),
            changed,
        })
    }

    /// What the target is told of the volumes.
    pub(super) fn offers(&self, volumes: &VolumeSet) -> Vec<VolumeOffer> {
        let all = volumes.all().iter().zip(&self.changed);
        all.map(|(volume, changed)| VolumeOffer {
            id: volume.id(),
            name: volume.name().clone(),
            size: volume.size(),
            base: changed.as_ref().map(|(migration, _)| *migration),
        })
        .collect()
    }

    /// What it lacks on these bases. Anything that makes no sense counts as a copy of some time.
    pub(super) fn on(&self, volumes: &VolumeSet, bases: &[Base]) -> BlockSet {
        let mut lacking = BlockSet::new(self.data.capacity());
        for (at, place) in volumes.layout().all_blocks().enumerate() {
            match (bases.get(at), self.changed.get(at)) {
                (Some(Base::Zeroes), _) => {
                    for run in self.data.runs_in(place) {
                        lacking.insert_range(run);
                    }
                }
                (Some(Base::Known), Some(Some((_, changed)))) => {
                    for run in changed.runs() {
                        lacking.insert_range(shifted(run, place));
                    }
                }
                _ => {
                    lacking.insert_range(place);
                }
            }
        }
        lacking
    }
}

/// What stands at the target, of several volumes the worst.
pub(super) fn base(bases: &[Base]) -> PlanBase {
    if bases.contains(&Base::Unknown) {
        PlanBase::UnknownCopy
    } else if bases.contains(&Base::Known) {
        PlanBase::KnownCopy
    } else {
        PlanBase::Nothing
    }
}

/// What has changed since a copy was left at the peer, if that is known.
fn changed_since(
    volume: &Arc<Volume>,
    peer: &SiteName,
) -> io::Result<Option<(MigrationId, BlockSet)>> {
    let baseline = volume.record().and_then(|record| record.baseline);
    let Some(baseline) = baseline.filter(|baseline| baseline.site == *peer) else {
        return Ok(None);
    };
    let changed = volume.unacked()?;
    Ok(changed.map(|changed| (baseline.migration, changed)))
}

fn shifted(run: BlockRange, place: BlockRange) -> BlockRange {
    BlockRange::new(run.start + place.start, run.end + place.start)
}
