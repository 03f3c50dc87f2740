//! Volumes in the library: replicas, and volumes that are owned here. They come and go by themselves.
//!
//! A replica does not change, so it can be compared at the same place, above all when its volume comes back to it. A volume in use
//! is written all the time: what its index says is a hint like any other. Both are read in the background, slowly.

use flimcd_content::Fingerprint;
use flimcd_core::{ChunkIndex, VolumeName};
use flimcd_volume::{Ownership, Volume, VolumeRecord};
use flimcd_wire::ChunkPrefix;
use std::io;

use super::{
    Candidate, Entry, Key, Library,
    image::{self, Identity},
    name_of,
    record::{self, ImageRecord, Shelf},
    table::LeafTable,
};
use crate::{api::LibraryKind, migration::progress::unix_ms};

impl Library {
    /// A volume's image has become a replica. Blocks.
    pub(crate) fn replica_made(&self, volume: &VolumeRecord) {
        self.take_volume(volume, LibraryKind::Replica);
    }

    /// A volume is owned here. Blocks.
    pub(crate) fn volume_made(&self, volume: &VolumeRecord) {
        self.take_volume(volume, LibraryKind::Volume);
    }

    /// Takes in what is new of the agent's volumes, and gives up what is gone. Blocks.
    pub(crate) fn reconcile(&self, volumes: &[VolumeRecord]) {
        for volume in volumes {
            match volume.ownership {
                Ownership::Owner { .. } => self.volume_made(volume),
                Ownership::Released { complete: true, .. } => self.replica_made(volume),
                // On its way: it is what it was until that is over.
                _ => {}
            }
        }
        let gone: Vec<VolumeName> = {
            let entries = self.entries();
            let known = entries.keys().filter(|key| key.shelf == Shelf::Volumes);
            let is_gone = |key: &&Key| volumes.iter().all(|volume| volume.name != key.name);
            known.filter(is_gone).map(|key| key.name.clone()).collect()
        };
        for name in gone {
            self.volume_gone(&name);
        }
    }

    /// A volume was removed, or its replica dropped. Blocks.
    pub(crate) fn volume_gone(&self, name: &VolumeName) {
        let key = Key::volume(name);
        if let Err(error) = self.drop_entry(&key) {
            tracing::warn!("what the library has of {key} cannot be removed: {error}");
        }
    }

    fn take_volume(&self, volume: &VolumeRecord, kind: LibraryKind) {
        let key = Key::volume(&volume.name);
        match self.record_volume(volume, kind) {
            Ok(true) => self.request(key),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("the library cannot take {key} in, it shares no content: {error}");
            }
        }
    }

    /// Writes the record. Whether the image has to be read.
    fn record_volume(&self, volume: &VolumeRecord, kind: LibraryKind) -> io::Result<bool> {
        let (_, identity) = image::open(&volume.image).map_err(io::Error::other)?;
        let key = Key::volume(&volume.name);
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(&key) {
            let is_it = entry.record.path == volume.image
                && entry.record.identity.is_same_file(&identity)
                && entry.record.tenant.as_deref() == Some(&volume.tenant);
            // What was found in a volume stays good enough while it is in use.
            let is_read = kind == LibraryKind::Volume || entry.record.identity == identity;
            if is_it && (is_read || entry.scan.is_some()) {
                if entry.record.kind != kind {
                    entry.record.kind = kind;
                    entry.record.save(&self.dir)?;
                }
                return Ok(false);
            }
            if let Some(scan) = entry.scan.take() {
                scan.stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        record::remove_made(&self.dir, &key)?;
        let (name, path) = (volume.name.clone(), volume.image.clone());
        let tenant = Some(volume.tenant.clone());
        let mut record = ImageRecord::new(name, path, tenant, identity, unix_ms());
        record.kind = kind;
        record.save(&self.dir)?;
        entries.insert(key, Entry { record, scan: None });
        Ok(true)
    }

    /// The image of an arriving volume itself, if it is a replica whose fingerprints are known and that was not touched since. What is
    /// known of it is given to `each`, also when it was not read as a whole yet.
    pub(super) fn own(
        &self,
        volume: &Volume,
        mut each: impl FnMut(ChunkIndex, ChunkPrefix),
    ) -> Option<Candidate> {
        let volume = volume.record()?;
        let key = Key::volume(&volume.name);
        let record = self.entries().get(&key).map(|entry| entry.record.clone())?;
        if record.path != volume.image || record.tenant.as_deref() != Some(&volume.tenant) {
            return None;
        }
        let (file, _) = image::open(&record.path).ok()?;
        if Identity::of(&file).ok()? != record.identity {
            tracing::info!(%key, "the copy that stands here was written since it was read: its content is found by asking");
            return None;
        }
        let path = record::table_path(&self.dir, &key);
        let table = LeafTable::open(&path, record.identity.chunks());
        let table = match table {
            Ok(table) => table,
            Err(error) if record.whole.is_some() => {
                self.make_anew(&key, &format!("its table cannot be used: {error}"));
                return None;
            }
            // Not begun yet.
            Err(_) => return None,
        };
        let mut found = Vec::new();
        let read = table.read_first(table.done(), |chunk, leaf| {
            found.extend(leaf.map(|leaf| (chunk, leaf.prefix())));
        });
        let root = read.ok()?.root()?;
        if super::root_of(&record).is_some_and(|expected: Fingerprint| expected != root) {
            self.make_anew(&key, "its table is damaged");
            return None;
        }
        for (chunk, prefix) in found {
            each(chunk, prefix);
        }
        tracing::info!(%key, chunks = table.done(), "what arrives is compared with the copy that stands here");
        Some(Candidate {
            name: name_of(&record),
            key,
            file,
            table,
            root,
        })
    }
}
