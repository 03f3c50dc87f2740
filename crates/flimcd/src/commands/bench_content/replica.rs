//! Cases `replica-N`: an image of which N percent of the blocks are others than what the target holds.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use anyhow::Context as _;
use flimcd_core::{BLOCK_SIZE, VolumeName};
use flimcd_lab::{
    changes::{ChangeOptions, Changes, Pattern},
    sparse::copy_sparse,
};

use super::{Bench, Case, blocking, images, moves::Stage, report::Row};

/// Share of the changed blocks that compress, as in the image itself.
const TEXT_SHARE: f64 = 0.6;
/// Images and changes must not be made of the same draws.
const CHANGE_SEED: u64 = 0x5eed;

/// What the target holds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// An image in its library.
    Library,
    /// What stayed when the volume moved away.
    Replica,
    /// The same, and somebody has written to it since.
    TouchedReplica,
}

impl Holds {
    const ALL: [Self; 3] = [Self::Library, Self::Replica, Self::TouchedReplica];

    const fn name(self) -> &'static str {
        match self {
            Self::Library => "library",
            Self::Replica => "replica",
            Self::TouchedReplica => "touched replica",
        }
    }
}

/// The changes to an image of this size.
pub(super) fn changes(bench: &Bench<'_>, size: u64, share: f64, pattern: Pattern) -> Changes {
    let options = ChangeOptions {
        seed: bench.args.seed ^ CHANGE_SEED,
        share,
        pattern,
        text_share: TEXT_SHARE,
    };
    Changes::new(size, options)
}

pub(super) async fn run(bench: &Bench<'_>, case: Case, share: f64) -> anyhow::Result<Vec<Row>> {
    let case = case.name();
    let mut rows = Vec::new();
    for pattern in [Pattern::Random, Pattern::Clustered] {
        for holds in Holds::ALL {
            let which = match pattern {
                Pattern::Random => "random",
                Pattern::Clustered => "clustered",
            };
            let variant = format!("{}, {which}", holds.name());
            if !bench.wants(&variant) {
                continue;
            }
            eprintln!("{case}: {variant}");
            let changes = changes(bench, bench.args.size, share, pattern);
            let row = Row::new(&case, &variant, "flimcd");
            let done = match holds {
                Holds::Library => from_library(bench, row, &changes).await,
                Holds::Replica => from_replica(bench, row, changes, false).await,
                Holds::TouchedReplica => from_replica(bench, row, changes, true).await,
            };
            rows.push(done.unwrap_or_else(|error| Row::failed(&case, &variant, "flimcd", &error)));
        }
    }
    Ok(rows)
}

/// The older image is in the target's library.
pub(super) async fn from_library(
    bench: &Bench<'_>,
    row: Row,
    changes: &Changes,
) -> anyhow::Result<Row> {
    let base = bench.base().await?;
    let stage = Stage::start(bench).await?;
    let image = stage.world.source.images().join("volume.raw");
    let (from, to, changes) = (base.clone(), image.clone(), changes.clone());
    blocking(move || {
        copy_sparse(&from, &to).context("the image cannot be copied")?;
        changes.apply(&to).context("the image cannot be changed")
    })
    .await?;
    against_library(&stage, row, &base, &image).await
}

/// Moves the image file `image` to a target that has `base` in its library.
pub(super) async fn against_library(
    stage: &Stage,
    row: Row,
    base: &Path,
    image: &Path,
) -> anyhow::Result<Row> {
    let world = &stage.world;
    let name: VolumeName = "volume".parse()?;
    stage.import(&world.source, &name, image).await?;
    volume_against_library(stage, row, base, (&name, image)).await
}

/// The same with a volume that is there already, in the file `image`.
pub(super) async fn volume_against_library(
    stage: &Stage,
    row: Row,
    base: &Path,
    (name, image): (&VolumeName, &Path),
) -> anyhow::Result<Row> {
    let world = &stage.world;
    world.target.add_to_library(base).await?;
    let (before, now) = (base.to_owned(), image.to_owned());
    let changed = blocking(move || Ok(images::changed(&before, &now)?)).await?;
    let moved = stage.migrate((&world.source, &world.target), name).await?;
    let arrived = stage.image_at(&world.target, name).await?;
    stage
        .row(row, &moved, changed, (image.to_owned(), arrived))
        .await
}

/// The volume moves away over a fast link, changes there, and comes back onto what stayed.
async fn from_replica(
    bench: &Bench<'_>,
    row: Row,
    changes: Changes,
    is_touched: bool,
) -> anyhow::Result<Row> {
    let base = bench.base().await?;
    let stage = Stage::start(bench).await?;
    let (home, away) = (&stage.world.source, &stage.world.target);
    let image = home.images().join("volume.raw");
    let (from, to) = (base.clone(), image.clone());
    blocking(move || copy_sparse(&from, &to).context("the image cannot be copied")).await?;
    let name: VolumeName = "volume".parse()?;
    stage.import(home, &name, &image).await?;
    let link = stage.speed_up();
    stage
        .migrate((home, away), &name)
        .await
        .context("moving away, before the measurement")?;
    stage.change(away, &name, changes).await?;
    stage.world.wan.set_model(link);
    if is_touched {
        touch(&image).context("the replica cannot be touched")?;
    }
    way_back(&stage, row, &name).await
}

/// Moves a volume home onto the replica that stayed there, and compares.
pub(super) async fn way_back(stage: &Stage, row: Row, name: &VolumeName) -> anyhow::Result<Row> {
    let (home, away) = (&stage.world.source, &stage.world.target);
    let replica = stage.image_at(home, name).await;
    let replica = replica.context("there is no replica at the site that the volume had left")?;
    let current = stage.image_at(away, name).await?;
    let (before, now) = (replica, current.clone());
    let changed = blocking(move || Ok(images::changed(&before, &now)?)).await?;
    let moved = stage.migrate((away, home), name).await?;
    let arrived = stage.image_at(home, name).await?;
    stage.row(row, &moved, changed, (current, arrived)).await
}

/// Inverts one block in the middle, behind the agent's back.
fn touch(image: &Path) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    let at = file.metadata()?.len() / 2 / BLOCK_SIZE * BLOCK_SIZE;
    let mut block = [0; 512];
    file.read_exact_at(&mut block, at)?;
    block.iter_mut().for_each(|byte| *byte ^= 0xff);
    file.write_all_at(&block, at)?;
    file.sync_all()
}
