//! Running the binary, and agents in a directory of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// A condition that takes longer than this will never come true.
const PATIENCE: Duration = Duration::from_secs(60);

/// The binary, with nothing of the tester's environment that it reads.
pub(crate) fn flimcd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flimcd"));
    command.env_remove("FLIMCD_API").stdin(Stdio::null());
    command
}

/// What a finished command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Said {
    /// Asserts that the command succeeded, and returns its standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.out
    }

    /// Asserts that it failed, and that its message has all of `parts`.
    #[track_caller]
    pub(crate) fn fails_with(self, parts: &[&str]) {
        assert!(!matches!(self.code, Some(0) | None), "{self:#?}");
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is missing in {self:#?}");
        }
        assert!(!self.err.contains("panicked"), "{self:#?}");
    }
}

/// Runs the binary to its end.
#[track_caller]
pub(crate) fn run(args: &[&str]) -> Said {
    flimcd().args(args).output().unwrap().into()
}

/// Waits until `condition` has a value.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {PATIENCE:?}"
        );
        // Polling, so that the processes that are waited for get the processor.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running agent; killed when dropped.
pub(crate) struct Agent {
    child: Child,
    pub(crate) dir: PathBuf,
}

impl Agent {
    /// Starts the agent of `dir/agent.toml` and waits until it answers.
    pub(crate) fn start(dir: &Path) -> Self {
        let log = fs::File::create(dir.join("agent.log")).unwrap();
        let child = flimcd()
            .args(["agent", "--config"])
            .arg(dir.join("agent.toml"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut agent = Self {
            child,
            dir: dir.to_owned(),
        };
        until("the agent's answer", || {
            if let Some(status) = agent.child.try_wait().unwrap() {
                panic!("the agent ended ({status}): {}", agent.log());
            }
            (agent.run(&["status"]).code == Some(0)).then_some(())
        });
        agent
    }

    /// Runs a command that talks to this agent.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        let socket = self.dir.join("run/api.sock");
        flimcd()
            .args(args)
            .env("FLIMCD_API", socket)
            .output()
            .unwrap()
            .into()
    }

    /// The same, with JSON as the answer.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.run(args).ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn stop(mut self) -> std::process::ExitStatus {
        signal(self.pid(), rustix::process::Signal::TERM);
        until("the agent's end", || self.child.try_wait().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process that the test started.
pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A directory with certificates for two sites.
pub(crate) struct Lab {
    pub(crate) dir: TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("flimcd-it-")
            .tempdir()
            .unwrap();
        let pki = dir.path().join("pki");
        let pki = pki.to_str().unwrap();
        run(&["pki", "init", "--dir", pki]).ok();
        for site in ["berlin", "lisbon"] {
            run(&["pki", "issue", site, "--dir", pki]).ok();
        }
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes the configuration of `site`, with the certificates of `identity`.
    pub(crate) fn configure(
        &self,
        site: &str,
        identity: &str,
        peer: &str,
        address: Option<&str>,
    ) -> PathBuf {
        let dir = self.path().join(site);
        fs::create_dir_all(&dir).unwrap();
        let address =
            address.map_or_else(String::new, |address| format!("address = \"{address}\"\n"));
        let text = format!(
            "site = \"{site}\"\nstate_dir = \"state\"\nruntime_dir = \"run\"\nlisten = \"127.0.0.1:0\"\n\
             [tls]\nca = \"../pki/ca.pem\"\ncert = \"../pki/{identity}.pem\"\nkey = \"../pki/{identity}.key\"\n\
             [[peer]]\nsite = \"{peer}\"\n{address}may_send = [\"*\"]\nmay_receive = [\"*\"]\n\
             [limits]\nreserve = 0\n"
        );
        fs::write(dir.join("agent.toml"), text).unwrap();
        dir
    }

    /// Two agents that know each other: the source dials the target.
    pub(crate) fn pair(&self) -> (Agent, Agent) {
        let target = Agent::start(&self.configure("lisbon", "lisbon", "berlin", None));
        let address = target.json(&["status", "--json"])["listen"]
            .as_str()
            .unwrap()
            .to_owned();
        let source = Agent::start(&self.configure("berlin", "berlin", "lisbon", Some(&address)));
        (source, target)
    }

    /// An image with holes, zeroes and content, of any size.
    pub(crate) fn image(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path().join(name);
        let options = flimcd_lab::image::ImageOptions {
            seed: size_bytes,
            size_bytes,
            ..Default::default()
        };
        flimcd_lab::image::create(&path, &options).unwrap();
        path
    }
}
