//! Which crate may use which, and what the pure crates must never pull in, asked of `cargo tree`.

use std::process::Command;

/// A crate and the workspace crates it may name in `[dependencies]`.
const ARROWS: &[(&str, &[&str])] = &[
    ("flimcd-core", &[]),
    ("flimcd-wire", &["flimcd-core"]),
    ("flimcd-content", &["flimcd-core", "flimcd-wire"]),
    ("flimcd-migrate", &["flimcd-core", "flimcd-wire"]),
    ("flimcd-volume", &["flimcd-core", "flimcd-content"]),
    ("flimcd-nbd", &["flimcd-core", "flimcd-volume"]),
    ("flimcd-link", &["flimcd-core", "flimcd-wire"]),
    ("flimcd-qemu", &["flimcd-core"]),
    (
        "flimcd-lab",
        &[
            "flimcd-core",
            "flimcd-wire",
            "flimcd-volume",
            "flimcd-nbd",
            "flimcd-link",
            "flimcd-qemu",
        ],
    ),
    (
        "flimcd-sim",
        &[
            "flimcd-core",
            "flimcd-wire",
            "flimcd-content",
            "flimcd-migrate",
            "flimcd-volume",
        ],
    ),
    (
        "flimcd-strategies",
        &[
            "flimcd-core",
            "flimcd-wire",
            "flimcd-content",
            "flimcd-migrate",
            "flimcd-volume",
            "flimcd-lab",
        ],
    ),
    (
        "flimcd-agent",
        &[
            "flimcd-core",
            "flimcd-wire",
            "flimcd-content",
            "flimcd-migrate",
            "flimcd-volume",
            "flimcd-nbd",
            "flimcd-link",
            "flimcd-qemu",
        ],
    ),
];

/// Crates that are arithmetic on their arguments: no socket, file, clock, task or randomness, not even
/// at second hand.
const PURE: &[&str] = &[
    "flimcd-core",
    "flimcd-wire",
    "flimcd-content",
    "flimcd-migrate",
];
const NEVER_IN_PURE: &[&str] = &[
    "tokio",
    "mio",
    "async-std",
    "smol",
    "socket2",
    "rustix",
    "nix",
    "io-uring",
    "rand",
    "getrandom",
    "fastrand",
    "chrono",
    "time",
    "rustls",
];

/// Crates with threads of their own and no executor: a guest's I/O never waits for a task.
const WITHOUT_EXECUTOR: &[&str] = &["flimcd-volume", "flimcd-nbd", "flimcd-sim"];
const EXECUTORS: &[&str] = &["tokio", "async-std", "smol"];

/// Every dependency that should not be there, as sentences.
pub(crate) fn check() -> Result<Vec<String>, String> {
    let mut faults = Vec::new();
    for (name, allowed) in ARROWS {
        for used in tree(name, &["--depth", "1"])? {
            if used.starts_with("flimcd") && used != *name && !allowed.contains(&used.as_str()) {
                faults.push(format!("{name} must not use {used}"));
            }
        }
    }
    forbid(PURE, NEVER_IN_PURE, &mut faults)?;
    forbid(WITHOUT_EXECUTOR, EXECUTORS, &mut faults)?;
    Ok(faults)
}

fn forbid(crates: &[&str], forbidden: &[&str], faults: &mut Vec<String>) -> Result<(), String> {
    for name in crates {
        let used = tree(name, &[])?;
        for bad in forbidden {
            if used.iter().any(|u| u == bad) {
                faults.push(format!(
                    "{name} must not depend on {bad}, not even indirectly \
                     (cargo tree -p {name} -e normal -i {bad} shows how)"
                ));
            }
        }
    }
    Ok(())
}

/// Names of the crates in `name`'s tree of normal dependencies, itself included.
fn tree(name: &str, more: &[&str]) -> Result<Vec<String>, String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "tree",
            "--locked",
            "-e",
            "normal",
            "--prefix",
            "none",
            "--no-dedupe",
        ])
        .args(["-p", name])
        .args(more)
        .output()
        .map_err(|error| format!("cargo tree cannot be started: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cargo tree -p {name} failed: {}", text.trim()));
    }
    Ok(names(&String::from_utf8_lossy(&output.stdout)))
}

fn names(tree: &str) -> Vec<String> {
    let mut names: Vec<String> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_first_words_of_the_lines() {
        let tree = "flimcd-wire v0.1.0 (/x)\nbytes v1.12.0\nserde v1.0.0\nbytes v1.12.0 (*)\n";
        assert_eq!(names(tree), ["bytes", "flimcd-wire", "serde"]);
    }

    #[test]
    fn a_forbidden_crate_is_found() {
        let mut faults = Vec::new();
        forbid(&["flimcd-core"], &["serde", "tokio"], &mut faults).unwrap();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains("serde"));
    }
}
