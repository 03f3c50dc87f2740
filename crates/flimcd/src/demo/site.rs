//! One agent of the demo: a real process with a directory of its own.

use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use flimcd_agent::api::{AddLibraryImage, Client, LibraryState, Status};
use flimcd_lab::wan::{Side, Wan};
use serde::Serialize;

use crate::outcome::advise;

const START_MAX: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(10);
const SCAN_POLL: Duration = Duration::from_millis(50);
/// So much of a log is shown when something went wrong.
const LOG_TAIL_BYTES: u64 = 4 << 10;

/// The configuration of a demo's agent, written as TOML.
#[derive(Serialize)]
struct ConfigFile<'a> {
    site: &'a str,
    state_dir: PathBuf,
    images_dir: PathBuf,
    runtime_dir: PathBuf,
    listen: String,
    /// Not here: what is measured is the migration.
    check: bool,
    tls: TlsFiles,
    peer: Vec<PeerTable<'a>>,
}

#[derive(Serialize)]
struct TlsFiles {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Serialize)]
struct PeerTable<'a> {
    site: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    may_send: [&'a str; 1],
    may_receive: [&'a str; 1],
}

/// Which agent to start.
pub(crate) struct SiteOptions<'a> {
    /// Its site.
    pub(crate) name: &'static str,
    /// The end of the emulated link at which it runs.
    pub(crate) side: Side,
    pub(crate) wan: &'a Wan,
    /// The one site it knows, and where it dials that.
    pub(crate) peer: (&'static str, Option<String>),
}

/// A running agent. Dropping it kills the process and waits for its end.
pub(crate) struct Site {
    name: &'static str,
    dir: PathBuf,
    child: Arc<Mutex<Child>>,
    pid: u32,
    pub(crate) client: Client,
}

impl Site {
    /// Starts the agent and waits until it answers.
    pub(crate) async fn start(
        base: &Path,
        pki: &Path,
        reaper: &Reaper,
        options: SiteOptions<'_>,
    ) -> anyhow::Result<Self> {
        let name = options.name;
        let dir = base.join(name);
        let config = write_config(&dir, pki, &options).with_context(|| {
            format!("the agent of {name} cannot be set up in {}", dir.display())
        })?;
        let log =
            fs::File::create(dir.join("agent.log")).context("the agent's log cannot be made")?;
        let program = std::env::current_exe().context("this program does not find itself")?;
        let mut command = Command::new(program);
        command
            .arg("agent")
            .arg("--config")
            .arg(&config)
            .args(["--with-parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A Ctrl-C at the terminal goes to the demo alone, which then ends the agents in order.
            .process_group(0);
        options.wan.put_in(options.side, &mut command)?;
        let child = command
            .spawn()
            .context("the agent's process cannot be started")?;
        let site = Self {
            name,
            pid: child.id(),
            client: Client::new(dir.join("run/api.sock")),
            child: reaper.watch(child),
            dir,
        };
        site.wait_until_up().await?;
        Ok(site)
    }

    async fn wait_until_up(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_MAX;
        loop {
            match self.client.status().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(
                        self.explain(anyhow::Error::new(error).context("it does not answer"))
                    );
                }
                Err(_) => {}
            }
            if let Some(status) = self.lock().try_wait()? {
                return Err(self.explain(anyhow::anyhow!("it ended at once ({status})")));
            }
            tokio::time::sleep(START_POLL).await;
        }
    }

    /// The agent's status.
    pub(crate) async fn status(&self) -> anyhow::Result<Status> {
        self.client
            .status()
            .await
            .map_err(|error| self.explain(error))
    }

    /// Takes an image into its library, and waits until it can be used.
    pub(crate) async fn add_to_library(&self, path: &Path) -> anyhow::Result<()> {
        let request = AddLibraryImage {
            name: None,
            path: path.to_owned(),
            tenant: None,
            public: false,
            copy: false,
        };
        let added = self.client.add_library_image(&request).await;
        let mut added = added.map_err(|error| self.explain(error))?;
        while added.state == LibraryState::Scanning {
            tokio::time::sleep(SCAN_POLL).await;
            let asked = self.client.library_image(&added.name).await;
            added = asked.map_err(|error| self.explain(error))?;
        }
        match added.problem {
            None => Ok(()),
            Some(problem) => anyhow::bail!("{} cannot be used: {problem}", path.display()),
        }
    }

    /// Adds to an error which agent it was, whether it still runs, and the end of its log.
    pub(crate) fn explain(&self, error: impl Into<anyhow::Error>) -> anyhow::Error {
        let error = error.into();
        let ended = match self.lock().try_wait() {
            Ok(Some(status)) => format!(", whose process ended ({status})"),
            _ => String::new(),
        };
        let log = log_tail(&self.dir.join("agent.log"));
        let log = log.unwrap_or_else(|error| format!("(cannot be read: {error})"));
        let what = format!("the agent of {}{ended}: {error:#}", self.name);
        if log.is_empty() {
            return advise(what, "its log is empty");
        }
        advise(what, format!("the end of its log:\n{log}"))
    }

    /// Its process id.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Its site.
    pub(crate) const fn name(&self) -> &'static str {
        self.name
    }

    /// Where the demo puts images for it to import.
    pub(crate) fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// Ends the process now. Everything it has lies in the demo's directory, so nothing is lost.
    pub(crate) fn kill(&self) {
        kill(&self.child);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Knows every agent of the demo, so that all of them can be ended from outside of what runs it.
#[derive(Default)]
pub(crate) struct Reaper(Mutex<Vec<Arc<Mutex<Child>>>>);

impl Reaper {
    fn watch(&self, child: Child) -> Arc<Mutex<Child>> {
        let child = Arc::new(Mutex::new(child));
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&child));
        child
    }

    /// Ends all of them.
    pub(crate) fn kill(&self) {
        for child in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            kill(child);
        }
    }
}

fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    // An error means that it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kill();
    }
}

fn write_config(dir: &Path, pki: &Path, options: &SiteOptions<'_>) -> anyhow::Result<PathBuf> {
    let name = options.name;
    let (peer, address) = options.peer.clone();
    for sub in ["state", "images", "run"] {
        fs::create_dir_all(dir.join(sub))?;
    }
    let config = ConfigFile {
        site: name,
        state_dir: dir.join("state"),
        images_dir: dir.join("images"),
        runtime_dir: dir.join("run"),
        listen: format!("{}:0", options.wan.address(options.side)),
        check: false,
        tls: TlsFiles {
            ca: pki.join("ca.pem"),
            cert: pki.join(format!("{name}.pem")),
            key: pki.join(format!("{name}.key")),
        },
        peer: vec![PeerTable {
            site: peer,
            address,
            may_send: ["*"],
            may_receive: ["*"],
        }],
    };
    let path = dir.join("agent.toml");
    fs::write(&path, toml::to_string(&config)?)?;
    Ok(path)
}

fn log_tail(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}
