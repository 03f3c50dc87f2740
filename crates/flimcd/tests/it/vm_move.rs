//! Running machines move: real guests in QEMU, real agents in network namespaces, an emulated WAN between them.
//!
//! Needs root, QEMU and a guest kernel; skipped loudly without them. Nothing here asserts a duration.

use std::{
    path::Path,
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use flimcd_agent::api::{AdoptVm, Client, MoveVm, RamMode, Strategy, VmMoveStatus, VmPhase};
use flimcd_core::VolumeName;
use flimcd_lab::{
    vm::{
        Agents, Arriving, ExtraDisk, GuestImage, GuestSpec, Layout, LoadSettings, Requirements,
        Stage, StageOptions, Storage,
    },
    wan::Side,
};
use tempfile::TempDir;

/// Anything here that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(20);

/// One guest pair at a time: they emulate a processor each.
static TURN: Mutex<()> = Mutex::new(());

/// A guest at site A under care of its agent, and an agent at site B that can take it.
struct World {
    // Dropped in this order: a machine without the agent that serves its disks waits for it, also to end.
    arriving: Arriving,
    returning: Arriving,
    agents: Agents,
    stage: Stage,
    client: Client,
    vm: VolumeName,
    /// Files that were written for checks.
    marks: AtomicUsize,
    layout: Layout,
    runtime: tokio::runtime::Runtime,
    _dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// `None`, said loudly, where something is missing.
    fn new(link: &str, disks: usize) -> Option<Self> {
        Self::with(link, disks, Layout::Raw)
    }

    fn with(link: &str, disks: usize, layout: Layout) -> Option<Self> {
        Self::with_machine(link, disks, layout, Arriving::config)
    }

    fn with_machine(
        link: &str,
        disks: usize,
        layout: Layout,
        machine: fn(&Arriving) -> String,
    ) -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let tools = match Requirements::check() {
            Ok(tools) => tools,
            Err(missing) => {
                eprintln!("SKIPPED: moves of machines: {missing}");
                return None;
            }
        };
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: moves of machines: network namespaces need root");
            return None;
        }
        let dir = tempfile::Builder::new()
            .prefix("flimcd-vm-")
            .tempdir()
            .unwrap();
        let extra = ExtraDisk {
            disk_bytes: 64 << 20,
            load_bytes: 8 << 20,
        };
        let spec = GuestSpec {
            disk_bytes: 128 << 20,
            load_bytes: 16 << 20,
            content_bytes: 24 << 20,
            seed: 7,
            extra_disks: vec![extra; disks - 1],
        };
        let image = GuestImage::build(&tools, dir.path(), &spec).unwrap();
        let options = StageOptions {
            link: link.parse().unwrap(),
            seed: 7,
            memory_mib: 128,
            load: LoadSettings::default(),
            layout,
            warm_up_s: 2,
        };
        let stage = Stage::start(&tools, dir.path(), &image, &options).unwrap();
        let arriving = Arriving::new(&stage).unwrap();
        let returning = Arriving::returning(&stage).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_flimcd"));
        let config = machine(&arriving);
        let back = returning.config();
        let agents = Agents::start(&stage.sites, dir.path(), program, [&back, &config]).unwrap();
        let client = Client::new(agents.at(Side::A).api_socket());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let adopt = AdoptVm {
            qmp: stage.source.qmp(),
            name: None,
            tenant: None,
            dry_run: false,
        };
        let vm = runtime.block_on(client.adopt_vm(&adopt)).unwrap().name;
        Some(Self {
            agents,
            arriving,
            returning,
            stage,
            client,
            vm,
            marks: AtomicUsize::new(0),
            layout,
            runtime,
            _dir: dir,
            _turn: turn,
        })
    }

    fn begin(&self, release: bool) {
        self.begin_with(release, RamMode::Precopy);
    }

    fn begin_with(&self, release: bool, ram: RamMode) {
        let request = MoveVm {
            to: Agents::NAMES[1].parse().unwrap(),
            downtime_ms: None,
            ram,
            bandwidth_bytes_per_sec: None,
            strategy: Strategy::Flimcd,
            release,
        };
        self.runtime
            .block_on(self.client.move_vm(&self.vm, &request))
            .unwrap();
    }

    /// The move as the source's agent sees it; `None` while it is not there.
    fn status(&self) -> Option<VmMoveStatus> {
        self.runtime.block_on(self.client.vm_move(&self.vm)).ok()
    }

    fn wait(&self, what: &str, done: impl Fn(&VmMoveStatus) -> bool) -> VmMoveStatus {
        let start = Instant::now();
        loop {
            let status = self.status();
            if let Some(status) = &status
                && done(status)
            {
                return status.clone();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "waited in vain for {what}: {status:#?}\n{}\n{}",
                self.agents.at(Side::A).log(),
                self.agents.at(Side::B).log()
            );
            std::thread::sleep(POLL);
        }
    }

    fn wait_phase(&self, phase: VmPhase) -> VmMoveStatus {
        self.wait(&format!("phase {phase}"), |status| {
            status.phase == phase || status.phase.has_ended()
        })
    }

    fn wait_end(&self) -> VmMoveStatus {
        self.wait("the end", |status| status.phase.has_ended())
    }

    fn ask(&self, command: &str) -> String {
        self.stage.sites.ask_guest(command).unwrap()
    }

    /// The guest finds all that it ever wrote, wherever it runs, and its load goes on.
    fn check_guest(&self) {
        let number = self.marks.fetch_add(1, Ordering::Relaxed);
        self.ask(&format!("mark after{number} 256"));
        let before = self.ask("status");
        let start = Instant::now();
        while self.ask("status") == before {
            assert!(start.elapsed() < PATIENCE, "the guest's load stands still");
            std::thread::sleep(POLL);
        }
        let answer = self.ask("verify");
        assert!(answer.ends_with("errors=0"), "{answer}");
        let complaints = [self.stage.source.complaints(), self.arriving.complaints()].concat();
        assert_eq!(complaints, [""; 0]);
    }

    /// The guest is at the target and nowhere else, whole.
    fn check_moved(self) {
        self.check_guest();
        let start = Instant::now();
        while self.arriving.load_lines().is_empty() {
            assert!(
                start.elapsed() < PATIENCE,
                "the guest does not run at the target"
            );
            std::thread::sleep(POLL);
        }
        assert!(
            !self.stage.source.is_running(),
            "the source's machine is still there"
        );
        // The machine ends in the middle of its answer.
        let _ = self.stage.sites.ask_guest("poweroff");
        self.arriving.wait_gone().unwrap();
        for image in self.arriving.images(self.agents.at(Side::B).dir()).unwrap() {
            let tools = self.stage.tools();
            match self.layout {
                Layout::Raw => tools.check_file_system(&image).unwrap(),
                Layout::Overlay => {
                    let raw = image.with_extension("checked");
                    tools.raw_copy(&image, &raw).unwrap();
                    tools.check_file_system(&raw).unwrap();
                }
            }
        }
    }

    /// What the target's agent says while it waits for somebody to start the machine.
    fn wait_told(&self) -> String {
        let target = Client::new(self.agents.at(Side::B).api_socket());
        let start = Instant::now();
        loop {
            if let Ok(status) = self.runtime.block_on(target.vm_move(&self.vm))
                && !status.phase.has_ended()
                && let Some(note) = status.notes.last()
            {
                return note.clone();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{}",
                self.agents.at(Side::B).log()
            );
            std::thread::sleep(POLL);
        }
    }

    /// The target gives the disks back as plain files, with the agent out of the way, soon after the move.
    fn wait_released(&self) {
        let target = Client::new(self.agents.at(Side::B).api_socket());
        let start = Instant::now();
        while !self.runtime.block_on(target.vms()).unwrap().is_empty() {
            assert!(
                start.elapsed() < PATIENCE,
                "{}",
                self.agents.at(Side::B).log()
            );
            std::thread::sleep(POLL);
        }
        let volumes = self.runtime.block_on(target.volumes()).unwrap();
        assert!(volumes.is_empty(), "{volumes:#?}");
    }

    /// The guest is at the source, whole, and nothing of it runs at the target.
    fn check_stayed(&self) {
        self.check_guest();
        assert!(
            self.arriving.load_lines().is_empty(),
            "the guest has run at the target"
        );
        assert!(self.stage.source.is_running());
    }
}

#[test]
fn two_disks_and_memory_move_under_load_and_are_released() {
    let Some(world) = World::new("200mbit,20ms,loss=0.01%", 2) else {
        return;
    };
    world.ask("mark before 512");
    world.begin(true);
    world.wait_phase(VmPhase::Ram);
    world.ask("mark during 512");
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    let disks = status.disks.as_ref().unwrap();
    assert_eq!(disks.volumes.len(), 2);
    assert!(
        status.ram_bytes_sent < status.ram_bytes_read,
        "memory is packed"
    );
    assert!(status.downtime_ms.is_some());
    world.wait_released();
    world.agents.at(Side::B).kill();
    world.check_moved();
}

/// Runs the command line against the agent of site B; what it printed.
fn flimcd_at_b(world: &World, arguments: &[&str]) -> String {
    let socket = world.agents.at(Side::B).api_socket();
    let done = Command::new(env!("CARGO_BIN_EXE_flimcd"))
        .args(arguments)
        .arg("--api")
        .arg(socket)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{arguments:?}: {text}\n{complaint}");
    text
}

#[test]
fn a_machine_comes_back_over_its_copy_and_little_crosses() {
    let Some(world) = World::new("200mbit,20ms", 1) else {
        return;
    };
    world.ask("mark before 512");
    world.begin(false);
    let away = world.wait_end();
    assert_eq!(away.phase, VmPhase::Completed, "{away:#?}");
    let away = away.disks.unwrap();
    world.ask("mark there 256");

    let home = Agents::NAMES[0];
    let disk = away.volumes[0].to_string();
    flimcd_at_b(&world, &["plan", &disk, "--to", home, "--watch", "0"]);
    let said = flimcd_at_b(&world, &["vm", "migrate", world.vm.as_str(), "--to", home]);
    for part in [
        "runs at",
        "downtime",
        "compressed",
        "PLANNED",
        "on the link",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let there = Client::new(world.agents.at(Side::B).api_socket());
    let back = world.runtime.block_on(there.vm_move(&world.vm)).unwrap();
    assert_eq!(back.phase, VmPhase::Completed, "{back:#?}");
    let back = back.disks.unwrap();
    assert!(back.planned.is_some(), "{back:#?}");
    // Two marks and some seconds of load, of an image of which it first took all.
    assert!(
        back.bytes_sent * 2 < away.bytes_sent,
        "{} of {}",
        back.bytes_sent,
        away.bytes_sent
    );
    world.check_guest();
    let start = Instant::now();
    while world.returning.load_lines().is_empty() {
        assert!(start.elapsed() < PATIENCE, "the guest does not run at home");
        std::thread::sleep(POLL);
    }
    world.arriving.wait_gone().unwrap();
    let _ = world.stage.sites.ask_guest("poweroff");
    world.returning.wait_gone().unwrap();
    let Storage::File(image) = &world.stage.source.spec().disks[0].storage else {
        panic!("the stage's disks are files");
    };
    world.stage.tools().check_file_system(image).unwrap();
}

#[test]
fn a_qcow2_disk_moves_and_finds_its_backing_file() {
    let Some(world) = World::with("200mbit,20ms", 1, Layout::Overlay) else {
        return;
    };
    world.ask("mark before 512");
    world.begin(true);
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.wait_released();
    world.check_moved();
}

#[test]
fn a_machine_that_somebody_else_starts_is_waited_for() {
    let Some(world) = World::with_machine("200mbit,20ms", 1, Layout::Raw, Arriving::awaited_config)
    else {
        return;
    };
    // Given up, and then begun again.
    world.begin(false);
    let told = world.wait_told();
    assert!(told.contains("-incoming defer"), "{told}");
    world
        .runtime
        .block_on(world.client.cancel_vm_move(&world.vm))
        .unwrap();
    assert_eq!(world.wait_end().phase, VmPhase::Cancelled);
    world.check_stayed();
    world.begin(false);
    let told = world.wait_told();
    let (_, arguments) = told.split_once("these arguments: ").unwrap();
    world
        .arriving
        .start_as_told(&world.stage.sites, arguments)
        .unwrap();
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}

#[test]
fn memory_follows_the_switch_when_asked_to() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    world.begin_with(false, RamMode::Postcopy);
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}

#[test]
fn a_cancelled_move_leaves_the_guest_alone_and_can_begin_again() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    world.begin(false);
    world.wait_phase(VmPhase::Ram);
    world
        .runtime
        .block_on(world.client.cancel_vm_move(&world.vm))
        .unwrap();
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Cancelled, "{status:#?}");
    world.check_stayed();
    world.begin(false);
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}

#[test]
fn a_target_machine_that_dies_before_the_switch_costs_nothing() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    world.begin(false);
    world.wait_phase(VmPhase::Ram);
    quit(&world);
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Failed, "{status:#?}");
    let error = status.error.unwrap();
    assert!(error.contains("at the target"), "{error}");
    world.check_stayed();
}

/// Ends the target's machine behind its agent's back.
fn quit(world: &World) {
    world.runtime.block_on(async {
        let qmp = flimcd_qemu::Qmp::connect(&world.arriving.lab_qmp())
            .await
            .unwrap();
        // It hangs up instead of answering, or does both.
        let _ = qmp.execute(flimcd_qemu::commands::Quit {}).await;
    });
}

#[test]
fn a_link_that_breaks_in_either_phase_only_delays() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    let cut = || {
        world.stage.sites.wan().cut();
        std::thread::sleep(Duration::from_secs(5));
        world.stage.sites.wan().restore();
    };
    world.begin(false);
    world.wait_phase(VmPhase::Ram);
    cut();
    let status = world.wait("the switch", |status| {
        status.switched_unix_ms.is_some() || status.phase.has_ended()
    });
    // A guest so idle that QEMU stops it first begins again too, and says so.
    assert!(
        status.attempt == 1 || status.notes.iter().all(|note| note.contains("by itself")),
        "memory was sent again because of the link: {status:#?}"
    );
    cut();
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}

#[test]
fn agents_that_are_killed_while_memory_goes_over_begin_it_again() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    world.begin(false);
    for side in [Side::A, Side::B] {
        let status = world.wait_phase(VmPhase::Ram);
        assert_eq!(status.phase, VmPhase::Ram, "{status:#?}");
        world.agents.at(side).kill();
        world.agents.at(side).restart().unwrap();
        world.wait("the next attempt", |next| next.attempt > status.attempt);
    }
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}

#[test]
fn agents_that_are_killed_after_the_switch_are_waited_for() {
    let Some(world) = World::new("50mbit,20ms", 1) else {
        return;
    };
    world.begin(false);
    world.wait("the switch", |status| status.switched_unix_ms.is_some());
    for side in [Side::A, Side::B] {
        world.agents.at(side).kill();
    }
    for side in [Side::A, Side::B] {
        world.agents.at(side).restart().unwrap();
    }
    let status = world.wait_end();
    assert_eq!(status.phase, VmPhase::Completed, "{status:#?}");
    world.check_moved();
}
