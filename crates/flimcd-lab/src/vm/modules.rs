//! Kernel modules and what they depend on, read from the modules themselves: an unpacked kernel
//! package has no `modules.dep`.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Modules of a kernel by name.
pub(super) struct Index {
    files: HashMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Index {
    /// Reads `lib/modules/VERSION`.
    pub(super) fn read(dir: &Path) -> io::Result<Self> {
        let mut files = HashMap::new();
        walk(&dir.join("kernel"), &mut files)?;
        let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().filter_map(|line| name_of(Path::new(line)));
        let builtin = builtin.collect();
        Ok(Self { files, builtin })
    }

    /// Whether the kernel has it, as a module or built in.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.iter().any(|n| n == name)
    }

    /// Files of `names` and all they depend on, in the order to insert them. What is built in or not
    /// there at all is left out.
    pub(super) fn closure(&self, names: &[&str]) -> io::Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            self.visit(name, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<PathBuf>) -> io::Result<()> {
        let Some(path) = self.files.get(name).filter(|path| !order.contains(path)) else {
            return Ok(());
        };
        for needed in depends(&fs::read(path)?) {
            self.visit(&needed, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

fn walk(dir: &Path, files: &mut HashMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// A module's name; only files that `insmod` takes as they are count.
fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The `depends=` of a module's information section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next();
    let value = String::from_utf8_lossy(value.unwrap_or_default());
    let names = value.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let drivers = dir.path().join("kernel/drivers");
        fs::create_dir_all(&drivers).unwrap();
        for (name, needs) in [("a-a", "b,c"), ("b", "c"), ("c", ""), ("d", "builtin,a_a")] {
            let text = format!("ELF\0license=GPL\0depends={needs}\0name={name}\0");
            fs::write(drivers.join(format!("{name}.ko")), text).unwrap();
        }
        fs::write(
            dir.path().join("modules.builtin"),
            "kernel/fs/built-in.ko\n",
        )
        .unwrap();
        let index = Index::read(dir.path()).unwrap();
        assert!(index.has("a_a") && index.has("built_in") && !index.has("e"));
        let order = index.closure(&["d", "b", "none"]).unwrap();
        let names: Vec<_> = order.iter().filter_map(|path| name_of(path)).collect();
        assert_eq!(names, ["c", "b", "a_a", "d"]);
    }
}
