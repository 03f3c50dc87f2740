//! Durable records of the library's images: one JSON file each, replaced atomically.

use flimcd_core::VolumeName;
use serde::{Deserialize, Serialize};
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use super::{image::Identity, index};
use crate::{
    api::LibraryKind,
    records::{self, Record},
};

/// Where an entry stands: images that people have added and volumes of the agent may have the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shelf {
    /// Added by people.
    Images,
    /// Volumes, here by themselves.
    Volumes,
}

/// Names an entry of the library.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(super) shelf: Shelf,
    pub(super) name: VolumeName,
}

impl Key {
    pub(super) fn image(name: &VolumeName) -> Self {
        let name = name.clone();
        Self {
            shelf: Shelf::Images,
            name,
        }
    }

    pub(super) fn volume(name: &VolumeName) -> Self {
        let name = name.clone();
        Self {
            shelf: Shelf::Volumes,
            name,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shelf {
            Shelf::Images => write!(f, "image {}", self.name),
            Shelf::Volumes => write!(f, "volume {}", self.name),
        }
    }
}

/// What is known durably of one image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    format: u32,
    #[serde(default)]
    pub(super) kind: LibraryKind,
    pub(super) name: VolumeName,
    pub(super) path: PathBuf,
    /// What is converted into the file at `path` before that is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) convert_from: Option<PathBuf>,
    /// The image that this one was added with, as a part of its backing chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) part_of: Option<VolumeName>,
    /// Whose it is; `None`: anybody's.
    pub(super) tenant: Option<String>,
    /// The file is the library's own.
    pub(super) is_copy: bool,
    pub(super) added_unix_ms: u64,
    /// The file as it was when its fingerprints were made, or began to be.
    pub(super) identity: Identity,
    /// Its fingerprints, if they are all there.
    pub(super) whole: Option<Whole>,
    /// Why it cannot be used, until it is verified.
    pub(super) problem: Option<String>,
}

/// What a table came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Whole {
    /// Root of the tree, hexadecimal; none for an image of zeroes.
    pub(super) root: Option<String>,
    pub(super) data_chunks: u64,
    pub(super) scanned_unix_ms: u64,
}

impl Record for ImageRecord {
    const FORMAT: u32 = 1;
    const OF: &'static str = "a library image";
    const WITHOUT: &'static str = "";

    fn format(&self) -> u32 {
        self.format
    }
}

impl ImageRecord {
    pub(super) fn new(
        name: VolumeName,
        path: PathBuf,
        tenant: Option<String>,
        identity: Identity,
        now: u64,
    ) -> Self {
        Self {
            format: Self::FORMAT,
            kind: LibraryKind::Image,
            name,
            path,
            convert_from: None,
            part_of: None,
            tenant,
            is_copy: false,
            added_unix_ms: now,
            identity,
            whole: None,
            problem: None,
        }
    }

    pub(super) fn key(&self) -> Key {
        match self.kind {
            LibraryKind::Image => Key::image(&self.name),
            LibraryKind::Replica | LibraryKind::Volume => Key::volume(&self.name),
        }
    }

    /// Writes the record durably. Blocks for the disk.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        records::save(&shelf_dir(dir, self.key().shelf), &self.name, self)
    }
}

fn shelf_dir(dir: &Path, shelf: Shelf) -> PathBuf {
    match shelf {
        Shelf::Images => dir.to_owned(),
        Shelf::Volumes => dir.join("volumes"),
    }
}

fn beside(dir: &Path, key: &Key, extension: &str) -> PathBuf {
    shelf_dir(dir, key.shelf).join(format!("{}.{extension}", key.name))
}

/// The fingerprints of the chunks.
pub(super) fn table_path(dir: &Path, key: &Key) -> PathBuf {
    beside(dir, key, "leaves")
}

/// The content index.
pub(super) fn index_path(dir: &Path, key: &Key) -> PathBuf {
    beside(dir, key, "index")
}

/// The library's own copy.
pub(super) fn copy_path(dir: &Path, key: &Key) -> PathBuf {
    beside(dir, key, "raw")
}

/// Removes the fingerprints and the index.
pub(super) fn remove_made(dir: &Path, key: &Key) -> io::Result<()> {
    remove_file(&table_path(dir, key))?;
    index::remove(&index_path(dir, key))
}

/// Removes everything that the library has of an entry.
pub(super) fn remove_all(dir: &Path, key: &Key) -> io::Result<()> {
    records::remove(&shelf_dir(dir, key.shelf), &key.name)?;
    remove_made(dir, key)?;
    remove_file(&copy_path(dir, key))
}

/// Makes the directories and reads all records. Those that cannot be read are reported in the log and left alone.
pub(super) fn load_all(dir: &Path) -> io::Result<Vec<ImageRecord>> {
    let mut all = Vec::new();
    for shelf in [Shelf::Images, Shelf::Volumes] {
        let dir = shelf_dir(dir, shelf);
        fs::create_dir_all(&dir)?;
        let records = records::load_all(&dir)?.into_iter();
        all.extend(records.filter(|record: &ImageRecord| record.key().shelf == shelf));
    }
    Ok(all)
}

/// Removes a file; none is fine.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
