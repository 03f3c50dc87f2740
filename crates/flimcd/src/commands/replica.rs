//! `flimcd replica`: copies that stayed when volumes moved away.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use flimcd_agent::api::VolumeInfo;
use flimcd_lab::report::{Align, Table};

use super::{client, print_json};
use crate::{
    args::{ReplicaArgs, ReplicaCommand},
    format,
};

pub(crate) async fn run(args: &ReplicaArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        ReplicaCommand::List { json, api } => {
            let mut copies = client(api).volumes().await?;
            copies.retain(|volume| volume.replica.is_some());
            if *json {
                print_json(&copies)?;
            } else {
                print!("{}", table(&copies, SystemTime::now()));
            }
        }
        ReplicaCommand::Drop {
            name,
            keep_image,
            api,
        } => {
            let dropped = client(api).drop_replica(name, *keep_image).await?;
            let image = dropped.image.display();
            if dropped.image_deleted {
                println!("dropped the copy of {name}; its image {image} was deleted");
            } else {
                println!("dropped the copy of {name}; its image {image} stays");
            }
        }
        ReplicaCommand::Restore {
            name,
            force,
            json,
            api,
        } => {
            let restored = client(api).restore_replica(name, *force).await?;
            let moment = UNIX_EPOCH + Duration::from_millis(restored.consistent_unix_ms);
            let age =
                (SystemTime::now().duration_since(moment)).map_or_else(|_| "0 s".to_owned(), ago);
            if *json {
                print_json(&restored)?;
            } else {
                println!(
                    "{name} is as it was {age} ago ({} put back); its image is {}",
                    format::bytes(restored.blocks * 4096),
                    restored.image.display()
                );
                println!(
                    "to use it: flimcd replica drop {name} --keep-image, then import the image"
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(copies: &[VolumeInfo], now: SystemTime) -> String {
    if copies.is_empty() {
        return "no copies of volumes that have moved away\n".to_owned();
    }
    let mut table = Table::new([
        ("VOLUME", Align::Left),
        ("SIZE", Align::Right),
        ("ON DISK", Align::Right),
        ("MOVED TO", Align::Left),
        ("SINCE", Align::Right),
        ("STATE", Align::Left),
        ("IMAGE", Align::Left),
    ]);
    for volume in copies {
        let Some(copy) = &volume.replica else {
            continue;
        };
        let age = now.duration_since(UNIX_EPOCH + Duration::from_millis(copy.since_unix_ms));
        table.row([
            volume.name.to_string(),
            format::bytes(volume.size_bytes),
            format::bytes(volume.allocated_bytes),
            volume
                .peer
                .as_ref()
                .map_or_else(String::new, ToString::to_string),
            age.map_or_else(|_| "–".to_owned(), ago),
            if copy.is_untouched {
                "untouched"
            } else {
                "touched"
            }
            .to_owned(),
            volume.image.display().to_string(),
        ]);
    }
    table.to_string()
}

/// Whole units are enough for an age.
fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
