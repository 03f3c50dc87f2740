//! The library: what there is at this site that arriving volumes may share content with.
//!
//! ```text
//!  add, a volume ─► scanning ─► ready ──── the file changed, or is gone ───► stale
//!                     ▲           │                                            │
//!                     ├───────────┴──────────────── verify ◄───────────────────┘
//!                     └── by itself, where a table or an index is damaged
//! ```
//! There are images that people have added, replicas, and the volumes that are owned here; the last two come and go by themselves
//! ([`volumes`]). A file stays where it is, unless a copy was asked for. What the library has of it is made while the file is
//! read once, and a restart goes on with it: the fingerprint of every chunk ([`table`]), by which volumes are compared at the
//! same place ([`seeds`]), and the places of its blocks ([`index`]), by which content is found anywhere ([`finder`]).
//!
//! A file that was written since, as its size, times and inode tell, is not used before it has been verified; only of volumes that are
//! in use it is expected. That is a matter of speed alone: whatever is taken from a file is checked against the
//! source's fingerprint first, from the very bytes that are then written.
//!
//! Content is shared inside a tenant, and with everybody where an image was made public, so that nobody learns from bytes or times
//! what others store.

mod add;
mod chain;
mod describe;
mod finder;
mod image;
mod index;
mod ops;
mod record;
mod scan;
mod seeds;
mod table;
mod volumes;

use flimcd_content::Fingerprint;
use flimcd_core::VolumeName;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tokio::sync::{
    Semaphore,
    mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};

pub(crate) use finder::Finder;
pub(crate) use record::Key;
pub(crate) use seeds::{Chosen, Seeds};

use crate::{
    api::{ApiCode, ErrorBody, LibraryImage, LibraryKind},
    error::{io_error, refuse},
};
use describe::describe;
use finder::Indexed;
use image::Identity;
use index::ContentIndex;
use record::ImageRecord;
use table::LeafTable;

/// Tenant of images that name none and are not public.
const DEFAULT_TENANT: &str = "default";

/// One file.
struct Entry {
    record: ImageRecord,
    scan: Option<Scan>,
}

/// A file that is being read.
#[derive(Clone, Default)]
struct Scan {
    done_chunks: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// A file that could be a seed.
struct Candidate {
    /// To people.
    name: String,
    key: Key,
    file: File,
    table: LeafTable,
    root: Fingerprint,
}

/// See the module.
pub(crate) struct Library {
    dir: PathBuf,
    entries: Mutex<BTreeMap<Key, Entry>>,
    /// What is to be read.
    wanted: UnboundedSender<Key>,
    requests: Mutex<Option<UnboundedReceiver<Key>>>,
    /// Whose turn it is to be read, of images and of volumes.
    turns: [Semaphore; 2],
}

impl Library {
    /// Opens the directory, which is made if it is not there. Blocks.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        let entry = |record: ImageRecord| (record.key(), Entry { record, scan: None });
        let entries = record::load_all(&dir)?.into_iter().map(entry).collect();
        let (wanted, requests) = unbounded_channel();
        Ok(Self {
            dir,
            entries: Mutex::new(entries),
            wanted,
            requests: Mutex::new(Some(requests)),
            turns: [Semaphore::new(1), Semaphore::new(1)],
        })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be read from now on, by [`scan`](Self::scan). To be had once.
    pub(crate) fn requests(&self) -> Option<UnboundedReceiver<Key>> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.take()
    }

    /// To be had while such a file is read.
    fn turn_of(&self, key: &Key) -> &Semaphore {
        let [images, volumes] = &self.turns;
        match key.shelf {
            record::Shelf::Images => images,
            record::Shelf::Volumes => volumes,
        }
    }

    fn request(&self, key: Key) {
        // Nobody reads when the agent stops; the next one goes on.
        let _ = self.wanted.send(key);
    }

    /// Files whose fingerprints are not all there, and that a restart goes on with.
    pub(crate) fn unfinished(&self) -> Vec<Key> {
        let entries = self.entries();
        let open = entries
            .iter()
            .filter(|(_, entry)| entry.record.whole.is_none() && entry.record.problem.is_none());
        open.map(|(key, _)| key.clone()).collect()
    }

    /// Everything, images first, by name.
    pub(crate) fn list(&self) -> Vec<LibraryImage> {
        self.entries().values().map(describe).collect()
    }

    /// The image of this name, otherwise what there is of the volume of this name.
    fn find(&self, name: &VolumeName) -> Result<Key, ErrorBody> {
        let entries = self.entries();
        [Key::image(name), Key::volume(name)]
            .into_iter()
            .find(|key| entries.contains_key(key))
            .ok_or_else(|| unknown(name))
    }

    /// One of them; see [`find`](Self::find).
    pub(crate) fn get(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        let key = self.find(name)?;
        self.entries()
            .get(&key)
            .map(describe)
            .ok_or_else(|| unknown(name))
    }

    /// Gives an image up, with the rest of its backing chain; the file stays, unless it is the library's own copy. Blocks.
    pub(crate) fn remove(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        let key = self.find(name)?;
        if key.shelf == record::Shelf::Volumes {
            let message = format!("{name} is not an image that was added but a volume here");
            let hint = "it leaves the library with the volume: see `flimcd replica drop` and `flimcd volume remove`";
            return Err(refuse(ApiCode::BadRequest, message, hint));
        }
        let info = self.get(name)?;
        let parts = |(_, entry): &(&Key, &Entry)| entry.record.part_of.as_ref() == Some(name);
        let parts: Vec<Key> = {
            let entries = self.entries();
            let parts = entries.iter().filter(parts);
            parts.map(|(key, _)| key.clone()).collect()
        };
        for key in parts.iter().chain([&key]) {
            let removed = self.drop_entry(key);
            removed
                .map_err(|error| io_error(&format!("removing {name} from the library"), &error))?;
        }
        Ok(info)
    }

    /// Removes all that there is of an entry; none is fine. Blocks.
    fn drop_entry(&self, key: &Key) -> io::Result<()> {
        let mut entries = self.entries();
        record::remove_all(&self.dir, key)?;
        if let Some(scan) = entries.remove(key).and_then(|entry| entry.scan) {
            scan.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Records of what has been read and that volumes of these tenants may share content with.
    fn ready(&self, tenants: &BTreeSet<&str>) -> Vec<ImageRecord> {
        let may_see = |record: &ImageRecord| {
            let owner = record.tenant.as_deref();
            owner.is_none_or(|owner| tenants.contains(owner))
        };
        let is_ready = |entry: &&Entry| {
            let record = &entry.record;
            entry.scan.is_none() && record.problem.is_none() && record.whole.is_some()
        };
        let entries = self.entries();
        let ready = entries.values().filter(is_ready).map(|entry| &entry.record);
        ready.filter(|record| may_see(record)).cloned().collect()
    }

    /// Files that volumes of this tenant can be compared with at the same place.
    fn candidates(&self, tenant: &str) -> Vec<Candidate> {
        let ready = self.ready(&BTreeSet::from([tenant]));
        let candidates = ready.iter().filter_map(|record| self.candidate(record));
        candidates.collect()
    }

    fn candidate(&self, record: &ImageRecord) -> Option<Candidate> {
        let root = root_of(record)?;
        let (file, identity) = self.file_of(record)?;
        if identity != record.identity {
            // A volume in use.
            return None;
        }
        let key = record.key();
        match LeafTable::open(&record::table_path(&self.dir, &key), identity.chunks()) {
            Ok(table) => Some(Candidate {
                name: name_of(record),
                key,
                file,
                table,
                root,
            }),
            Err(error) => {
                self.make_anew(&key, &format!("its table cannot be used: {error}"));
                None
            }
        }
    }

    /// The file, if it may be used.
    fn file_of(&self, record: &ImageRecord) -> Option<(File, Identity)> {
        match image::open(&record.path) {
            Ok((_, identity))
                if identity != record.identity && record.kind == LibraryKind::Image =>
            {
                tracing::warn!(image = %record.name, "an image of the library has changed and is not used; `flimcd library verify` makes its table anew");
                None
            }
            Ok(found) => Some(found),
            Err(error) => {
                tracing::warn!(image = %record.name, "an image of the library is not used: {error}");
                None
            }
        }
    }

    /// Files that volumes of these tenants can find content in at any place.
    fn indexed(&self, tenants: &[String]) -> Vec<Indexed> {
        let tenants: BTreeSet<&str> = tenants.iter().map(String::as_str).collect();
        let mut files = Vec::new();
        for record in self.ready(&tenants) {
            let Some(root) = root_of(&record) else {
                continue;
            };
            let Some((file, _)) = self.file_of(&record) else {
                continue;
            };
            let key = record.key();
            match ContentIndex::open(&record::index_path(&self.dir, &key), root) {
                Ok(index) => {
                    let indexed = index.entries();
                    tracing::debug!(of = %key, indexed, "content may be found in a file of the library");
                    files.push(Indexed {
                        tenant: record.tenant,
                        file,
                        index,
                    });
                }
                Err(error) => self.make_anew(&key, &format!("its index cannot be used: {error}")),
            }
        }
        files
    }

    /// What was made of a file is of no use: it is made anew, and the file not used until then.
    fn make_anew(&self, key: &Key, why: &str) {
        tracing::error!("the {key} is not used by the library: {why}; the file is read again");
        match self.forget_made(key) {
            Ok(_) => self.request(key.clone()),
            Err(error) => {
                tracing::error!("the record of {key} in the library cannot be written: {error}");
            }
        }
    }
}

/// The root of what was read; none for zeroes.
fn root_of(record: &ImageRecord) -> Option<Fingerprint> {
    parse_root(record.whole.as_ref()?.root.as_ref()?)
}

/// What people call it.
fn name_of(record: &ImageRecord) -> String {
    match record.kind {
        LibraryKind::Image => record.name.to_string(),
        kind @ (LibraryKind::Replica | LibraryKind::Volume) => format!("{kind} {}", record.name),
    }
}

fn parse_root(text: &str) -> Option<Fingerprint> {
    let bytes = text.as_bytes().as_chunks::<2>().0;
    let mut root = [0; Fingerprint::BYTES];
    if bytes.len() != root.len() {
        return None;
    }
    for (byte, digits) in root.iter_mut().zip(bytes) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Fingerprint::from_bytes(root))
}

fn unknown(name: &VolumeName) -> ErrorBody {
    refuse(
        ApiCode::UnknownImage,
        format!("there is no image {name} in the library"),
        "`flimcd library list` shows what there is",
    )
}

#[cfg(test)]
mod tests;
