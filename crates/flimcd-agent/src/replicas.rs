//! Copies that stay when a volume has moved away: whether they are kept, how much room they may take, and dropping them.
//!
//! A copy is a volume that was released whole: see `flimcd_volume::Standing` for when it is trusted. Nothing here may
//! ever remove a volume that is owned or that is coming back, so [`Hosting::remove`](crate::hosting::Hosting::remove) looks
//! at the record when nobody else can change it any more.

use flimcd_core::VolumeName;
use flimcd_volume::{Ownership, VolumeRecord};
use std::sync::Arc;

use crate::{
    agent::Agent,
    api::{ErrorBody, Phase, RemovedVolume, Role},
    check::found_difference,
    hosting::{Hosted, allocated},
    migration::store::MigrationRecord,
};

impl Agent {
    /// Tells the library what the image of a volume is now: a copy that stayed, or the volume itself.
    pub(crate) async fn note_in_library(self: &Arc<Self>, name: &VolumeName) {
        let Ok(hosted) = self.hosting.get(name) else {
            return;
        };
        let library = self.library.clone();
        let noted = tokio::task::spawn_blocking(move || {
            let record = hosted.record();
            match record.ownership {
                _ if record.is_replica() => library.replica_made(&record),
                Ownership::Owner { .. } => library.volume_made(&record),
                _ => {}
            }
        });
        if let Err(panic) = noted.await {
            tracing::error!(volume = %name, "the library was not told of it: {panic}");
        }
    }

    /// What is left to do at a source when a migration has ended, also by one that a restart finds.
    pub(crate) async fn after_migration(self: &Arc<Self>, record: &MigrationRecord) {
        let is_move = record.role == Role::Source && !record.increment;
        if !is_move || record.status.phase != Phase::Completed {
            return;
        }
        let keep =
            (record.request.as_ref()).is_none_or(|request| request.keep_replica != Some(false));
        if keep {
            self.check_in_background(record);
            return self.make_room_among_replicas().await;
        }
        for moved in &record.volumes {
            // Another migration may have brought it back meanwhile.
            let is_it = (self.hosting.by_id(moved.id)).is_some_and(|hosted| {
                let found = hosted.record();
                found.is_replica() && found.last_migration == Some(record.id)
            });
            if is_it && let Err(error) = self.drop_replica(&moved.name, false).await {
                tracing::warn!(volume = %moved.name, "its copy stays here: {error}");
            }
        }
    }

    /// Removes a copy that stayed, with its image unless that is to be kept or was imported.
    pub(crate) async fn drop_replica(
        self: &Arc<Self>,
        name: &VolumeName,
        keep_image: bool,
    ) -> Result<RemovedVolume, ErrorBody> {
        self.remove_volume(name, !keep_image, true).await
    }

    /// Whether an end check found that this copy is not what stands at the target: somebody has to look first.
    fn differs(&self, copy: &VolumeRecord) -> bool {
        let migration = copy.last_migration.and_then(|id| self.registry.status(id));
        migration.is_some_and(|status| found_difference(&status))
    }

    /// Drops the oldest copies while all of them take more room than `limits.replicas` allows. Those whose image was
    /// imported neither count nor go: their files would stay. Nor do those that an end check found to differ.
    async fn make_room_among_replicas(self: &Arc<Self>) {
        let Some(limit) = self.config.limits.replicas else {
            return;
        };
        let mut copies: Vec<_> = (self.hosting.all().iter())
            .map(|hosted| hosted.record())
            .filter(|record| record.is_replica() && !record.imported && !self.differs(record))
            .map(|record| (since(&record), allocated(&record.image), record.name))
            .collect();
        copies.sort();
        let mut taken: u64 = copies.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, name) in copies {
            if taken <= limit.0 {
                break;
            }
            match self.drop_replica(&name, false).await {
                Ok(_) => {
                    tracing::info!(
                        volume = %name, bytes, limit = limit.0,
                        "dropped the copy of a volume that has moved away: limits.replicas is reached"
                    );
                    taken -= bytes;
                }
                Err(error) => {
                    tracing::warn!(volume = %name, "the copy of a volume that has moved away stays: {error}");
                }
            }
        }
    }
}

/// Since when it is a copy, in milliseconds since 1970.
pub(crate) fn since(record: &VolumeRecord) -> u64 {
    record
        .replica
        .as_ref()
        .map_or(0, |replica| replica.since_unix_ms)
}

/// The copy that stayed, as the API shows it; `None` unless the volume has moved away whole.
pub(crate) fn describe(hosted: &Hosted) -> Option<crate::api::ReplicaInfo> {
    let record = hosted.record();
    record.is_replica().then(|| crate::api::ReplicaInfo {
        since_unix_ms: since(&record),
        is_untouched: matches!(
            hosted.volume().standing(),
            Some(flimcd_volume::Standing::Untouched(_))
        ),
        imported: record.imported,
    })
}
