//! Running machines that are taken under care and given back, with real QEMU and a guest that checks itself.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use flimcd_lab::{
    sparse::copy_sparse,
    vm::{
        Bus, DiskFormat, DiskSpec, ExtraDisk, GuestImage, GuestSpec, LoadSummary, Qemu, QemuSpec,
        Requirements, Style, Tools,
    },
};
use rustix::process::Signal;
use serde_json::Value;

use crate::util::{Agent, Lab, flimcd, signal, until};

/// What guests need, or a loud skip.
fn tools() -> Option<&'static Tools> {
    static TOOLS: OnceLock<Option<Tools>> = OnceLock::new();
    TOOLS
        .get_or_init(|| match Requirements::check() {
            Ok(tools) => Some(tools),
            Err(missing) => {
                eprintln!("SKIPPED: needs QEMU and a kernel for a guest: {missing}");
                None
            }
        })
        .as_ref()
}

/// One site with an agent and one running machine.
struct Site {
    lab: Lab,
    agent: Option<Agent>,
    tools: &'static Tools,
    image: GuestImage,
    root: PathBuf,
    qemu: Qemu,
}

impl Site {
    /// A guest on a raw root disk and, if asked, on a qcow2 overlay as its second disk.
    fn start(tools: &'static Tools, style: Style, has_overlay: bool) -> Self {
        let lab = Lab::new();
        let agent = Agent::start(&lab.configure("berlin", "berlin", "lisbon", None));
        let mut spec = GuestSpec {
            disk_bytes: 96 << 20,
            load_bytes: 16 << 20,
            content_bytes: 4 << 20,
            ..GuestSpec::default()
        };
        if has_overlay {
            spec.extra_disks = vec![ExtraDisk {
                disk_bytes: 48 << 20,
                load_bytes: 16 << 20,
            }];
        }
        let image = GuestImage::build(tools, lab.path(), &spec).unwrap();
        let root = lab.path().join("vm-root.raw");
        copy_sparse(&image.disks[0], &root).unwrap();
        let mut machine = QemuSpec::new("vm1", &lab.path().join("qemu"), &image);
        machine.load.writes_per_sec = 200.0;
        machine.load.reads_per_sec = 200.0;
        let mut disk = DiskSpec::new("disk0", &root);
        disk.style = style;
        machine.disks = vec![disk];
        if has_overlay {
            let overlay = lab.path().join("overlay.qcow2");
            tools
                .qcow2_overlay(&image.disks[1], "raw", &overlay)
                .unwrap();
            let mut disk = DiskSpec::new("disk1", &overlay);
            // The other way of everything.
            disk.style = match style {
                Style::Blockdev => Style::Drive,
                Style::Drive => Style::Blockdev,
            };
            disk.format = DiskFormat::Qcow2;
            disk.bus = Bus::VirtioScsi;
            disk.is_direct = false;
            machine.disks.push(disk);
        }
        let qemu = machine.spawn(tools).unwrap();
        qemu.wait_ready().unwrap();
        Self {
            lab,
            agent: Some(agent),
            tools,
            image,
            root,
            qemu,
        }
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().unwrap()
    }

    fn adopt(&self) -> Value {
        let qmp = self.qemu.qmp();
        let args = ["vm", "adopt", "--qmp", qmp.to_str().unwrap(), "--json"];
        self.agent().json(&args)
    }

    fn release(&self) -> Value {
        self.agent().json(&["vm", "release", "vm1", "--json"])
    }

    /// Kills the agent as `kill -9` does, and starts it again.
    fn kill_agent(&mut self) {
        let agent = self.agent.take().unwrap();
        let dir = agent.dir.clone();
        drop(agent);
        self.agent = Some(Agent::start(&dir));
    }

    /// Everything that the guest ever wrote is there, it saw no error, and its file system is whole.
    fn check(self) {
        let answer = self.qemu.control("verify").unwrap();
        assert!(answer.ends_with("errors=0"), "{answer}");
        let complaints = self.qemu.complaints();
        assert!(complaints.is_empty(), "{complaints:?}");
        let summary = LoadSummary::of(&self.qemu.load_lines());
        eprintln!(
            "load: {:.0} writes/s, {:.0} reads/s, worst write {:.0} ms, worst read {:.0} ms",
            summary.writes_per_sec,
            summary.reads_per_sec,
            summary.worst_write_ms,
            summary.worst_read_ms
        );
        self.qemu.power_off().unwrap();
        self.tools.check_file_system(&self.root).unwrap();
        drop(self.agent);
        drop((self.lab, self.image));
    }
}

/// Where QEMU has its disks, as it says itself over its second monitor: file names of all nodes.
fn nodes(qemu: &Qemu) -> Vec<String> {
    let answer = qmp(&qemu.lab_qmp(), "query-named-block-nodes");
    let nodes = answer.as_array().unwrap().iter();
    nodes
        .map(|node| node["file"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// One command over a monitor that nobody else holds.
fn qmp(socket: &Path, command: &str) -> Value {
    use std::io::{BufRead as _, BufReader, Write as _};
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut answer = None;
    // The greeting, and the answer to the first command.
    let _greeting = lines.next();
    for text in ["qmp_capabilities", command] {
        writeln!(stream, "{{\"execute\":\"{text}\"}}").unwrap();
        loop {
            let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            if let Some(value) = line.get("return") {
                answer = Some(value.clone());
                break;
            }
            assert!(line.get("error").is_none(), "{line}");
        }
    }
    answer.unwrap()
}

fn cycles(style: Style, has_overlay: bool, count: usize) {
    let Some(tools) = tools() else { return };
    let site = Site::start(tools, style, has_overlay);
    let disks = if has_overlay { 2 } else { 1 };
    let qmp = site.qemu.qmp();
    let look = || {
        let args = [
            "vm",
            "adopt",
            "--qmp",
            qmp.to_str().unwrap(),
            "--dry-run",
            "--json",
        ];
        let mut found = site.agent().json(&args);
        // The only thing that may be different: a qcow2 file has room to grow.
        for disk in found["disks"].as_array_mut().unwrap() {
            disk["file_bytes"].take();
        }
        found
    };
    let before = look();
    assert_eq!(before["care"], "found");
    assert_eq!(before["disks"].as_array().unwrap().len(), disks);
    assert!(site.agent().json(&["vm", "list", "--json"]) == Value::Array(vec![]));
    site.qemu.control("mark before 64").unwrap();
    for round in 0..count {
        let adopted = site.adopt();
        assert_eq!(adopted["care"], "in-care", "{adopted}");
        assert_eq!(adopted["status"], "running");
        let volumes = site.agent().json(&["volume", "list", "--json"]);
        assert_eq!(volumes.as_array().unwrap().len(), disks);
        assert!(
            nodes(&site.qemu)
                .iter()
                .any(|file| file.starts_with("nbd+unix:")),
            "{:?}",
            nodes(&site.qemu)
        );
        // The agent holds the image as QEMU would.
        let write = can_be_opened(&site.root);
        assert!(!write, "a second program could open the image");
        site.qemu
            .control(&format!("mark during{round} 16"))
            .unwrap();
        site.qemu.wait_seconds(1).unwrap();
        let released = site.release();
        assert_eq!(released["care"], "released");
        assert!(
            !nodes(&site.qemu)
                .iter()
                .any(|file| file.starts_with("nbd+unix:")),
            "{:?}",
            nodes(&site.qemu)
        );
        assert_eq!(
            site.agent().json(&["vm", "list", "--json"]),
            Value::Array(vec![])
        );
        assert_eq!(
            site.agent().json(&["volume", "list", "--json"]),
            Value::Array(vec![])
        );
        site.qemu.control(&format!("mark after{round} 16")).unwrap();
    }
    assert_eq!(look(), before, "the disks' options are as before");
    site.check();
}

/// Whether qemu-io could open an image for writing, with its locks.
fn can_be_opened(image: &Path) -> bool {
    let status = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 0"])
        .arg(image)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    status.success()
}

#[test]
fn ten_times_in_and_out_of_care_under_load() {
    cycles(Style::Blockdev, true, 10);
}

#[test]
fn in_and_out_of_care_of_a_machine_started_with_drive() {
    cycles(Style::Drive, true, 3);
}

#[test]
fn the_guest_outlives_killed_agents() {
    let Some(tools) = tools() else { return };
    let mut site = Site::start(tools, Style::Blockdev, true);
    site.adopt();
    for round in 0..3 {
        site.qemu.wait_seconds(1).unwrap();
        site.kill_agent();
        site.qemu.control(&format!("mark kill{round} 16")).unwrap();
    }
    let shown = site.agent().json(&["vm", "show", "vm1", "--json"]);
    assert_eq!(
        (&shown["care"], &shown["status"]),
        (&"in-care".into(), &"running".into())
    );
    // Adopted volumes are not removed or moved by themselves.
    let volume = shown["disks"][0]["volume"].as_str().unwrap().to_owned();
    let removed = site.agent().run(&["volume", "remove", &volume]);
    removed.fails_with(&["a disk of VM vm1", "flimcd vm release vm1"]);
    let moved = site.agent().run(&["migrate", &volume, "--to", "lisbon"]);
    moved.fails_with(&["a disk of VM vm1", "flimcd vm migrate vm1"]);
    site.release();
    site.check();
}

/// How far an agent got with taking or giving back, as its files say.
#[derive(Clone, Copy, Debug)]
enum Got {
    /// Nothing was asked yet.
    Nowhere,
    /// The machine's record is there.
    Recorded,
    /// So many disks are volumes.
    Volumes(usize),
    /// So many disks were seen to be on exports.
    Adopted(usize),
    /// The release is on record.
    Releasing,
    /// So many disks are left.
    Left(usize),
}

impl Got {
    fn is_there(self, state_dir: &Path) -> bool {
        let record = fs::read(state_dir.join("vms/vm1.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&record).unwrap_or_default();
        let disks = || record["disks"].as_array().cloned().unwrap_or_default();
        match self {
            Self::Nowhere => true,
            Self::Recorded => !record.is_null(),
            Self::Volumes(count) => {
                let volumes = fs::read_dir(state_dir.join("volumes")).unwrap().flatten();
                let is_volume = |name: &str| name.starts_with("vm1-");
                let named =
                    volumes.filter(|entry| entry.file_name().to_str().is_some_and(is_volume));
                named.count() >= count
            }
            Self::Adopted(count) => {
                disks()
                    .iter()
                    .filter(|disk| !disk["adopted"].is_null())
                    .count()
                    >= count
            }
            Self::Releasing => record["state"] == "releasing",
            Self::Left(count) => record["state"] == "releasing" && disks().len() <= count,
        }
    }
}

/// An agent that dies in the middle of taking or giving back: wherever that was, the next one knows.
#[test]
fn an_agent_killed_in_the_middle_leaves_the_machine_whole() {
    let Some(tools) = tools() else { return };
    let mut site = Site::start(tools, Style::Blockdev, true);
    let adopting = [
        Got::Nowhere,
        Got::Recorded,
        Got::Volumes(1),
        Got::Volumes(2),
        Got::Adopted(1),
        Got::Adopted(2),
    ];
    let releasing = [Got::Releasing, Got::Left(1), Got::Left(0)];
    let rounds = adopting.map(|got| (false, got)).into_iter();
    for (round, (is_release, got)) in rounds.chain(releasing.map(|got| (true, got))).enumerate() {
        let mut command = flimcd();
        command.env("FLIMCD_API", site.agent().dir.join("run/api.sock"));
        if is_release {
            site.adopt();
            command.args(["vm", "release", "vm1"]);
        } else {
            command.args(["vm", "adopt", "--qmp"]).arg(site.qemu.qmp());
        }
        let silent = std::process::Stdio::null;
        let mut child = command.stdout(silent()).stderr(silent()).spawn().unwrap();
        let state_dir = site.agent().dir.join("state");
        // It may be over before it was seen to be there; then that is the moment.
        while !got.is_there(&state_dir) && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        signal(site.agent().pid(), Signal::KILL);
        child.wait().unwrap();
        site.kill_agent();
        let is_in_care = until("the machine is in care or out of it", || {
            let all = site.agent().json(&["vm", "list", "--json"]);
            match all.as_array().unwrap().first() {
                None => Some(false),
                Some(vm) => (vm["care"] == "in-care").then_some(true),
            }
        });
        let on_exports = nodes(&site.qemu)
            .iter()
            .any(|file| file.starts_with("nbd+unix:"));
        assert_eq!(on_exports, is_in_care, "{got:?}: {:?}", nodes(&site.qemu));
        let volumes = site.agent().json(&["volume", "list", "--json"]);
        let volumes = volumes.as_array().unwrap().len();
        assert_eq!(volumes, if is_in_care { 2 } else { 0 }, "{got:?}");
        site.qemu.control(&format!("mark round{round} 16")).unwrap();
        if is_in_care {
            site.release();
        }
    }
    site.check();
}

#[test]
fn what_is_refused_says_why_and_changes_nothing() {
    let Some(tools) = tools() else { return };
    let lab = Lab::new();
    let agent = Agent::start(&lab.configure("berlin", "berlin", "lisbon", None));
    let adopt = |socket: &Path, more: &[&str]| {
        let mut args = vec!["vm", "adopt", "--qmp", socket.to_str().unwrap()];
        args.extend(more);
        agent.run(&args)
    };
    // Nobody there.
    adopt(&lab.path().join("none.qmp"), &[]).fails_with(&["none.qmp", "-qmp unix:"]);
    // Somebody else there.
    let api = agent.dir.join("run/api.sock");
    adopt(&api, &[]).fails_with(&["api.sock"]);
    agent.run(&["vm", "show", "vm1"]).fails_with(&["no VM vm1"]);
    agent
        .run(&["vm", "release", "vm1"])
        .fails_with(&["no VM vm1", "flimcd vm list"]);

    let spec = GuestSpec {
        disk_bytes: 32 << 20,
        load_bytes: 4 << 20,
        content_bytes: 1 << 20,
        ..GuestSpec::default()
    };
    let image = GuestImage::build(tools, lab.path(), &spec).unwrap();
    let start = |name: &str, more: &[&str]| {
        let disk = lab.path().join(format!("{name}.raw"));
        copy_sparse(&image.disks[0], &disk).unwrap();
        let mut machine = QemuSpec::new(name, &lab.path().join(name), &image);
        machine.disks = vec![DiskSpec::new("disk0", &disk)];
        machine.is_paused = true;
        machine.more = more.iter().map(|&text| text.to_owned()).collect();
        machine.spawn(tools).unwrap()
    };
    let odd = [
        "-blockdev",
        "driver=null-co,node-name=odd,size=1048576",
        "-device",
        "virtio-blk-pci,drive=odd,id=odd-dev",
    ];
    let refused = start("odd", &odd);
    let said = adopt(&refused.qmp(), &[]);
    said.fails_with(&["cannot be adopted", "odd", "null-co", "--dry-run"]);
    let dry = adopt(&refused.qmp(), &["--dry-run"]);
    assert!(dry.out.contains("cannot be adopted as it is"), "{dry:?}");
    assert_eq!(dry.code, Some(1));
    drop(refused);

    let one = start("one", &[]);
    let held = UnixStream::connect(one.qmp()).unwrap();
    adopt(&one.qmp(), &[]).fails_with(&["another program"]);
    drop(held);
    let taken = lab.image("taken.raw", 1 << 20);
    let volume = "one-disk0-dev";
    agent
        .run(&["volume", "import", volume, taken.to_str().unwrap()])
        .ok();
    adopt(&one.qmp(), &[]).fails_with(&["there is a volume one-disk0-dev already", "--name"]);
    agent.run(&["volume", "remove", volume]).ok();
    let said = adopt(&one.qmp(), &[]).ok();
    assert!(
        said.contains("adopted one") && said.contains(volume),
        "{said}"
    );
    adopt(&one.qmp(), &["--name", "again"]).fails_with(&["under care already, as one"]);
    let two = start("two", &[]);
    adopt(&two.qmp(), &["--name", "one"]).fails_with(&["there is a VM one", "--name"]);
    drop(two);

    // A QEMU that is gone is forgotten, and its image is whole.
    drop(one);
    let shown = until("the end of QEMU", || {
        let vm = agent.json(&["vm", "show", "one", "--json"]);
        (vm["status"] == "gone").then_some(vm)
    });
    assert!(
        shown["problem"]
            .as_str()
            .unwrap()
            .contains("flimcd vm release one")
    );
    let said = agent.run(&["vm", "release", "one"]).ok();
    assert!(said.contains("forgot one"), "{said}");
    let now = fs::read(lab.path().join("one.raw")).unwrap();
    assert!(now == fs::read(&image.disks[0]).unwrap());
    assert!(can_be_opened(&lab.path().join("one.raw")));
}

/// The agent was away, and somebody has started the machine again on its plain files: they are its own.
#[test]
fn a_machine_started_again_on_its_files_keeps_them() {
    let Some(tools) = tools() else { return };
    let lab = Lab::new();
    let dir = lab.configure("berlin", "berlin", "lisbon", None);
    let agent = Agent::start(&dir);
    let spec = GuestSpec {
        disk_bytes: 32 << 20,
        load_bytes: 4 << 20,
        content_bytes: 1 << 20,
        ..GuestSpec::default()
    };
    let image = GuestImage::build(tools, lab.path(), &spec).unwrap();
    let mut machine = QemuSpec::new("vm1", &lab.path().join("qemu"), &image);
    machine.disks = vec![DiskSpec::new("disk0", &image.disks[0])];
    machine.is_paused = true;
    let first = machine.spawn(tools).unwrap();
    let qmp = machine.qmp();
    let adopt = ["vm", "adopt", "--qmp", qmp.to_str().unwrap()];
    agent.run(&adopt).ok();
    drop((agent, first));
    let second = machine.spawn(tools).unwrap();
    // Its monitor greets once it has its disks.
    until("the second QEMU", || {
        UnixStream::connect(second.lab_qmp()).ok()
    });
    assert!(!nodes(&second).is_empty());
    // It waits for the locks of the image for half a minute, as they could be those of the agent before.
    let agent = Agent::start(&dir);
    let shown = agent.json(&["vm", "show", "vm1", "--json"]);
    let why = shown["disks"][0]["refused"].as_str().unwrap();
    assert!(why.contains("flimcd vm release vm1"), "{shown}");
    let volume = agent.json(&["volume", "show", "vm1-disk0-dev", "--json"]);
    assert!(volume["export"].is_null(), "{volume}");
    agent.run(&["vm", "release", "vm1"]).ok();
    assert!(second.is_running());
    let volumes = agent.json(&["volume", "list", "--json"]);
    assert_eq!(volumes, Value::Array(vec![]));
    // It can come into care again, and then a second QEMU is refused.
    agent.run(&adopt).ok();
    assert!(!can_be_opened(&image.disks[0]));
    agent.run(&["vm", "release", "vm1"]).ok();
}

/// Not part of a normal run: how long guests wait for their disks at most while they are taken and given back.
/// `cargo test -p flimcd --test it stalls -- --ignored --nocapture`
#[test]
#[ignore = "measures, and says nothing on a busy machine"]
fn stalls() {
    let Some(tools) = tools() else { return };
    for (text, style) in [("-blockdev", Style::Blockdev), ("-drive", Style::Drive)] {
        let site = Site::start(tools, style, true);
        // Worst write and read of the seconds that something took.
        let during = |what: &dyn Fn()| {
            let before = site.qemu.load_lines().len();
            what();
            site.qemu.wait_seconds(2).unwrap();
            let lines = site.qemu.load_lines();
            LoadSummary::of(&lines[before..])
        };
        let mut all = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..10 {
            all[0].push(during(&|| ()));
            all[1].push(during(&|| drop(site.adopt())));
            all[2].push(during(&|| ()));
            all[3].push(during(&|| drop(site.release())));
        }
        for (what, sums) in ["on files", "adopt", "in care", "release"].iter().zip(all) {
            let worst = |of: fn(&LoadSummary) -> f64| {
                let mut all: Vec<_> = sums.iter().map(of).collect();
                all.sort_by(f64::total_cmp);
                format!(
                    "median {:.0}, worst {:.0} ms",
                    all[all.len() / 2],
                    all[all.len() - 1]
                )
            };
            eprintln!(
                "{text}, {what}: longest write {}; longest read {}",
                worst(|sum| sum.worst_write_ms),
                worst(|sum| sum.worst_read_ms)
            );
        }
        eprintln!(
            "{}",
            site.agent()
                .log()
                .lines()
                .filter(|l| l.contains("disk taken") || l.contains("disk given"))
                .collect::<Vec<_>>()
                .join("\n")
        );
        site.check();
    }
}
