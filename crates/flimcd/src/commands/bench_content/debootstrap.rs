//! Case `debootstrap`: a Debian root file system moves to a site whose library holds another one, built separately.

use std::{path::Path, process::Command};

use anyhow::Context as _;
use flimcd_core::VolumeName;
use flimcd_lab::{bench::debian, sparse::copy_sparse};
use serde_json::json;

use super::{Bench, Case, blocking, images, moves::Stage, replica, report::Row};

/// A root file system and its journal need this much at least.
const SIZE_MIN: u64 = 1 << 30;

/// How the source has it; the library's image is raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Raw,
    Qcow2,
}

pub(super) async fn run(bench: &Bench<'_>, case: Case) -> anyhow::Result<Vec<Row>> {
    let case = case.name();
    let (cache, size) = (debian::cache_dir(), bench.args.size.max(SIZE_MIN));
    let why = match &bench.no_router {
        Some(why) => Some(format!("it runs with a router only ({why})")),
        None => debian::missing(&cache, size),
    };
    if let Some(why) = why {
        return Ok(vec![Row::skipped(&case, "library, any", "flimcd", why)]);
    }
    let made = blocking(move || {
        let progress = |what: &str| eprintln!("debootstrap: {what}");
        Ok(debian::images(&cache, size, progress)?)
    });
    let debian = made.await?;
    let (library, image) = (debian.other.clone(), debian.one.clone());
    let present = blocking(move || Ok(images::present_share(&library, &image)?)).await?;
    let mut rows = Vec::new();
    for (layout, variant) in [
        (Layout::Raw, "library"),
        (Layout::Qcow2, "library, from qcow2"),
    ] {
        if !bench.wants(variant) {
            continue;
        }
        if layout == Layout::Qcow2 && !has_qemu_img() {
            let why = "qemu-img is not installed (Debian: apt install qemu-utils)";
            rows.push(Row::skipped(&case, variant, "flimcd", why));
            continue;
        }
        eprintln!("{case}: {variant}");
        let mut row = Row::new(&case, variant, "flimcd");
        row.details = json!({
            "packages_of_its_own": debian.extra,
            "share_of_blocks_in_library": present,
            "note": format!("{:.1}% of its non-zero blocks stand somewhere in the library", present * 100.0),
        });
        let done = one(bench, row, (&debian.one, &debian.other), layout).await;
        rows.push(done.unwrap_or_else(|error| Row::failed(&case, variant, "flimcd", &error)));
    }
    Ok(rows)
}

async fn one(
    bench: &Bench<'_>,
    row: Row,
    (image, library): (&Path, &Path),
    layout: Layout,
) -> anyhow::Result<Row> {
    let stage = Stage::start(bench).await?;
    let site = &stage.world.source;
    let (name, from): (VolumeName, _) = ("volume".parse()?, image.to_owned());
    match layout {
        Layout::Raw => {
            let to = site.images().join("volume.raw");
            let image = to.clone();
            blocking(move || copy_sparse(&from, &to).context("the image cannot be copied")).await?;
            stage.import(site, &name, &image).await?;
        }
        // As an adopted machine's disk: the volume is the file, and what the format means stays with QEMU.
        Layout::Qcow2 => {
            let to = stage.dir().join("image.qcow2");
            let file = to.clone();
            blocking(move || convert(&from, &to)).await?;
            stage.create_with(site, &name, &file).await?;
        }
    }
    let image = stage.image_at(site, &name).await?;
    let mut row = replica::volume_against_library(&stage, row, library, (&name, &image)).await?;
    // What differs at the same place is not what had to cross here.
    row.bound_bytes = None;
    row.gathered_bound_bytes = None;
    row.is_within_bound = None;
    Ok(row)
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output();
    found.is_ok_and(|output| output.status.success())
}

fn convert(raw: &Path, qcow2: &Path) -> anyhow::Result<()> {
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([raw, qcow2])
        .output()
        .context("qemu-img cannot be started")?;
    anyhow::ensure!(
        output.status.success(),
        "qemu-img convert failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
