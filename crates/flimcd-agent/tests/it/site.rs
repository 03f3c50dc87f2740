//! Sites for tests: a directory, certificates, a configuration, and an agent in this process or another.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use flimcd_agent::{
    Config, RunningAgent, StartError,
    api::{Client, MigrateRequest, MigrationStatus, Phase, Strategy, Switchover},
};
use flimcd_core::VolumeName;
use tempfile::TempDir;

/// Environment variable that makes this test binary an agent.
pub(crate) const CHILD_CONFIG: &str = "FLIMCD_TEST_AGENT_CONFIG";

/// A deadline for conditions that come by themselves: far more than they take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two sites that know each other, with a certificate authority.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) source: Site,
    pub(crate) target: Site,
}

/// One site.
pub(crate) struct Site {
    pub(crate) name: &'static str,
    root: PathBuf,
    pki: PathBuf,
    /// What the configuration says beside directories and certificates.
    pub(crate) listen: Option<String>,
    pub(crate) peers: String,
    pub(crate) extra: String,
    pub(crate) images_dir: Option<PathBuf>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        flimcd_link::pki::create_ca(&pki, false).unwrap();
        for site in ["alpha", "beta"] {
            flimcd_link::pki::issue(&pki, &site.parse().unwrap(), false).unwrap();
        }
        let site = |name: &'static str, listen: Option<&str>, peer: &str| Site {
            name,
            root: dir.path().join(name),
            pki: pki.clone(),
            listen: listen.map(str::to_owned),
            peers: peer_table(peer, None),
            extra: String::new(),
            images_dir: None,
        };
        Self {
            source: site("alpha", None, "beta"),
            target: site("beta", Some("127.0.0.1:0"), "alpha"),
            dir,
        }
    }

    /// Starts both agents in this process; the source knows where the target listens.
    pub(crate) async fn start(&mut self) -> (RunningAgent, RunningAgent) {
        let target = self.target.start().await.unwrap();
        self.source.peers = peer_table("beta", Some(&target.listen_address().unwrap().to_string()));
        // After a restart at the same address.
        self.target.listen = Some(target.listen_address().unwrap().to_string());
        (self.source.start().await.unwrap(), target)
    }
}

/// A `[[peer]]` table that allows everything.
pub(crate) fn peer_table(site: &str, address: Option<&str>) -> String {
    let address = address.map_or_else(String::new, |address| format!("address = \"{address}\"\n"));
    format!("[[peer]]\nsite = \"{site}\"\n{address}may_send = [\"*\"]\nmay_receive = [\"*\"]\n")
}

impl Site {
    /// The configuration as text.
    pub(crate) fn config_text(&self) -> String {
        let listen = self.listen.as_ref();
        let listen = listen.map_or_else(String::new, |at| format!("listen = \"{at}\"\n"));
        let images = self.images_dir.as_ref();
        let images = images.map_or_else(String::new, |at| format!("images_dir = {at:?}\n"));
        format!(
            "site = \"{name}\"\nstate_dir = {state:?}\nruntime_dir = {runtime:?}\n{images}{listen}\n\
             [tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n\n{peers}\n[limits]\nreserve = 0\n{extra}",
            name = self.name,
            state = self.root.join("state"),
            runtime = self.root.join("run"),
            ca = self.pki.join("ca.pem"),
            cert = self.pki.join(format!("{}.pem", self.name)),
            key = self.pki.join(format!("{}.key", self.name)),
            peers = self.peers,
            extra = self.extra,
        )
    }

    pub(crate) fn config(&self) -> Config {
        Config::parse(&self.config_text(), Path::new("/test/agent.toml")).unwrap()
    }

    /// Starts an agent in this process.
    pub(crate) async fn start(&self) -> Result<RunningAgent, StartError> {
        flimcd_agent::start(self.config()).await
    }

    /// Starts an agent as a process of its own, and waits until it answers.
    pub(crate) async fn start_process(&self) -> Process {
        fs::create_dir_all(&self.root).unwrap();
        let path = self.root.join("agent.toml");
        fs::write(&path, self.config_text()).unwrap();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.root.join("agent.log"))
            .unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "agent_process", "--nocapture"])
            .env(CHILD_CONFIG, &path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut process = Process {
            child,
            client: self.client(),
            log: self.root.join("agent.log"),
        };
        let client = process.client.clone();
        let pid = process.child.id();
        until("the agent answers", async || {
            assert!(
                process.child.try_wait().unwrap().is_none(),
                "{}",
                process.log_text()
            );
            matches!(client.status().await, Ok(status) if status.pid == pid)
        })
        .await;
        process
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.root.join("run/api.sock"))
    }

    pub(crate) fn socket(&self, volume: &str) -> PathBuf {
        self.root.join(format!("run/{volume}.sock"))
    }

    pub(crate) fn image(&self, volume: &str) -> PathBuf {
        let images = self.images_dir.clone();
        images
            .unwrap_or_else(|| self.root.join("state/images"))
            .join(format!("{volume}.raw"))
    }

    #[allow(dead_code, reason = "the tests in the crate do not look there")]
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.root.join("state")
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.root.join("run")
    }
}

/// An agent in a process of its own.
pub(crate) struct Process {
    child: Child,
    pub(crate) client: Client,
    log: PathBuf,
}

impl Process {
    /// Kills it as `kill -9` does, or stops it gently, and waits until it is gone.
    pub(crate) async fn end(&mut self, gently: bool) {
        if gently {
            let pid = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        } else {
            self.child.kill().unwrap();
        }
        let mut status = None;
        until("the agent has ended", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        assert!(
            !gently || status.is_some_and(|status| status.success()),
            "{status:?}"
        );
    }

    pub(crate) fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.log.display(), self.log_text());
        }
    }
}

/// Waits for a condition that comes by itself.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !condition().await {
        assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

/// A request with a strategy.
pub(crate) fn to_beta(strategy: Strategy, switchover: Switchover) -> MigrateRequest {
    MigrateRequest {
        to: "beta".parse().unwrap(),
        strategy,
        bandwidth_bytes_per_sec: None,
        switchover,
        compress: None,
        library: None,
        keep_replica: None,
        check: None,
    }
}

/// Waits until the last migration of `volume` ends, as `client`'s agent sees it.
pub(crate) async fn ended(client: &Client, volume: &str) -> MigrationStatus {
    let mut last = None;
    until("the migration has ended", async || {
        let Ok(all) = client.migrations().await else {
            return false;
        };
        last = all
            .into_iter()
            .rfind(|status| status.volumes.contains(&name(volume)));
        last.as_ref().is_some_and(|status| status.phase.has_ended())
    })
    .await;
    last.unwrap()
}

/// Waits until the migration of `volume` is in `phase`, or has ended.
pub(crate) async fn in_phase(client: &Client, volume: &str, phase: Phase) -> MigrationStatus {
    let mut last = None;
    until("the migration is in a phase", async || {
        let Ok(all) = client.migrations().await else {
            return false;
        };
        last = all
            .into_iter()
            .rfind(|status| status.volumes.contains(&name(volume)));
        last.as_ref()
            .is_some_and(|status| status.phase == phase || status.phase.has_ended())
    })
    .await;
    last.unwrap()
}
