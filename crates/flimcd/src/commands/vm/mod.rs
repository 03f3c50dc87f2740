//! `flimcd vm`: machines that run, with their disks.

mod args;
mod migrate;
mod show;

use std::process::ExitCode;

use anyhow::Context as _;
use flimcd_agent::api::{AdoptVm, VmInfo};

use super::{client, print_json};
pub(crate) use args::{VmArgs, VmCommand};
pub(crate) use migrate::summary as move_summary;

pub(crate) async fn run(args: &VmArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        VmCommand::Migrate(args) => return migrate::run(args).await,
        VmCommand::Cancel(args) => return migrate::cancel(args).await,
        VmCommand::Adopt {
            qmp,
            name,
            tenant,
            dry_run,
            json,
            api,
        } => {
            let request = AdoptVm {
                qmp: std::path::absolute(qmp).with_context(|| {
                    format!("the path {} cannot be made absolute", qmp.display())
                })?,
                name: name.clone(),
                tenant: tenant.clone(),
                dry_run: *dry_run,
            };
            let vm = client(api).adopt_vm(&request).await?;
            if *json {
                print_json(&vm)?;
            } else {
                print!("{}", show::adopted(&vm));
            }
            return Ok(code_of(&vm));
        }
        VmCommand::List { json, api } => {
            let vms = client(api).vms().await?;
            if *json {
                print_json(&vms)?;
            } else {
                print!("{}", show::table(&vms));
            }
        }
        VmCommand::Show { name, json, api } => {
            let vm = client(api).vm(name).await?;
            if *json {
                print_json(&vm)?;
            } else {
                print!("{}", show::details(&vm));
            }
        }
        VmCommand::Release { name, json, api } => {
            let vm = client(api).release_vm(name).await?;
            if *json {
                print_json(&vm)?;
            } else {
                print!("{}", show::released(&vm));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A dry run that found something in the way fails, as the real thing would.
fn code_of(vm: &VmInfo) -> ExitCode {
    if vm.problem.is_some() || vm.disks.iter().any(|disk| disk.refused.is_some()) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
