//! What `flimcd demo` can be told.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use flimcd_agent::api::Strategy;
use flimcd_lab::wan::LinkModel;
use serde::Serialize;

use crate::units::{parse_rate, parse_size};

#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  flimcd demo                                        1 GiB over 200 Mbit/s, 40 ms: under two minutes
  flimcd demo --size 256MiB --strategies flimcd      a short one
  flimcd demo --link 1gbit,20ms --json report.json   another link, figures to a file of your choice
  flimcd demo --image debian.raw                     your own raw image; it is copied, never changed
  flimcd demo --load trace:disk.vscsi --speed 4      a recorded disk as the guest

Needs no root and no QEMU. Two agents run as real processes, and talk over a TCP relay that models \
the link's rate, delay and queue, but not loss. The guest is a load that connects with NBD and knows \
what every byte must be. Ctrl-C at any moment stops everything and removes every file.")]
pub(crate) struct DemoArgs {
    /// Move a running Linux guest with its memory instead. Needs QEMU and root (network namespaces)
    #[arg(long, conflicts_with_all = ["size", "image", "strategies", "load", "speed", "dirty"])]
    pub(crate) vm: bool,
    /// Size of the image, which is made from the seed
    #[arg(long, value_parser = parse_size, default_value = "1GiB", conflicts_with = "image")]
    pub(crate) size: u64,
    /// Move a copy of this raw image instead
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// The emulated link
    #[arg(long, value_name = "RATE,RTT", default_value = "200mbit,40ms")]
    pub(crate) link: LinkModel,
    /// Strategies to compare, in this order
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "precopy,precopy-zstd,flimcd,flimcd-base",
        help = "Strategies to compare, in this order: precopy (as QEMU's mirror: non-zero blocks raw, in \
                rounds), precopy-zstd, postcopy, flimcd, flimcd-base (with a base image at the target)"
    )]
    pub(crate) strategies: Vec<DemoStrategy>,
    /// How much of the image differs from the base image in the target's library, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(..=100))]
    pub(crate) base_differs: u8,
    /// The guest: synthetic, or trace:FILE to replay a recorded disk (CloudPhysics vscsi)
    #[arg(long, default_value = "synthetic", value_name = "LOAD")]
    pub(crate) load: LoadArg,
    /// Replay the trace so many times as fast as it was recorded
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) speed: f64,
    /// New dirty bytes per second of the synthetic load; half the link's rate if left out
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) dirty: Option<u64>,
    /// Decides image, requests and contents
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Where to make the temporary directory
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Where to write the figures
    #[arg(long, value_name = "FILE", default_value = "flimcd-demo-report.json")]
    pub(crate) json: PathBuf,
}

/// A strategy with its compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DemoStrategy {
    Precopy,
    PrecopyZstd,
    Postcopy,
    Flimcd,
    /// `flimcd`, with a base image in the target's library.
    FlimcdBase,
}

impl DemoStrategy {
    const ALL: [Self; 5] = [
        Self::Precopy,
        Self::PrecopyZstd,
        Self::Postcopy,
        Self::Flimcd,
        Self::FlimcdBase,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::PrecopyZstd => "precopy-zstd",
            Self::Postcopy => "postcopy",
            Self::Flimcd => "flimcd",
            Self::FlimcdBase => "flimcd-base",
        }
    }

    /// What the agent is asked for: the strategy, and whether it compresses.
    pub(crate) const fn request(self) -> (Strategy, bool) {
        match self {
            Self::Precopy => (Strategy::Precopy, false),
            Self::PrecopyZstd => (Strategy::Precopy, true),
            Self::Postcopy => (Strategy::Postcopy, true),
            Self::Flimcd | Self::FlimcdBase => (Strategy::Flimcd, true),
        }
    }

    /// Whether it may use the base image in the target's library.
    pub(crate) const fn uses_base(self) -> bool {
        matches!(self, Self::FlimcdBase)
    }
}

impl FromStr for DemoStrategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.name() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                format!("there is no strategy '{text}'; there are {names}")
            })
    }
}

/// Where the guest's requests come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LoadArg {
    Synthetic,
    Trace(PathBuf),
}

impl FromStr for LoadArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "synthetic" => Ok(Self::Synthetic),
            Some(("trace", file)) if !file.is_empty() => Ok(Self::Trace(file.into())),
            _ => Err(format!(
                "'{text}' is not a load; use synthetic or trace:FILE"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_and_strategies_are_named() {
        assert_eq!("synthetic".parse(), Ok(LoadArg::Synthetic));
        assert_eq!("trace:a:b".parse(), Ok(LoadArg::Trace("a:b".into())));
        assert!("trace:".parse::<LoadArg>().is_err());
        assert!("x".parse::<LoadArg>().is_err());
        for strategy in DemoStrategy::ALL {
            assert_eq!(strategy.name().parse(), Ok(strategy));
        }
        assert!("Precopy".parse::<DemoStrategy>().is_err());
    }
}
