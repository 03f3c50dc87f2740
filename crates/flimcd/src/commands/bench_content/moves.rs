//! Migrations of a volume that no guest uses, and what goes before one.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use flimcd_agent::api::{
    CreateVolume, ImportVolume, MigrateRequest, MigrationStatus, OwnershipState, Phase,
};
use flimcd_core::VolumeName;
use flimcd_lab::{
    changes::Changes,
    image::{self, ImageOptions},
    load::{DiskOp, DiskRequest, GuestDisk},
    wan::{LinkModel, WanBytes},
};
use serde_json::json;
use tempfile::TempDir;

use super::{
    Bench, blocking,
    images::{self, Changed},
    report::{ImageRow, Row},
};
use crate::demo::{
    guest,
    site::Site,
    world::{SOURCE, World},
};

const POLL: Duration = Duration::from_millis(20);
/// A migration that takes longer hangs: so many times what the whole image takes raw, and some minutes.
const TOO_LONG_FACTOR: u32 = 4;
const TOO_LONG_BASE: Duration = Duration::from_secs(300);
/// What has to happen before a measurement happens at this rate, if the link is slower.
const SET_UP_BITS_PER_SEC: u64 = 1_000_000_000;
/// Writes in flight while changes are made.
const WRITES_IN_FLIGHT: usize = 16;

/// Two agents with a directory of their own, for one measurement.
pub(super) struct Stage {
    /// Dropped first: processes end before their files go.
    pub(super) world: World,
    dir: TempDir,
}

/// What a migration took.
pub(super) struct Moved {
    pub(super) seconds: f64,
    pub(super) bytes: WanBytes,
    /// From the site that had the volume.
    pub(super) forward_bytes: u64,
    pub(super) status: MigrationStatus,
}

impl Stage {
    pub(super) async fn start(bench: &Bench<'_>) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in(bench.dir).context("no directory for a measurement")?;
        let world = World::start(dir.path(), bench.wan()?, bench.reaper).await?;
        Ok(Self { world, dir })
    }

    /// For images and whatever else belongs to this measurement.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes the link fast, and back again with what is returned.
    pub(super) fn speed_up(&self) -> LinkModel {
        let model = self.world.wan.model();
        self.world.wan.set_model(LinkModel {
            rate_bits_per_sec: model.rate_bits_per_sec.max(SET_UP_BITS_PER_SEC),
            loss: 0.0,
            ..model
        });
        model
    }

    /// Takes a file under an agent's care, as it is.
    pub(super) async fn import(
        &self,
        site: &Site,
        name: &VolumeName,
        path: &Path,
    ) -> anyhow::Result<()> {
        let request = ImportVolume {
            name: name.clone(),
            path: path.to_owned(),
            tenant: None,
        };
        let imported = site.client.import_volume(&request).await;
        imported.map_err(|error| site.explain(error))?;
        Ok(())
    }

    /// The file of a volume at a site.
    pub(super) async fn image_at(&self, site: &Site, name: &VolumeName) -> anyhow::Result<PathBuf> {
        let volume = site.client.volume(name).await;
        Ok(volume.map_err(|error| site.explain(error))?.image)
    }

    /// Moves a volume that no guest uses, and waits for the end.
    pub(super) async fn migrate(
        &self,
        (from, to): (&Site, &Site),
        name: &VolumeName,
    ) -> anyhow::Result<Moved> {
        // By names, because all else is to be as it is for a user who says nothing.
        let request: MigrateRequest = serde_json::from_value(json!({ "to": to.name() }))?;
        let before = self.world.wan.bytes();
        let (began, began_unix_ms) = (Instant::now(), unix_ms());
        let migrated = from.client.migrate(name, &request).await;
        let mut status = migrated.map_err(|error| from.explain(error))?;
        let slowest = self.world.wan.model().transmission(status.bytes_total);
        let too_long = TOO_LONG_BASE + slowest * TOO_LONG_FACTOR;
        while !status.phase.has_ended() {
            if began.elapsed() > too_long {
                return Err(from.explain(anyhow::anyhow!(
                    "the migration did not end within {too_long:?} (phase {}, {:?})",
                    status.phase,
                    status.error
                )));
            }
            tokio::time::sleep(POLL).await;
            let asked = from.client.migration(status.id).await;
            status = asked.map_err(|error| from.explain(error))?;
        }
        if status.phase != Phase::Completed {
            let why = status.error.as_deref().unwrap_or("it does not say why");
            return Err(from.explain(anyhow::anyhow!("the migration {}: {why}", status.phase)));
        }
        let bytes = self.world.wan.bytes().since(&before);
        let ended = status
            .ended_unix_ms
            .map(|ended| Duration::from_millis(ended.saturating_sub(began_unix_ms)));
        self.wait_until_owned(to, name).await?;
        Ok(Moved {
            seconds: ended.unwrap_or_else(|| began.elapsed()).as_secs_f64(),
            bytes,
            forward_bytes: if from.name() == SOURCE {
                bytes.a_to_b
            } else {
                bytes.b_to_a
            },
            status,
        })
    }

    /// The source may know first that all is done.
    async fn wait_until_owned(&self, site: &Site, name: &VolumeName) -> anyhow::Result<()> {
        let deadline = Instant::now() + TOO_LONG_BASE;
        loop {
            let volume = site.client.volume(name).await;
            let volume = volume.map_err(|error| site.explain(error))?;
            if volume.ownership == OwnershipState::Owner && volume.migration.is_none() {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{name} is still {} at {}",
                volume.ownership,
                site.name()
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Writes changes to a volume as a guest would.
    pub(super) async fn change(
        &self,
        site: &Site,
        name: &VolumeName,
        changes: Changes,
    ) -> anyhow::Result<()> {
        let export = site.client.export(name).await;
        let export = export.map_err(|error| site.explain(error))?;
        blocking(move || {
            let mut disk = guest::connect(&export)?;
            let written = write_all(&mut *disk, |write| changes.for_each(write));
            written.context("the volume cannot be written")
        })
        .await
    }

    /// A new volume with the bytes of a file, whatever they mean: what is imported has to be raw.
    pub(super) async fn create_with(
        &self,
        site: &Site,
        name: &VolumeName,
        file: &Path,
    ) -> anyhow::Result<()> {
        let request = CreateVolume {
            name: name.clone(),
            size_bytes: std::fs::metadata(file)?.len(),
            tenant: None,
        };
        let created = site.client.create_volume(&request).await;
        created.map_err(|error| site.explain(error))?;
        let export = site.client.export(name).await;
        let export = export.map_err(|error| site.explain(error))?;
        let file = file.to_owned();
        blocking(move || {
            let mut disk = guest::connect(&export)?;
            let written = write_all(&mut *disk, |write| images::for_each_piece(&file, write));
            written.context("the volume cannot be written")
        })
        .await
    }

    /// The row of a migration: figures, bounds, and whether the image at `to` is `expected`.
    pub(super) async fn row(
        &self,
        row: Row,
        moved: &Moved,
        changed: Changed,
        (expected, arrived): (PathBuf, PathBuf),
    ) -> anyhow::Result<Row> {
        let checked = blocking(move || {
            let image = ImageRow {
                size_bytes: std::fs::metadata(&expected)?.len(),
                non_zero_bytes: images::non_zero_bytes(&expected)?,
                allocated_source_bytes: images::allocated(&expected)?,
                allocated_target_bytes: images::allocated(&arrived)?,
            };
            Ok((image, images::is_same(&expected, &arrived)?))
        });
        let (image, is_right) = checked.await?;
        let mut row = row
            .with_changed(changed, image.size_bytes)
            .with_content(moved.status.content, image.non_zero_bytes)
            .measured(moved.seconds, moved.forward_bytes, &moved.bytes);
        row.image = Some(image);
        row.image_is_right = Some(is_right);
        if row.details.is_null() {
            row.details = json!({});
        }
        row.details["library_image"] = json!(moved.status.library_image);
        // Without the packets' headers and acknowledgements.
        row.details["bytes_on_sockets"] = json!(moved.status.bytes_on_link);
        row.details["downtime_ms"] = json!(moved.status.downtime_ms);
        Ok(row)
    }
}

impl Bench<'_> {
    /// The image that everything is compared with, made when it is wanted first.
    pub(super) async fn base(&self) -> anyhow::Result<PathBuf> {
        let path = self.dir.join("base.raw");
        let options = ImageOptions {
            seed: self.args.seed,
            size_bytes: self.args.size,
            ..ImageOptions::default()
        };
        let made = path.clone();
        if !path.exists() {
            blocking(move || {
                image::create(&made, &options)
                    .context("the image cannot be made; is there room? Name another --dir")
            })
            .await?;
        }
        Ok(path)
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Writes a piece of content at an offset.
type Write<'a> = &'a mut dyn FnMut(u64, &[u8]) -> std::io::Result<()>;

/// Writes what `each` has, several pieces at a time, and flushes.
fn write_all(
    disk: &mut dyn GuestDisk,
    each: impl FnOnce(Write<'_>) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let receive = |disk: &mut dyn GuestDisk, in_flight: &mut usize| -> std::io::Result<Vec<u8>> {
        loop {
            if let Some(reply) = disk.receive(Duration::from_secs(1))? {
                reply.result?;
                *in_flight -= 1;
                return Ok(reply.data);
            }
        }
    };
    let (mut id, mut in_flight) = (0, 0);
    each(&mut |offset, bytes| {
        let mut data = if in_flight < WRITES_IN_FLIGHT {
            Vec::new()
        } else {
            receive(disk, &mut in_flight)?
        };
        data.clear();
        data.extend_from_slice(bytes);
        id += 1;
        in_flight += 1;
        disk.submit(DiskRequest {
            id,
            op: DiskOp::Write,
            offset,
            length: u32::try_from(bytes.len()).map_err(std::io::Error::other)?,
            data,
        })
    })?;
    while in_flight > 0 {
        receive(disk, &mut in_flight)?;
    }
    in_flight = 1;
    disk.submit(DiskRequest {
        id: id + 1,
        op: DiskOp::Flush,
        offset: 0,
        length: 0,
        data: Vec::new(),
    })?;
    receive(disk, &mut in_flight).map(drop)
}
