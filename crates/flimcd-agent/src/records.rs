//! Durable records: a directory of JSON files, each replaced atomically.

use serde::{Serialize, de::DeserializeOwned};
use std::{
    fmt::Display,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// What is kept in such a directory.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// Version of the files' format.
    const FORMAT: u32;
    /// What it is a record of, to people.
    const OF: &'static str;
    /// What it means that one cannot be read, for the log: the rest of the sentence that it is left out.
    const WITHOUT: &'static str;

    /// The version that this one was written in.
    fn format(&self) -> u32;
}

/// The file of the record called `stem`.
pub(crate) fn path(dir: &Path, stem: &impl Display) -> PathBuf {
    dir.join(format!("{stem}.json"))
}

/// Writes a record durably, in the place of one of the same name. Blocks for the disk.
pub(crate) fn save(dir: &Path, stem: &impl Display, record: &impl Record) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
    let temporary = dir.join(format!("{stem}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, path(dir, stem))?;
    File::open(dir)?.sync_all()
}

/// Removes a record durably; none is fine. Blocks for the disk.
pub(crate) fn remove(dir: &Path, stem: &impl Display) -> io::Result<()> {
    match fs::remove_file(path(dir, stem)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::open(dir)?.sync_all(),
    }
}

/// Reads all records of a directory, and clears away what a write that was cut short has left. Files that cannot
/// be read are reported in the log and left alone.
pub(crate) fn load_all<R: Record>(dir: &Path) -> io::Result<Vec<R>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("tmp") => fs::remove_file(&path)?,
            Some("json") => match load(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(
                    "the record of {} {} cannot be read ({error}); it is left out{}",
                    R::OF,
                    path.display(),
                    R::WITHOUT
                ),
            },
            _ => {}
        }
    }
    Ok(records)
}

fn load<R: Record>(path: &Path) -> io::Result<R> {
    let record: R = serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)?;
    if record.format() == R::FORMAT {
        Ok(record)
    } else {
        let problem = format!("format {} of another version", record.format());
        Err(io::Error::other(problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Note {
        format: u32,
        text: String,
    }

    impl Record for Note {
        const FORMAT: u32 = 3;
        const OF: &'static str = "a test";
        const WITHOUT: &'static str = "";

        fn format(&self) -> u32 {
            self.format
        }
    }

    fn note(format: u32, text: &str) -> Note {
        let text = text.to_owned();
        Note { format, text }
    }

    #[test]
    fn what_is_whole_and_of_this_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        save(dir, &"one", &note(3, "first")).unwrap();
        save(dir, &"one", &note(3, "second")).unwrap();
        save(dir, &"older", &note(2, "")).unwrap();
        fs::write(path(dir, &"broken"), "{").unwrap();
        fs::write(dir.join("half.tmp"), "{").unwrap();
        fs::write(dir.join("other.raw"), "").unwrap();
        assert_eq!(load_all::<Note>(dir).unwrap(), [note(3, "second")]);
        assert!(!dir.join("half.tmp").exists());
        assert!(path(dir, &"older").exists() && path(dir, &"broken").exists());
        remove(dir, &"one").unwrap();
        remove(dir, &"one").unwrap();
        assert!(load_all::<Note>(dir).unwrap().is_empty());
    }
}
