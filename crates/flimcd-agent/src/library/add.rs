//! Taking images in.

use flimcd_core::{CHUNK_SIZE, VolumeName};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    DEFAULT_TENANT, Entry, Library,
    chain::{self, Chain, ChainError},
    describe,
    image::{self, Identity, ImageError},
    record::{self, ImageRecord},
};
use crate::{
    api::{AddLibraryImage, ApiCode, ErrorBody, LibraryImage},
    error::{io_error, refuse},
    migration::progress::unix_ms,
};

/// What becomes of a file that is added.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    /// It stays where it is.
    AsItIs,
    /// The library makes a copy of its own.
    Copy,
    /// The same, of what guests see in it, when it is its turn to be read.
    Convert,
}

impl Library {
    /// Takes an image in, of qcow2 the files of the whole backing chain; they are to be scanned next. `in_use` says which volume
    /// has a file. Blocks.
    pub(crate) fn add(
        &self,
        request: &AddLibraryImage,
        in_use: impl Fn(&File) -> Option<VolumeName>,
    ) -> Result<LibraryImage, ErrorBody> {
        let name = name_of(request)?;
        let path = &request.path;
        let (file, _) = image::open(path).map_err(|error| no_image(&error, path))?;
        refuse_volume(path, in_use(&file))?;
        let read = image::is_qcow2(&file).map_err(|error| io_error("reading the image", &error))?;
        let (take, parts) = match read.then(|| chain::look(path)) {
            None if request.copy => (Take::Copy, Vec::new()),
            None => (Take::AsItIs, Vec::new()),
            Some(Err(error)) => return Err(no_chain(&error, path)),
            Some(Ok(Chain::ToConvert(why))) => {
                tracing::info!(image = %name, "the library makes a raw copy of an image: {why}");
                (Take::Convert, Vec::new())
            }
            // A copy of each file would still refer to the others where they were.
            Some(Ok(Chain::Plain(_))) if request.copy => (Take::Convert, Vec::new()),
            Some(Ok(Chain::Plain(files))) => (Take::AsItIs, self.parts(&name, files)?),
        };
        for (_, part) in &parts {
            let (file, _) = image::open(part).map_err(|error| no_image(&error, part))?;
            refuse_volume(part, in_use(&file))?;
        }
        let info = self.add_file(request, &name, path, None, take)?;
        for (part, path) in &parts {
            if let Err(error) = self.add_file(request, part, path, Some(&name), take) {
                // The error says what is wrong; of the chain nothing stays.
                let _ = self.remove(&name);
                return Err(error);
            }
        }
        Ok(info)
    }

    /// Names for the files that a chain's image is based on, without those that are in the library already.
    fn parts(
        &self,
        name: &VolumeName,
        files: Vec<PathBuf>,
    ) -> Result<Vec<(VolumeName, PathBuf)>, ErrorBody> {
        let known: Vec<PathBuf> = {
            let entries = self.entries();
            let paths = entries.values().map(|entry| entry.record.path.clone());
            paths.collect()
        };
        let mut parts = Vec::new();
        for (number, file) in (1u32..).zip(files.into_iter().skip(1)) {
            if known.contains(&file) {
                continue;
            }
            let part = format!("{name}.{number}").parse().map_err(|error| {
                let message = format!("a part of the backing chain cannot be named: {error}");
                refuse(
                    ApiCode::BadRequest,
                    message,
                    "give a shorter name with --name",
                )
            })?;
            parts.push((part, file));
        }
        Ok(parts)
    }

    fn add_file(
        &self,
        request: &AddLibraryImage,
        name: &VolumeName,
        path: &Path,
        part_of: Option<&VolumeName>,
        take: Take,
    ) -> Result<LibraryImage, ErrorBody> {
        let (_, identity) = image::open(path).map_err(|error| no_image(&error, path))?;
        let tenant = request.tenant.clone();
        let tenant = tenant.or_else(|| Some(DEFAULT_TENANT.to_owned()));
        let tenant = tenant.filter(|_| !request.public);
        let mut record =
            ImageRecord::new(name.clone(), path.to_owned(), tenant, identity, unix_ms());
        record.part_of = part_of.cloned();
        let key = record.key();
        {
            let mut entries = self.entries();
            if entries.contains_key(&key) {
                let message = format!("there is an image {name} in the library already");
                let hint = "choose another name with --name, or remove that one";
                return Err(refuse(ApiCode::Exists, message, hint));
            }
            let (record, scan) = (record.clone(), Some(super::Scan::default()));
            entries.insert(key.clone(), Entry { record, scan });
        }
        let taken = self.take_in(&mut record, take);
        let mut entries = self.entries();
        match taken {
            Ok(()) => {
                let entry = Entry { record, scan: None };
                let info = describe(&entry);
                entries.insert(key.clone(), entry);
                self.request(key);
                Ok(info)
            }
            Err(error) => {
                entries.remove(&key);
                let what = format!("taking {} into the library", path.display());
                Err(io_error(&what, &error))
            }
        }
    }

    /// Copies the image if that was asked for, and writes the record.
    fn take_in(&self, record: &mut ImageRecord, take: Take) -> io::Result<()> {
        let own = record::copy_path(&self.dir, &record.key());
        match take {
            Take::AsItIs => {}
            Take::Copy => {
                if let Err(error) = copy_sparse(&record.path, &own) {
                    // The message is about the copy.
                    let _ = record::remove_file(&own);
                    return Err(error);
                }
                record.identity = Identity::of(&File::open(&own)?)?;
                (record.path, record.is_copy) = (own, true);
            }
            Take::Convert => {
                let from = std::mem::replace(&mut record.path, own);
                (record.convert_from, record.is_copy) = (Some(from), true);
            }
        }
        record.save(&self.dir)
    }
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
        ImageError::Open { .. } => "check the path, and the permissions of the agent's user",
        ImageError::NotAFile { .. } | ImageError::Size { .. } => {
            "the library takes raw and qcow2 images"
        }
    };
    let message = format!("{} cannot be in the library: {error}", path.display());
    refuse(ApiCode::Image, message, hint)
}

fn no_chain(error: &ChainError, path: &Path) -> ErrorBody {
    let hint = match error {
        ChainError::NoTool(_) => {
            "install qemu-img where the agent runs (Debian: qemu-utils, Fedora: qemu-img)"
                .to_owned()
        }
        ChainError::Encrypted(_) => format!(
            "make a raw image of it with its key: qemu-img convert --image-opts … -O raw {}.raw",
            path.display()
        ),
        ChainError::Failed { .. } | ChainError::Answer(_) => {
            format!(
                "see what `qemu-img info --backing-chain {}` says",
                path.display()
            )
        }
    };
    let message = format!("{} cannot be in the library: {error}", path.display());
    refuse(ApiCode::Image, message, hint)
}

/// The image of a volume is in the library by itself, and changes.
fn refuse_volume(path: &Path, volume: Option<VolumeName>) -> Result<(), ErrorBody> {
    let Some(volume) = volume else { return Ok(()) };
    let message = format!("{} is the image of the volume {volume}", path.display());
    let hint = "there is nothing to do: what is in volumes here is found by itself, for volumes of the same tenant";
    Err(refuse(ApiCode::Image, message, hint))
}

/// Copies a file and leaves chunks of zeroes out.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
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
