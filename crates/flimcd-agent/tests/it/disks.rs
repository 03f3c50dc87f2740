//! Disks with a checking guest on each, which move one at a time or together.

use flimcd_agent::api::{Client, ImportVolume, MigrateRequest, MigrateTogether, MigrationStatus};
use flimcd_core::VolumeName;

use crate::{
    guest::{Guest, Running, content, write_sparse},
    site::{Site, World, name, until},
};

const MIB: usize = 1 << 20;

/// Name and bytes of a disk.
pub(crate) type Disk = (&'static str, usize);

/// One disk.
pub(crate) const ONE: &[Disk] = &[("vm", 24 * MIB)];
/// Sizes that are no multiple of a block, one that ends with a chunk, and one of less than a block.
pub(crate) const THREE: &[Disk] = &[
    ("vm", 9 * MIB + 1234),
    ("data", 12 * MIB),
    ("tiny", 3 * 512),
];
/// Two, the first of them odd.
pub(crate) const TWO: &[Disk] = &[("vm", 8 * MIB + 7 * 512), ("data", 5 * MIB)];

/// Disks whose guests rest.
pub(crate) struct Disks(Vec<(&'static str, Guest)>);

/// Disks whose guests work.
pub(crate) struct AtWork(Vec<(&'static str, Running)>);

impl Disks {
    /// Takes new images under care at the source.
    pub(crate) async fn import(world: &World, disks: &[Disk], seed: u64) -> Self {
        let mut all = Vec::new();
        for (number, &(volume, bytes)) in (1..).zip(disks) {
            let image = world.dir.path().join(format!("{volume}.img"));
            let content = content(bytes, seed * 8 + number);
            write_sparse(&image, &content);
            let import = ImportVolume {
                name: name(volume),
                path: image,
                tenant: None,
            };
            world.source.client().import_volume(&import).await.unwrap();
            all.push((volume, Guest::new(content, seed + number * 100)));
        }
        Self(all)
    }

    pub(crate) fn names(&self) -> Vec<VolumeName> {
        self.0.iter().map(|(volume, _)| name(volume)).collect()
    }

    /// Guests go to work, on whichever of the sites serves them.
    pub(crate) fn start(self, sites: &[&Site]) -> AtWork {
        let start = |(volume, guest): (&'static str, Guest)| {
            let sockets: Vec<_> = sites.iter().map(|site| site.socket(volume)).collect();
            (volume, guest.start(&sockets, volume))
        };
        AtWork(self.0.into_iter().map(start).collect())
    }

    /// Compares all disks through their exports.
    pub(crate) fn check_all(&self, site: &Site) {
        for (volume, guest) in &self.0 {
            guest.check_all(&site.socket(volume), volume);
        }
    }

    /// Compares all disks with the image files of a stopped agent.
    pub(crate) fn check_files(&self, site: &Site) {
        for (volume, guest) in &self.0 {
            guest.check_file(&site.image(volume));
        }
    }
}

impl AtWork {
    /// Waits until every guest has had so many more answers.
    pub(crate) async fn works(&self, requests: u64) {
        for (volume, running) in &self.0 {
            let before = running.count();
            until(&format!("the guest of {volume} works"), async || {
                running.count() > before + requests
            })
            .await;
        }
    }

    pub(crate) fn requests(&self) -> u64 {
        self.0.iter().map(|(_, running)| running.count()).sum()
    }

    /// Takes the guests off their disks.
    pub(crate) async fn stop(self) -> Disks {
        let mut all = Vec::new();
        for (volume, running) in self.0 {
            all.push((volume, running.stop().await));
        }
        Disks(all)
    }
}

/// Begins the migration of all of them together.
pub(crate) async fn migrate(
    client: &Client,
    volumes: &[VolumeName],
    request: &MigrateRequest,
) -> MigrationStatus {
    if let [only] = volumes {
        return client.migrate(only, request).await.unwrap();
    }
    let together = MigrateTogether {
        volumes: volumes.to_vec(),
        request: request.clone(),
    };
    client.migrate_together(&together).await.unwrap()
}
