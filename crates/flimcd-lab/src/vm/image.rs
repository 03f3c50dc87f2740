//! A guest's disks: ext4 made by `mke2fs -d`, which needs no root.
//!
//! The root disk has busybox, the guest's program, the load's file at its version 0, and as much
//! other content as asked for. Same spec, same bytes, except for what mke2fs dates.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use super::{
    GUEST_PROGRAM, Tools, initramfs,
    stamp::{self, BLOCK_BYTES, Stamp},
};
use crate::{
    content::{fill_noise, fill_text},
    rng::{Rng, mix3},
};

/// Largest file of the other content.
const CONTENT_FILE_BYTES_MAX: u64 = 8 << 20;

const INIT: &str = r#"#!/bin/sh
# PID 1 of the guest. Its settings are on the kernel's command line.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
number=1
while [ -d /disks/$number ]; do
    disk=$(busybox findfs LABEL=flimcd-disk-$number) && busybox mount "$disk" /disks/$number
    number=$((number + 1))
done
value() { busybox sed -n "s/.*flimcd\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
busybox ip link set lo up
address=$(value ip)
if [ -n "$address" ] && busybox ip link set eth0 up; then
    busybox ip addr add "$address" dev eth0
    gateway=$(value gateway)
    [ -z "$gateway" ] || busybox ip route add default via "$gateway"
fi
busybox stty -F /dev/ttyS1 raw -echo
echo "GUEST UP $(busybox cat /proc/uptime)"
/guest </dev/null &
if [ -n "$(value shell)" ]; then
    while :; do busybox setsid busybox cttyhack sh; done
fi
while :; do wait; busybox sleep 1; done
"#;

/// What guest to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// Size of the root disk.
    pub disk_bytes: u64,
    /// Size of the file on it that the load writes to.
    pub load_bytes: u64,
    /// Other files on it, in all: three of five bytes text, the others noise.
    pub content_bytes: u64,
    /// Decides the other files.
    pub seed: u64,
    /// More disks, each with a file for the load.
    pub extra_disks: Vec<ExtraDisk>,
}

/// A disk beside the root disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtraDisk {
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Size of the file on it that the load writes to.
    pub load_bytes: u64,
}

impl Default for GuestSpec {
    /// A guest for tests: 256 MiB of disk with a load over 32 MiB and 16 MiB of other content.
    fn default() -> Self {
        Self {
            disk_bytes: 256 << 20,
            load_bytes: 32 << 20,
            content_bytes: 16 << 20,
            seed: 1,
            extra_disks: Vec::new(),
        }
    }
}

/// A guest that can be booted.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The first root.
    pub initramfs: PathBuf,
    /// Raw images: the root disk, then the others.
    pub disks: Vec<PathBuf>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file could not be read or written.
    #[error("the guest's image cannot be made in {}: {source}", dir.display())]
    Io {
        /// Where the image was to be.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tool failed.
    #[error("{tool} failed: {text}")]
    Tool {
        /// Its path.
        tool: String,
        /// What it said.
        text: String,
    },
}

impl GuestImage {
    /// Makes the guest's disks and its first root in `dir`: `root.raw`, `disk1.raw`…, `initramfs`.
    ///
    /// # Errors
    /// No room, or a tool that fails.
    pub fn build(tools: &Tools, dir: &Path, spec: &GuestSpec) -> Result<Self, ImageError> {
        let io = |source| ImageError::Io {
            dir: dir.to_owned(),
            source,
        };
        let initramfs = dir.join("initramfs");
        let archive = initramfs::build(tools).map_err(io)?;
        fs::write(&initramfs, archive).map_err(io)?;

        let tree = tempfile::tempdir_in(dir).map_err(io)?;
        root_tree(tools, tree.path(), spec).map_err(io)?;
        let root = dir.join("root.raw");
        make_ext4(tools, &root, "flimcd-root", spec.disk_bytes, tree.path())?;
        tree.close().map_err(io)?;
        let mut disks = vec![root];
        for (number, extra) in (1u64..).zip(&spec.extra_disks) {
            let tree = tempfile::tempdir_in(dir).map_err(io)?;
            load_file(&tree.path().join("load.bin"), number, extra.load_bytes).map_err(io)?;
            let path = dir.join(format!("disk{number}.raw"));
            let label = format!("flimcd-disk-{number}");
            make_ext4(tools, &path, &label, extra.disk_bytes, tree.path())?;
            disks.push(path);
        }
        Ok(Self {
            kernel: tools.kernel.clone(),
            initramfs,
            disks,
        })
    }
}

impl Tools {
    /// Makes an empty qcow2 file of this size.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn qcow2_empty(&self, bytes: u64, to: &Path) -> Result<(), ImageError> {
        let mut command = Command::new(&self.qemu_img);
        command
            .args(["create", "-q", "-f", "qcow2"])
            .arg(to)
            .arg(bytes.to_string());
        run(&mut command).map(|_| ())
    }

    /// Compares what guests would see of two images, of whatever format qemu-img finds, while
    /// nobody writes to them. `None` when they are the same; what qemu-img says when they differ.
    ///
    /// # Errors
    /// When qemu-img cannot read them.
    pub fn compare(&self, one: &Path, other: &Path) -> Result<Option<String>, ImageError> {
        let mut command = Command::new(&self.qemu_img);
        // -U: QEMU may still have them open.
        let output = command.args(["compare", "-U"]).arg(one).arg(other).output();
        let failed = |text| ImageError::Tool {
            tool: "qemu-img compare".to_owned(),
            text,
        };
        let output = output.map_err(|error| failed(error.to_string()))?;
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.code() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(text(&output.stdout))),
            _ => Err(failed(text(&output.stderr))),
        }
    }

    /// Makes a qcow2 file that is a copy of `raw`.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn qcow2_copy(&self, raw: &Path, to: &Path) -> Result<(), ImageError> {
        let mut command = Command::new(&self.qemu_img);
        command
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .arg(raw)
            .arg(to);
        run(&mut command).map(|_| ())
    }

    /// Makes a raw file of what a guest sees of the image `from`, whatever format qemu-img finds.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn raw_copy(&self, from: &Path, to: &Path) -> Result<(), ImageError> {
        let mut command = Command::new(&self.qemu_img);
        command.args(["convert", "-O", "raw"]).arg(from).arg(to);
        run(&mut command).map(|_| ())
    }

    /// Makes an empty qcow2 overlay over `backing`, of the format `backing_format` (`raw`, `qcow2`).
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn qcow2_overlay(
        &self,
        backing: &Path,
        backing_format: &str,
        to: &Path,
    ) -> Result<(), ImageError> {
        let mut command = Command::new(&self.qemu_img);
        command.args(["create", "-q", "-f", "qcow2", "-F", backing_format, "-b"]);
        run(command.arg(backing).arg(to)).map(|_| ())
    }

    /// Checks a raw image with an ext4 file system that no guest uses: replays its journal, then
    /// looks for faults. The image is written to.
    ///
    /// # Errors
    /// [`ImageError::Tool`] with what e2fsck found.
    pub fn check_file_system(&self, image: &Path) -> Result<(), ImageError> {
        // The first run exits with 1 when it has replayed the journal.
        let _ = Command::new(&self.e2fsck).arg("-fy").arg(image).output();
        run(Command::new(&self.e2fsck).arg("-fn").arg(image)).map(|_| ())
    }
}

fn root_tree(tools: &Tools, root: &Path, spec: &GuestSpec) -> io::Result<()> {
    for dir in [
        "bin", "sbin", "dev", "proc", "sys", "run", "tmp", "data", "marks", "disks",
    ] {
        fs::create_dir(root.join(dir))?;
    }
    for number in 1..=spec.extra_disks.len() {
        fs::create_dir(root.join(format!("disks/{number}")))?;
    }
    program(&root.join("bin/busybox"), &fs::read(&tools.busybox)?)?;
    for name in [
        "sh", "ls", "cat", "dd", "df", "free", "md5sum", "mount", "ps", "sync", "top",
    ] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    program(&root.join("guest"), GUEST_PROGRAM)?;
    program(&root.join("sbin/init"), INIT.as_bytes())?;
    load_file(&root.join("data/load.bin"), 0, spec.load_bytes)?;
    content(&root.join("content"), spec)
}

fn program(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Writes version 0 of every block of a file for the load.
fn load_file(path: &Path, file: u64, bytes: u64) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut page = [0; BLOCK_BYTES];
    for block in 0..(bytes / BLOCK_BYTES as u64).max(1) {
        stamp::fill(
            Stamp {
                file,
                block,
                seq: 0,
            },
            &mut page,
        );
        out.write_all(&page)?;
    }
    out.flush()
}

/// Files of 4 KiB to 8 MiB until there is enough.
fn content(dir: &Path, spec: &GuestSpec) -> io::Result<()> {
    fs::create_dir(dir)?;
    let mut rng = Rng::new(spec.seed);
    let mut left = spec.content_bytes;
    let mut buffer = Vec::new();
    for number in 0u64.. {
        if left == 0 {
            break;
        }
        let bytes = (4096 << rng.below(12))
            .min(left)
            .min(CONTENT_FILE_BYTES_MAX);
        buffer.resize(usize::try_from(bytes).map_err(io::Error::other)?, 0);
        let seed = mix3(spec.seed, number, 3);
        if seed % 5 < 3 {
            fill_text(seed, &mut buffer);
        } else {
            fill_noise(seed, &mut buffer);
        }
        fs::write(dir.join(format!("{number:04}")), &buffer)?;
        left -= bytes;
    }
    Ok(())
}

fn make_ext4(
    tools: &Tools,
    path: &Path,
    label: &str,
    bytes: u64,
    tree: &Path,
) -> Result<(), ImageError> {
    let mut command = Command::new(&tools.mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-L", label]);
    // The file is new and sparse: nothing needs to be zeroed, now or by the guest later.
    let options =
        "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1";
    command.args(["-E", options]).arg("-d").arg(tree).arg(path);
    let kib = format!("{}k", bytes / 1024);
    let _ = fs::remove_file(path);
    run(command.arg(kib)).map(|_| ())
}

fn run(command: &mut Command) -> Result<Output, ImageError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let failed = |text: String| ImageError::Tool {
        tool: tool.clone(),
        text,
    };
    let output = command
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    Err(failed(said.join(" ").trim().to_owned()))
}
