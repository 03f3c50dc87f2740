//! Reading files and making their fingerprints and indexes.

use flimcd_core::VolumeName;
use std::{
    io,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use super::{
    Entry, Key, Library, Scan, chain, describe,
    image::{self, Identity, Scanned},
    index::{self, IndexBuilder},
    record::{self, ImageRecord, Whole},
    table::LeafTable,
};
use crate::{
    api::{ErrorBody, LibraryImage, LibraryKind},
    error::io_error,
    migration::progress::unix_ms,
};

/// Volumes and replicas are read slowly: after a step of that the disk is left alone for so many times as long as it took.
const REST: u32 = 3;
/// Not longer, so that a stop is noticed.
const REST_MAX: Duration = Duration::from_millis(200);

impl Library {
    /// Reads a file and makes its fingerprints, from where that was left. Blocks; `go_on` is asked all the time.
    pub(crate) fn scan(&self, key: &Key, go_on: impl Fn() -> bool) {
        let scan = Scan::default();
        let record = {
            let mut entries = self.entries();
            let Some(entry) = entries.get_mut(key) else {
                return;
            };
            if entry.scan.is_some() || entry.record.whole.is_some() {
                return;
            }
            entry.scan = Some(scan.clone());
            entry.record.clone()
        };
        let rests = record.kind != LibraryKind::Image;
        let mut stepped = Instant::now();
        let result = self.scan_file(&record, |done| {
            scan.done_chunks.store(done, Ordering::Relaxed);
            let goes_on = !scan.stop.load(Ordering::Relaxed) && go_on();
            if rests && goes_on {
                thread::sleep((stepped.elapsed() * REST).min(REST_MAX));
                stepped = Instant::now();
            }
            goes_on
        });
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(key) else {
            // Removed meanwhile: what was written since then goes, too.
            if let Err(error) = record::remove_all(&self.dir, key) {
                tracing::warn!("what was made of {key} cannot be removed: {error}");
            }
            return;
        };
        let is_ours = (entry.scan.as_ref())
            .is_some_and(|current| std::sync::Arc::ptr_eq(&current.stop, &scan.stop));
        if !is_ours {
            return;
        }
        entry.scan = None;
        if scan.stop.load(Ordering::Relaxed) {
            return;
        }
        match result {
            Ok(Some((identity, whole))) => {
                tracing::info!(chunks = whole.data_chunks, "the library has read {key}");
                entry.record.identity = identity;
                entry.record.whole = Some(whole);
                entry.record.problem = None;
            }
            Ok(None) => return,
            Err(error) => {
                tracing::error!("reading {key} for the library failed: {error}");
                entry.record.problem = Some(error.to_string());
            }
        }
        if let Err(error) = entry.record.save(&self.dir) {
            tracing::error!("the record of {key} in the library cannot be written: {error}");
        }
    }

    fn scan_file(
        &self,
        record: &ImageRecord,
        go_on: impl FnMut(u64) -> bool,
    ) -> io::Result<Option<(Identity, Whole)>> {
        let key = record.key();
        if let Some(from) = &record.convert_from {
            self.convert(&key, from, record)?;
        }
        let (file, identity) = image::open(&record.path).map_err(io::Error::other)?;
        let index_path = record::index_path(&self.dir, &key);
        let resumed = self.resume(record, identity).unwrap_or_default();
        let (mut table, mut index) = match resumed {
            Some(resumed) => resumed,
            None => {
                let mut begun = record.clone();
                begun.identity = identity;
                begun.save(&self.dir)?;
                if let Some(entry) = self.entries().get_mut(&key) {
                    entry.record.identity = identity;
                }
                index::remove(&index_path)?;
                let path = record::table_path(&self.dir, &key);
                let table = LeafTable::create(&path, identity.chunks())?;
                (table, IndexBuilder::resume(&index_path, 0)?)
            }
        };
        if image::scan(&file, &mut table, &mut index, go_on)? == Scanned::Stopped {
            return Ok(None);
        }
        if record.kind == LibraryKind::Image && Identity::of(&file)? != identity {
            return Err(io::Error::other(
                "it was written while it was read; verify it when it is at rest",
            ));
        }
        let mut data_chunks = 0;
        let tree = table.read_all(|_, leaf| data_chunks += u64::from(leaf.is_some()))?;
        match tree.root() {
            Some(root) => index.finish(root)?,
            None => index::remove(&index_path)?,
        }
        let whole = Whole {
            root: tree.root().map(|root| root.to_string()),
            data_chunks,
            scanned_unix_ms: unix_ms(),
        };
        Ok(Some((identity, whole)))
    }

    /// What an earlier scan has made of the same file, if it can be gone on with.
    fn resume(
        &self,
        record: &ImageRecord,
        identity: Identity,
    ) -> io::Result<Option<(LeafTable, IndexBuilder)>> {
        if identity != record.identity {
            return Ok(None);
        }
        let key = record.key();
        let table = LeafTable::open(&record::table_path(&self.dir, &key), identity.chunks())?;
        let index = IndexBuilder::resume(&record::index_path(&self.dir, &key), table.entries())?;
        Ok(Some((table, index)))
    }

    /// Makes the library's own copy of what guests see in an image; once.
    fn convert(&self, key: &Key, from: &std::path::Path, record: &ImageRecord) -> io::Result<()> {
        tracing::info!(from = %from.display(), "converting an image for the library");
        chain::convert(from, &record.path)?;
        let mut converted = record.clone();
        converted.convert_from = None;
        converted.identity = image::open(&record.path).map_err(io::Error::other)?.1;
        converted.save(&self.dir)?;
        if let Some(entry) = self.entries().get_mut(key) {
            entry.record = converted;
        }
        Ok(())
    }

    /// Forgets a file's fingerprints, so that a scan makes them anew. Blocks.
    pub(crate) fn begin_verify(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        let key = self.find(name)?;
        let forgotten = self.forget_made(&key);
        let found = forgotten.map_err(|error| io_error("forgetting the fingerprints", &error))?;
        self.request(key);
        found.ok_or_else(|| super::unknown(name))
    }

    /// Forgets what was made of a file, unless it is made just now. `None` when there is no such entry.
    pub(super) fn forget_made(&self, key: &Key) -> io::Result<Option<LibraryImage>> {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(key) else {
            return Ok(None);
        };
        if entry.scan.is_none() {
            self.forget(entry)?;
        }
        Ok(Some(describe(entry)))
    }

    pub(super) fn forget(&self, entry: &mut Entry) -> io::Result<()> {
        entry.record.whole = None;
        entry.record.problem = None;
        entry.record.save(&self.dir)?;
        record::remove_made(&self.dir, &entry.record.key())
    }
}
