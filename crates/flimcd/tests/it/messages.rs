//! Help, and what is said about wrong input: what was tried, what went wrong, what to do.

use std::{fs, os::unix::net::UnixListener};

use crate::util::{Agent, Lab, run};

const COMMANDS: &[&[&str]] = &[
    &[],
    &["demo"],
    &["pki"],
    &["pki", "init"],
    &["pki", "issue"],
    &["agent"],
    &["volume"],
    &["volume", "create"],
    &["volume", "import"],
    &["volume", "list"],
    &["volume", "show"],
    &["volume", "remove"],
    &["export"],
    &["heat"],
    &["migrate"],
    &["switchover"],
    &["cancel"],
    &["status"],
    &["sim"],
    &["bench"],
    &["bench", "link"],
    &["bench", "nbd"],
    &["completions"],
];

#[test]
fn every_command_helps_with_examples() {
    for command in COMMANDS {
        let args: Vec<&str> = command.iter().copied().chain(["--help"]).collect();
        let help = run(&args).ok();
        assert!(
            help.contains("Usage:") && help.contains("Examples:"),
            "{command:?}: {help}"
        );
        assert!(
            help.lines().all(|line| line.chars().count() <= 100),
            "{command:?}: {help}"
        );
    }
}

#[test]
fn completions_exist_for_common_shells() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            run(&["completions", shell]).ok().contains("flimcd"),
            "{shell}"
        );
    }
}

#[test]
fn impossible_arguments_are_refused_before_anything_is_done() {
    run(&["migrate", "vm1", "--to", "lisbon", "--bandwidth", "50"]).fails_with(&["50mbit"]);
    run(&["migrate", "../vm1", "--to", "lisbon"]).fails_with(&["letters, digits"]);
    run(&["volume", "create", "vm1", "--size", "0"]).fails_with(&["1GiB"]);
    run(&["demo", "--link", "fast"]).fails_with(&["200mbit,40ms"]);
    run(&["demo", "--strategies", "teleport"]).fails_with(&["teleport", "precopy", "flimcd"]);
    run(&["demo", "--load", "tape:x"]).fails_with(&["trace:FILE"]);
    run(&["demo", "--image", "/nonexistent.raw"]).fails_with(&["/nonexistent.raw"]);
    run(&["demo", "--json", "/nonexistent/report.json"]).fails_with(&["--json"]);
    run(&["demo", "--load", "trace:/nonexistent.vscsi"]).fails_with(&["/nonexistent.vscsi"]);
    run(&["sim", "--seeds", "9..3"]).fails_with(&["0..1000"]);
}

#[test]
fn without_an_agent_commands_say_how_to_start_one() {
    let lab = Lab::new();
    let socket = lab.path().join("api.sock");
    let socket = socket.to_str().unwrap();
    for command in [
        &["status"][..],
        &["volume", "list"],
        &["migrate", "vm1", "--to", "x"],
    ] {
        let args: Vec<&str> = command.iter().copied().chain(["--api", socket]).collect();
        run(&args).fails_with(&[socket, "flimcd agent --config"]);
    }
}

#[test]
fn a_wrong_configuration_names_file_key_and_remedy() {
    let lab = Lab::new();
    let dir = lab.configure("berlin", "berlin", "lisbon", Some("127.0.0.1:7412"));
    let file = dir.join("agent.toml");
    let path = file.to_str().unwrap();
    run(&["agent", "--check", "--config", path]).ok();
    let good = fs::read_to_string(&file).unwrap();
    let check = |from: &str, to: &str, parts: &[&str]| {
        assert!(good.contains(from));
        fs::write(&file, good.replace(from, to)).unwrap();
        let said = run(&["agent", "--config", path]);
        said.fails_with(&[&[path], parts].concat());
    };
    check(
        "site = \"berlin\"",
        "site = \"../berlin\"",
        &["letters, digits"],
    );
    check("state_dir", "stat_dir", &["stat_dir"]);
    check("127.0.0.1:7412", "lisbon", &["HOST:PORT"]);
    check("may_send = [\"*\"]", "may_send = [\"a b\"]", &["may_send"]);
    check("site = \"lisbon\"", "site = \"berlin\"", &["berlin"]);
    check("[tls]", "[tls", &["agent.toml"]);
    run(&["agent", "--config", "/nonexistent.toml"]).fails_with(&["/nonexistent.toml", "--config"]);
    assert!(
        !dir.join("state").exists() && !dir.join("run").exists(),
        "nothing was changed"
    );
}

#[test]
fn certificates_that_do_not_fit_are_named() {
    let lab = Lab::new();
    let dir = lab.configure("berlin", "lisbon", "lisbon", None);
    let path = dir.join("agent.toml");
    run(&["agent", "--config", path.to_str().unwrap()]).fails_with(&["berlin", "lisbon"]);
    fs::remove_file(lab.path().join("pki/lisbon.key")).unwrap();
    run(&["agent", "--config", path.to_str().unwrap()]).fails_with(&["lisbon.key"]);
}

#[test]
fn sockets_ports_and_directories_in_use_are_named() {
    let lab = Lab::new();
    let agent = Agent::start(&lab.configure("berlin", "berlin", "lisbon", None));
    let config = agent.dir.join("agent.toml");
    // The same agent again: its state directory is locked.
    run(&["agent", "--config", config.to_str().unwrap()]).fails_with(&["state"]);
    // Another one that wants the first one's port.
    let port = agent.json(&["status", "--json"])["listen"]
        .as_str()
        .unwrap()
        .to_owned();
    let dir = lab.configure("lisbon", "lisbon", "berlin", None);
    let other = dir.join("agent.toml");
    let text = fs::read_to_string(&other).unwrap();
    fs::write(&other, text.replace("127.0.0.1:0", &port)).unwrap();
    run(&["agent", "--config", other.to_str().unwrap()]).fails_with(&[&port]);
    // And one whose API socket something else listens on.
    fs::write(&other, text).unwrap();
    fs::create_dir_all(dir.join("run")).unwrap();
    let _held = UnixListener::bind(dir.join("run/api.sock")).unwrap();
    run(&["agent", "--config", other.to_str().unwrap()]).fails_with(&["api.sock"]);
    agent.run(&["status"]).ok();
}

#[test]
fn unknown_volumes_and_sites_are_refused_and_nothing_changes() {
    let lab = Lab::new();
    let (source, target) = lab.pair();
    source.run(&["volume", "show", "vm1"]).fails_with(&["vm1"]);
    source.run(&["export", "vm1"]).fails_with(&["vm1"]);
    source.run(&["cancel", "vm1"]).fails_with(&["vm1"]);
    source
        .run(&["migrate", "vm1", "--to", "lisbon"])
        .fails_with(&["vm1"]);
    source
        .run(&["volume", "create", "vm1", "--size", "4097"])
        .ok();
    source
        .run(&["volume", "create", "vm1", "--size", "4097"])
        .fails_with(&["vm1", "hint"]);
    let before = source.json(&["volume", "show", "vm1", "--json"]);
    source
        .run(&["migrate", "vm1", "--to", "madrid"])
        .fails_with(&["madrid", "hint"]);
    source
        .run(&["migrate", "vm1", "--to", "berlin"])
        .fails_with(&["berlin"]);
    source.run(&["switchover", "vm1"]).fails_with(&["vm1"]);
    source
        .run(&["volume", "import", "vm2", "/nonexistent.raw"])
        .fails_with(&["/nonexistent.raw"]);
    assert_eq!(source.json(&["volume", "show", "vm1", "--json"]), before);
    assert_eq!(
        target.json(&["volume", "list", "--json"]),
        serde_json::json!([])
    );
}
