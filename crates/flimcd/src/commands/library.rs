//! `flimcd library`.

use std::{process::ExitCode, time::Duration};

use anyhow::Context as _;
use flimcd_agent::api::{AddLibraryImage, Client, LibraryImage, LibraryState};
use flimcd_lab::report::{Align, Table};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal as _;
use tokio::signal::unix::{SignalKind, signal};

use super::{client, print_json, volume::absolute};
use crate::{
    args::{LibraryArgs, LibraryCommand},
    format,
    outcome::{advise, interrupted},
};

const POLL: Duration = Duration::from_millis(200);

pub(crate) async fn run(args: &LibraryArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        LibraryCommand::Add {
            image,
            name,
            tenant,
            public,
            copy,
            no_wait,
            json,
            api,
        } => {
            let request = AddLibraryImage {
                name: name.clone(),
                path: absolute(image)?,
                tenant: tenant.clone(),
                public: *public,
                copy: *copy,
            };
            let client = client(api);
            let added = client.add_library_image(&request).await?;
            conclude(&client, added, *no_wait, *json, "added").await
        }
        LibraryCommand::Verify {
            name,
            no_wait,
            json,
            api,
        } => {
            let client = client(api);
            let before = client.library_image(name).await?;
            let begun = client.verify_library_image(name).await?;
            let done = match (no_wait, &before.root) {
                (false, Some(_)) => "verified",
                _ => "read again",
            };
            let code = conclude(&client, begun, *no_wait, *json, done).await?;
            if !no_wait && !json && before.root.is_some() {
                let now = client.library_image(name).await?;
                let same = now.root == before.root;
                println!(
                    "{}",
                    if same {
                        "its content is what it was"
                    } else {
                        "its content had changed since it was read before"
                    }
                );
            }
            Ok(code)
        }
        LibraryCommand::List { json, api } => {
            let images = client(api).library().await?;
            if *json {
                print_json(&images)?;
            } else {
                print!("{}", table(&images));
            }
            Ok(ExitCode::SUCCESS)
        }
        LibraryCommand::Show { name, json, api } => {
            let image = client(api).library_image(name).await?;
            if *json {
                print_json(&image)?;
            } else {
                print!("{}", details(&image));
            }
            Ok(ExitCode::SUCCESS)
        }
        LibraryCommand::Remove { name, api } => {
            let removed = client(api).remove_library_image(name).await?;
            let file = removed.path.display();
            if removed.is_copy {
                println!(
                    "removed {}; the library's copy {file} was deleted",
                    removed.name
                );
            } else {
                println!("removed {}; its file {file} stays", removed.name);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits until an image has been read, if that is wanted, and says what came of it.
async fn conclude(
    client: &Client,
    image: LibraryImage,
    no_wait: bool,
    json: bool,
    done: &str,
) -> anyhow::Result<ExitCode> {
    let image = if no_wait {
        Some(image)
    } else {
        read(client, image, json).await?
    };
    let Some(image) = image else {
        eprintln!("the agent goes on reading the image; `flimcd library list` shows how far it is");
        return Ok(interrupted());
    };
    if json {
        print_json(&image)?;
    }
    match image.state {
        LibraryState::Ready if !json => {
            println!(
                "{done} {}, {}, {} of it with data, file {}",
                image.name,
                format::bytes(image.size_bytes),
                format::bytes(image.data_bytes.unwrap_or_default()),
                image.path.display()
            );
        }
        LibraryState::Scanning if !json => {
            println!(
                "{} is being read; `flimcd library list` shows how far it is",
                image.name
            );
        }
        LibraryState::Ready | LibraryState::Scanning => {}
        LibraryState::Stale | LibraryState::Failed => {
            return Err(advise(
                format!(
                    "{} cannot be used: {}",
                    image.name,
                    image
                        .problem
                        .as_deref()
                        .unwrap_or("the agent does not say why")
                ),
                format!(
                    "put that right, then `flimcd library verify {}`",
                    image.name
                ),
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows an image, and the rest of its backing chain, until all of it has been read; `None` after Ctrl-C. Of a chain that cannot be
/// used it is the part that says why.
async fn read(
    client: &Client,
    image: LibraryImage,
    quiet: bool,
) -> anyhow::Result<Option<LibraryImage>> {
    let mut interrupts = signal(SignalKind::interrupt()).context("Ctrl-C cannot be watched")?;
    let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
        let bar = ProgressBar::new(image.size_bytes.max(1));
        let style = "{prefix} {bar:24.cyan/blue} {bytes} of {total_bytes}, {binary_bytes_per_sec}";
        bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
        bar.set_prefix(image.name.to_string());
        bar
    });
    let name = image.name;
    let chain = loop {
        let mut chain = vec![client.library_image(&name).await?];
        let others = client.library().await?.into_iter();
        chain.extend(others.filter(|other| other.part_of.as_ref() == Some(&name)));
        if let Some(bar) = &bar {
            bar.set_length(chain.iter().map(|part| part.size_bytes).sum());
            bar.set_position(chain.iter().map(|part| part.scanned_bytes).sum());
        }
        if chain
            .iter()
            .all(|part| part.state != LibraryState::Scanning)
        {
            break chain;
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = interrupts.recv() => return Ok(None),
        }
    };
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let unusable = chain.iter().find(|part| part.state != LibraryState::Ready);
    Ok(unusable.or(chain.first()).cloned())
}

fn owner(image: &LibraryImage) -> String {
    image.tenant.clone().unwrap_or_else(|| "public".to_owned())
}

/// What it is, and of what.
fn kind(image: &LibraryImage) -> String {
    match &image.part_of {
        Some(whole) => format!("backing file of {whole}"),
        None => image.kind.to_string(),
    }
}

fn state(image: &LibraryImage) -> String {
    match image.state {
        LibraryState::Scanning => {
            let percent = image.scanned_bytes * 100 / image.size_bytes.max(1);
            format!("scanning, {percent}%")
        }
        state => state.to_string(),
    }
}

/// All images, one line each.
fn table(images: &[LibraryImage]) -> String {
    if images.is_empty() {
        return "no images; `flimcd library add IMAGE` takes one in\n".into();
    }
    let mut table = Table::new([
        ("IMAGE", Align::Left),
        ("KIND", Align::Left),
        ("SIZE", Align::Right),
        ("DATA", Align::Right),
        ("STATE", Align::Left),
        ("TENANT", Align::Left),
        ("FILE", Align::Left),
    ]);
    for image in images {
        table.row([
            image.name.to_string(),
            kind(image),
            format::bytes(image.size_bytes),
            image
                .data_bytes
                .map_or_else(|| "–".to_owned(), format::bytes),
            state(image),
            owner(image),
            image.path.display().to_string(),
        ]);
    }
    table.to_string()
}

fn details(image: &LibraryImage) -> String {
    let none = || "–".to_owned();
    let lines = [
        ("name", image.name.to_string()),
        ("kind", kind(image)),
        ("state", state(image)),
        ("problem", image.problem.clone().unwrap_or_else(none)),
        ("tenant", owner(image)),
        (
            "size",
            format!(
                "{} ({} bytes)",
                format::bytes(image.size_bytes),
                image.size_bytes
            ),
        ),
        ("data", image.data_bytes.map_or_else(none, format::bytes)),
        ("root", image.root.clone().unwrap_or_else(none)),
        ("file", image.path.display().to_string()),
        ("copy", if image.is_copy { "yes" } else { "no" }.to_owned()),
    ];
    lines
        .map(|(key, value)| format!("{key:<10} {value}\n"))
        .concat()
}
