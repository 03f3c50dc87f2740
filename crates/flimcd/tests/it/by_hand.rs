//! What an operator does: two agents, a volume, its migration, with and without trouble.

use std::{fs, path::Path};

use flimcd_lab::load::{DiskOp, DiskRequest, GuestDisk, NbdDisk};
use serde_json::Value;

use crate::util::{Agent, Lab, flimcd, signal, until};

pub(crate) fn connect(agent: &Agent, volume: &str) -> NbdDisk {
    let export = agent.json(&["export", volume, "--json"]);
    let socket = Path::new(export["socket"].as_str().unwrap());
    NbdDisk::connect(socket, export["export"].as_str().unwrap()).unwrap()
}

pub(crate) fn ask(
    disk: &mut dyn GuestDisk,
    op: DiskOp,
    offset: u64,
    data: Vec<u8>,
) -> std::io::Result<Vec<u8>> {
    let length = u32::try_from(data.len()).unwrap();
    disk.submit(DiskRequest {
        id: 1,
        op,
        offset,
        length,
        data,
    })?;
    until("the disk's answer", || {
        disk.receive(std::time::Duration::from_secs(1)).transpose()
    })
    .and_then(|reply| reply.result.map(|()| reply.data))
}

fn read_all(disk: &mut dyn GuestDisk) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < disk.size() {
        let at = all.len() as u64;
        let len = usize::try_from((disk.size() - at).min(1 << 20)).unwrap();
        all.extend(ask(disk, DiskOp::Read, at, vec![0; len]).unwrap());
    }
    all
}

fn volume(agent: &Agent, name: &str) -> Value {
    agent.json(&["volume", "show", name, "--json"])
}

#[test]
fn volumes_of_any_size_move_with_every_byte() {
    let lab = Lab::new();
    let (source, target) = lab.pair();
    // A block, less than one, one byte more, and an odd number of chunks and a bit.
    for (name, size) in [
        ("one", 4096),
        ("tiny", 1),
        ("odd", 4097),
        ("big", (9 << 20) + 12_345),
    ] {
        let image = lab.image(&format!("{name}.raw"), size);
        let before = fs::read(&image).unwrap();
        source
            .run(&["volume", "import", name, image.to_str().unwrap()])
            .ok();
        for strategy in ["precopy", "postcopy", "flimcd"] {
            let (from, to, site) = (&source, &target, "lisbon");
            let said = from.run(&[
                "migrate",
                name,
                "--to",
                site,
                "--strategy",
                strategy,
                "--wait",
            ]);
            assert!(said.ok().contains(site));
            assert_eq!(
                volume(from, name)["ownership"],
                "released",
                "{name}, {strategy}"
            );
            assert_eq!(volume(to, name)["ownership"], "owner", "{name}, {strategy}");
            assert!(
                read_all(&mut connect(to, name)) == before,
                "{name}, {strategy}"
            );
            // The server sees that a connection was closed a moment after it was.
            until("the guest's leave", || {
                (volume(to, name)["guest_connections"] == 0).then_some(())
            });
            to.run(&["volume", "remove", name, "--delete-image"]).ok();
            from.run(&["volume", "remove", name]).ok();
            from.run(&["volume", "import", name, image.to_str().unwrap()])
                .ok();
        }
        assert!(
            fs::read(&image).unwrap() == before,
            "{name}: the source's image was not touched"
        );
    }
}

#[test]
fn a_manual_switch_waits_for_the_word_and_moves_what_the_guest_wrote() {
    let lab = Lab::new();
    let (source, target) = lab.pair();
    let image = lab.image("vm1.raw", 8 << 20);
    let mut expected = fs::read(&image).unwrap();
    source
        .run(&["volume", "import", "vm1", image.to_str().unwrap()])
        .ok();
    let mut guest = connect(&source, "vm1");
    source
        .run(&[
            "migrate",
            "vm1",
            "--to",
            "lisbon",
            "--switchover",
            "manual",
            "--json",
        ])
        .ok();
    let ready = |agent: &Agent| {
        let status = agent.json(&["status", "--json"]);
        status["migrations"][0]["ready_for_switchover"]
            .as_bool()
            .filter(|&ready| ready)
    };
    until("the migration to be ready", || ready(&source));
    expected[5000..9096].fill(7);
    ask(&mut guest, DiskOp::Write, 5000, vec![7; 4096]).unwrap();
    source.run(&["switchover", "vm1"]).ok();
    until("the switch", || {
        (volume(&source, "vm1")["ownership"] == "released").then_some(())
    });
    let error = ask(&mut guest, DiskOp::Read, 0, vec![0; 512]).unwrap_err();
    assert!(!error.to_string().is_empty());
    let mut moved = connect(&target, "vm1");
    assert!(read_all(&mut moved) == expected);
    ask(&mut moved, DiskOp::Write, 0, vec![9; 512]).unwrap();
    source.run(&["cancel", "vm1"]).fails_with(&["vm1"]);
    until("the end", || {
        (volume(&target, "vm1")["ownership"] == "owner").then_some(())
    });
}

#[test]
fn interrupting_a_waiting_migrate_cancels_before_the_switch() {
    let lab = Lab::new();
    let (source, target) = lab.pair();
    let image = lab.image("vm1.raw", 8 << 20);
    source
        .run(&["volume", "import", "vm1", image.to_str().unwrap()])
        .ok();
    let child = flimcd()
        .args([
            "migrate",
            "vm1",
            "--to",
            "lisbon",
            "--switchover",
            "manual",
            "--wait",
        ])
        .env("FLIMCD_API", source.dir.join("run/api.sock"))
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    until("the migration to be ready", || {
        let status = source.json(&["status", "--json"]);
        status["migrations"][0]["ready_for_switchover"]
            .as_bool()
            .filter(|&ready| ready)
    });
    signal(child.id(), rustix::process::Signal::INT);
    let said: crate::util::Said = child.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(130), "{said:#?}");
    assert!(
        said.err.contains("cancel") && said.err.contains("not touched"),
        "{said:#?}"
    );
    assert_eq!(volume(&source, "vm1")["ownership"], "owner");
    until("the target to forget it", || {
        (target.json(&["volume", "list", "--json"]) == serde_json::json!([])).then_some(())
    });
    // And it can be moved after all.
    source
        .run(&["migrate", "vm1", "--to", "lisbon", "--wait"])
        .ok();
}

#[test]
fn a_peer_with_a_wrong_certificate_is_refused_and_the_reason_is_shown() {
    let lab = Lab::new();
    let target = Agent::start(&lab.configure("lisbon", "lisbon", "berlin", None));
    let address = target.json(&["status", "--json"])["listen"]
        .as_str()
        .unwrap()
        .to_owned();
    // The same name, signed by an authority that nobody knows.
    let other = Lab::new();
    for file in ["berlin.pem", "berlin.key"] {
        fs::copy(
            other.path().join("pki").join(file),
            lab.path().join("pki").join(file),
        )
        .unwrap();
    }
    let source = Agent::start(&lab.configure("berlin", "berlin", "lisbon", Some(&address)));
    let image = lab.image("vm1.raw", 1 << 20);
    source
        .run(&["volume", "import", "vm1", image.to_str().unwrap()])
        .ok();
    source.run(&["migrate", "vm1", "--to", "lisbon"]).ok();
    let reason = until("the link's error", || {
        let status = source.json(&["status", "--json"]);
        status["links"][0]["last_error"].as_str().map(str::to_owned)
    });
    assert!(reason.contains("certificate"), "{reason}");
    assert_eq!(volume(&source, "vm1")["ownership"], "owner");
    assert_eq!(
        target.json(&["volume", "list", "--json"]),
        serde_json::json!([])
    );
    source.run(&["cancel", "vm1"]).ok();
}

#[test]
fn agents_that_are_stopped_and_started_know_their_volumes() {
    let lab = Lab::new();
    let dir = lab.configure("berlin", "berlin", "lisbon", None);
    let agent = Agent::start(&dir);
    let image = lab.image("vm1.raw", 1 << 20);
    agent
        .run(&["volume", "import", "vm1", image.to_str().unwrap()])
        .ok();
    agent
        .run(&["volume", "import", "vm2", image.to_str().unwrap()])
        .fails_with(&["vm1.raw"]);
    let before = volume(&agent, "vm1");
    let status = agent.stop();
    assert!(status.success(), "{status}");
    let again = Agent::start(&dir);
    let after = volume(&again, "vm1");
    for field in ["id", "epoch", "ownership", "image", "size_bytes"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    assert!(read_all(&mut connect(&again, "vm1")) == fs::read(&image).unwrap());
}
