//! Files written on command, with checksums kept in memory: what was written before, during and
//! after a move has to be there at the end.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::{
    content::fill_text,
    files::{O_DIRECT, Page},
    rng::mix3,
};

/// A file, its size and the checksum of what was written.
struct Mark {
    name: String,
    pages: u64,
    sum: u64,
}

/// The files so far.
pub(crate) struct Marks {
    dir: PathBuf,
    marks: Vec<Mark>,
}

impl Marks {
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            marks: Vec::new(),
        }
    }

    /// Writes a file of `kib` KiB and waits until it is on the disk. Returns its checksum.
    pub(crate) fn write(&mut self, name: &str, kib: u64) -> io::Result<u64> {
        if name.is_empty() || name.contains('/') || self.marks.iter().any(|m| m.name == name) {
            let text = format!("{name:?} is not a new file name");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let pages = kib.div_ceil(4);
        let mut file = File::create(self.dir.join(name))?;
        let mut sum = Sum::default();
        let mut page = Page::boxed();
        for number in 0..pages {
            fill_text(mix3(Sum::of(name.as_bytes()), number, 2), &mut page.0);
            sum.add(&page.0);
            file.write_all(&page.0)?;
        }
        file.sync_all()?;
        File::open(&self.dir)?.sync_all()?;
        self.marks.push(Mark {
            name: name.to_owned(),
            pages,
            sum: sum.0,
        });
        Ok(sum.0)
    }

    /// Name and checksum of each, as written.
    pub(crate) fn sums(&self) -> impl Iterator<Item = (&str, u64)> {
        self.marks.iter().map(|mark| (mark.name.as_str(), mark.sum))
    }

    /// Reads every file from the disk again. Returns how many are not what was written.
    pub(crate) fn verify(&self) -> u64 {
        let mut wrong = 0;
        for mark in &self.marks {
            match read_sum(&self.dir.join(&mark.name)) {
                Ok((pages, sum)) if (pages, sum) == (mark.pages, mark.sum) => {}
                Ok((pages, sum)) => {
                    wrong += 1;
                    println!("BAD file {}: {pages} pages, sum {sum:016x}", mark.name);
                }
                Err(error) => {
                    wrong += 1;
                    println!("BAD file {}: {error}", mark.name);
                }
            }
        }
        wrong
    }
}

/// Reads past the page cache, where the file system can.
fn read_sum(path: &Path) -> io::Result<(u64, u64)> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(O_DIRECT)
        .open(path);
    let mut file = direct.or_else(|_| File::open(path))?;
    let mut sum = Sum::default();
    let mut page = Page::boxed();
    let mut pages = 0;
    loop {
        match file.read(&mut page.0)? {
            0 => return Ok((pages, sum.0)),
            n if n == page.0.len() => sum.add(&page.0),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        pages += 1;
    }
}

/// FNV-1a over 64-bit words: enough to find what moved wrongly, and fast under emulation.
#[derive(Clone, Copy)]
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn of(bytes: &[u8]) -> u64 {
        let mut sum = Self::default();
        sum.add(bytes);
        sum.0
    }

    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            let mixed = (self.0 ^ u64::from_le_bytes(padded)).wrapping_mul(0x0100_0000_01b3);
            self.0 = mixed ^ (mixed >> 29);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_changed_is_found() {
        let dir = std::env::temp_dir().join(format!("flimcd-marks-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let mut marks = Marks::new(&dir);
        marks.write("one", 17).unwrap();
        marks.write("two", 4).unwrap();
        assert!(marks.write("two", 4).is_err() && marks.write("a/b", 4).is_err());
        let sums: Vec<_> = marks.sums().collect();
        assert!(sums[0].0 == "one" && sums[0].1 != sums[1].1);
        assert_eq!(marks.verify(), 0);
        let mut bytes = fs::read(dir.join("one")).unwrap();
        bytes[5000] ^= 1;
        fs::write(dir.join("one"), bytes).unwrap();
        fs::remove_file(dir.join("two")).unwrap();
        assert_eq!(marks.verify(), 2);
        fs::remove_dir_all(&dir).unwrap();
    }
}
