//! Everything the demo sets up: a temporary directory, certificates, two agents, and the link between.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use flimcd_lab::wan::{
    Side,
    relay::{Relay, RelayOptions, Route},
};
use flimcd_link::pki;
use tempfile::TempDir;

use super::{
    args::DemoArgs,
    site::{Reaper, Site},
};

/// The site that the guest leaves.
pub(super) const SOURCE: &str = "berlin";
/// The site that it goes to.
pub(super) const TARGET: &str = "lisbon";

/// Fields are dropped in this order: processes end before their files go.
pub(super) struct World {
    pub(super) source: Site,
    pub(super) target: Site,
    pub(super) relay: Relay,
}

/// Makes the directory that holds every file of the demo.
pub(super) fn make_dir(args: &DemoArgs) -> anyhow::Result<TempDir> {
    let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    // The agents and the relay have absolute paths only.
    let base = std::path::absolute(&base)?;
    tempfile::Builder::new()
        .prefix("flimcd-demo-")
        .tempdir_in(&base)
        .with_context(|| {
            format!(
                "no temporary directory can be made in {}; name another one with --dir",
                base.display()
            )
        })
}

impl World {
    pub(super) async fn start(
        dir: &Path,
        args: &DemoArgs,
        reaper: &Reaper,
    ) -> anyhow::Result<Self> {
        let pki = make_pki(dir)?;
        let target = Site::start(dir, &pki, reaper, TARGET, (SOURCE, None)).await?;
        let listen = target.status().await?.listen;
        let listen: SocketAddr = listen
            .as_deref()
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("the agent of {TARGET} listens on {listen:?}"))?;
        let relay = Relay::start(&RelayOptions {
            model: args.link,
            routes: vec![Route {
                listen: (Ipv4Addr::LOCALHOST, 0).into(),
                target: listen,
                from: Side::A,
            }],
            seed: args.seed,
        })
        .context("the emulated link cannot be started")?;
        let address = relay.addresses()[0].to_string();
        let source = Site::start(dir, &pki, reaper, SOURCE, (TARGET, Some(address))).await?;
        Ok(Self {
            source,
            target,
            relay,
        })
    }

    /// Ends both agents, so that nothing waits for them any more.
    pub(super) fn kill(&self) {
        self.source.kill();
        self.target.kill();
    }
}

fn make_pki(dir: &Path) -> anyhow::Result<PathBuf> {
    let pki = dir.join("pki");
    pki::create_ca(&pki, false)?;
    for site in [SOURCE, TARGET] {
        pki::issue(&pki, &site.parse()?, false)?;
    }
    Ok(pki)
}

/// Removes the directory. A file that a thread makes at the same moment is no reason to leave it.
pub(super) fn remove_dir(dir: TempDir) -> anyhow::Result<()> {
    let path = dir.keep();
    let mut tries = 0;
    loop {
        match std::fs::remove_dir_all(&path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < 10 => {
                tries += 1;
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "the demo's directory {} cannot be removed; remove it by hand",
                        path.display()
                    )
                });
            }
        }
    }
}
