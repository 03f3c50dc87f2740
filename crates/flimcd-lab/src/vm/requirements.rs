//! What booting a guest needs, looked for before anything is done.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{GUEST_PROGRAM, modules};

/// Names the directory or file of the guest's kernel.
const KERNEL_VARIABLE: &str = "FLIMCD_GUEST_KERNEL";
/// Modules that tell what a kernel can do.
const VIRTIO: &str = "virtio_blk";
const SATA: &str = "ahci";

/// Finds the programs and the kernel that a guest is made of.
#[derive(Clone, Debug, Default)]
pub struct Requirements {
    /// Where the kernel is: a directory with `boot/vmlinuz-*` and `lib/modules/*`, as `dpkg-deb -x`
    /// makes it from a kernel package. `None` looks at `FLIMCD_GUEST_KERNEL`, then at
    /// `~/.cache/flimcd/guest-kernel`, then at `/`.
    pub kernel_dir: Option<PathBuf>,
    /// Only a kernel with a driver for SATA disks will do.
    pub needs_sata: bool,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Tools {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// Its version, as it says it.
    pub qemu_version: String,
    /// `qemu-img`.
    pub qemu_img: PathBuf,
    /// `mke2fs`.
    pub mke2fs: PathBuf,
    /// `e2fsck`.
    pub e2fsck: PathBuf,
    /// A statically linked busybox.
    pub busybox: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// `lib/modules/VERSION` of that kernel.
    pub modules: PathBuf,
}

impl Tools {
    /// Whether the guest's kernel has a driver for SATA disks. Debian's cloud kernels have none.
    #[must_use]
    pub fn has_sata(&self) -> bool {
        modules::Index::read(&self.modules).is_ok_and(|index| index.has(SATA))
    }
}

/// Everything that is missing, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing(pub Vec<String>);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a guest cannot be made here: ")?;
        f.write_str(&self.0.join("; "))
    }
}

impl std::error::Error for Missing {}

impl Requirements {
    /// Looks in the usual places.
    ///
    /// # Errors
    /// [`Missing`] names everything that is not there, not only the first.
    pub fn check() -> Result<Tools, Missing> {
        Self::default().find()
    }

    /// Looks for everything.
    ///
    /// # Errors
    /// As [`Requirements::check`].
    pub fn find(&self) -> Result<Tools, Missing> {
        let mut missing = Vec::new();
        let mut program = |name: &str, package: &str| {
            find_program(name).unwrap_or_else(|| {
                missing.push(format!(
                    "{name} is not installed (Debian: apt install {package})"
                ));
                PathBuf::new()
            })
        };
        let qemu = program("qemu-system-x86_64", "qemu-system-x86");
        let qemu_img = program("qemu-img", "qemu-utils");
        let mke2fs = program("mke2fs", "e2fsprogs");
        let e2fsck = program("e2fsck", "e2fsprogs");
        let busybox = program("busybox", "busybox-static");
        let is_dynamic = fs::read(&busybox).is_ok_and(|bytes| {
            let head = &bytes[..bytes.len().min(4096)];
            head.windows(6).any(|bytes| bytes == b"ld-lin")
        });
        if is_dynamic {
            let path = busybox.display();
            missing.push(format!(
                "{path} is not static (Debian: apt install busybox-static)"
            ));
        }
        if GUEST_PROGRAM.is_empty() {
            missing.push(
                "the guest's program could not be linked statically when this was built \
                 (Debian: apt install libc6-dev, then build again)"
                    .into(),
            );
        }
        let (kernel, modules) = self.kernel().unwrap_or_else(|text| {
            missing.push(text);
            Default::default()
        });
        if !missing.is_empty() {
            return Err(Missing(missing));
        }
        let qemu_version = version(&qemu).map_err(|text| Missing(vec![text]))?;
        Ok(Tools {
            qemu,
            qemu_version,
            qemu_img,
            mke2fs,
            e2fsck,
            busybox,
            kernel,
            modules,
        })
    }

    fn kernel(&self) -> Result<(PathBuf, PathBuf), String> {
        let named = self
            .kernel_dir
            .clone()
            .or_else(|| env::var_os(KERNEL_VARIABLE).map(Into::into));
        let places = match named {
            Some(dir) => vec![dir],
            None => cache_dir()
                .into_iter()
                .chain([PathBuf::from("/")])
                .collect(),
        };
        let found = places.iter().find_map(|place| self.kernel_in(place));
        found.ok_or_else(|| {
            let places: Vec<_> = places
                .iter()
                .map(|place| place.display().to_string())
                .collect();
            let (driver, flavour) = if self.needs_sata {
                (SATA, "amd64")
            } else {
                (VIRTIO, "cloud-amd64")
            };
            format!(
                "no kernel for the guest with the module {driver} in {} (`scripts/guest-kernel.sh \
                 {flavour}` unpacks Debian's; {KERNEL_VARIABLE} names another place)",
                places.join(", ")
            )
        })
    }

    /// The newest kernel under `root` that can be read and has the modules a guest needs.
    fn kernel_in(&self, root: &Path) -> Option<(PathBuf, PathBuf)> {
        let mut kernels: Vec<String> = fs::read_dir(root.join("boot"))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
            .collect();
        kernels.sort();
        kernels.into_iter().rev().find_map(|version| {
            let kernel = root.join("boot").join(format!("vmlinuz-{version}"));
            let modules = ["lib/modules", "usr/lib/modules"]
                .map(|dir| root.join(dir).join(&version))
                .into_iter()
                .find(|dir| dir.is_dir())?;
            fs::File::open(&kernel).ok()?;
            let index = modules::Index::read(&modules).ok()?;
            let does = index.has(VIRTIO) && (!self.needs_sata || index.has(SATA));
            does.then_some((kernel, modules))
        })
    }
}

fn cache_dir() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("flimcd/guest-kernel"))
}

/// Looks in `PATH` and where administrators' programs are, which `PATH` may lack.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = env::split_paths(&path).chain(admin);
    places.find_map(|dir| Some(dir.join(name)).filter(|path| path.is_file()))
}

fn version(qemu: &Path) -> Result<String, String> {
    let failed = |what: &dyn fmt::Display| format!("{} --version: {what}", qemu.display());
    let output = Command::new(qemu)
        .arg("--version")
        .output()
        .map_err(|error| failed(&error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .next()
        .and_then(|line| line.split("version ").nth(1));
    version
        .map(str::to_owned)
        .ok_or_else(|| failed(&text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let requirements = Requirements {
            kernel_dir: Some(dir.path().to_owned()),
            needs_sata: true,
        };
        let text = requirements.find().unwrap_err().to_string();
        assert!(text.contains(&dir.path().display().to_string()), "{text}");
        assert!(text.contains("guest-kernel.sh amd64"), "{text}");
        assert!(find_program("no-such-program-here").is_none());
    }
}
