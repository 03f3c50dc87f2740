//! The command line as clap sees it: every command with its help and examples.

use std::{ops::Range, path::PathBuf};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use clap_complete::Shell;
use flimcd_agent::api::Strategy;
use flimcd_core::{SiteName, VolumeName};

pub(crate) use crate::commands::heat::HeatArgs;
pub(crate) use crate::commands::vm::VmArgs;
pub(crate) use crate::demo::args::DemoArgs;
use crate::units::{parse_rate, parse_seeds, parse_size};

/// Where an agent's API socket is looked for.
const API_SOCKET: &str = "/run/flimcd/api.sock";

/// Move a running virtual machine with its local disks between data centres.
#[derive(Debug, Parser)]
#[command(
    name = "flimcd",
    version,
    arg_required_else_help = true,
    after_help = "\
Examples:
  flimcd demo                             two agents, a WAN and a guest on this machine: see it move
  flimcd agent --config agent.toml        run the daemon of one site
  flimcd vm adopt --qmp vm1.qmp           take a running QEMU's disks under care
  flimcd migrate vm1 --to lisbon --wait   move a disk and watch it
  flimcd status --watch                   what the agent is doing

`flimcd COMMAND --help` has examples for each command. Commands for an agent talk to its socket: \
--api, or FLIMCD_API, or /run/flimcd/api.sock."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Migrate a disk between two agents over an emulated WAN, on this machine, and compare strategies
    Demo(DemoArgs),
    /// Make the certificates that agents know each other by
    Pki(PkiArgs),
    /// Run the daemon of one site
    Agent(AgentArgs),
    /// Create, import, list, show and remove volumes
    Volume(VolumeArgs),
    /// Take running QEMU machines under care, list and show them, give them back
    Vm(VmArgs),
    /// Images at this site that need not cross the link when volumes arrive
    Library(LibraryArgs),
    /// Copies that stayed here of volumes that have moved away
    Replica(ReplicaArgs),
    /// Keep a replica of a volume up to date at another site
    Replicate(crate::commands::replicate::ReplicateArgs),
    /// Show what is hot in a volume, as numbers and as a picture
    Heat(HeatArgs),
    /// Print the socket that a guest finds a volume at
    Export(ExportArgs),
    /// Say what moving volumes to another site would cost; nothing moves
    Plan(PlanArgs),
    /// Move a volume to another site
    Migrate(MigrateArgs),
    /// Let a volume's migration switch to the target as soon as it is ready
    Switchover(OneVolumeArgs),
    /// End a volume's migration before the switch; the guest never notices
    Cancel(OneVolumeArgs),
    /// Compare the copy that a migration left here with what arrived
    Check(crate::commands::check::CheckArgs),
    /// Show an agent's links, volumes and migrations
    Status(StatusArgs),
    /// Run whole simulated migrations with faults, and check them
    Sim(SimArgs),
    /// Measure the link or the NBD server
    Bench(BenchArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// Which agent to talk to.
#[derive(Clone, Debug, Args)]
pub(crate) struct ApiArgs {
    /// The agent's API socket
    #[arg(long = "api", value_name = "SOCKET", env = "FLIMCD_API", default_value = API_SOCKET)]
    pub(crate) socket: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd pki init                 make an authority in ./pki
  flimcd pki issue lisbon         certificate and key for the site lisbon: pki/lisbon.pem, pki/lisbon.key

Every site gets ca.pem and its own two files. ca.key stays where it was made.")]
pub(crate) struct PkiArgs {
    #[command(subcommand)]
    pub(crate) command: PkiCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a certificate authority
    #[command(after_help = "Examples:\n  flimcd pki init\n  flimcd pki init --dir /etc/flimcd/pki")]
    Init {
        /// Directory of the authority's files
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// Replace an authority that is there; certificates it issued stop working
        #[arg(long)]
        force: bool,
    },
    /// Make a certificate and a key for a site
    #[command(after_help = "\
Examples:\n  flimcd pki issue lisbon\n  flimcd pki issue lisbon --dir /etc/flimcd/pki")]
    Issue {
        /// Name of the site, as in its configuration
        site: SiteName,
        /// Directory of the authority's files
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// Replace a certificate that is there
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd agent --config /etc/flimcd/agent.toml
  flimcd agent --config agent.toml --check     only say whether the configuration can be used

docs/agent.example.toml shows every setting. SIGINT or SIGTERM stop the agent gracefully; migrations \
that run then go on when it is started again.")]
pub(crate) struct AgentArgs {
    /// Configuration, TOML
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Check the configuration, and do nothing else
    #[arg(long)]
    pub(crate) check: bool,
    /// Process id of the parent, with which the agent ends; for the demo
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) with_parent: Option<u32>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd volume create vm1 --size 20GiB
  flimcd volume import vm1 /var/lib/images/vm1.raw
  flimcd volume list")]
pub(crate) struct VolumeArgs {
    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make an empty volume
    #[command(after_help = "\
Examples:\n  flimcd volume create vm1 --size 20GiB\n  flimcd volume create vm2 --size 512M --tenant acme")]
    Create {
        /// Name of the volume
        name: VolumeName,
        /// Size: 1GiB, 512M, or any number of bytes
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// Whose it is; content is only shared inside a tenant
        #[arg(long)]
        tenant: Option<String>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Take a raw image under care, where it lies and without copying it
    #[command(after_help = "\
Examples:\n  flimcd volume import vm1 /var/lib/images/vm1.raw\n
A qcow2 image is moved as the bytes of its file; the guest's QEMU keeps reading it as qcow2.")]
    Import {
        /// Name to give it
        name: VolumeName,
        /// The raw image
        image: PathBuf,
        /// Whose it is; content is only shared inside a tenant
        #[arg(long)]
        tenant: Option<String>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List all volumes
    #[command(after_help = "Examples:\n  flimcd volume list\n  flimcd volume list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show one volume
    #[command(after_help = "Examples:\n  flimcd volume show vm1\n  flimcd volume show vm1 --json")]
    Show {
        /// Name of the volume
        name: VolumeName,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Give a volume up; its image stays unless asked otherwise
    #[command(after_help = "\
Examples:\n  flimcd volume remove vm1\n  flimcd volume remove vm1 --delete-image")]
    Remove {
        /// Name of the volume
        name: VolumeName,
        /// Delete the image file too
        #[arg(long)]
        delete_image: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd library add /var/lib/images/debian12.raw     at the site where volumes arrive
  flimcd library list
  flimcd library verify debian12                      after the file was changed

Volumes that are migrated here are compared with these images: a chunk of 64 KiB that one of them has at the \
same place is read from it, and does not cross the link. Content is shared inside a tenant, and with all \
tenants where an image is public.")]
pub(crate) struct LibraryArgs {
    #[command(subcommand)]
    pub(crate) command: LibraryCommand,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd replica list
  flimcd replica drop vm-1

A volume that moves away leaves its image here, unless `flimcd migrate --keep-replica false` said otherwise. When it comes back, \
what has changed since is all that is sent. limits.replicas in the agent's configuration bounds the room they take.")]
pub(crate) struct ReplicaArgs {
    #[command(subcommand)]
    pub(crate) command: ReplicaCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReplicaCommand {
    /// Show all copies
    #[command(after_help = "\
Examples:
  flimcd replica list
  flimcd replica list --json | jq '.[].name'")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Drop a copy and delete its image; an image that was imported stays
    #[command(after_help = "\
Examples:
  flimcd replica drop vm-1
  flimcd replica drop vm-1 --keep-image

The volume itself, at the site that owns it, is not touched. When it comes back, all of it is sent.")]
    Drop {
        /// Name of the volume
        name: VolumeName,
        /// Leave the image file
        #[arg(long)]
        keep_image: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Put a replica that was being updated back to its last consistent moment
    #[command(after_help = "\
Examples:
  flimcd replica restore vm-1

For a replica that `flimcd replicate` keeps here, when the site that owns the volume is lost. The image is then the disk as it was \
at that moment, as after a loss of power. To use it, `flimcd replica drop vm-1 --keep-image` and import the image.")]
    Restore {
        /// Name of the volume
        name: VolumeName,
        /// Although the site that owns the volume is connected
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum LibraryCommand {
    /// Take a raw or qcow2 image into the library; it is read once
    #[command(after_help = "\
Examples:
  flimcd library add /var/lib/images/debian12.raw
  flimcd library add disk.raw --name web-2024 --tenant acme
  flimcd library add base.raw --public --copy

The file stays where it is, and must not be written any more; --copy makes a copy that is the library's own. \
Ctrl-C leaves the agent reading. Of a qcow2 image the files of its whole backing chain are taken in; where they are compressed, \
or with --copy, a raw copy is made. The agent needs qemu-img for that.")]
    Add {
        /// The image
        image: PathBuf,
        /// Name to give it; the file's if left out
        #[arg(long)]
        name: Option<VolumeName>,
        /// Whose volumes may share content with it
        #[arg(long, conflicts_with = "public")]
        tenant: Option<String>,
        /// Volumes of all tenants may share content with it
        #[arg(long)]
        public: bool,
        /// Make a copy in the agent's state directory
        #[arg(long)]
        copy: bool,
        /// Do not wait until it has been read
        #[arg(long)]
        no_wait: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List all images, replicas and volumes
    #[command(after_help = "Examples:\n  flimcd library list\n  flimcd library list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show one image
    #[command(
        after_help = "Examples:\n  flimcd library show debian12\n  flimcd library show debian12 --json"
    )]
    Show {
        /// Name of the image
        name: VolumeName,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Give an image up; its file stays, unless it is the library's own copy
    #[command(after_help = "Examples:\n  flimcd library remove debian12")]
    Remove {
        /// Name of the image
        name: VolumeName,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Read an image again and make its fingerprints anew
    #[command(after_help = "Examples:\n  flimcd library verify debian12")]
    Verify {
        /// Name of the image
        name: VolumeName,
        /// Do not wait until it has been read
        #[arg(long)]
        no_wait: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd export vm1              the NBD URI, for a guest or for nbdinfo, nbdcopy, qemu-img…
  flimcd export vm1 --json       socket and export name apart
  qemu-system-x86_64 … -drive file=\"$(flimcd export vm1)\",format=raw,if=virtio")]
pub(crate) struct ExportArgs {
    /// Name of the volume
    pub(crate) name: VolumeName,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd plan vm1 --to lisbon                        read all of it, and ask lisbon what is there
  flimcd plan vm1 --to lisbon --bandwidth 50mbit     times for a link of that rate
  flimcd plan vm1 --to lisbon --quick                look at 128 MiB of it, drawn at random
  flimcd plan vm1 vm1-data --to lisbon --json

Nothing moves, and nothing stays at the target. The volume is read beside the guest's path, and rests while the guest is \
active. Ctrl-C ends it. `flimcd migrate --wait` shows the last plan beside what happened.")]
pub(crate) struct PlanArgs {
    /// Names of the volumes, which would move together
    #[arg(required = true)]
    pub(crate) volumes: Vec<VolumeName>,
    /// The site to move them to, a peer in the agent's configuration
    #[arg(long, value_name = "SITE")]
    pub(crate) to: SiteName,
    /// What the link carries: 50mbit, 6MB/s…; as measured if left out
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Look at a sample, and say how far off the figures may be
    #[arg(long)]
    pub(crate) quick: bool,
    /// Pieces of 256 KiB in the sample; 512 if left out
    #[arg(long, value_name = "N", requires = "quick", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sample: Option<u32>,
    /// Watch what the guest writes for so many seconds at least
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    pub(crate) watch: u32,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd migrate vm1 --to lisbon           begin, and return
  flimcd migrate vm1 --to lisbon --wait    watch it to its end
  flimcd migrate vm1 --to lisbon --bandwidth 50mbit --strategy precopy
  flimcd migrate vm1 --to lisbon --switchover manual && flimcd switchover vm1

With --switchover auto the switch comes once the migration is ready and the guest's connection to \
the source's export is closed. The guest then connects to the target's export. With --wait, Ctrl-C \
cancels the migration before the switch; after it, the command only detaches.")]
pub(crate) struct MigrateArgs {
    /// Name of the volume
    pub(crate) volume: VolumeName,
    /// The site to move it to, a peer in the agent's configuration
    #[arg(long, value_name = "SITE")]
    pub(crate) to: SiteName,
    /// How to go about it
    #[arg(long, value_parser = strategy(), default_value_t)]
    pub(crate) strategy: Strategy,
    /// Ceiling for all that goes to this site: 50mbit, 6MB/s…
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// When the switch may come
    #[arg(long, value_enum, default_value_t = SwitchoverArg::Auto)]
    pub(crate) switchover: SwitchoverArg,
    /// Compress content, or not; the strategy's own way if left out
    #[arg(long, value_name = "BOOL")]
    pub(crate) compress: Option<bool>,
    /// Do not send what an image of the target's library has at the same place; the strategy's own way if left out
    #[arg(long, value_name = "BOOL")]
    pub(crate) library: Option<bool>,
    /// Keep the copy that is here when the volume has moved, so that a way back costs what changed; kept if left out
    #[arg(long, value_name = "BOOL")]
    pub(crate) keep_replica: Option<bool>,
    /// Do not compare that copy with what arrived, in the background, when everything is there
    #[arg(long)]
    pub(crate) no_check: bool,
    /// Stay, show progress, and end with the migration's outcome
    #[arg(long)]
    pub(crate) wait: bool,
    /// Print JSON: the migration, or with --wait one line per second
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

/// Takes the name of a strategy.
pub(crate) fn strategy() -> impl TypedValueParser<Value = Strategy> {
    PossibleValuesParser::new(Strategy::ALL.map(Strategy::name))
        .try_map(|name| name.parse::<Strategy>())
}

/// When the switch may come, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SwitchoverArg {
    /// Once no guest is connected to the source's export any more, or when asked
    Auto,
    /// Only when `flimcd switchover` asks for it
    Manual,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd switchover vm1     switch as soon as the migration is ready
  flimcd cancel vm1         end the migration; before the switch only

Stop the guest (or be sure that it stops) before a switchover: from then on the source refuses its \
requests.")]
pub(crate) struct OneVolumeArgs {
    /// Name of the volume
    pub(crate) name: VolumeName,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd status
  flimcd status --watch            again every second, until Ctrl-C
  flimcd status --json             everything, for programs
  flimcd status --api /run/user/1000/flimcd/api.sock")]
pub(crate) struct StatusArgs {
    /// Show it again every second
    #[arg(long)]
    pub(crate) watch: bool,
    /// Print JSON; with --watch one line per second
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd sim --seeds 0..1000     a thousand migrations, no two alike
  flimcd sim --seeds 42 --trace  one of them again, with everything that happened")]
pub(crate) struct SimArgs {
    /// Seeds to run: 0..1000 (the last one is not in it), or a single one
    #[arg(long, value_name = "A..B", value_parser = parse_seeds)]
    pub(crate) seeds: Range<u64>,
    /// Print what happened in each run
    #[arg(long)]
    pub(crate) trace: bool,
    /// Threads to run on; all processors if left out
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Leave out all faults
    #[arg(long)]
    pub(crate) no_faults: bool,
    /// Break a rule of the volume on purpose: every name of one is printed for a wrong one
    #[cfg(feature = "mutations")]
    #[arg(long, value_name = "RULE", value_parser = crate::commands::sim::parse_mutation)]
    pub(crate) mutation: Option<flimcd_sim::Mutation>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd bench link                 goodput, and faults under load, over emulated links
  flimcd bench content              what need not be sent, beside rsync, qemu-img and pre-copy
  flimcd bench nbd --json out.json  this NBD server beside qemu-nbd and nbdkit, on the same file")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Bulk goodput and the latency of a fault under bulk, over emulated links (needs root or user
    /// namespaces)
    #[command(after_help = "\
Examples:\n  flimcd bench link\n  flimcd bench link --link 200mbit,40ms,loss=0.1% --seconds 20 --json link.json")]
    Link {
        /// Links to measure; a fixed set if left out. May be repeated
        #[arg(long, value_name = "RATE,RTT[,loss=P]")]
        link: Vec<flimcd_lab::wan::LinkModel>,
        /// Seconds of each measurement
        #[arg(long, default_value_t = 15)]
        seconds: u64,
        /// Write the figures to a file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// The NBD server against qemu-nbd and nbdkit on the same file (those that are installed)
    #[command(after_help = "\
Examples:\n  flimcd bench nbd\n  flimcd bench nbd --dir /var/tmp --size 4GiB --json nbd.json")]
    Nbd {
        /// Directory for the file that is read and written
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Size of that file
        #[arg(long, value_parser = parse_size, default_value = "1GiB")]
        size: u64,
        /// Seconds of each measurement
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// Measurements of each server and load
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Only loads whose name contains this
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Write the figures to a file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Moving a running machine, beside QEMU's own migration (needs root and QEMU)
    Vm(crate::commands::bench_vm::BenchVmArgs),
    /// What of an image need not be sent, beside rsync, qemu-img and pre-copy
    Content(crate::commands::bench_content::BenchContentArgs),
    /// Every strategy on the same engine, link and load, in virtual time
    Strategies(crate::commands::bench_strategies::BenchStrategiesArgs),
    /// The server that `bench nbd` measures, in a process of its own
    #[command(
        hide = true,
        after_help = "Examples:\n  flimcd bench nbd-serve IMAGE SOCKET"
    )]
    NbdServe {
        /// The image
        image: PathBuf,
        /// Where to listen, until standard input ends
        socket: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd completions bash > /etc/bash_completion.d/flimcd
  flimcd completions zsh  > ~/.zfunc/_flimcd
  flimcd completions fish > ~/.config/fish/completions/flimcd.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_examples() {
        fn check(command: &clap::Command, path: &str) {
            if command.get_name() == "help" {
                return;
            }
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Examples:"), "{path} has no examples");
            assert!(
                command.get_about().is_some() || path == "flimcd",
                "{path} has no description"
            );
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        check(&Cli::command(), "flimcd");
    }
}
