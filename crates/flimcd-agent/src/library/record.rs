//! Durable records of the library's images: one JSON file each, replaced atomically.

use flimcd_core::VolumeName;
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::image::Identity;
use crate::records::{self, Record};

/// What is known durably of one image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    format: u32,
    pub(super) name: VolumeName,
    pub(super) path: PathBuf,
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
            name,
            path,
            tenant,
            is_copy: false,
            added_unix_ms: now,
            identity,
            whole: None,
            problem: None,
        }
    }

    /// Writes the record durably. Blocks for the disk.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        records::save(dir, &self.name, self)
    }
}

/// Where the index of an image's blocks is.
pub(super) fn index_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.index"))
}

pub(super) fn record_path(dir: &Path, name: &VolumeName) -> PathBuf {
    records::path(dir, name)
}

pub(super) fn table_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.leaves"))
}

pub(super) fn copy_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.raw"))
}

/// Reads all records. Those that cannot be read are reported in the log and left alone.
pub(super) fn load_all(dir: &Path) -> io::Result<Vec<ImageRecord>> {
    records::load_all(dir)
}

/// Removes a file; none is fine.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
