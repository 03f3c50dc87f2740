//! The running agent: what it has opened, and how it starts and stops.
//!
//! ```text
//!  start: directories → lock → certificates → records put right → volumes → exports → links → API → migrations go on
//!  stop:  API → migrations pause → links → exports → lock
//! ```
//! Whatever fails on the way up is said, and what was opened is closed again.

use flimcd_core::{SiteName, VolumeName};
use flimcd_link::{Endpoint, LinkConfig, TlsIdentity};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    Config,
    api::{LinkStatus, MigrationStatus, Status, server},
    check::Checks,
    dirs::{self, ApiSocket, StateLock},
    error::StartError,
    hosting::{Hosting, ImageLocks},
    library::Library,
    links::PeerLink,
    migration::{hooks::Sessions, progress::unix_ms, settle::settle_all, store::Store},
    plan::Plans,
    registry::Registry,
    replicate::Replications,
    vm::{
        CareState, Vms,
        session::{Moves, SessionStore},
    },
};

/// How long open API requests may take when the agent stops.
const API_GRACE: Duration = Duration::from_secs(2);

/// Everything that the parts of an agent share.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) hosting: Hosting,
    pub(crate) vms: Arc<Vms>,
    pub(crate) moves: Moves,
    pub(crate) moves_store: SessionStore,
    pub(crate) registry: Registry,
    pub(crate) library: Arc<Library>,
    pub(crate) plans: Plans,
    pub(crate) checks: Checks,
    pub(crate) replications: Replications,
    /// Those who move machines, and wait for what happens to their disks.
    pub(crate) sessions: Arc<Sessions>,
    endpoint: Endpoint,
    links: BTreeMap<SiteName, Arc<PeerLink>>,
    dialled: Mutex<BTreeSet<SiteName>>,
    stop: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    started_unix_ms: u64,
    listen: Option<SocketAddr>,
}

impl Agent {
    /// The link to a peer. Dials it from now on, if the configuration says where.
    pub(crate) fn link_to(&self, peer: &SiteName) -> Option<Arc<PeerLink>> {
        let link = self.links.get(peer)?;
        let address = self.config.peer(peer).and_then(|peer| peer.address.clone());
        let mut dialled = self.dialled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = address
            && dialled.insert(peer.clone())
            && let Err(error) = self.endpoint.link(peer, &address)
        {
            tracing::error!(%peer, "dialling failed: {error}");
        }
        Some(link.clone())
    }

    /// Tells drivers that the agent stops.
    pub(crate) fn stop_signal(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    /// Runs a task that the agent waits for when it stops.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(tokio::spawn(task));
    }

    async fn wait_for_tasks(&self) {
        loop {
            let task = self
                .tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            let Some(task) = task else { return };
            if let Err(error) = task.await {
                tracing::error!("a task of the agent has failed: {error}");
            }
        }
    }

    /// The agent and everything it has at hand.
    pub(crate) fn status(&self) -> Status {
        let mut last: BTreeMap<_, MigrationStatus> = BTreeMap::new();
        let mut migrations = Vec::new();
        for status in self.registry.statuses() {
            if status.phase.has_ended() {
                last.insert(status.volumes.clone(), status);
            } else {
                migrations.push(status);
            }
        }
        migrations.extend(last.into_values());
        migrations.sort_by_key(|status| (status.started_unix_ms, status.id));
        Status {
            site: self.config.site.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_unix_ms: self.started_unix_ms,
            listen: self.listen.map(|address| address.to_string()),
            links: self
                .links
                .values()
                .map(|link| self.link_status(link))
                .collect(),
            volumes: self.list_volumes(),
            migrations,
        }
    }

    fn link_status(&self, link: &PeerLink) -> LinkStatus {
        let handle = link.handle();
        let estimate = handle.estimate();
        let up = handle.status().is_up;
        LinkStatus {
            peer: link.peer().clone(),
            address: self
                .config
                .peer(link.peer())
                .and_then(|peer| peer.address.clone()),
            up,
            rate_bytes_per_sec: estimate.rate_bytes_per_sec,
            rtt_ms: estimate.rtt_min.map(|rtt| rtt.as_secs_f64() * 1000.0),
            bytes_sent: handle.bytes_sent(),
            bytes_received: handle.bytes_received(),
            last_error: handle
                .last_error()
                .filter(|_| !up)
                .map(|error| error.to_string()),
        }
    }
}

/// An agent that runs; made by [`start`].
pub struct RunningAgent {
    agent: Arc<Agent>,
    api: JoinHandle<()>,
    api_path: PathBuf,
    _api_socket: ApiSocket,
    routers: Vec<JoinHandle<()>>,
    _lock: StateLock,
}

impl std::fmt::Debug for RunningAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunningAgent")
            .field("site", &self.agent.config.site)
            .finish_non_exhaustive()
    }
}

/// Starts an agent. It runs on the current tokio runtime, which needs its threads: see [`run`].
///
/// # Errors
/// [`StartError`]; nothing of the agent is left then.
pub async fn start(config: Config) -> Result<RunningAgent, StartError> {
    dirs::make(&config)?;
    let lock = StateLock::take(&config.state_dir)?;
    let endpoint = Endpoint::new(link_config(&config)?)?;
    let (api_socket, api_listener) = ApiSocket::bind(config.api_socket())?;
    let directory = config.state_dir.join("migrations");
    let unusable = |source| StartError::Directory {
        what: "state_dir",
        path: directory.clone(),
        source,
    };
    let (store, records) = Store::open(directory.clone()).map_err(unusable)?;
    let vms = Vms::open(config.state_dir.join("vms")).map_err(unusable)?;
    let opened = SessionStore::open(config.state_dir.join("moves"));
    let (moves_store, moves) = opened.map_err(unusable)?;
    let hosting = {
        let (config, vms, records) = (config.clone(), vms.clone(), records.clone());
        // A panic here is a bug that is better seen.
        let opened = tokio::task::spawn_blocking(move || {
            settle_all(&config.state_dir.join("volumes"), &records)?;
            Hosting::open(&config, |volume| image_locks(&vms, volume))
        })
        .await;
        opened.map_err(|panic| unusable(std::io::Error::other(panic)))??
    };
    let images = config.state_dir.join("library");
    let library = Library::open(images.clone()).map_err(|source| StartError::Directory {
        what: "state_dir",
        path: images,
        source,
    })?;
    let schedules = config.state_dir.join("replications");
    let replications = Replications::open(schedules.clone());
    let replications = replications.map_err(|source| StartError::Directory {
        what: "state_dir",
        path: schedules,
        source,
    })?;
    let listen = match &config.listen {
        Some(address) => Some(endpoint.listen(address).await?),
        None => None,
    };
    let agent = Arc::new(Agent {
        links: endpoint
            .links()
            .map(|handle| (handle.peer().clone(), PeerLink::new(handle)))
            .collect(),
        config,
        store,
        hosting,
        vms,
        moves: Moves::default(),
        moves_store,
        registry: Registry::default(),
        library: Arc::new(library),
        plans: Plans::default(),
        checks: Checks::default(),
        replications,
        sessions: Arc::default(),
        endpoint,
        dialled: Mutex::default(),
        stop: watch::Sender::new(false),
        tasks: Mutex::default(),
        started_unix_ms: unix_ms(),
        listen,
    });
    agent.resume(records).await;
    agent.resume_vms();
    agent.resume_moves(moves).await;
    agent.resume_scans();
    agent.spawn(crate::heat::keep(agent.clone()));
    agent.spawn(crate::replicate::keep(agent.clone()));
    let routers = agent
        .links
        .values()
        .map(|link| tokio::spawn(link.clone().route(agent.clone())))
        .collect();
    let api_path = agent.config.api_socket();
    let api = tokio::spawn(serve_api(agent.clone(), api_listener));
    tracing::info!(
        site = %agent.config.site, listen = ?agent.listen.map(|address| address.to_string()),
        api = %api_path.display(), "the agent is ready"
    );
    Ok(RunningAgent {
        agent,
        api,
        api_path,
        _api_socket: api_socket,
        routers,
        _lock: lock,
    })
}

impl RunningAgent {
    /// Where peers reach it, if it listens.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.agent.listen
    }

    /// Socket of its API.
    #[must_use]
    pub fn api_socket(&self) -> &Path {
        &self.api_path
    }

    /// What runs.
    #[cfg(test)]
    pub(crate) fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    /// Stops it: migrations pause and go on after a restart, guests are disconnected, sockets are removed.
    pub async fn stop(self) {
        tracing::info!("the agent stops");
        self.agent.stop.send_replace(true);
        let mut api = self.api;
        if tokio::time::timeout(API_GRACE, &mut api).await.is_err() {
            api.abort();
        }
        self.agent.wait_for_tasks().await;
        self.agent.sessions.stop();
        self.agent.endpoint.stop();
        for router in self.routers {
            if let Err(error) = router.await {
                tracing::error!("the router of a link has failed: {error}");
            }
        }
        let agent = self.agent;
        let closed = tokio::task::spawn_blocking(move || agent.hosting.close()).await;
        if let Err(error) = closed {
            tracing::error!("closing the volumes failed: {error}");
        }
        tracing::info!("the agent has stopped");
    }
}

/// Runs an agent until SIGTERM or SIGINT. The runtime has to be a multi-threaded one.
///
/// # Errors
/// [`StartError`] when it does not start.
pub async fn run(config: Config) -> Result<(), StartError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    let agent = start(config).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    agent.stop().await;
    Ok(())
}

async fn serve_api(agent: Arc<Agent>, listener: UnixListener) {
    let mut stop = agent.stop_signal();
    let stopped = async move {
        // An error means that the agent is gone, which is a stop as well.
        let _ = stop.wait_for(|&stop| stop).await;
    };
    let served = axum::serve(listener, server::router(agent)).with_graceful_shutdown(stopped);
    if let Err(error) = served.await {
        tracing::error!("the API has failed: {error}");
    }
}

/// What a start does about the locks of a volume's image: a machine that was in the middle of being taken or given
/// back may have its QEMU on the image.
fn image_locks(vms: &Vms, volume: &VolumeName) -> ImageLocks {
    match vms.of_volume(volume).map(|record| record.state) {
        None => ImageLocks::Take,
        Some(CareState::InCare) => ImageLocks::TakeOrDoNotServe,
        Some(CareState::Adopting | CareState::Releasing) => ImageLocks::Leave,
    }
}

fn link_config(config: &Config) -> Result<LinkConfig, StartError> {
    let read = |key, path: &Path| {
        fs::read_to_string(path).map_err(|source| StartError::Certificate {
            key,
            path: path.to_owned(),
            site: config.site.clone(),
            source,
        })
    };
    let tls = TlsIdentity {
        ca_pem: read("ca", &config.tls.ca)?,
        cert_pem: read("cert", &config.tls.cert)?,
        key_pem: read("key", &config.tls.key)?,
    };
    let mut link = LinkConfig::new(config.site.clone(), tls);
    link.peers = config.peers.iter().map(|peer| peer.site.clone()).collect();
    link.ceiling_bytes_per_sec = config.limits.bandwidth.map(|rate| rate.0);
    Ok(link)
}
