//! Replacing a small file so that a crash leaves the old or the new one.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// The calls that a replacement makes, so that a test can crash between them.
pub(super) trait Files {
    /// Writes a whole new file.
    fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync_file(&mut self, path: &Path) -> io::Result<()>;
    /// Gives a file another file's name.
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&mut self, path: &Path) -> io::Result<()>;
}

/// The file system.
#[derive(Debug, Default)]
pub(super) struct RealFiles {
    /// The file written last, so that the sync is of the same open file that was written to: an error of the
    /// write-back is reported to descriptors that were open then.
    file: Option<File>,
}

impl Files for RealFiles {
    fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        self.file = Some(file);
        Ok(())
    }

    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        match &self.file {
            Some(file) => file.sync_all(),
            None => File::open(path)?.sync_all(),
        }
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// How a replacement failed.
#[derive(Debug)]
pub(super) enum ReplaceError {
    /// The old file is in place.
    Unchanged(io::Error),
    /// The new file is in place, and after a power failure the old one may be again.
    Undecided(io::Error),
}

/// Makes `dir/name` have `bytes`, durably.
pub(super) fn replace(
    files: &mut impl Files,
    dir: &Path,
    name: &str,
    bytes: &[u8],
) -> Result<(), ReplaceError> {
    let temporary = dir.join(format!("{name}.tmp"));
    files
        .write(&temporary, bytes)
        .and_then(|()| files.sync_file(&temporary))
        .and_then(|()| files.rename(&temporary, &dir.join(name)))
        .map_err(ReplaceError::Unchanged)?;
    files.sync_dir(dir).map_err(ReplaceError::Undecided)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::record::{VolumeRecord, tests::sample};
    use std::{collections::BTreeMap, path::PathBuf};

    /// A file in the model: what is in the page cache, and what is on the disk.
    #[derive(Clone, Debug, Default)]
    struct Content {
        live: Vec<u8>,
        durable: Option<Vec<u8>>,
    }

    /// A file system that keeps live names and contents apart from durable ones.
    #[derive(Clone, Debug, Default)]
    struct ModelFiles {
        contents: Vec<Content>,
        live: BTreeMap<PathBuf, usize>,
        /// Directory changes that are not durable, in order. A crash keeps a prefix of them.
        pending: Vec<Change>,
        durable: BTreeMap<PathBuf, usize>,
        /// Calls until the crash.
        fuse: usize,
        skip: Option<&'static str>,
    }

    #[derive(Clone, Debug)]
    enum Change {
        Link(PathBuf, usize),
        Rename(PathBuf, PathBuf),
    }

    impl ModelFiles {
        fn burn(&mut self) -> io::Result<()> {
            if self.fuse == 0 {
                return Err(io::Error::other("crash"));
            }
            self.fuse -= 1;
            Ok(())
        }

        fn apply(names: &mut BTreeMap<PathBuf, usize>, change: &Change) {
            match change {
                Change::Link(path, file) => {
                    names.insert(path.clone(), *file);
                }
                Change::Rename(from, to) => {
                    if let Some(file) = names.remove(from) {
                        names.insert(to.clone(), file);
                    }
                }
            }
        }

        /// Every state of the disk that a crash now can leave at `path`: file not there, or its bytes.
        fn after_crash(&self, path: &Path) -> Vec<Option<Vec<u8>>> {
            let mut states = Vec::new();
            for kept in 0..=self.pending.len() {
                let mut names = self.durable.clone();
                for change in &self.pending[..kept] {
                    Self::apply(&mut names, change);
                }
                let Some(&file) = names.get(path) else {
                    states.push(None);
                    continue;
                };
                let content = &self.contents[file];
                match &content.durable {
                    Some(bytes) if *bytes == content.live => states.push(Some(bytes.clone())),
                    // Not synced: nothing, half of it with zeroes behind, or all of it.
                    _ => {
                        let half = content.live.len() / 2;
                        let mut torn = content.live[..half].to_vec();
                        torn.resize(content.live.len(), 0);
                        states.extend([Some(vec![]), Some(torn), Some(content.live.clone())]);
                    }
                }
            }
            states
        }
    }

    impl Files for ModelFiles {
        fn write(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            self.burn()?;
            self.contents.push(Content {
                live: bytes.to_vec(),
                durable: None,
            });
            let file = self.contents.len() - 1;
            self.live.insert(path.to_owned(), file);
            self.pending.push(Change::Link(path.to_owned(), file));
            Ok(())
        }

        fn sync_file(&mut self, path: &Path) -> io::Result<()> {
            self.burn()?;
            if self.skip != Some("sync_file") {
                let content = &mut self.contents[self.live[path]];
                content.durable = Some(content.live.clone());
            }
            Ok(())
        }

        fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
            self.burn()?;
            let change = Change::Rename(from.to_owned(), to.to_owned());
            Self::apply(&mut self.live, &change);
            self.pending.push(change);
            Ok(())
        }

        fn sync_dir(&mut self, _: &Path) -> io::Result<()> {
            self.burn()?;
            if self.skip != Some("sync_dir") {
                for change in self.pending.drain(..) {
                    Self::apply(&mut self.durable, &change);
                }
            }
            Ok(())
        }
    }

    /// Crashes at every step of several replacements in a row; true when recovery always finds the old or the new record,
    /// and the new one once the replacement has returned.
    fn survives(skip: Option<&'static str>) -> bool {
        let dir = Path::new("/v");
        let record = dir.join("record");
        for fuse in 0..=12 {
            let mut files = ModelFiles {
                fuse: 4,
                ..ModelFiles::default()
            };
            replace(&mut files, dir, "record", &sample(1).encode().unwrap()).unwrap();
            files.fuse = fuse;
            files.skip = skip;
            let mut epoch = 1;
            loop {
                let new = sample(epoch + 1).encode().unwrap();
                let done = replace(&mut files, dir, "record", &new).is_ok();
                let allowed = if done {
                    epoch + 1..=epoch + 1
                } else {
                    epoch..=epoch + 1
                };
                for state in files.after_crash(&record) {
                    let Some(bytes) = state else { return false };
                    match VolumeRecord::decode(&bytes, &record) {
                        Ok(found) if allowed.contains(&found.epoch.0) => {}
                        _ => return false,
                    }
                }
                if !done || epoch == 4 {
                    break;
                }
                epoch += 1;
            }
        }
        true
    }

    #[test]
    fn a_crash_at_any_step_leaves_the_old_or_the_new_record() {
        assert!(survives(None));
    }

    #[test]
    fn the_model_notices_a_missing_sync() {
        assert!(!survives(Some("sync_file")));
        assert!(!survives(Some("sync_dir")));
    }
}
