//! The library: images at this site that arriving volumes may share content with.
//!
//! ```text
//!  add ─► scanning ─► ready ──── the file changed, or is gone ───► stale
//!            ▲          │                                            │
//!            └──────────┴──────────────── verify ◄───────────────────┘
//! ```
//! An image stays where it is, unless a copy was asked for. What the library has of it is the fingerprint of every chunk, in a file of
//! its own ([`table`]), made while the image is read once; a restart goes on with that. A file that was written since,
//! as its size, times and inode tell, is not used before it has been verified. That is a matter of speed alone:
//! whatever is taken from an image is checked against the source's fingerprint first.
//!
//! Content is shared inside a tenant, and with everybody where an image was made public, so that nobody learns from bytes or times
//! what others store.

mod finder;
mod image;
mod ops;
mod record;
mod seeds;
mod table;

use flimcd_content::{ContentIndex, Fingerprint, IndexBuilder};
use flimcd_core::{CHUNK_SIZE, VolumeName};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

pub(crate) use finder::Finder;
pub(crate) use seeds::{Chosen, Seeds};

use crate::{
    api::{AddLibraryImage, ApiCode, ErrorBody, LibraryImage, LibraryState},
    error::{io_error, refuse},
    migration::progress::unix_ms,
};
use finder::Indexed;
use image::{Identity, ImageError, Scanned};
use record::{ImageRecord, Whole};
use table::LeafTable;

/// Tenant of images that name none and are not public.
const DEFAULT_TENANT: &str = "default";

/// One image.
struct Entry {
    record: ImageRecord,
    scan: Option<Scan>,
}

/// An image that is being read.
#[derive(Clone, Default)]
struct Scan {
    done_chunks: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// An image that could be a seed.
struct Candidate {
    name: VolumeName,
    /// Whose it is; `None`: anybody's.
    tenant: Option<String>,
    file: File,
    table: LeafTable,
    root: Fingerprint,
}

/// See the module.
pub(crate) struct Library {
    dir: PathBuf,
    images: Mutex<BTreeMap<VolumeName, Entry>>,
}

impl Library {
    /// Opens the directory, which is made if it is not there. Blocks.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let entry = |record: ImageRecord| (record.name.clone(), Entry { record, scan: None });
        let images = record::load_all(&dir)?.into_iter().map(entry).collect();
        Ok(Self {
            dir,
            images: Mutex::new(images),
        })
    }

    fn images(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Entry>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Images whose fingerprints are not all there, and that a restart goes on with.
    pub(crate) fn unfinished(&self) -> Vec<VolumeName> {
        let images = self.images();
        let open = images
            .values()
            .filter(|entry| entry.record.whole.is_none() && entry.record.problem.is_none());
        open.map(|entry| entry.record.name.clone()).collect()
    }

    /// All images, by name.
    pub(crate) fn list(&self) -> Vec<LibraryImage> {
        self.images().values().map(describe).collect()
    }

    /// One image.
    pub(crate) fn get(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        self.images()
            .get(name)
            .map(describe)
            .ok_or_else(|| unknown(name))
    }

    /// Takes an image in; it is to be scanned next. Blocks.
    pub(crate) fn add(&self, request: &AddLibraryImage) -> Result<LibraryImage, ErrorBody> {
        let name = name_of(request)?;
        let (_, identity) =
            image::open(&request.path).map_err(|error| no_image(&error, &request.path))?;
        let tenant = request
            .tenant
            .clone()
            .or_else(|| Some(DEFAULT_TENANT.to_owned()));
        let tenant = tenant.filter(|_| !request.public);
        let mut record = ImageRecord::new(
            name.clone(),
            request.path.clone(),
            tenant,
            identity,
            unix_ms(),
        );
        {
            let mut images = self.images();
            if images.contains_key(&name) {
                let message = format!("there is an image {name} in the library already");
                return Err(refuse(
                    ApiCode::Exists,
                    message,
                    "choose another name with --name, or remove that one",
                ));
            }
            images.insert(
                name.clone(),
                Entry {
                    record: record.clone(),
                    scan: Some(Scan::default()),
                },
            );
        }
        let taken = self.take_in(&mut record, request.copy);
        let mut images = self.images();
        match taken {
            Ok(()) => {
                let entry = Entry { record, scan: None };
                let info = describe(&entry);
                images.insert(name, entry);
                Ok(info)
            }
            Err(error) => {
                images.remove(&name);
                Err(io_error(
                    &format!("taking {} into the library", request.path.display()),
                    &error,
                ))
            }
        }
    }

    /// Copies the image if that was asked for, and writes the record.
    fn take_in(&self, record: &mut ImageRecord, copy: bool) -> io::Result<()> {
        if copy {
            let own = record::copy_path(&self.dir, &record.name);
            if let Err(error) = copy_sparse(&record.path, &own) {
                // The message is about the copy.
                let _ = record::remove_file(&own);
                return Err(error);
            }
            record.identity = Identity::of(&File::open(&own)?)?;
            record.path = own;
            record.is_copy = true;
        }
        record.save(&self.dir)
    }

    /// Reads an image and makes its fingerprints, from where that was left. Blocks; `go_on` is asked all the time.
    pub(crate) fn scan(&self, name: &VolumeName, go_on: impl Fn() -> bool) {
        let scan = Scan::default();
        let record = {
            let mut images = self.images();
            let Some(entry) = images.get_mut(name) else {
                return;
            };
            if entry.scan.is_some() {
                return;
            }
            entry.scan = Some(scan.clone());
            entry.record.clone()
        };
        let result = self.scan_image(&record, |done| {
            scan.done_chunks.store(done, Ordering::Relaxed);
            !scan.stop.load(Ordering::Relaxed) && go_on()
        });
        let mut images = self.images();
        let Some(entry) = images.get_mut(name) else {
            return;
        };
        entry.scan = None;
        match result {
            Ok(Some((identity, whole))) => {
                tracing::info!(image = %name, chunks = whole.data_chunks, "an image of the library is ready");
                entry.record.identity = identity;
                entry.record.whole = Some(whole);
                entry.record.problem = None;
            }
            Ok(None) => return,
            Err(error) => {
                tracing::error!(image = %name, "reading an image of the library failed: {error}");
                entry.record.problem = Some(error.to_string());
            }
        }
        if let Err(error) = entry.record.save(&self.dir) {
            tracing::error!(image = %name, "the record of an image cannot be written: {error}");
        }
    }

    fn scan_image(
        &self,
        record: &ImageRecord,
        mut go_on: impl FnMut(u64) -> bool,
    ) -> io::Result<Option<(Identity, Whole)>> {
        let (file, identity) = image::open(&record.path).map_err(io::Error::other)?;
        let path = record::table_path(&self.dir, &record.name);
        let resumed =
            (identity == record.identity).then(|| LeafTable::open(&path, identity.chunks()));
        let mut table = match resumed {
            Some(Ok(table)) => table,
            _ => {
                let mut begun = record.clone();
                begun.identity = identity;
                begun.save(&self.dir)?;
                if let Some(entry) = self.images().get_mut(&record.name) {
                    entry.record.identity = identity;
                }
                LeafTable::create(&path, identity.chunks())?
            }
        };
        let index_path = record::index_path(&self.dir, &record.name);
        let mut index = IndexBuilder::new(&index_path);
        let is_from_the_start = table.done() == 0;
        if image::scan(&file, &mut table, &mut index, &mut go_on)? == Scanned::Stopped {
            return Ok(None);
        }
        if !is_from_the_start {
            // The table went on where it was, but the index did not see what came before.
            let chunks = table.chunks();
            index = IndexBuilder::new(&index_path);
            if image::index(&file, &mut index, || go_on(chunks))? == Scanned::Stopped {
                return Ok(None);
            }
        }
        if Identity::of(&file)? != identity {
            return Err(io::Error::other(
                "it was written while it was read; verify it when it is at rest",
            ));
        }
        let mut data_chunks = 0;
        let tree = table.read_all(|_, leaf| data_chunks += u64::from(leaf.is_some()))?;
        if let Some(root) = tree.root() {
            index.finish(root)?;
        }
        let whole = Whole {
            root: tree.root().map(|root| root.to_string()),
            data_chunks,
            scanned_unix_ms: unix_ms(),
        };
        Ok(Some((identity, whole)))
    }

    /// Forgets an image's fingerprints, so that a scan makes them anew. Blocks.
    pub(crate) fn begin_verify(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        let mut images = self.images();
        let entry = images.get_mut(name).ok_or_else(|| unknown(name))?;
        if entry.scan.is_none() {
            let failed = |error| io_error("forgetting the image's fingerprints", &error);
            entry.record.whole = None;
            entry.record.problem = None;
            entry.record.save(&self.dir).map_err(failed)?;
            record::remove_file(&record::table_path(&self.dir, name)).map_err(failed)?;
        }
        Ok(describe(entry))
    }

    /// Gives an image up; the file stays, unless it is the library's own copy. Blocks.
    pub(crate) fn remove(&self, name: &VolumeName) -> Result<LibraryImage, ErrorBody> {
        let mut images = self.images();
        let entry = images.get(name).ok_or_else(|| unknown(name))?;
        let info = describe(entry);
        let removed = record::remove_file(&record::record_path(&self.dir, name)).and_then(|()| {
            record::remove_file(&record::table_path(&self.dir, name))?;
            record::remove_file(&record::index_path(&self.dir, name))?;
            record::remove_file(&record::copy_path(&self.dir, name))
        });
        removed.map_err(|error| io_error(&format!("removing {name} from the library"), &error))?;
        if let Some(scan) = images.remove(name).and_then(|entry| entry.scan) {
            scan.stop.store(true, Ordering::Relaxed);
        }
        Ok(info)
    }

    /// Images that can be used for a volume of this tenant.
    fn candidates(&self, tenant: &str) -> Vec<Candidate> {
        let ready: Vec<ImageRecord> = {
            let images = self.images();
            let is_ready = |entry: &&Entry| entry.scan.is_none() && entry.record.problem.is_none();
            let ready = images
                .values()
                .filter(is_ready)
                .map(|entry| entry.record.clone());
            ready.collect()
        };
        let may_see =
            |record: &ImageRecord| record.tenant.as_deref().is_none_or(|owner| owner == tenant);
        ready
            .into_iter()
            .filter(may_see)
            .filter_map(|record| self.candidate(&record))
            .collect()
    }

    /// Files that volumes of all these tenants may share content with, with their indexes.
    fn indexed(&self, tenants: &[String]) -> Vec<Indexed> {
        let Some((first, others)) = tenants.split_first() else {
            return Vec::new();
        };
        let for_all = |candidate: &Candidate| {
            let owner = candidate.tenant.as_ref();
            owner.is_none_or(|owner| others.iter().all(|other| other == owner))
        };
        let candidates = self.candidates(first).into_iter().filter(for_all);
        let indexed = candidates.filter_map(|candidate| {
            let path = record::index_path(&self.dir, &candidate.name);
            match ContentIndex::open(&path, candidate.root) {
                Ok(index) => Some(Indexed {
                    file: candidate.file,
                    index,
                }),
                Err(error) => {
                    let why = format!("its index cannot be used: {error}");
                    self.put_aside(&candidate.name, &why);
                    None
                }
            }
        });
        indexed.collect()
    }

    fn candidate(&self, record: &ImageRecord) -> Option<Candidate> {
        let root = parse_root(record.whole.as_ref()?.root.as_ref()?)?;
        let opened = image::open(&record.path).map(|(file, identity)| {
            let table = LeafTable::open(
                &record::table_path(&self.dir, &record.name),
                identity.chunks(),
            );
            (file, identity, table)
        });
        match opened {
            Ok((file, identity, Ok(table))) if identity == record.identity => Some(Candidate {
                name: record.name.clone(),
                tenant: record.tenant.clone(),
                file,
                table,
                root,
            }),
            Ok((_, identity, Err(error))) if identity == record.identity => {
                self.put_aside(&record.name, &format!("its table cannot be used: {error}"));
                None
            }
            Ok(_) => {
                tracing::warn!(image = %record.name, "an image of the library has changed and is not used; `flimcd library verify` makes its table anew");
                None
            }
            Err(error) => {
                tracing::warn!(image = %record.name, "an image of the library is not used: {error}");
                None
            }
        }
    }

    /// An image whose table is of no use waits for somebody to have it verified.
    fn put_aside(&self, name: &VolumeName, why: &str) {
        tracing::error!(image = %name, "an image of the library is not used: {why}; `flimcd library verify {name}` makes its table anew");
        let mut images = self.images();
        if let Some(entry) = images.get_mut(name) {
            entry.record.problem = Some(why.to_owned());
            if let Err(error) = entry.record.save(&self.dir) {
                tracing::error!(image = %name, "the record of an image cannot be written: {error}");
            }
        }
    }
}

fn describe(entry: &Entry) -> LibraryImage {
    let record = &entry.record;
    let chunks = record.identity.chunks();
    let is_current = || {
        File::open(&record.path)
            .and_then(|file| Identity::of(&file))
            .map(|now| now == record.identity)
    };
    let (state, problem) = match (&entry.scan, &record.problem, &record.whole) {
        (Some(_), ..) | (None, None, None) => (LibraryState::Scanning, None),
        (None, Some(problem), _) => (LibraryState::Failed, Some(problem.clone())),
        (None, None, Some(_)) => match is_current() {
            Ok(true) => (LibraryState::Ready, None),
            Ok(false) => (
                LibraryState::Stale,
                Some("the file was changed since it was read".to_owned()),
            ),
            Err(error) => (
                LibraryState::Stale,
                Some(format!("the file cannot be opened: {error}")),
            ),
        },
    };
    let scanned = match (&entry.scan, &record.whole) {
        (Some(scan), _) => scan.done_chunks.load(Ordering::Relaxed),
        (None, Some(_)) => chunks,
        (None, None) => 0,
    };
    LibraryImage {
        name: record.name.clone(),
        path: record.path.clone(),
        tenant: record.tenant.clone(),
        is_copy: record.is_copy,
        size_bytes: record.identity.size_bytes,
        data_bytes: record
            .whole
            .as_ref()
            .map(|whole| whole.data_chunks * CHUNK_SIZE),
        state,
        scanned_bytes: (scanned * CHUNK_SIZE).min(record.identity.size_bytes),
        root: record.whole.as_ref().and_then(|whole| whole.root.clone()),
        problem,
        added_unix_ms: record.added_unix_ms,
        scanned_unix_ms: record.whole.as_ref().map(|whole| whole.scanned_unix_ms),
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

fn name_of(request: &AddLibraryImage) -> Result<VolumeName, ErrorBody> {
    if !request.path.is_absolute() {
        let message = format!("the path {} is not absolute", request.path.display());
        let hint = "the agent has another working directory: give the whole path";
        return Err(refuse(ApiCode::BadRequest, message, hint));
    }
    if request.public && request.tenant.is_some() {
        let message = "an image is either public or a tenant's";
        return Err(refuse(ApiCode::BadRequest, message, ""));
    }
    if let Some(name) = &request.name {
        return Ok(name.clone());
    }
    let stem = request
        .path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default();
    stem.parse().map_err(|error| {
        let message = format!("the file's name is no name for an image: {error}");
        refuse(ApiCode::BadRequest, message, "give one with --name")
    })
}

fn no_image(error: &ImageError, path: &Path) -> ErrorBody {
    let hint = match error {
        ImageError::Qcow2 { .. } => format!(
            "make a raw one of it: qemu-img convert -O raw {} NEW.raw",
            path.display()
        ),
        ImageError::Open { .. } => {
            "check the path, and the permissions of the user that the agent runs as".to_owned()
        }
        _ => "the library takes raw images".to_owned(),
    };
    refuse(ApiCode::Image, error.to_string(), hint)
}

fn unknown(name: &VolumeName) -> ErrorBody {
    refuse(
        ApiCode::UnknownImage,
        format!("there is no image {name} in the library"),
        "`flimcd library list` shows what there is",
    )
}

/// Copies a file and leaves chunks of zeroes out.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    let target = File::create_new(to)?;
    target.set_len(size)?;
    let mut buffer = vec![0; usize::try_from(CHUNK_SIZE * 16).map_err(io::Error::other)?];
    let mut at = 0;
    while at < size {
        // Never behind `at`, which is where a chunk begins.
        at = at.max(image::next_data(&source, at, size)? / CHUNK_SIZE * CHUNK_SIZE);
        let length = size.saturating_sub(at).min(CHUNK_SIZE * 16);
        let piece = &mut buffer[..usize::try_from(length).map_err(io::Error::other)?];
        source.read_exact_at(piece, at)?;
        if !flimcd_content::is_zero(piece) {
            target.write_all_at(piece, at)?;
        }
        at += length.max(1);
    }
    target.sync_all()
}

#[cfg(test)]
mod tests;
