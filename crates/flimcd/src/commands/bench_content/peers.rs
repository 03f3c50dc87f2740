//! Case `peers`: the image of `replica-5` by flimcd, by rsync onto the older copy, and by qemu-img onto an empty file.
//! The image is stopped: neither of the two can do anything else.

use std::fs::File;

use anyhow::Context as _;
use flimcd_lab::{bench::copy::Copier, changes::Pattern, sparse::copy_sparse};
use serde_json::json;

use super::{
    Bench, Case, blocking, images, replica,
    report::{ImageRow, Row},
};

const SHARE: f64 = 0.05;

pub(super) async fn run(bench: &Bench<'_>, case: Case) -> anyhow::Result<Vec<Row>> {
    let case = case.name();
    let changes = replica::changes(bench, bench.args.size, SHARE, Pattern::Random);
    let mut rows = Vec::new();
    let variant = "library, random 5%";
    eprintln!("{case}: flimcd");
    let ours = replica::from_library(bench, Row::new(&case, variant, "flimcd"), &changes).await;
    rows.push(ours.unwrap_or_else(|error| Row::failed(&case, variant, "flimcd", &error)));
    for copier in Copier::ALL {
        let variant = if copier.uses_older_copy() {
            "older copy, random 5%"
        } else {
            "empty file"
        };
        if let Err(missing) = copier.check() {
            rows.push(Row::skipped(&case, variant, copier.name(), missing));
            continue;
        }
        eprintln!("{case}: {}", copier.name());
        let row = Row::new(&case, variant, copier.name());
        let done = copy(bench, row, copier, &changes).await;
        rows.push(done.unwrap_or_else(|error| Row::failed(&case, variant, copier.name(), &error)));
    }
    compare(&mut rows);
    Ok(rows)
}

async fn copy(
    bench: &Bench<'_>,
    row: Row,
    copier: Copier,
    changes: &flimcd_lab::changes::Changes,
) -> anyhow::Result<Row> {
    let base = bench.base().await?;
    let dir = tempfile::tempdir_in(bench.dir)?;
    let wan = bench.wan()?;
    let (changes, path) = (changes.clone(), dir.path().to_owned());
    let work = move || {
        let (source, images) = (path.join("source.raw"), path.join("images"));
        std::fs::create_dir(&images)?;
        let target = images.join("target.raw");
        copy_sparse(&base, &source).context("the image cannot be copied")?;
        changes.apply(&source)?;
        if copier.uses_older_copy() {
            copy_sparse(&base, &target).context("the older copy cannot be made")?;
        } else {
            let empty = File::create(&target)?;
            empty.set_len(std::fs::metadata(&source)?.len())?;
        }
        let changed = images::changed(&target, &source)?;
        let copied = copier.copy(&wan, &path, &source, &target)?;
        // qemu-nbd rounds an odd image up to a sector.
        let size = std::fs::metadata(&source)?.len();
        File::options().write(true).open(&target)?.set_len(size)?;
        let image = ImageRow {
            size_bytes: std::fs::metadata(&source)?.len(),
            non_zero_bytes: images::non_zero_bytes(&source)?,
            allocated_source_bytes: images::allocated(&source)?,
            allocated_target_bytes: images::allocated(&target)?,
        };
        Ok((changed, copied, image, images::is_same(&source, &target)?))
    };
    let done = blocking(work).await;
    drop(dir);
    let (changed, copied, image, is_right) = done?;
    let mut row = row.with_changed(changed, image.size_bytes).measured(
        copied.seconds,
        copied.bytes.a_to_b,
        &copied.bytes,
    );
    row.image = Some(image);
    row.image_is_right = Some(is_right);
    Ok(row)
}

/// Says of each of the others how much faster flimcd was.
fn compare(rows: &mut [Row]) {
    let Some(ours) = rows.first().and_then(|row| row.seconds) else {
        return;
    };
    for row in rows.iter_mut().skip(1) {
        if let Some(theirs) = row.seconds {
            let factor = theirs / ours;
            row.details = json!({
                "flimcd_times_faster": factor,
                "note": format!("flimcd was {factor:.1} times as fast"),
            });
        }
    }
}
