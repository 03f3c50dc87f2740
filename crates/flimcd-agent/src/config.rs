//! The agent's configuration: a TOML file, checked as a whole before anything is opened.
//!
//! `docs/agent.example.toml` shows every key. Unknown keys are refused, so that a mistyped key is
//! not a silent default. Each message names the file, the key, and what to write instead.

mod units;

use flimcd_core::{SiteName, VolumeName};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

pub use units::{ByteCount, ByteRate};

/// Longest path that a unix socket may have, without the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {} cannot be read: {source}; name the right file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML, or has unknown, missing or mistyped keys.
    #[error("the configuration {} is not valid: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What does not fit, and where.
        source: Box<toml::de::Error>,
    },
    /// A value is impossible.
    #[error("the configuration {}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
}

/// A checked configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this site.
    pub site: SiteName,
    /// Durable state of volumes.
    pub state_dir: PathBuf,
    /// Where images of created and arriving volumes are kept; see [`Config::images_dir`].
    images_dir: Option<PathBuf>,
    /// Sockets of the API and of the exports.
    pub runtime_dir: PathBuf,
    /// Address that peers connect to, `HOST:PORT`.
    pub listen: Option<String>,
    /// Certificates.
    pub tls: Tls,
    /// Sites that this one deals with.
    #[serde(default, rename = "peer")]
    pub peers: Vec<Peer>,
    /// How machines that arrive are started.
    #[serde(default, rename = "machine")]
    pub machines: Vec<Machine>,
    /// Whether, after a migration, the copy that stays here is compared with what arrived; yes if left out.
    #[serde(default = "yes")]
    pub check: bool,
    /// Bounds on what the agent takes.
    #[serde(default)]
    pub limits: Limits,
    /// What is logged and how.
    #[serde(default)]
    pub log: Log,
}

const fn yes() -> bool {
    true
}

/// Files of the agent's identity, PEM.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Certificate of the authority that signed all agents' certificates.
    pub ca: PathBuf,
    /// This agent's certificate, for the name `site`.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A site that this one deals with.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name.
    pub site: SiteName,
    /// Where it listens, `HOST:PORT`.
    pub address: Option<String>,
    /// Volumes it may send here: names or patterns with `*`.
    #[serde(default)]
    pub may_send: Vec<String>,
    /// Volumes that may go there: names or patterns with `*`.
    #[serde(default)]
    pub may_receive: Vec<String>,
}

/// How machines that arrive are started.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Machines that it is for: names or patterns with `*`. The first table that fits is taken.
    pub vms: Vec<String>,
    /// The command: program and arguments, with placeholders as `docs/agent.example.toml` explains them.
    #[serde(default)]
    pub command: Vec<String>,
    /// Instead of a command: the monitor of a machine that somebody else starts.
    pub qmp: Option<PathBuf>,
}

/// Where the machine of a VM that arrives comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineSource {
    /// It is started with this command.
    Command(Vec<String>),
    /// Somebody starts it, with its monitor at this path.
    Awaited(PathBuf),
}

impl Machine {
    fn check(&self) -> Result<(), String> {
        self.vms
            .iter()
            .try_for_each(|pattern| check_pattern(pattern))?;
        if let Some(qmp) = &self.qmp {
            if !self.command.is_empty() {
                return Err(
                    "either `command` or `qmp`: the machine is started by the agent, or by you"
                        .to_owned(),
                );
            }
            if !qmp.is_absolute() {
                return Err(format!("qmp = {qmp:?} is not an absolute path"));
            }
            return Ok(());
        }
        for needed in ["{control}", "{blockdevs}"] {
            if !self.command.iter().any(|argument| argument == needed) {
                return Err(format!(
                    "the command lacks the argument {needed:?}; without it the agent cannot steer the machine and give \
                     it its disks"
                ));
            }
        }
        Ok(())
    }

    fn source_of(&self, vm: &VolumeName) -> MachineSource {
        match &self.qmp {
            Some(qmp) => {
                let path = qmp.to_string_lossy().replace("{name}", vm.as_str());
                MachineSource::Awaited(path.into())
            }
            None => MachineSource::Command(self.command.clone()),
        }
    }
}

/// Bounds on what the agent takes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Ceiling on what is sent to one peer.
    pub bandwidth: Option<ByteRate>,
    /// Whether volumes may arrive that would not fit if they were not sparse.
    #[serde(default)]
    pub overcommit: bool,
    /// Room that copies of volumes that have moved away may take together; without it they stay until they are dropped.
    pub replicas: Option<ByteCount>,
    /// Room that arriving volumes leave free; see [`Limits::reserve_bytes`].
    reserve: Option<ByteCount>,
}

impl Limits {
    /// Room on the images' file system that arriving volumes must leave free; 256 MiB by default.
    #[must_use]
    pub fn reserve_bytes(&self) -> u64 {
        self.reserve.map_or(256 << 20, |count| count.0)
    }
}

/// What is logged and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Level, or directives as `tracing-subscriber` has them.
    pub filter: String,
    /// Text or JSON.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// Reads and checks the file at `path`. Relative paths in it count from the file's directory.
    ///
    /// # Errors
    /// [`ConfigError`], with the file and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a configuration that came from `path`.
    ///
    /// # Errors
    /// [`ConfigError`], with the file and the key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let base = std::path::absolute(path)
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned))
            .unwrap_or_default();
        config.resolve_paths(&base);
        config
            .check()
            .map_err(|(key, problem)| ConfigError::Value {
                path: path.to_owned(),
                key,
                problem,
            })?;
        Ok(config)
    }

    /// Where images of created and arriving volumes are kept.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.images_dir
            .clone()
            .unwrap_or_else(|| self.state_dir.join("images"))
    }

    /// Socket of the API.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.runtime_dir.join("api.sock")
    }

    /// Socket of a volume's export.
    #[must_use]
    pub fn export_socket(&self, name: &VolumeName) -> PathBuf {
        self.runtime_dir.join(format!("{name}.sock"))
    }

    /// Where a machine of this name comes from when it arrives.
    #[must_use]
    pub fn machine_for(&self, vm: &VolumeName) -> Option<MachineSource> {
        let machine = self
            .machines
            .iter()
            .find(|machine| matches_any(&machine.vms, vm));
        machine.map(|machine| machine.source_of(vm))
    }

    /// The peer of that name.
    #[must_use]
    pub fn peer(&self, site: &SiteName) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.site == *site)
    }

    fn resolve_paths(&mut self, base: &Path) {
        for path in [
            &mut self.state_dir,
            &mut self.runtime_dir,
            &mut self.tls.ca,
            &mut self.tls.cert,
            &mut self.tls.key,
        ]
        .into_iter()
        .chain(self.images_dir.as_mut())
        {
            *path = base.join(&*path);
        }
    }

    fn check(&self) -> Result<(), (String, String)> {
        let api = self.api_socket();
        if api.as_os_str().len() > SOCKET_PATH_MAX {
            let problem = format!(
                "the API's socket {} would have a path longer than the {SOCKET_PATH_MAX} bytes \
                 that a unix socket may have; choose a shorter directory",
                api.display()
            );
            return Err(("runtime_dir".into(), problem));
        }
        if let Some(listen) = &self.listen {
            resolve(listen).map_err(|problem| ("listen".to_owned(), problem))?;
        }
        let mut seen = BTreeSet::from([&self.site]);
        for peer in &self.peers {
            let key = |key: &str| format!("peer {}: {key}", peer.site);
            if peer.site == self.site {
                let problem = "this is the agent's own site; a peer is another one".to_owned();
                return Err((key("site"), problem));
            }
            if !seen.insert(&peer.site) {
                let problem = "the site has two tables; put everything into one".to_owned();
                return Err((key("site"), problem));
            }
            if let Some(address) = &peer.address {
                check_address(address).map_err(|problem| (key("address"), problem))?;
            }
            for (list, patterns) in [
                ("may_send", &peer.may_send),
                ("may_receive", &peer.may_receive),
            ] {
                for pattern in patterns {
                    check_pattern(pattern).map_err(|problem| (key(list), problem))?;
                }
            }
        }
        for machine in &self.machines {
            machine
                .check()
                .map_err(|problem| ("machine".to_owned(), problem))?;
        }
        if self.limits.bandwidth.is_some_and(|rate| rate.0 < 1024) {
            let problem = "less than 1 KiB/s would never end; write for example \"200 Mbit/s\"";
            return Err(("limits.bandwidth".into(), problem.into()));
        }
        Ok(())
    }
}

impl Peer {
    /// Whether it may send the volume `name` here.
    #[must_use]
    pub fn allows_sending(&self, name: &VolumeName) -> bool {
        matches_any(&self.may_send, name)
    }

    /// Whether the volume `name` may go there.
    #[must_use]
    pub fn allows_receiving(&self, name: &VolumeName) -> bool {
        matches_any(&self.may_receive, name)
    }
}

fn matches_any(patterns: &[String], name: &VolumeName) -> bool {
    patterns
        .iter()
        .any(|pattern| matches_pattern(pattern.as_bytes(), name.as_str().as_bytes()))
}

/// Whether `text` fits `pattern`, in which `*` stands for any text.
fn matches_pattern(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((after_star, from)) = retry {
            retry = Some((after_star, from + 1));
            p = after_star;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

fn check_pattern(pattern: &str) -> Result<(), String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.*".contains(&byte);
    if pattern.is_empty() || !pattern.bytes().all(fits) {
        return Err(format!(
            "{pattern:?} is neither a volume's name nor a pattern; use letters, digits, '-', '_', \
             '.', and '*' for any text"
        ));
    }
    Ok(())
}

fn check_address(address: &str) -> Result<(), String> {
    let port = address
        .rsplit_once(':')
        .map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(port)) if port > 0 => Ok(()),
        _ => Err(format!(
            "{address:?} is not an address; write HOST:PORT, for example \"lisbon.example:7411\""
        )),
    }
}

/// The address to listen on.
pub(crate) fn resolve(listen: &str) -> Result<SocketAddr, String> {
    let hint = "write ADDRESS:PORT, for example \"0.0.0.0:7411\"";
    match listen.to_socket_addrs() {
        Ok(mut found) => found
            .next()
            .ok_or_else(|| format!("{listen:?} has no address; {hint}")),
        Err(error) => Err(format!("{listen:?} is not an address ({error}); {hint}")),
    }
}

#[cfg(test)]
mod tests;
