//! A guest of the lab, moved by two agents: what `demo --vm` shows and `bench vm` measures.
//!
//! ```text
//!  Stage: two namespaces, a WAN, a guest under load at A, a client        (flimcd-lab)
//!  agents of this program at A and B
//!  adopt at A ──► move to B ──► [release] ──► the guest verifies itself ──► switched off, file systems checked
//! ```

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use flimcd_agent::api::{
    AddLibraryImage, AdoptVm, Client, LibraryState, MoveVm, VmMoveStatus, VmPhase,
};
use flimcd_core::VolumeName;
use flimcd_lab::{
    vm::{AgentError, Agents, Arriving, ClientReport, LoadSummary, Stage},
    wan::Side,
};
use serde::Serialize;

const POLL: Duration = Duration::from_millis(20);
/// A move that takes longer hangs.
const MOVE_MAX: Duration = Duration::from_secs(900);
/// Seconds of load before the start to compare with.
const BEFORE_LINES: usize = 5;

/// What came out of a move.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Moved {
    /// From the request until the source is not needed any more.
    pub(crate) total_s: f64,
    /// From the request until the guest ran at the target.
    pub(crate) to_switch_s: f64,
    /// What the agents report.
    pub(crate) status: VmMoveStatus,
    /// What the guest's client saw, from the request until the guest had settled.
    pub(crate) client: ClientReport,
    /// What it saw while the disks were adopted.
    pub(crate) client_adopt: ClientReport,
    /// Bytes from source to target on the WAN, headers and the client's traffic included.
    pub(crate) wire_bytes: u64,
    /// Bytes the other way.
    pub(crate) wire_bytes_back: u64,
    /// The guest's load meanwhile, at the source and after.
    pub(crate) load: LoadSummary,
    /// The same while the disks were adopted.
    pub(crate) load_adopt: LoadSummary,
    /// The same before.
    pub(crate) load_before: LoadSummary,
    /// Packets that the emulator handed over too late: many mean that the machine was too busy.
    pub(crate) late_packets: u64,
    /// What the guest said when it verified itself at the target.
    pub(crate) verified: String,
    /// What either guest printed that is wrong.
    pub(crate) complaints: Vec<String>,
}

/// How to move.
pub(crate) struct MoveOptions {
    pub(crate) request: MoveVm,
    /// Seconds of load at the target that still belong to the result.
    pub(crate) settle_s: usize,
    /// Images in the target's library.
    pub(crate) library: Vec<PathBuf>,
}

/// Site that the guest moves to.
pub(crate) const TO: &str = Agents::NAMES[1];

/// Two agents beside a stage.
pub(crate) struct Two {
    // Dropped before the agents: a machine without the one that serves its disks waits for it, also to end.
    target: Arriving,
    agents: Agents,
    source_api: Client,
}

impl Two {
    /// Starts the agents; nothing happens to the guest.
    pub(crate) fn start(stage: &Stage, dir: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program does not find itself")?;
        let target = Arriving::new(stage).context("the target's directory")?;
        let agents = Agents::start(&stage.sites, dir, &program, ["", &target.config()])
            .map_err(|error: AgentError| anyhow::anyhow!("{error}"))?;
        let source_api = Client::new(agents.at(Side::A).api_socket());
        Ok(Self {
            target,
            agents,
            source_api,
        })
    }

    /// Adopts the stage's guest and moves it. `show` is called with each new status.
    pub(crate) async fn go(
        &self,
        stage: &Stage,
        options: &MoveOptions,
        mut show: impl FnMut(&VmMoveStatus),
    ) -> anyhow::Result<Moved> {
        self.fill_library(&options.library).await?;
        let before = stage.source.load_lines();
        let adopting = Instant::now();
        let adopted = self
            .source_api
            .adopt_vm(&AdoptVm {
                qmp: stage.source.qmp(),
                name: None,
                tenant: None,
                dry_run: false,
            })
            .await
            .context("adopting the guest")?;
        // One second of load that has seen all of it.
        let lines = stage.source.load_lines().len();
        wait_until("the load goes on", || {
            stage.source.load_lines().len() >= lines + 2
        })
        .await?;
        let client_adopt = stage.client.report(adopting, Instant::now());
        let adopt_lines = stage.source.load_lines();

        let start = Instant::now();
        let counters = stage.sites.counters();
        let status = self
            .source_api
            .move_vm(&adopted.name, &options.request)
            .await?;
        let (status, to_switch) = self.follow(&adopted.name, status, start, &mut show).await?;
        let total_s = start.elapsed().as_secs_f64();
        self.settle(stage, options.settle_s).await?;
        let after = stage.sites.counters();
        let client = stage.client.report(start, Instant::now());
        let mut during = stage.source.load_lines();
        during.drain(..adopt_lines.len().min(during.len()));
        during.extend(self.target.load_lines());
        let verified = stage
            .sites
            .ask_guest("verify")
            .context("the guest's own check")?;
        Ok(Moved {
            total_s,
            to_switch_s: to_switch.map_or(total_s, |at| at.duration_since(start).as_secs_f64()),
            status,
            client,
            client_adopt,
            wire_bytes: after.a_to_b.bytes - counters.a_to_b.bytes,
            wire_bytes_back: after.b_to_a.bytes - counters.b_to_a.bytes,
            load: LoadSummary::of(&during),
            load_adopt: LoadSummary::of(&adopt_lines[before.len().min(adopt_lines.len())..]),
            load_before: LoadSummary::of(&before[before.len().saturating_sub(BEFORE_LINES)..]),
            late_packets: after.late - counters.late,
            verified,
            complaints: [stage.source.complaints(), self.target.complaints()].concat(),
        })
    }

    /// Puts images into the target's library, and waits until they have been read.
    async fn fill_library(&self, images: &[PathBuf]) -> anyhow::Result<()> {
        let target = Client::new(self.agents.at(Side::B).api_socket());
        for path in images {
            let request = AddLibraryImage {
                name: None,
                path: path.clone(),
                tenant: None,
                public: true,
                copy: false,
            };
            let name = target.add_library_image(&request).await?.name;
            while target.library_image(&name).await?.state != LibraryState::Ready {
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Follows the move to its end. Also says when the guest ran at the target.
    async fn follow(
        &self,
        vm: &VolumeName,
        mut status: VmMoveStatus,
        start: Instant,
        show: &mut impl FnMut(&VmMoveStatus),
    ) -> anyhow::Result<(VmMoveStatus, Option<Instant>)> {
        let mut switched = None;
        loop {
            show(&status);
            if status.switched_unix_ms.is_some() {
                switched.get_or_insert_with(Instant::now);
            }
            if status.phase == VmPhase::Completed {
                return Ok((status, switched));
            }
            let why = || status.error.clone().unwrap_or_default();
            if status.phase.has_ended() {
                bail!(
                    "the move ended as {}: {}; logs:\n{}",
                    status.phase,
                    why(),
                    self.logs()
                );
            }
            if start.elapsed() > MOVE_MAX {
                bail!(
                    "the move has not ended after {} s; logs:\n{}",
                    MOVE_MAX.as_secs(),
                    self.logs()
                );
            }
            tokio::time::sleep(POLL).await;
            status = self.source_api.vm_move(vm).await?;
        }
    }

    /// Waits until the load at the target has run for some seconds.
    async fn settle(&self, stage: &Stage, seconds: usize) -> anyhow::Result<()> {
        let runs = Instant::now();
        let client = &stage.client;
        wait_until("the guest's load at the target", || {
            self.target.load_lines().len() >= seconds
                && client.last_answer().is_some_and(|came| came > runs)
        })
        .await
    }

    /// Switches the guest at the target off and checks its file systems.
    pub(crate) fn check_disks(&self, stage: &Stage) -> anyhow::Result<()> {
        // The machine ends in the middle of the answer.
        let _ = stage.sites.ask_guest("poweroff");
        self.target.wait_gone()?;
        for image in self.target.images(self.agents.at(Side::B).dir())? {
            stage.tools().check_file_system(&image)?;
        }
        Ok(())
    }

    fn logs(&self) -> String {
        [Side::A, Side::B]
            .map(|side| {
                let log = self.agents.at(side).log();
                let tail: Vec<_> = log.lines().rev().take(30).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                format!("--- {}\n{}", self.agents.at(side).name(), tail.join("\n"))
            })
            .join("\n")
    }
}

async fn wait_until(what: &str, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > Duration::from_secs(60) {
            bail!("waited for a minute in vain: {what}");
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}
