//! One strategy of the demo: a fresh volume, a guest on it, its migration, and the reckoning.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use flimcd_agent::api::{
    ImportVolume, MigrateRequest, MigrationStatus, OwnershipState, Phase, Switchover,
};
use flimcd_core::VolumeName;
use flimcd_lab::{
    load::{FinalCheck, GuestDisk, LoadHandle, LoadStats, Paused},
    report::{LowerBound, StrategyReport},
    sparse::copy_sparse,
};

use super::{
    args::DemoStrategy,
    blocking,
    guest::{self, GuestPlan},
    image::DemoImage,
    report::Details,
    site::Site,
    world::{TARGET, World},
};
use crate::{outcome::advise, progress::Progress};

/// The guest runs this long before the migration is asked for.
const WARM_UP: Duration = Duration::from_secs(2);
/// And this long after it, at the target alone.
const AFTERMATH: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(50);
/// A migration that does not end at all is given up: so many times the lower bound, and a minute.
const TOO_LONG_FACTOR: f64 = 20.0;

/// What all strategies have in common.
pub(crate) struct Setting<'a> {
    pub(crate) world: &'a World,
    pub(crate) image: &'a DemoImage,
    pub(crate) guest: &'a GuestPlan,
    pub(crate) bound: &'a LowerBound,
    /// The same with a base image at the target.
    pub(crate) base_bound: Option<&'a LowerBound>,
}

/// Moves a fresh copy of the image under load.
pub(crate) async fn run(
    setting: &Setting<'_>,
    strategy: DemoStrategy,
) -> anyhow::Result<StrategyReport> {
    let name: VolumeName = format!("demo-{}", strategy.name()).parse()?;
    let run = Run {
        setting,
        strategy,
        name,
    };
    let load = run.begin().await?;
    tokio::time::sleep(WARM_UP).await;
    let outcome = run.migrate(&load).await;
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            let broken_by = load.broken_by();
            // Whatever the guest waits for, it does not come any more.
            setting.world.kill();
            return Err(match broken_by {
                Some(cause) => error.context(format!("the guest lost its disk ({cause})")),
                None => error.context(format!("the migration with {} failed", strategy.name())),
            });
        }
    };
    run.finish(load, outcome).await
}

struct Run<'a> {
    setting: &'a Setting<'a>,
    strategy: DemoStrategy,
    name: VolumeName,
}

/// What the migration itself showed.
struct Outcome {
    migration_time: Duration,
    time_to_switch: Duration,
    downtime: Duration,
    bytes_on_link: u64,
    source: MigrationStatus,
    target: MigrationStatus,
}

impl Run<'_> {
    /// The lower bound of this strategy.
    fn bound(&self) -> LowerBound {
        let base = self
            .setting
            .base_bound
            .filter(|_| self.strategy.uses_base());
        *base.unwrap_or(self.setting.bound)
    }

    /// Imports a copy of the image at the source and starts the guest on it.
    async fn begin(&self) -> anyhow::Result<Arc<LoadHandle>> {
        let source = &self.setting.world.source;
        let path = source.images().join(format!("{}.raw", self.name));
        let (from, to) = (self.setting.image.path.clone(), path.clone());
        blocking(move || copy_sparse(&from, &to).context("the image cannot be copied")).await?;
        let request = ImportVolume {
            name: self.name.clone(),
            path,
            tenant: None,
        };
        source
            .client
            .import_volume(&request)
            .await
            .map_err(|error| source.explain(error))?;
        let export = source
            .client
            .export(&self.name)
            .await
            .map_err(|error| source.explain(error))?;
        let disk = blocking(move || guest::connect(&export)).await?;
        let load = self
            .setting
            .guest
            .start(disk, self.setting.image.baseline.clone())?;
        Ok(Arc::new(load))
    }

    /// From the request to the end, the guest's move included.
    async fn migrate(&self, load: &Arc<LoadHandle>) -> anyhow::Result<Outcome> {
        let world = self.setting.world;
        let (strategy, compress) = self.strategy.request();
        let request = MigrateRequest {
            to: TARGET.parse()?,
            strategy,
            bandwidth_bytes_per_sec: None,
            switchover: Switchover::Auto,
            compress: Some(compress),
            library: Some(self.strategy.uses_base()),
            keep_replica: None,
            check: None,
        };
        let mut progress = Progress::new(format!("{:>12}", self.strategy.name()));
        let bytes_before = world.wan.bytes().both();
        load.begin_phase("migration");
        let (began, began_unix_ms) = (Instant::now(), unix_ms());
        let migrated = world.source.client.migrate(&self.name, &request).await;
        let mut status = migrated.map_err(|error| world.source.explain(error))?;
        let id = status.id;
        let mut moved: Option<Moved> = None;
        let mut waiting: Option<Box<dyn GuestDisk>> = None;
        while !status.phase.has_ended() {
            progress.show(&status);
            if began.elapsed() > self.too_long() {
                anyhow::bail!(
                    "it did not end within {:.0} s (phase {})",
                    began.elapsed().as_secs_f64(),
                    status.phase
                );
            }
            if moved.is_none() && waiting.is_none() {
                // As a target machine does, the guest's next host connects before the switch.
                waiting = self.connect_to_target().await?;
            }
            if status.ready_for_switchover
                && moved.is_none()
                && let Some(disk) = waiting.take()
            {
                moved = Some(move_guest(load, disk, self.setting.guest.is_busy()).await?);
            } else {
                tokio::time::sleep(POLL).await;
            }
            status = self.status_of(&world.source, id).await?;
        }
        progress.show(&status);
        drop(progress);
        load.begin_phase("after");
        if status.phase != Phase::Completed {
            let why = status
                .error
                .unwrap_or_else(|| "the agent does not say why".into());
            return Err(world
                .source
                .explain(anyhow::anyhow!("it {}: {why}", status.phase)));
        }
        let moved = moved.context("it ended although the guest had not been moved")?;
        let migration_time = status.ended_unix_ms.map_or_else(
            || began.elapsed(),
            |ended| Duration::from_millis(ended.saturating_sub(began_unix_ms)),
        );
        Ok(Outcome {
            migration_time,
            time_to_switch: moved.at.duration_since(began),
            downtime: moved.downtime,
            bytes_on_link: world.wan.bytes().both() - bytes_before,
            target: self.status_of(&world.target, id).await?,
            source: status,
        })
    }

    /// The guest's disk at the target, once the target knows the volume.
    async fn connect_to_target(&self) -> anyhow::Result<Option<Box<dyn GuestDisk>>> {
        let target = &self.setting.world.target;
        let known = target.status().await?.volumes.into_iter().any(|volume| {
            volume.name == self.name
                && matches!(
                    volume.ownership,
                    OwnershipState::Incoming | OwnershipState::Arriving
                )
        });
        if !known {
            return Ok(None);
        }
        let export = target
            .client
            .export(&self.name)
            .await
            .map_err(|error| target.explain(error))?;
        blocking(move || guest::connect(&export).map(Some)).await
    }

    async fn status_of(
        &self,
        site: &Site,
        id: flimcd_core::MigrationId,
    ) -> anyhow::Result<MigrationStatus> {
        site.client
            .migration(id)
            .await
            .map_err(|error| site.explain(error))
    }

    fn too_long(&self) -> Duration {
        Duration::from_secs_f64(
            (60.0 + TOO_LONG_FACTOR * self.setting.bound.migration_time_s).min(86_400.0),
        )
    }

    /// Stops the guest, compares the whole disk with what it must hold, and clears up.
    async fn finish(
        &self,
        load: Arc<LoadHandle>,
        outcome: Outcome,
    ) -> anyhow::Result<StrategyReport> {
        tokio::time::sleep(AFTERMATH).await;
        let (check, phases, total) = blocking(move || {
            let Paused { disk, .. } = load.pause().context("the guest cannot be stopped")?;
            let mut disk = disk.context("the guest has no disk at the end")?;
            let check = load
                .final_check(&mut *disk)
                .context("the whole disk cannot be checked")?;
            Ok((check, load.phases(), load.snapshot()))
        })
        .await?;
        self.remove_volumes().await?;
        Ok(self.report(&outcome, &check, &phases, &total))
    }

    /// Makes room for the next strategy.
    async fn remove_volumes(&self) -> anyhow::Result<()> {
        for site in [&self.setting.world.source, &self.setting.world.target] {
            let removed = site.client.remove_volume(&self.name, true).await;
            removed.map_err(|error| site.explain(error))?;
        }
        Ok(())
    }

    fn report(
        &self,
        outcome: &Outcome,
        check: &FinalCheck,
        phases: &[LoadStats],
        total: &LoadStats,
    ) -> StrategyReport {
        let phase = |name: &str| phases.iter().find(|phase| phase.phase == name);
        let during = phase("migration").unwrap_or(total);
        let before = phase("start").unwrap_or(total);
        let migration_time_s = outcome.migration_time.as_secs_f64();
        let details = Details {
            time_to_switch_s: outcome.time_to_switch.as_secs_f64(),
            migration_time_to_lower_bound: migration_time_s / self.bound().migration_time_s,
            guest_reads_total: total.reads.ops,
            guest_writes_total: total.writes.ops + total.zeroes.ops,
            guest_reads_at_target: outcome.target.guest_reads,
            guest_stall_ms_p99_before: before.all.latency.p99_ms,
            guest_dirty_bytes: during.fresh_dirty_bytes,
            missing_blocks_at_switch: outcome
                .source
                .missing_blocks_at_switch
                .or(outcome.target.missing_blocks_at_switch),
            content: outcome.source.content,
            final_check_bytes: check.bytes,
            wrong: total
                .wrong
                .iter()
                .chain(&check.wrong)
                .map(ToString::to_string)
                .collect(),
            first_errors: total.first_errors.clone(),
        };
        StrategyReport {
            strategy: self.strategy.name().to_owned(),
            is_compressing: self.strategy.request().1,
            migration_time_s,
            downtime_ms: outcome.downtime.as_secs_f64() * 1e3,
            bytes_on_link: outcome.bytes_on_link,
            guest_reads: during.reads.ops,
            // A read that is wrong at any time counts.
            guest_reads_wrong: total.reads_wrong,
            guest_reads_missed: outcome.target.guest_reads_missed,
            guest_stall_ms_p99: during.all.latency.p99_ms,
            // The guest made no request while it stood still, so its longest wait is not among them.
            guest_stall_ms_max: during
                .all
                .latency
                .max_ms
                .max(outcome.downtime.as_secs_f64() * 1e3),
            guest_errors: total.errors + total.unanswered,
            final_blocks_wrong: check.wrong_granules,
            same_place_bytes: outcome.source.content.same_blocks * flimcd_core::BLOCK_SIZE,
            zero_bytes: outcome.source.content.zero_blocks * flimcd_core::BLOCK_SIZE,
            elsewhere_bytes: outcome.source.content.elsewhere_blocks * flimcd_core::BLOCK_SIZE,
            repeated_bytes: outcome.source.content.repeated_blocks * flimcd_core::BLOCK_SIZE,
            compressed_from_bytes: outcome.source.content.compressed_blocks
                * flimcd_core::BLOCK_SIZE,
            compressed_bytes: outcome.source.content.compressed_bytes,
            raw_bytes: outcome.source.content.raw_blocks * flimcd_core::BLOCK_SIZE,
            lower_bound: Some(self.bound()),
            error: None,
            details: serde_json::to_value(details).unwrap_or_default(),
        }
    }
}

/// When the guest ran at the target, and how long it had stood still.
#[derive(Clone, Copy)]
struct Moved {
    at: Instant,
    downtime: Duration,
}

/// The switchover as a guest sees it: it stops, its connection to the source closes, and it goes on at
/// the target, whose first answer waits for the hand-over.
async fn move_guest(
    load: &Arc<LoadHandle>,
    mut disk: Box<dyn GuestDisk>,
    is_busy: bool,
) -> anyhow::Result<Moved> {
    let load = Arc::clone(load);
    blocking(move || {
        let paused = load
            .pause()
            .context("the guest cannot be stopped at the source")?;
        let stopped = Instant::now();
        drop(paused.disk);
        // A flush may be answered before the switch, and a guest that rests now and then would count its
        // rest as downtime: one read of the first bytes tells when the target really serves.
        let served = guest::probe(&mut *disk).context("the target does not answer")?;
        let resumed = load.resume_on(disk).map_err(|error| {
            advise(
                format!("the guest cannot go on at the target: {error}"),
                "the target did not take the volume over; see the agents' logs",
            )
        })?;
        let at = if is_busy {
            resumed.first_completed
        } else {
            served
        };
        let since = paused.last_completed.filter(|_| is_busy).unwrap_or(stopped);
        Ok(Moved {
            at,
            downtime: at.duration_since(since),
        })
    })
    .await
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
