//! The command line of `flimcd vm`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use flimcd_core::VolumeName;

use crate::args::ApiArgs;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd vm adopt --qmp /run/vm1.qmp --dry-run   what would be taken, and what is in the way
  flimcd vm adopt --qmp /run/vm1.qmp             take the running machine's disks under care
  flimcd vm list
  flimcd vm release vm1                          back onto plain files")]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Move a machine under care to another site, with its memory, while it runs
    Migrate(super::migrate::MigrateArgs),
    /// End a machine's move before its switch
    Cancel(super::migrate::CancelArgs),
    /// Take a running QEMU's disks under care, without a restart and without copying
    #[command(after_help = "\
Examples:
  flimcd vm adopt --qmp /run/vm1.qmp --dry-run
  flimcd vm adopt --qmp /run/vm1.qmp
  flimcd vm adopt --qmp /run/vm1.qmp --name web

QEMU has to have been started with a monitor socket, -qmp unix:/run/vm1.qmp,server=on,wait=off, that \
no other program holds open. All disks are taken or none; read-only media stay as they are. Meanwhile \
and afterwards the guest goes on. Each disk becomes a volume NAME-DISK; its image stays where it is.")]
    Adopt {
        /// QEMU's monitor socket (QMP)
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// Name to give the machine; the one of QEMU's -name if left out
        #[arg(long, value_name = "VM")]
        name: Option<VolumeName>,
        /// Whose its volumes are; content is only shared inside a tenant
        #[arg(long)]
        tenant: Option<String>,
        /// Only look: what would be taken, and what is in the way
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List the machines under care
    #[command(after_help = "Examples:\n  flimcd vm list\n  flimcd vm list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show one machine and its disks
    #[command(after_help = "Examples:\n  flimcd vm show vm1\n  flimcd vm show vm1 --json")]
    Show {
        /// Name of the machine
        name: VolumeName,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Give a machine's disks back as plain files; the guest goes on
    #[command(after_help = "\
Examples:\n  flimcd vm release vm1\n
The agent is out of the way afterwards: it may be stopped, and no volumes of the machine are left. A \
machine whose QEMU is gone is only forgotten; its images stay.")]
    Release {
        /// Name of the machine
        name: VolumeName,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
}
