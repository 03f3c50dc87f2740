//! What only QEMU's process tells: its working directory, its open files, and options on its command
//! line that QMP has no answer for.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// QEMU's process, as far as it can be looked at.
#[derive(Debug, Default)]
pub(crate) struct Process {
    /// Relative file names start here.
    directory: Option<PathBuf>,
    /// Device and inode of its open files; `None` when they cannot be seen.
    open: Option<Vec<(u64, u64)>>,
    line: CommandLine,
}

impl Process {
    /// Looks at process `pid`. What cannot be seen is left out.
    pub(crate) fn look(pid: Option<u32>) -> Self {
        let Some(pid) = pid else {
            return Self::default();
        };
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let line = fs::read(dir.join("cmdline")).unwrap_or_default();
        let args: Vec<_> = line
            .split(|b| *b == 0)
            .map(|arg| String::from_utf8_lossy(arg).into_owned())
            .collect();
        let program = args.first().map(Path::new).and_then(Path::file_name);
        let program = program.unwrap_or_default().to_string_lossy();
        // A socket that somebody else made for QEMU leads to that one.
        if !program.contains("qemu") && !program.contains("kvm") {
            return Self::default();
        }
        Self {
            directory: fs::read_link(dir.join("cwd")).ok(),
            open: open_files(&dir.join("fd")),
            line: CommandLine::parse(&args),
        }
    }

    /// `file` as an absolute path, if that is known.
    pub(crate) fn absolute(&self, file: &str) -> Option<PathBuf> {
        let path = Path::new(file);
        if path.is_absolute() {
            return Some(path.to_owned());
        }
        Some(self.directory.as_ref()?.join(path))
    }

    /// Whether QEMU has the file open; `None` when that cannot be known.
    pub(crate) fn has_open(&self, file: &fs::Metadata) -> Option<bool> {
        let open = self.open.as_ref()?;
        Some(open.contains(&(file.dev(), file.ino())))
    }

    /// The command line.
    pub(crate) const fn line(&self) -> &CommandLine {
        &self.line
    }
}

fn open_files(dir: &Path) -> Option<Vec<(u64, u64)>> {
    let entries = fs::read_dir(dir).ok()?;
    let stats = entries
        .flatten()
        .filter_map(|e| fs::metadata(e.path()).ok());
    let open: Vec<_> = stats.map(|m| (m.dev(), m.ino())).collect();
    (!open.is_empty()).then_some(open)
}

/// Options by dotted name.
pub(crate) type OptionMap = BTreeMap<String, String>;

/// `-blockdev` and `-drive` of a command line.
#[derive(Debug, Default)]
pub(crate) struct CommandLine {
    blockdevs: Vec<OptionMap>,
    drives: Vec<OptionMap>,
}

impl CommandLine {
    pub(crate) fn parse(args: &[String]) -> Self {
        let mut line = Self::default();
        for pair in args.windows(2) {
            // QEMU takes both `-drive` and `--drive`.
            match pair[0].trim_start_matches('-') {
                "blockdev" if pair[0].starts_with('-') => line.blockdevs.push(options(&pair[1])),
                "drive" if pair[0].starts_with('-') => line.drives.push(options(&pair[1])),
                _ => {}
            }
        }
        line
    }

    /// The options of a file's node: by its own name, or as the child of the named format node, or of the
    /// drive, whose file is the one that `file` takes.
    pub(crate) fn of_file(
        &self,
        protocol: &str,
        format: Option<&str>,
        drive: Option<&str>,
        file: impl Fn(&str) -> bool,
    ) -> Option<OptionMap> {
        let named = |name: &str| {
            let mut all = self.blockdevs.iter();
            all.find(|o| o.get("node-name").is_some_and(|n| n == name))
        };
        if let Some(own) = named(protocol) {
            return Some(own.clone());
        }
        if let Some(parent) = format.and_then(named) {
            let child = parent.iter().filter_map(|(key, value)| {
                Some((key.strip_prefix("file.")?.to_owned(), value.clone()))
            });
            let child: OptionMap = child.collect();
            return (!child.is_empty()).then_some(child);
        }
        let drive = drive?;
        // One without an id is called after its place, which only QEMU knows.
        let same = |o: &&OptionMap| match o.get("id") {
            Some(id) => id == drive,
            None => o.get("file").is_some_and(|f| file(f)),
        };
        let mut found = self.drives.iter().find(same)?.clone();
        // It means the format's node. What that lets through, the file's node always passes on.
        found.insert("discard".into(), "unmap".into());
        for (key, value) in found.clone() {
            if let Some(key) = key.strip_prefix("file.") {
                found.insert(key.to_owned(), value);
            }
        }
        Some(found)
    }
}

/// JSON, or `key=value,…` where `,,` is a comma.
fn options(text: &str) -> OptionMap {
    let mut map = OptionMap::new();
    if text.starts_with('{') {
        if let Ok(value) = serde_json::from_str(text) {
            flatten("", &value, &mut map);
        }
        return map;
    }
    let text = text.replace(",,", "\u{0}");
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, "on"));
        map.insert(key.to_owned(), value.replace('\u{0}', ","));
    }
    map
}

fn flatten(prefix: &str, value: &Value, map: &mut OptionMap) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, map);
            }
        }
        Value::String(text) => {
            map.insert(prefix.to_owned(), text.clone());
        }
        Value::Bool(on) => {
            map.insert(prefix.to_owned(), if *on { "on" } else { "off" }.to_owned());
        }
        Value::Number(number) => {
            map.insert(prefix.to_owned(), number.to_string());
        }
        Value::Null | Value::Array(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_files_node() {
        let line = CommandLine::parse(
            &[
                "qemu",
                "-blockdev",
                r#"{"driver":"file","filename":"a","node-name":"p0","aio":"native","cache":{"direct":true}}"#,
                "-blockdev",
                "driver=raw,node-name=f1,discard=ignore,file.driver=file,file.aio=io_uring",
                "-drive",
                "file=x,,y.raw,id=d2,aio=threads,discard=ignore,file.locking=off",
                "-drive",
                "file=z,if=virtio,aio=native",
                "-drive",
            ]
            .map(str::to_owned),
        );
        let check = |protocol, format, drive, key: &str, expected: Option<&str>| {
            let found = line.of_file(protocol, format, drive, |f| f == "z");
            let value = found.as_ref().and_then(|o| o.get(key)).map(String::as_str);
            assert_eq!(value, expected, "{protocol} {key}");
        };
        check("p0", Some("f0"), None, "aio", Some("native"));
        check("p0", Some("f0"), None, "cache.direct", Some("on"));
        check("#block1", Some("f1"), None, "aio", Some("io_uring"));
        check("#block1", Some("f1"), None, "discard", None);
        check(
            "#block2",
            Some("#block3"),
            Some("d2"),
            "aio",
            Some("threads"),
        );
        check("#block2", None, Some("d2"), "discard", Some("unmap"));
        check("#block2", None, Some("d2"), "locking", Some("off"));
        check("#block2", None, Some("d2"), "file", Some("x,y.raw"));
        check("#block2", None, Some("virtio0"), "aio", Some("native"));
        check("#block2", None, None, "aio", None);
    }

    #[test]
    fn another_program_is_not_looked_at() {
        let this = Process::look(Some(std::process::id()));
        assert!(
            this.absolute("relative.img").is_none()
                || std::env::args().next().is_some_and(|a| a.contains("qemu"))
        );
    }
}
