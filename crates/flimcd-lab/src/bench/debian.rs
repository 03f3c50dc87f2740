//! Two Debian root file systems on ext4 that were built separately: the same release, some other packages, and files
//! in another order. Made by debootstrap from the mirror that this machine is configured for, and kept.
//!
//! `mke2fs -d` lays files out in the order in which a directory lists them. On a tmpfs that is the order in which they
//! were made, the last one first; so the second tree goes through one, in an order that is shuffled.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::rng::Rng;

/// Packages that only one of the two has.
const EXTRA: [(&str, &str); 2] = [("one", "less,nano,file"), ("other", "vim-tiny,wget,bzip2")];
/// Where trees are put into another order.
const TMPFS: &str = "/dev/shm";
const SHUFFLE_SEED: u64 = 0xdeb1a;

/// Two images of the same size.
#[derive(Clone, Debug)]
pub struct DebianImages {
    /// Files in the order in which they were unpacked.
    pub one: PathBuf,
    /// Files in another order.
    pub other: PathBuf,
    /// The release, such as `bookworm`.
    pub suite: String,
    /// What each has of its own.
    pub extra: [(&'static str, &'static str); 2],
}

/// Why there are no images.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// Something that has to be there first.
    #[error("{0}")]
    Missing(String),
    /// A program failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// The program.
        program: &'static str,
        /// The end of what it said.
        said: String,
    },
    /// Files.
    #[error("{what}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

const fn file(what: &'static str) -> impl Fn(io::Error) -> DebianError {
    move |source| DebianError::File { what, source }
}

/// Where images are kept: `~/.cache/flimcd/debootstrap`.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    base.unwrap_or_else(home).join("flimcd/debootstrap")
}

/// What is missing to make images of this size, or `None` when they are there or can be made.
#[must_use]
pub fn missing(cache: &Path, size_bytes: u64) -> Option<String> {
    let is_there = |name| image_path(cache, name, size_bytes).exists();
    if EXTRA.iter().all(|(name, _)| is_there(name)) {
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        return Some("debootstrap needs root".to_owned());
    }
    let tools = [
        ("debootstrap", "debootstrap"),
        ("mke2fs", "e2fsprogs"),
        ("tar", "tar"),
    ];
    for (program, package) in tools {
        if crate::vm::requirements::find_program(program).is_none() {
            return Some(format!(
                "{program} is not installed (Debian: apt install {package})"
            ));
        }
    }
    mirror().err().map(|error| error.to_string())
}

/// The two images, from the cache or made now, which takes some minutes and the mirror. Blocks.
///
/// # Errors
/// [`DebianError`].
pub fn images(
    cache: &Path,
    size_bytes: u64,
    mut progress: impl FnMut(&str),
) -> Result<DebianImages, DebianError> {
    if let Some(what) = missing(cache, size_bytes) {
        return Err(DebianError::Missing(what));
    }
    let debs = cache.join("debs");
    fs::create_dir_all(&debs).map_err(file("the cache cannot be made"))?;
    let mirror = mirror();
    let suite = mirror
        .as_ref()
        .map_or_else(|_| String::new(), |(_, suite)| suite.clone());
    for (name, packages) in EXTRA {
        let image = image_path(cache, name, size_bytes);
        if image.exists() {
            continue;
        }
        let (url, suite) = match &mirror {
            Ok(found) => found,
            Err(error) => return Err(DebianError::Missing(error.to_string())),
        };
        progress(&format!("debootstrap {suite} with {packages}"));
        let tree = tempfile::Builder::new()
            .prefix("tree-")
            .tempdir_in(cache)
            .map_err(file("no directory for debootstrap"))?;
        let mut command = Command::new(program("debootstrap"));
        command
            .arg(format!("--cache-dir={}", debs.display()))
            .arg(format!("--include={packages}"))
            .arg(suite)
            .arg(tree.path())
            .arg(url);
        run("debootstrap", &mut command)?;
        if name == "one" {
            make_image(tree.path(), &image, size_bytes)?;
        } else {
            progress("the same in another order");
            let shuffled = shuffled(tree.path())?;
            make_image(shuffled.path(), &image, size_bytes)?;
        }
    }
    Ok(DebianImages {
        one: image_path(cache, "one", size_bytes),
        other: image_path(cache, "other", size_bytes),
        suite,
        extra: EXTRA,
    })
}

fn image_path(cache: &Path, name: &str, size_bytes: u64) -> PathBuf {
    cache.join(format!("debian-{name}-{size_bytes}.raw"))
}

fn program(name: &str) -> PathBuf {
    crate::vm::requirements::find_program(name).unwrap_or_else(|| name.into())
}

/// Under a name of its own first, so that half an image is never found.
fn make_image(tree: &Path, image: &Path, size_bytes: u64) -> Result<(), DebianError> {
    let part = image.with_extension("part");
    let sparse = fs::File::create(&part).and_then(|file| file.set_len(size_bytes));
    sparse.map_err(file("the image cannot be made"))?;
    let mut command = Command::new(program("mke2fs"));
    command
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(tree)
        .arg(&part);
    run("mke2fs", &mut command)?;
    fs::rename(&part, image).map_err(file("the image cannot be kept"))
}

/// A copy of a tree whose directories list their entries in a random order.
fn shuffled(tree: &Path) -> Result<tempfile::TempDir, DebianError> {
    let copy = tempfile::Builder::new()
        .prefix("flimcd-debian-")
        .tempdir_in(TMPFS)
        .map_err(file("no directory on a tmpfs"))?;
    let mut names = Vec::new();
    list(tree, Path::new("."), &mut names).map_err(file("the tree cannot be listed"))?;
    Rng::new(SHUFFLE_SEED).shuffle(&mut names);
    let mut order = tempfile::NamedTempFile::new().map_err(file("no temporary file"))?;
    for name in &names {
        use std::os::unix::ffi::OsStrExt as _;
        let line = [name.as_os_str().as_bytes(), b"\0"].concat();
        order.write_all(&line).map_err(file("no temporary file"))?;
    }
    let failed = |source| DebianError::File {
        what: "tar cannot be started",
        source,
    };
    let mut pack = Command::new("tar")
        .arg("-C")
        .arg(tree)
        .args(["--no-recursion", "--null", "-cf", "-", "-T"])
        .arg(order.path())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let piped = pack.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let mut unpack = Command::new("tar");
    unpack
        .arg("-C")
        .arg(copy.path())
        .args(["-xpf", "-"])
        .stdin(piped);
    let unpacked = run("tar", &mut unpack);
    let packed = pack.wait().map_err(failed)?;
    unpacked?;
    if !packed.success() {
        return Err(DebianError::Failed {
            program: "tar",
            said: packed.to_string(),
        });
    }
    Ok(copy)
}

/// Everything below `at`, relative to `tree`; symbolic links are not followed.
fn list(tree: &Path, at: &Path, names: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(tree.join(at))? {
        let entry = entry?;
        let name = at.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list(tree, &name, names)?;
        }
        names.push(name);
    }
    Ok(())
}

fn run(program: &'static str, command: &mut Command) -> Result<(), DebianError> {
    let output = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let output = output
        .spawn()
        .and_then(std::process::Child::wait_with_output);
    let output = output.map_err(file("a program cannot be started"))?;
    if output.status.success() {
        return Ok(());
    }
    // debootstrap says what is wrong on its standard output.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let said = lines[lines.len().saturating_sub(5)..].join("; ");
    Err(DebianError::Failed { program, said })
}

/// Address of the mirror and name of the release that this machine gets its packages from.
fn mirror() -> Result<(String, String), DebianError> {
    let missing = || {
        let text =
            "no Debian mirror is configured (deb line or .sources file with this release and main)";
        DebianError::Missing(text.to_owned())
    };
    let release = fs::read_to_string("/etc/os-release").map_err(|_| missing())?;
    let suite = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .ok_or_else(missing)?
        .trim_matches('"');
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(Result::ok).map(|entry| entry.path()));
    }
    let texts = files
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok());
    let url = texts.into_iter().find_map(|text| find_mirror(&text, suite));
    Ok((url.ok_or_else(missing)?, suite.to_owned()))
}

/// The first address in a sources file that has `suite` and its `main`.
fn find_mirror(text: &str, suite: &str) -> Option<String> {
    let one_line = text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        // Options in brackets may have blanks in them.
        let rest = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let (url, its) = (words.next()?, words.next()?);
        (its == suite && words.any(|word| word == "main")).then(|| url.to_owned())
    });
    one_line.or_else(|| {
        text.split("\n\n").find_map(|paragraph| {
            let field = |name: &str| {
                let lines = paragraph.lines().filter(|line| !line.starts_with('#'));
                lines
                    .filter_map(|line| line.split_once(':'))
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.trim().to_owned())
            };
            let has = |name: &str, word: &str| {
                field(name).is_some_and(|text| text.split_whitespace().any(|w| w == word))
            };
            let fits = has("Types", "deb") && has("Suites", suite) && has("Components", "main");
            let urls = field("URIs").filter(|_| fits)?;
            urls.split_whitespace().next().map(str::to_owned)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_sources_are_understood() {
        let check = |text: &str, url: Option<&str>| {
            assert_eq!(find_mirror(text, "bookworm").as_deref(), url, "{text}");
        };
        check(
            "# x\ndeb [signed-by=/a b] http://one/apt other main\ndeb http://two/debian bookworm main contrib\n",
            Some("http://two/debian"),
        );
        check(
            "deb [arch=amd64 trusted=yes] http://x/y bookworm main",
            Some("http://x/y"),
        );
        check(
            "Types: deb\n# old\nURIs: http://sec/s\nSuites: bookworm-security\nComponents: main\n\n\
             Types: deb deb-src\nURIs: http://a/debian http://b\nSuites: bookworm bookworm-updates\nComponents: main\n",
            Some("http://a/debian"),
        );
        check("deb http://two/debian bookworm contrib", None);
        check("", None);
    }
}
