//! Durable records of the library's images: one JSON file each, replaced atomically.

use flimcd_core::VolumeName;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::image::Identity;

/// Version of the files' format.
const FORMAT: u32 = 1;

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

impl ImageRecord {
    pub(super) fn new(
        name: VolumeName,
        path: PathBuf,
        tenant: Option<String>,
        identity: Identity,
        now: u64,
    ) -> Self {
        Self {
            format: FORMAT,
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
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        let temporary = dir.join(format!("{}.tmp", self.name));
        let mut file = File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, record_path(dir, &self.name))?;
        File::open(dir)?.sync_all()
    }
}

pub(super) fn record_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.json"))
}

pub(super) fn table_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.leaves"))
}

pub(super) fn copy_path(dir: &Path, name: &VolumeName) -> PathBuf {
    dir.join(format!("{name}.raw"))
}

/// Reads all records. Those that cannot be read are reported in the log and left alone.
pub(super) fn load_all(dir: &Path) -> io::Result<Vec<ImageRecord>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let is = |wanted: &str| {
            path.extension()
                .is_some_and(|extension| extension == wanted)
        };
        if is("tmp") {
            fs::remove_file(&path)?;
        } else if is("json") {
            match load(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(
                    "the record of a library image {} cannot be read ({error}); it is left out",
                    path.display()
                ),
            }
        }
    }
    Ok(records)
}

fn load(path: &Path) -> io::Result<ImageRecord> {
    let record: ImageRecord = serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)?;
    if record.format != FORMAT {
        let problem = format!("format {} of another version", record.format);
        return Err(io::Error::other(problem));
    }
    Ok(record)
}

/// Removes a file; none is fine.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
