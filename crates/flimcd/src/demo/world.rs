//! Everything the demo sets up: a temporary directory, certificates, two agents, and the link between. The
//! benchmarks of content use it too.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use flimcd_lab::wan::{Side, Wan};
use flimcd_link::pki;
use tempfile::TempDir;

use super::{
    args::DemoArgs,
    site::{Reaper, Site, SiteOptions},
};

/// The site that the guest leaves.
pub(crate) const SOURCE: &str = "berlin";
/// The site that it goes to.
pub(crate) const TARGET: &str = "lisbon";

/// Fields are dropped in this order: processes end before their files go.
pub(crate) struct World {
    pub(crate) source: Site,
    pub(crate) target: Site,
    pub(crate) wan: Wan,
}

/// Makes the directory that holds every file of the demo.
pub(crate) fn make_dir(args: &DemoArgs) -> anyhow::Result<TempDir> {
    make_dir_in(args.dir.as_deref(), "flimcd-demo-")
}

/// Makes a temporary directory below `base`, or where the system has them.
pub(crate) fn make_dir_in(base: Option<&Path>, prefix: &str) -> anyhow::Result<TempDir> {
    let base = base.map_or_else(std::env::temp_dir, Path::to_owned);
    // The agents and the relay have absolute paths only.
    let base = std::path::absolute(&base)?;
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(&base)
        .with_context(|| {
            format!(
                "no temporary directory can be made in {}; name another one with --dir",
                base.display()
            )
        })
}

impl World {
    /// Two agents at the ends of `wan`; the source dials the target.
    pub(crate) async fn start(dir: &Path, wan: Wan, reaper: &Reaper) -> anyhow::Result<Self> {
        let pki = make_pki(dir)?;
        let options = SiteOptions {
            name: TARGET,
            side: Side::B,
            wan: &wan,
            peer: (SOURCE, None),
        };
        let target = Site::start(dir, &pki, reaper, options).await?;
        let listen = target.status().await?.listen;
        let listen: SocketAddr = listen
            .as_deref()
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("the agent of {TARGET} listens on {listen:?}"))?;
        let address = wan.reach(Side::A, listen)?.to_string();
        let options = SiteOptions {
            name: SOURCE,
            side: Side::A,
            wan: &wan,
            peer: (TARGET, Some(address)),
        };
        let source = Site::start(dir, &pki, reaper, options).await?;
        Ok(Self {
            source,
            target,
            wan,
        })
    }

    /// Ends both agents, so that nothing waits for them any more.
    pub(crate) fn kill(&self) {
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
pub(crate) fn remove_dir(dir: TempDir) -> anyhow::Result<()> {
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
