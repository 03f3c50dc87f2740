//! The README's walkthrough, run as a reader would paste it.

use std::{fs, net::TcpListener, path::Path, process::Command};

const BEGIN: &str = "<!-- walkthrough: begin";
const END: &str = "<!-- walkthrough: end -->";

/// The shell blocks between the two marks.
fn script(readme: &str) -> String {
    let start = readme.find(BEGIN).expect("the mark of the begin");
    let end = readme.find(END).expect("the mark of the end");
    let mut script = String::new();
    let mut inside = false;
    for line in readme[start..end].lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside => {
                script.push_str(line);
                script.push('\n');
            }
            _ => {}
        }
    }
    script
}

/// Two ports that nobody listened on a moment ago.
fn free_ports() -> [u16; 2] {
    let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn the_walkthrough_of_the_readme_works_as_pasted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let binary = Path::new(env!("CARGO_BIN_EXE_flimcd"));
    let [berlin, lisbon] = free_ports();
    // The same, with this build, in another place, on other ports.
    let script = script(&readme)
        .replace("cargo build --release\n", "")
        .replace(
            "$PWD/target/release",
            binary.parent().unwrap().to_str().unwrap(),
        )
        .replace("/tmp/flimcd-try", dir.path().join("try").to_str().unwrap())
        .replace("7411", &berlin.to_string())
        .replace("7412", &lisbon.to_string());
    assert!(
        script.contains("flimcd migrate vm1 --to lisbon --wait"),
        "{script}"
    );
    // Jobs are controlled as in a terminal; the first failure ends it, and the agents with it.
    let output = Command::new("bash")
        .args([
            "-c",
            &format!("set -em -o pipefail\ntrap 'kill $(jobs -p) 2>/dev/null' ERR\n{script}"),
        ])
        .env_remove("FLIMCD_API")
        .output()
        .unwrap();
    let said = crate::util::Said::from(output);
    assert!(
        said.out.contains("every byte is there"),
        "{said:#?}\n{script}"
    );
    assert_eq!(said.code, Some(0), "{said:#?}\n{script}");
    assert!(
        !dir.path().join("try").exists(),
        "the walkthrough clears up"
    );
}
