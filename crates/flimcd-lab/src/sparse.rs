//! Files with holes: their extents, copies and comparisons.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use rustix::{
    fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek},
    io::Errno,
};

const BUFFER_BYTES: usize = 1 << 20;
/// The kernel is asked to copy so much at once.
const COPY_BYTES_MAX: u64 = 64 << 20;

/// Copies a file and its holes. `to` must not exist.
///
/// # Errors
/// Those of reading and writing; [`io::ErrorKind::AlreadyExists`] when `to` exists.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    let target = File::create_new(to)?;
    target.set_len(size)?;
    for_each_extent(&source, size, |start, end| {
        copy_extent(&source, &target, start, end)
    })
}

fn copy_extent(source: &File, target: &File, mut at: u64, end: u64) -> io::Result<()> {
    // Room is taken in one piece, as a file system that is not full would give it.
    let _ = fallocate(target, FallocateFlags::empty(), at, end - at);
    while at < end {
        let (mut from, mut to) = (at, at);
        let want = usize::try_from((end - at).min(COPY_BYTES_MAX)).unwrap_or(BUFFER_BYTES);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => at += copied as u64,
            // Not on every file system, and not between any two.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP) => {
                return copy_by_hand(source, target, at, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, target: &File, mut at: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while at < end {
        let len = buffer
            .len()
            .min(usize::try_from(end - at).unwrap_or(usize::MAX));
        source.read_exact_at(&mut buffer[..len], at)?;
        target.write_all_at(&buffer[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Where two files differ first; `None` when they hold the same bytes. Holes are zeroes.
///
/// # Errors
/// Those of reading.
pub fn first_difference(one: &Path, other: &Path) -> io::Result<Option<u64>> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let size = one.metadata()?.len();
    if other.metadata()?.len() != size {
        return Ok(Some(size.min(other.metadata()?.len())));
    }
    // What is a hole in both needs no look.
    let first = first_in_extents(&one, &other, &one, size)?;
    let second = first_in_extents(&one, &other, &other, size)?;
    Ok(first.into_iter().chain(second).min())
}

fn first_in_extents(one: &File, other: &File, map: &File, size: u64) -> io::Result<Option<u64>> {
    let (mut left, mut right) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut found = None;
    for_each_extent(map, size, |mut at, end| {
        while at < end && found.is_none() {
            let len = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(BUFFER_BYTES);
            one.read_exact_at(&mut left[..len], at)?;
            other.read_exact_at(&mut right[..len], at)?;
            let differs = left[..len]
                .iter()
                .zip(&right[..len])
                .position(|(l, r)| l != r);
            found = differs.map(|offset| at + offset as u64);
            at += len as u64;
        }
        Ok(())
    })?;
    Ok(found)
}

/// Calls `each` with the start and the end of every run of bytes of `file`, of `size` bytes, that is not a hole.
///
/// # Errors
/// Those of the file, and of `each`.
pub fn for_each_extent(
    file: &File,
    size: u64,
    mut each: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        each(start, end)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn copies_keep_holes_and_differences_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&one).unwrap();
        file.set_len((8 << 20) + 77).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(b"end", (8 << 20) + 74).unwrap();
        copy_sparse(&one, &other).unwrap();
        assert_eq!(first_difference(&one, &other).unwrap(), None);
        assert!(std::fs::read(&one).unwrap() == std::fs::read(&other).unwrap());
        assert!(std::fs::metadata(&other).unwrap().blocks() * 512 < 1 << 20);
        let error = copy_sparse(&one, &other).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        // In what is a hole in one of them only.
        let copy = File::options().write(true).open(&other).unwrap();
        copy.write_all_at(&[1], 5 << 20).unwrap();
        assert_eq!(first_difference(&one, &other).unwrap(), Some(5 << 20));
        assert_eq!(first_difference(&other, &one).unwrap(), Some(5 << 20));
        copy.set_len(1000).unwrap();
        assert_eq!(first_difference(&one, &other).unwrap(), Some(1000));
    }

    #[test]
    fn copies_by_hand_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("a"), dir.path().join("b"));
        let content: Vec<u8> = (0..(2u32 << 20) + 77).map(|at| (at % 251) as u8).collect();
        std::fs::write(&one, &content).unwrap();
        let (source, target) = (File::open(&one).unwrap(), File::create(&other).unwrap());
        copy_by_hand(&source, &target, 0, content.len() as u64).unwrap();
        assert_eq!(first_difference(&one, &other).unwrap(), None);
    }
}
