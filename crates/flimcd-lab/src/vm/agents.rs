//! Agents at the sites, as processes of the real program: configuration, certificates, start, kill and
//! restart. For end-to-end tests and the demo.

use std::{
    fs::{self, File},
    io,
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use flimcd_core::SiteName;
use flimcd_link::pki;

use super::sites::{Place, Sites};
use crate::wan::Side;

/// Where agents listen at their site.
const PORT: u16 = 7400;
const START_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
const LOG_TAIL_LINES: usize = 20;

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Files or the process.
    #[error("the agent of {site} cannot be started in {}: {source}", dir.display())]
    Start {
        /// Its site.
        site: String,
        /// Its directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not answer, or ended.
    #[error("the agent of {site} {what}; the end of its log:\n{log}")]
    NotUp {
        /// Its site.
        site: String,
        /// What happened instead.
        what: String,
        /// The end of its log.
        log: String,
    },
    /// Certificates.
    #[error("certificates cannot be made: {0}")]
    Pki(String),
}

/// Two agents that know each other: that of side A dials that of side B.
#[derive(Debug)]
pub struct Agents {
    sites: [Agent; 2],
}

/// One agent. Dropping it kills the process.
#[derive(Debug)]
pub struct Agent {
    name: String,
    dir: PathBuf,
    /// Enough to start it again.
    start: Start,
    child: Mutex<Child>,
}

#[derive(Debug)]
struct Start {
    program: PathBuf,
    prefix: Vec<String>,
}

impl Agents {
    /// Names of the sites, A first.
    pub const NAMES: [&str; 2] = ["berlin", "lisbon"];

    /// Writes configurations and certificates under `dir` and starts both agents with `program`, the
    /// `flimcd` binary. `more` is added to the configurations as it is, A first; each may set keys
    /// of its own and tables (`[vm]`), because it comes before every other table.
    ///
    /// # Errors
    /// When an agent does not come up; its log says why.
    pub fn start(
        sites: &Sites,
        dir: &Path,
        program: &Path,
        more: [&str; 2],
    ) -> Result<Self, AgentError> {
        let pki = dir.join("pki");
        make_pki(&pki)?;
        let start = |side| Agent::start(sites, side, dir, &pki, program, more);
        // B first, because A dials it.
        let target = start(Side::B)?;
        let source = start(Side::A)?;
        Ok(Self {
            sites: [source, target],
        })
    }

    /// The agent of a side.
    #[must_use]
    pub const fn at(&self, side: Side) -> &Agent {
        &self.sites[side.index()]
    }
}

impl Agent {
    fn start(
        sites: &Sites,
        side: Side,
        base: &Path,
        pki: &Path,
        program: &Path,
        more: [&str; 2],
    ) -> Result<Self, AgentError> {
        let name = Agents::NAMES[side.index()].to_owned();
        let dir = base.join(&name);
        let start = Start {
            program: program.to_owned(),
            prefix: sites.prefix(Place::Site(side)),
        };
        let spawn = || -> io::Result<Child> {
            for sub in ["state", "images", "run"] {
                fs::create_dir_all(dir.join(sub))?;
            }
            fs::write(
                dir.join("agent.toml"),
                config(&dir, pki, side, more[side.index()]),
            )?;
            start.spawn(&dir)
        };
        let child = spawn().map_err(|source| AgentError::Start {
            site: name.clone(),
            dir: dir.clone(),
            source,
        })?;
        let agent = Self {
            child: Mutex::new(child),
            name,
            dir,
            start,
        };
        agent.wait_until_up()?;
        Ok(agent)
    }

    /// Its site's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory: `state`, `images`, `run`, `agent.toml`, `agent.log`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The socket of its API.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.dir.join("run/api.sock")
    }

    /// Everything it logged, over all its starts.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.join("agent.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&self) {
        let mut child = self.child();
        // It may have ended already, then both do nothing.
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Starts it again after [`Agent::kill`], with the same configuration, and waits until it answers.
    ///
    /// # Errors
    /// As [`Agents::start`].
    pub fn restart(&self) -> Result<(), AgentError> {
        self.kill();
        let child = self
            .start
            .spawn(&self.dir)
            .map_err(|source| AgentError::Start {
                site: self.name.clone(),
                dir: self.dir.clone(),
                source,
            })?;
        *self.child() = child;
        self.wait_until_up()
    }

    fn wait_until_up(&self) -> Result<(), AgentError> {
        let not_up = |what: String| {
            let log = self.log();
            let lines: Vec<&str> = log.trim_end().lines().collect();
            AgentError::NotUp {
                site: self.name.clone(),
                what,
                log: lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"),
            }
        };
        let deadline = Instant::now() + START_MAX;
        while UnixStream::connect(self.api_socket()).is_err() {
            if let Ok(Some(status)) = self.child().try_wait() {
                return Err(not_up(format!("ended ({status})")));
            }
            if Instant::now() > deadline {
                return Err(not_up("does not answer".to_owned()));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Start {
    fn spawn(&self, dir: &Path) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("agent.log"))?;
        // The prefix enters the namespace and becomes the agent: one process, one id.
        Command::new(&self.prefix[0])
            .args(&self.prefix[1..])
            .arg(&self.program)
            .args(["agent", "--config"])
            .arg(dir.join("agent.toml"))
            .args(["--with-parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
    }
}

fn make_pki(dir: &Path) -> Result<(), AgentError> {
    let failed = |error: &dyn std::fmt::Display| AgentError::Pki(error.to_string());
    pki::create_ca(dir, false).map_err(|error| failed(&error))?;
    for name in Agents::NAMES {
        let site: SiteName = name.parse().map_err(|error| failed(&error))?;
        pki::issue(dir, &site, false).map_err(|error| failed(&error))?;
    }
    Ok(())
}

fn config(dir: &Path, pki: &Path, side: Side, more: &str) -> String {
    let name = Agents::NAMES[side.index()];
    let peer = Agents::NAMES[side.other().index()];
    let address = match side {
        Side::A => format!("address = \"{}:{PORT}\"\n", Sites::address(Side::B)),
        Side::B => String::new(),
    };
    let file = |path: PathBuf| format!("{:?}", path.to_string_lossy());
    format!(
        "site = \"{name}\"\nstate_dir = {}\nimages_dir = {}\nruntime_dir = {}\nlisten = \"{}:{PORT}\"\n\
         {more}\n\
         [tls]\nca = {}\ncert = {}\nkey = {}\n\
         [[peer]]\nsite = \"{peer}\"\n{address}may_send = [\"*\"]\nmay_receive = [\"*\"]\n",
        file(dir.join("state")),
        file(dir.join("images")),
        file(dir.join("run")),
        Sites::address(side),
        file(pki.join("ca.pem")),
        file(pki.join(format!("{name}.pem"))),
        file(pki.join(format!("{name}.key"))),
    )
}
