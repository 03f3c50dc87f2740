//! `flimcd volume` and `flimcd export`.

use std::{path::Path, process::ExitCode};

use anyhow::Context as _;
use flimcd_agent::api::{CreateVolume, ImportVolume, VolumeInfo};
use flimcd_lab::report::{Align, Table};

use super::{client, print_json};
use crate::{
    args::{ExportArgs, VolumeArgs, VolumeCommand},
    format,
};

pub(crate) async fn run(args: &VolumeArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        VolumeCommand::Create {
            name,
            size,
            tenant,
            api,
        } => {
            let request = CreateVolume {
                name: name.clone(),
                size_bytes: *size,
                tenant: tenant.clone(),
            };
            let made = client(api).create_volume(&request).await?;
            println!(
                "created {}, {}, image {}",
                made.name,
                format::bytes(made.size_bytes),
                made.image.display()
            );
        }
        VolumeCommand::Import {
            name,
            image,
            tenant,
            api,
        } => {
            let request = ImportVolume {
                name: name.clone(),
                path: absolute(image)?,
                tenant: tenant.clone(),
            };
            let taken = client(api).import_volume(&request).await?;
            println!(
                "imported {}, {}, image {}",
                taken.name,
                format::bytes(taken.size_bytes),
                taken.image.display()
            );
        }
        VolumeCommand::List { json, api } => {
            let volumes = client(api).volumes().await?;
            if *json {
                print_json(&volumes)?;
            } else {
                print!("{}", table(&volumes));
            }
        }
        VolumeCommand::Show { name, json, api } => {
            let volume = client(api).volume(name).await?;
            if *json {
                print_json(&volume)?;
            } else {
                print!("{}", details(&volume));
            }
        }
        VolumeCommand::Remove {
            name,
            delete_image,
            api,
        } => {
            let removed = client(api).remove_volume(name, *delete_image).await?;
            let image = removed.image.display();
            if removed.image_deleted {
                println!("removed {}; its image {image} was deleted", removed.name);
            } else {
                println!("removed {}; its image {image} stays", removed.name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn export(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let export = client(&args.api).export(&args.name).await?;
    if args.json {
        print_json(&export)?;
    } else {
        // The URI and nothing else, so that it can stand in a command line.
        println!("{}", export.uri);
    }
    Ok(ExitCode::SUCCESS)
}

/// The agent has another working directory than this command.
pub(super) fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path)
        .with_context(|| format!("the path {} cannot be made absolute", path.display()))
}

/// All volumes, one line each.
pub(crate) fn table(volumes: &[VolumeInfo]) -> String {
    if volumes.is_empty() {
        return "no volumes; `flimcd volume create` or `flimcd volume import` makes one\n".into();
    }
    let none = || "–".to_owned();
    let mut table = Table::new([
        ("VOLUME", Align::Left),
        ("SIZE", Align::Right),
        ("ON DISK", Align::Right),
        ("STATE", Align::Left),
        ("EPOCH", Align::Right),
        ("PEER", Align::Left),
        ("GUESTS", Align::Right),
        ("SOCKET", Align::Left),
    ]);
    for volume in volumes {
        table.row([
            volume.name.to_string(),
            format::bytes(volume.size_bytes),
            format::bytes(volume.allocated_bytes),
            state(volume),
            volume.epoch.to_string(),
            volume.peer.as_ref().map_or_else(none, ToString::to_string),
            volume.guest_connections.to_string(),
            volume
                .export
                .as_ref()
                .map_or_else(none, |export| export.socket.display().to_string()),
        ]);
    }
    table.to_string()
}

/// What it is here, in a word.
fn state(volume: &VolumeInfo) -> String {
    match volume.replica {
        Some(_) => "replica".to_owned(),
        None => volume.ownership.to_string(),
    }
}

fn details(volume: &VolumeInfo) -> String {
    let none = || "–".to_owned();
    let lines = [
        ("name", volume.name.to_string()),
        ("id", volume.id.to_string()),
        ("tenant", volume.tenant.clone()),
        (
            "size",
            format!(
                "{} ({} bytes)",
                format::bytes(volume.size_bytes),
                volume.size_bytes
            ),
        ),
        ("on disk", format::bytes(volume.allocated_bytes)),
        (
            "state",
            format!("{}, epoch {}", state(volume), volume.epoch),
        ),
        (
            "peer",
            volume.peer.as_ref().map_or_else(none, ToString::to_string),
        ),
        ("image", volume.image.display().to_string()),
        (
            "export",
            volume
                .export
                .as_ref()
                .map_or_else(none, |export| export.uri.clone()),
        ),
        ("guests", volume.guest_connections.to_string()),
        (
            "migration",
            volume.migration.map_or_else(none, |id| id.to_string()),
        ),
    ];
    lines
        .map(|(key, value)| format!("{key:<10} {value}\n"))
        .concat()
}
