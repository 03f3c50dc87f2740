//! The steps of the migration, in order.

use std::time::{Duration, Instant};

use flimcd_qemu::{
    commands::{
        BlockJobCancel, BlockdevAdd, Capability, Cont, Migrate, MigrateCancel, MigrateContinue,
        MigrateIncoming, MigrateSetCapabilities, MigrateStartPostcopy, MigrationInfo, QueryMigrate,
        Quit,
    },
    qmp::{Command, Qmp},
    transfer::TransferState,
};
use serde_json::json;
use tokio::time::{Instant as Deadline, sleep};

use super::{
    BaselineError, BaselineOptions, BaselineReport, CopyMode, Outcome, Phase, Ram, Sync,
    commands::{
        BlockExportAdd, Mirror, NbdServerStart, NbdServerStop, Parameters, QueryBlockJobs, inet,
    },
    watch::{Job, Watch},
};
use crate::{
    vm::{ClientReport, LoadSummary, Qemu, Sites, Stage, Storage},
    wan::{Side, tun::RouterCounters},
};

const NBD_PORT: u16 = 10809;
const RAM_PORT: u16 = 4444;
const POLL: Duration = Duration::from_millis(20);
/// For steps that take moments unless something is broken.
const STEP_MAX: Duration = Duration::from_secs(60);
/// Post-copy ends by itself.
const TAIL_MAX: Duration = Duration::from_secs(300);
/// Seconds of load before the start to compare with.
const BEFORE_LINES: usize = 5;

/// One end.
struct End<'a> {
    side: &'static str,
    qemu: &'a Qemu,
    qmp: Qmp,
    watch: Watch,
}

impl<'a> End<'a> {
    async fn connect(side: &'static str, qemu: &'a Qemu) -> Result<Self, BaselineError> {
        let connected = Qmp::connect(&qemu.lab_qmp()).await;
        let qmp = connected.map_err(|source| BaselineError::Qmp { side, source })?;
        let watch = Watch::new(side, &qmp);
        Ok(Self {
            side,
            qemu,
            qmp,
            watch,
        })
    }

    async fn execute<C: Command>(&self, command: C) -> Result<C::Reply, BaselineError> {
        let side = self.side;
        let done = self.qmp.execute(command).await;
        done.map_err(|source| BaselineError::Qmp { side, source })
    }

    /// Waits for the migration to get into one of `states`; false when it does not in time.
    async fn reaches(
        &mut self,
        states: &[TransferState],
        longest: Duration,
    ) -> Result<bool, BaselineError> {
        let deadline = Deadline::now() + longest;
        let is_there = |watch: &Watch| {
            states.contains(&watch.migration) || watch.migration == TransferState::Failed
        };
        let came = self.watch.until(deadline, is_there).await?;
        if came && self.watch.migration == TransferState::Failed {
            let text = self
                .execute(QueryMigrate {})
                .await?
                .error_desc
                .unwrap_or_default();
            return Err(BaselineError::Failed {
                what: "memory",
                text,
            });
        }
        Ok(came)
    }

    /// As [`End::reaches`], for steps that must come.
    async fn must_reach(
        &mut self,
        states: &[TransferState],
        what: &'static str,
    ) -> Result<(), BaselineError> {
        if self.reaches(states, STEP_MAX).await? {
            return Ok(());
        }
        let text = format!("it did not come within {} s", STEP_MAX.as_secs());
        Err(BaselineError::Failed { what, text })
    }
}

struct Run<'a> {
    stage: &'a Stage,
    options: &'a BaselineOptions,
    source: End<'a>,
    target: End<'a>,
    start: Instant,
    counters: RouterCounters,
    lines: usize,
    report: BaselineReport,
}

/// Migrates the stage's guest to `target`, a QEMU that waits for a migration. Afterwards, if it
/// completed, the guest runs at the target and the source's QEMU has ended.
///
/// Reads logs and compares files in between, which blocks: give it a runtime of its own.
///
/// # Errors
/// [`BaselineError`]; not converging is none.
pub async fn migrate(
    stage: &Stage,
    target: &Qemu,
    options: &BaselineOptions,
) -> Result<BaselineReport, BaselineError> {
    if let Some(name) = &options.congestion_control {
        let set = stage.sites.set_congestion_control(name);
        set.map_err(crate::vm::StageError::from)?;
    }
    let source = End::connect("the source", &stage.source).await?;
    let target = End::connect("the target", target).await?;
    let before = stage.source.load_lines();
    let mut run = Run {
        report: empty_report(options, &source.qmp, &before),
        stage,
        options,
        source,
        target,
        start: Instant::now(),
        counters: stage.sites.counters(),
        lines: before.len(),
    };
    run.prepare().await?;
    if run.mirror().await? && run.ram().await? {
        run.switch().await?;
    }
    run.finish().await
}

fn empty_report(
    options: &BaselineOptions,
    qmp: &Qmp,
    before: &[crate::vm::LoadLine],
) -> BaselineReport {
    BaselineReport {
        outcome: Outcome::Completed,
        options: options.clone(),
        qemu: qmp.version().to_string(),
        total_s: 0.0,
        mirror_s: None,
        ram_s: None,
        drain_ms: None,
        stop_to_resume_ms: None,
        qemu_downtime_ms: None,
        postcopy_tail_s: None,
        client: ClientReport::default(),
        wire_bytes: 0,
        wire_bytes_mirror: 0,
        wire_bytes_back: 0,
        ram_bytes: None,
        ram_passes: None,
        load: LoadSummary::default(),
        load_before: LoadSummary::of(&before[before.len().saturating_sub(BEFORE_LINES)..]),
        late_packets: 0,
        difference: None,
        verified: None,
        complaints: Vec::new(),
    }
}

impl Run<'_> {
    fn disks(&self) -> Vec<String> {
        let disks = &self.stage.source.spec().disks;
        disks.iter().map(|disk| disk.id.clone()).collect()
    }

    fn sent_bytes(&self) -> u64 {
        self.stage.sites.counters().a_to_b.bytes - self.counters.a_to_b.bytes
    }

    /// Capabilities at both ends, and the target listening for disks and memory.
    async fn prepare(&mut self) -> Result<(), BaselineError> {
        let mut names = vec!["events", "pause-before-switchover"];
        let mut parameters = Parameters {
            downtime_limit: Some(self.options.downtime_limit_ms),
            ..Parameters::default()
        };
        match self.options.ram {
            Ram::Precopy => {}
            Ram::Multifd(channels) => {
                names.push("multifd");
                parameters.multifd_channels = Some(channels);
                parameters.multifd_compression = Some("zstd");
            }
            Ram::Postcopy => names.push("postcopy-ram"),
        }
        for end in [&self.target, &self.source] {
            let capabilities = names.iter().map(|name| Capability {
                capability: (*name).to_owned(),
                state: true,
            });
            let capabilities = capabilities.collect();
            end.execute(MigrateSetCapabilities { capabilities }).await?;
            end.execute(parameters.clone()).await?;
        }
        let address = Sites::address(Side::B);
        let data = json!({ "host": address.to_string(), "port": NBD_PORT.to_string() });
        let addr = json!({ "type": "inet", "data": data });
        self.target.execute(NbdServerStart { addr }).await?;
        for disk in self.disks() {
            let export = BlockExportAdd {
                r#type: "nbd",
                id: format!("export-{disk}"),
                node_name: disk.clone(),
                name: disk,
                writable: true,
            };
            self.target.execute(export).await?;
        }
        let incoming = MigrateIncoming {
            uri: format!("tcp:{address}:{RAM_PORT}"),
            exit_on_error: None,
        };
        self.target.execute(incoming).await?;
        Ok(())
    }

    /// Mirrors all disks until they are ready; false when they do not get ready in time.
    async fn mirror(&mut self) -> Result<bool, BaselineError> {
        let disks = self.disks();
        for disk in &disks {
            let options = json!({
                "driver": "nbd",
                "node-name": format!("remote-{disk}"),
                "export": disk,
                "discard": "unmap",
                "detect-zeroes": "unmap",
                "server": inet(Sites::address(Side::B), NBD_PORT),
            });
            self.source.execute(BlockdevAdd { options }).await?;
            let mirror = Mirror {
                job_id: format!("mirror-{disk}"),
                device: disk.clone(),
                target: format!("remote-{disk}"),
                sync: match self.options.sync {
                    Sync::Full => "full",
                    Sync::Top => "top",
                },
                copy_mode: match self.options.copy_mode {
                    CopyMode::Background => "background",
                    CopyMode::WriteBlocking => "write-blocking",
                },
                granularity: self.options.granularity,
            };
            self.source.execute(mirror).await?;
        }
        let deadline = Deadline::now() + self.options.mirror_max;
        let all = disks.len();
        let is_ready = |watch: &Watch| watch.jobs.len() == all;
        let is_ready = self.source.watch.until(deadline, is_ready).await?;
        self.report.wire_bytes_mirror = self.sent_bytes();
        if is_ready {
            self.report.mirror_s = Some(self.start.elapsed().as_secs_f64());
            return Ok(true);
        }
        let jobs = self.source.execute(QueryBlockJobs {}).await?;
        self.report.outcome = Outcome::NotConverged {
            phase: Phase::Mirror,
            left_bytes: jobs
                .iter()
                .map(|job| job.len.saturating_sub(job.offset))
                .sum(),
        };
        for disk in &disks {
            self.cancel_job(disk, true).await?;
        }
        Ok(false)
    }

    /// Cancels a mirror. One that is ready ends in sync, unless forced to end at once.
    async fn cancel_job(&self, disk: &str, force: bool) -> Result<(), BaselineError> {
        let device = format!("mirror-{disk}");
        self.source
            .execute(BlockJobCancel { device, force })
            .await?;
        Ok(())
    }

    /// Sends memory until the guest stops; false when it does not get there in time.
    async fn ram(&mut self) -> Result<bool, BaselineError> {
        let start = Instant::now();
        let uri = format!("tcp:{}:{RAM_PORT}", Sites::address(Side::B));
        self.source.execute(Migrate { uri }).await?;
        if self.options.ram == Ram::Postcopy {
            let deadline = Deadline::now() + self.options.ram_max;
            // After the first pass; a guest that has converged by then needs no post-copy.
            let is_second = |watch: &Watch| {
                watch.passes >= 2 || watch.migration == TransferState::PreSwitchover
            };
            self.source.watch.until(deadline, is_second).await?;
            if self.source.watch.migration != TransferState::PreSwitchover {
                self.source.execute(MigrateStartPostcopy {}).await?;
            }
        }
        if self
            .source
            .reaches(&[TransferState::PreSwitchover], self.options.ram_max)
            .await?
        {
            self.report.ram_s = Some(start.elapsed().as_secs_f64());
            return Ok(true);
        }
        let info = self.source.execute(QueryMigrate {}).await?;
        self.report.outcome = Outcome::NotConverged {
            phase: Phase::Ram,
            left_bytes: info.ram.map_or(0, |ram| ram.remaining),
        };
        self.source.execute(MigrateCancel {}).await?;
        for disk in self.disks() {
            self.cancel_job(&disk, true).await?;
        }
        Ok(false)
    }

    /// From the stopped guest at the source to the running guest at the target.
    async fn switch(&mut self) -> Result<(), BaselineError> {
        let stopped = Instant::now();
        let disks = self.disks();
        for disk in &disks {
            self.cancel_job(disk, false).await?;
        }
        let all = disks.len();
        let have_ended = |watch: &Watch| {
            watch
                .jobs
                .values()
                .filter(|job| **job == Job::Ended)
                .count()
                == all
        };
        let deadline = Deadline::now() + STEP_MAX;
        if !self.source.watch.until(deadline, have_ended).await? {
            let text = format!("the mirrors did not end within {} s", STEP_MAX.as_secs());
            return Err(BaselineError::Failed {
                what: "the switch",
                text,
            });
        }
        self.report.drain_ms = Some(stopped.elapsed().as_secs_f64() * 1e3);
        let state = TransferState::PreSwitchover;
        self.source.execute(MigrateContinue { state }).await?;
        let is_postcopy = self.options.ram == Ram::Postcopy;
        let mut arrived = vec![TransferState::Completed];
        if is_postcopy {
            arrived.push(TransferState::PostcopyActive);
        }
        self.target.must_reach(&arrived, "the switch").await?;
        self.target.execute(NbdServerStop {}).await?;
        if self.options.compares {
            self.report.difference = Some(self.compare()?);
        }
        self.target.execute(Cont {}).await?;
        let runs = Instant::now();
        if !self
            .source
            .reaches(&[TransferState::Completed], TAIL_MAX)
            .await?
        {
            let text = format!("not within {} s", TAIL_MAX.as_secs());
            return Err(BaselineError::Failed {
                what: "the end of memory",
                text,
            });
        }
        self.report.postcopy_tail_s = is_postcopy.then(|| runs.elapsed().as_secs_f64());
        self.report.total_s = self.start.elapsed().as_secs_f64();
        let deadline = Deadline::now() + STEP_MAX;
        self.target
            .watch
            .until(deadline, |watch| watch.resumed_us.is_some())
            .await?;
        Ok(())
    }

    fn compare(&self) -> Result<Option<String>, BaselineError> {
        let sources = &self.stage.source.spec().disks;
        for (source, target) in sources.iter().zip(&self.target.qemu.spec().disks) {
            let (Storage::File(one), Storage::File(other)) = (&source.storage, &target.storage)
            else {
                continue;
            };
            if let Some(text) = self.stage.tools().compare(one, other)? {
                return Ok(Some(format!("{}: {text}", source.id)));
            }
        }
        Ok(None)
    }

    /// Collects what is known after the load has run on for a while.
    async fn finish(mut self) -> Result<BaselineReport, BaselineError> {
        let is_done = self.report.outcome == Outcome::Completed;
        if is_done {
            self.settle().await?;
        } else {
            self.report.total_s = self.start.elapsed().as_secs_f64();
        }
        let counters = self.stage.sites.counters();
        self.report.wire_bytes = self.sent_bytes();
        self.report.wire_bytes_back = counters.b_to_a.bytes - self.counters.b_to_a.bytes;
        self.report.late_packets = counters.late - self.counters.late;
        self.report.client = self.stage.client.report(self.start, Instant::now());
        let stopped = self
            .source
            .watch
            .stopped_us
            .zip(self.target.watch.resumed_us);
        self.report.stop_to_resume_ms = stopped.map(|(stop, resume)| ms_between(stop, resume));
        let mut lines = self.stage.source.load_lines();
        lines.drain(..self.lines.min(lines.len()));
        if is_done {
            lines.extend(self.target.qemu.load_lines());
        }
        self.report.load = LoadSummary::of(&lines);
        let info: MigrationInfo = self.source.execute(QueryMigrate {}).await?;
        self.report.qemu_downtime_ms = info.downtime;
        if let Some(ram) = info.ram {
            self.report.ram_bytes = Some(ram.transferred);
            self.report.ram_passes = Some(ram.dirty_sync_count);
        }
        if is_done {
            self.source.execute(Quit {}).await?;
        }
        Ok(self.report)
    }

    /// Waits until the load at the target has run for some seconds and the client hears from the guest.
    async fn settle(&self) -> Result<(), BaselineError> {
        let runs = Instant::now();
        let has_settled = || {
            self.target.qemu.load_lines().len() >= self.options.settle_s
                && self
                    .stage
                    .client
                    .last_answer()
                    .is_some_and(|came| came > runs)
        };
        while !has_settled() {
            if runs.elapsed() > STEP_MAX {
                let text = "the guest runs, but neither load nor client went on".to_owned();
                return Err(BaselineError::Failed {
                    what: "the target",
                    text,
                });
            }
            sleep(POLL).await;
        }
        Ok(())
    }
}

fn ms_between(from_us: u64, to_us: u64) -> f64 {
    Duration::from_micros(to_us.saturating_sub(from_us)).as_secs_f64() * 1e3
}
