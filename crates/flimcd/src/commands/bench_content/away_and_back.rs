//! Case `back`: a volume moves away, a recorded hour of requests runs on it there, and it comes back onto the replica
//! that stayed.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use flimcd_core::VolumeName;
use flimcd_lab::{
    load::{Baseline, LoadHandle, LoadPhase, Paused},
    sparse::copy_sparse,
    trace::{Fold, ReplayOptions, Trace, read_file},
};
use serde_json::{Value, json};

use super::{Bench, Case, blocking, moves::Stage, replica, report::Row};
use crate::demo::{
    guest::{self, GuestPlan},
    site::Site,
};

const VARIANT: &str = "replica, a recorded hour";
/// A recorded guest addresses sectors.
const GRANULE: u32 = 512;
const POLL: Duration = Duration::from_millis(50);

pub(super) async fn run(bench: &Bench<'_>, case: Case) -> anyhow::Result<Vec<Row>> {
    let case = case.name();
    let Some(path) = &bench.args.trace else {
        let why = "no recorded disk; name a CloudPhysics vscsi trace with --trace";
        return Ok(vec![Row::skipped(&case, VARIANT, "flimcd", why)]);
    };
    eprintln!("{case}: {VARIANT}");
    let done = away_and_back(bench, Row::new(&case, VARIANT, "flimcd"), path).await;
    Ok(vec![done.unwrap_or_else(|error| {
        Row::failed(&case, VARIANT, "flimcd", &error)
    })])
}

async fn away_and_back(bench: &Bench<'_>, mut row: Row, trace: &Path) -> anyhow::Result<Row> {
    let base = bench.base().await?;
    let stage = Stage::start(bench).await?;
    let (home, away) = (&stage.world.source, &stage.world.target);
    let image = home.images().join("volume.raw");
    let (from, to, file) = (base, image.clone(), trace.to_owned());
    let prepared = blocking(move || {
        copy_sparse(&from, &to).context("the image cannot be copied")?;
        let trace = read_file(&file)?;
        Ok((trace, Baseline::of_file(&to, GRANULE)?))
    });
    let (trace, baseline) = prepared.await?;
    let name: VolumeName = "volume".parse()?;
    stage.import(home, &name, &image).await?;
    let link = stage.speed_up();
    stage
        .migrate((home, away), &name)
        .await
        .context("moving away, before the measurement")?;
    let (load, facts) = replay(bench, away, &name, &trace, baseline).await?;
    stage.world.wan.set_model(link);
    row.details = facts;
    let mut row = replica::way_back(&stage, row, &name).await?;
    // The guest knows what every sector must hold, whatever the files say.
    let export = home.client.export(&name).await;
    let export = export.map_err(|error| home.explain(error))?;
    let check = blocking(move || {
        let mut disk = guest::connect(&export)?;
        Ok(load.final_check(&mut *disk)?)
    });
    let check = check.await?;
    row.details["sectors_wrong"] = json!(check.wrong_granules);
    row.image_is_right = Some(row.image_is_right == Some(true) && check.is_right());
    Ok(row)
}

/// Runs the whole trace on the volume, and waits for its end.
async fn replay(
    bench: &Bench<'_>,
    site: &Site,
    name: &VolumeName,
    trace: &Trace,
    baseline: Baseline,
) -> anyhow::Result<(LoadHandle, Value)> {
    let fold = Fold::new(&trace.records, baseline.size());
    let options = ReplayOptions {
        speed: bench.args.trace_speed,
        is_repeating: false,
        ..ReplayOptions::default()
    };
    let summary = trace.summary.clone();
    let plan = GuestPlan::replay(trace.clone(), "given", options, bench.args.seed);
    let export = site.client.export(name).await;
    let export = export.map_err(|error| site.explain(error))?;
    let load = blocking(move || {
        let disk = guest::connect(&export)?;
        plan.start(disk, baseline)
    })
    .await?;
    loop {
        match load.phase() {
            LoadPhase::Ended => break,
            LoadPhase::Broken => {
                let why = load.broken_by().unwrap_or_default();
                return Err(site.explain(anyhow::anyhow!("the guest lost its disk: {why}")));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
    // Closes the connection, so that the volume may move.
    let (load, stats) = blocking(move || {
        let Paused { disk, .. } = load.pause().context("the guest cannot be stopped")?;
        drop(disk);
        let stats = load.snapshot();
        Ok((load, stats))
    })
    .await?;
    anyhow::ensure!(
        stats.reads_wrong == 0 && stats.errors == 0,
        "{} reads were wrong and {} requests failed while the trace ran",
        stats.reads_wrong,
        stats.errors
    );
    let facts = json!({
        "trace": summary,
        "times_as_fast_as_recorded": bench.args.trace_speed,
        "touched_bytes": fold.touched_bytes(),
        "places_shared": fold.is_aliasing(),
        "writes": stats.writes.ops,
        "written_bytes": stats.writes.bytes,
    });
    Ok((load, facts))
}
