//! Everything before a move: two sites, a guest at site A under its load, its client, and disks for the
//! target. What moves the guest (agents, or QEMU alone) comes on top.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    Client, DiskFormat, DiskSpec, GuestImage, ImageError, LoadSettings, Place, Qemu, QemuError,
    QemuSpec, Sites, SitesError, Storage, Tools,
};
use crate::{
    sparse::copy_sparse,
    wan::{LinkModel, Side},
};

/// A client that has not reached the guest by then never will.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How the disks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Raw files, the source's a copy of the image.
    Raw,
    /// Qcow2 files over the image as their raw backing file.
    Overlay,
}

/// What the target has of the disks before the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtTarget {
    /// Nothing: empty files.
    Nothing,
    /// The image that the guest was started from: a raw copy, or an empty overlay over it.
    Image,
}

/// What to set up.
#[derive(Clone, Debug)]
pub struct StageOptions {
    /// The WAN.
    pub link: LinkModel,
    /// Decides its losses.
    pub seed: u64,
    /// The guest's memory.
    pub memory_mib: u32,
    /// What its load does.
    pub load: LoadSettings,
    /// How its disks are kept.
    pub layout: Layout,
    /// Seconds that the load runs before anything else happens.
    pub warm_up_s: usize,
}

/// Why there is no stage.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// Namespaces.
    #[error(transparent)]
    Sites(#[from] SitesError),
    /// Images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The guest.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// Copies of images, or the client's sockets.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The client gets no answers.
    #[error("the guest does not answer its client; it printed: {0}")]
    NoAnswer(String),
}

/// A guest at site A with a client. Dropped in this order: the client, QEMU, the sites.
#[derive(Debug)]
pub struct Stage {
    /// Asks the guest all along.
    pub client: Client,
    /// The guest.
    pub source: Qemu,
    /// The sites.
    pub sites: Sites,
    tools: Tools,
    image: GuestImage,
    layout: Layout,
    dir: PathBuf,
}

impl Stage {
    /// Sets everything up in `dir` and returns when the load has run for a while and the client gets
    /// answers. `image` stays as it is.
    ///
    /// # Errors
    /// [`StageError`] says what is missing or went wrong.
    pub fn start(
        tools: &Tools,
        dir: &Path,
        image: &GuestImage,
        options: &StageOptions,
    ) -> Result<Self, StageError> {
        let sites = Sites::new(options.link, options.seed)?;
        let disks = disks(
            tools,
            image,
            options.layout,
            AtTarget::Image,
            &dir.join("source"),
        )?;
        let mut spec = QemuSpec::new("guest", &dir.join("source"), image);
        spec.memory_mib = options.memory_mib;
        spec.load = options.load;
        spec.net = Sites::net();
        spec.disks = disks;
        let at_a = Place::Site(Side::A);
        let source = spec.spawn_with(tools, |command| sites.put_in(at_a, command))?;
        source.wait_ready()?;
        source.wait_seconds(options.warm_up_s)?;
        let io = |source| StageError::Io {
            what: "the client cannot reach the guest",
            source,
        };
        let client = Client::start(&sites).map_err(io)?;
        if !client.wait_answers_after(Instant::now(), ANSWER_MAX) {
            return Err(StageError::NoAnswer(source.serial()));
        }
        Ok(Self {
            client,
            source,
            sites,
            tools: tools.clone(),
            image: image.clone(),
            layout: options.layout,
            dir: dir.to_owned(),
        })
    }

    /// Makes files for the target's disks; those of a former target are replaced.
    ///
    /// # Errors
    /// No room, or qemu-img fails.
    pub fn target_disks(&self, have: AtTarget) -> Result<Vec<DiskSpec>, StageError> {
        disks(
            &self.tools,
            &self.image,
            self.layout,
            have,
            &self.dir.join("target"),
        )
    }

    /// The same machine for site B, which waits for a migration (`-incoming defer -S`).
    #[must_use]
    pub fn target_spec(&self, disks: Vec<DiskSpec>) -> QemuSpec {
        QemuSpec {
            dir: self.dir.join("target"),
            disks,
            is_incoming: true,
            is_paused: true,
            ..self.source.spec().clone()
        }
    }

    /// Starts that machine at site B.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn spawn_target(&self, disks: Vec<DiskSpec>) -> Result<Qemu, StageError> {
        let spec = self.target_spec(disks);
        let at_b = Place::Site(Side::B);
        Ok(spec.spawn_with(&self.tools, |command| self.sites.put_in(at_b, command))?)
    }

    /// The programs it uses.
    #[must_use]
    pub const fn tools(&self) -> &Tools {
        &self.tools
    }
}

fn disks(
    tools: &Tools,
    image: &GuestImage,
    layout: Layout,
    have: AtTarget,
    dir: &Path,
) -> Result<Vec<DiskSpec>, StageError> {
    let io = |source| StageError::Io {
        what: "the guest's disks cannot be made",
        source,
    };
    fs::create_dir_all(dir).map_err(io)?;
    let mut disks = Vec::new();
    for (number, base) in image.disks.iter().enumerate() {
        let id = format!("disk{number}");
        let mut disk = DiskSpec::new(&id, &dir.join(&id));
        let Storage::File(path) = &disk.storage else {
            continue;
        };
        let _ = fs::remove_file(path);
        match (layout, have) {
            (Layout::Raw, AtTarget::Image) => copy_sparse(base, path).map_err(io)?,
            (Layout::Raw, AtTarget::Nothing) => {
                let size = fs::metadata(base).map_err(io)?.len();
                fs::File::create(path)
                    .and_then(|file| file.set_len(size))
                    .map_err(io)?;
            }
            (Layout::Overlay, AtTarget::Image) => tools.qcow2_overlay(base, "raw", path)?,
            (Layout::Overlay, AtTarget::Nothing) => {
                let size = fs::metadata(base).map_err(io)?.len();
                tools.qcow2_empty(size, path)?;
            }
        }
        if layout == Layout::Overlay {
            disk.format = DiskFormat::Qcow2;
        }
        disks.push(disk);
    }
    Ok(disks)
}
