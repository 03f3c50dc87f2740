//! One agent's end of all its links: it listens, dials, and turns connections into bundles.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use flimcd_core::SiteName;
use flimcd_wire::{Hello, Refusal, RefusalCode};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    ConfigError, LinkConfig, LinkError, LinkHandle, ListenError, UnknownPeer,
    bucket::Bucket,
    config::BULK_CONNECTIONS_MAX,
    dial::Dialler,
    greet::{self, Greeted, TurnedAway},
    identity::Credentials,
    lane::{BULK, Lane},
    link::{Link, Origin},
    socket,
};

/// Connections in the handshake at once; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// Those of one host among them, so that one that only connects does not shut the others out.
const HANDSHAKES_PER_HOST_MAX: usize = 24;
/// Incomplete bundles of one peer; the oldest goes first.
const PENDING_MAX: usize = 2;
/// How long a bundle may stay incomplete.
const PENDING_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after accepting failed, for example for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a refusal that repeats itself is not logged again.
const REFUSAL_LOG_PAUSE: Duration = Duration::from_secs(60);
/// Bulk connections where the kernel has no BBR: with loss, several carry more than one.
const BULK_WITHOUT_BBR: u8 = 4;

/// One agent's end of all its links. Cheap to clone; stops when [`Endpoint::stop`] is called.
///
/// There is one [`LinkHandle`] per configured peer, whoever dials. Both sides may dial: the first
/// bundle that is complete is used, and nobody dials while the link is up.
#[derive(Clone)]
pub struct Endpoint(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) config: LinkConfig,
    pub(crate) credentials: Credentials,
    links: BTreeMap<SiteName, Arc<Link>>,
    pending: Mutex<HashMap<SiteName, Vec<Pending>>>,
    last_refusal: Mutex<Option<(String, Instant)>>,
    stop: watch::Sender<bool>,
}

/// A bundle of which some connections are there.
struct Pending {
    bundle: u64,
    since: Instant,
    lanes: Vec<Option<Lane>>,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("site", &self.0.config.site)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Checks the configuration and the certificates. No socket is opened yet.
    ///
    /// # Errors
    /// [`ConfigError`] says which setting is wrong.
    pub fn new(config: LinkConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let credentials = Credentials::new(&config.site, &config.tls)?;
        let link = |peer: &SiteName| {
            let bucket = Bucket::new(
                config.ceiling_bytes_per_sec,
                config.ceiling_includes_faults,
                Instant::now(),
            );
            let link = Link::new(&config.site, peer.clone(), config.silence_max, bucket);
            (peer.clone(), link)
        };
        let links = config.peers.iter().map(link).collect();
        Ok(Self(Arc::new(Shared {
            config,
            credentials,
            links,
            pending: Mutex::default(),
            last_refusal: Mutex::default(),
            stop: watch::Sender::new(false),
        })))
    }

    /// The links to all configured peers.
    pub fn links(&self) -> impl Iterator<Item = LinkHandle> + '_ {
        self.0.links.values().cloned().map(LinkHandle)
    }

    /// The link to one peer, whether up or not.
    ///
    /// # Errors
    /// [`UnknownPeer`] for a site that is not configured.
    pub fn peer(&self, site: &SiteName) -> Result<LinkHandle, UnknownPeer> {
        let link = self.0.links.get(site);
        link.cloned()
            .map(LinkHandle)
            .ok_or_else(|| UnknownPeer(site.clone()))
    }

    /// Accepts peers on `address` (`host:port`; port 0 lets the system choose) from now on, and says
    /// which address it became.
    ///
    /// # Errors
    /// [`ListenError`] when the address cannot be used.
    pub async fn listen(&self, address: &str) -> Result<SocketAddr, ListenError> {
        let failed = |source| ListenError {
            address: address.to_owned(),
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let (shared, mut stop) = (self.0.clone(), self.0.stop.subscribe());
        tokio::spawn(async move {
            tokio::select! {
                () = shared.accept(listener) => {}
                _ = stop.wait_for(|&stop| stop) => {}
            }
        });
        Ok(local)
    }

    /// Dials `peer` at `address` (`host:port`) whenever its link is down, until the endpoint stops or
    /// another address is given.
    ///
    /// # Errors
    /// [`UnknownPeer`] for a site that is not configured.
    pub fn link(&self, peer: &SiteName, address: &str) -> Result<LinkHandle, UnknownPeer> {
        let handle = self.peer(peer)?;
        let dialler = Dialler::new(self.0.clone(), handle.0.clone(), address.to_owned());
        let mut stop = self.0.stop.subscribe();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = dialler.run() => {}
                _ = stop.wait_for(|&stop| stop) => {}
            }
        });
        handle.0.set_dialler(task.abort_handle());
        Ok(handle)
    }

    /// Closes all links and stops listening and dialling.
    pub fn stop(&self) {
        self.0.stop.send_replace(true);
        for link in self.0.links.values() {
            link.stop();
        }
        self.0.pending().clear();
    }
}

impl Shared {
    /// How many connections a bundle gets that this side dials.
    pub(crate) fn lanes(&self) -> u8 {
        let default = if socket::has_bbr() {
            1
        } else {
            BULK_WITHOUT_BBR
        };
        BULK + self.config.bulk_connections.unwrap_or(default)
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<SiteName, Vec<Pending>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        // Dropped with this task, and the handshakes with it.
        let mut tasks = JoinSet::new();
        let mut of_host: HashMap<IpAddr, Arc<Semaphore>> = HashMap::new();
        loop {
            let Ok(permit) = handshakes.clone().acquire_owned().await else {
                return;
            };
            while tasks.try_join_next().is_some() {}
            of_host.retain(|_, free| free.available_permits() < HANDSHAKES_PER_HOST_MAX);
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("cannot accept connections: {error}; trying again");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let free = of_host
                .entry(from.ip())
                .or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES_PER_HOST_MAX)));
            let Ok(host_permit) = free.clone().try_acquire_owned() else {
                tracing::warn!(%from, "refused a connection: too many unfinished ones from there");
                continue;
            };
            let shared = self.clone();
            tasks.spawn(async move {
                let limit = shared.config.handshake_timeout;
                let result = timeout(limit, shared.receive(tcp)).await;
                drop((permit, host_permit));
                let error = match result {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error,
                    Err(_) => LinkError::HandshakeTimeout { after: limit },
                };
                shared.log_refusal(from.ip(), &error);
            });
        }
    }

    async fn receive(&self, tcp: TcpStream) -> Result<(), LinkError> {
        socket::prepare(&tcp, self.config.silence_max);
        let greeted = match greet::accept(tcp, self.credentials.server.clone()).await {
            Ok(greeted) => greeted,
            Err(TurnedAway { site, error }) => {
                return Err(self.note_turned_away(site.as_ref(), error));
            }
        };
        let hello = greeted.hello.clone();
        let link = match self.admit(&hello) {
            Ok(link) => link,
            Err(refusal) => {
                let error = greeted.refuse(refusal).await;
                return Err(self.note_turned_away(Some(&hello.site), error));
            }
        };
        let lane = Greeted::welcome(greeted, &self.config.site, &link.traffic).await;
        self.collect(&link, &hello, lane?);
        Ok(())
    }

    /// Lets the link of a peer that is known say why it is not up.
    fn note_turned_away(&self, site: Option<&SiteName>, error: LinkError) -> LinkError {
        if let Some(link) = site.and_then(|site| self.links.get(site)) {
            link.note_turned_away(error.clone());
        }
        error
    }

    /// Logs a refusal, but not the same one over and over: diallers come back every two seconds.
    fn log_refusal(&self, from: IpAddr, error: &LinkError) {
        let text = format!("refused a connection from {from}: {error}");
        let mut last = self
            .last_refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_new = last
            .as_ref()
            .is_none_or(|(old, at)| *old != text || at.elapsed() > REFUSAL_LOG_PAUSE);
        if is_new {
            tracing::warn!("{text}");
            *last = Some((text, Instant::now()));
        } else {
            tracing::debug!("{text}");
        }
    }

    fn admit(&self, hello: &Hello) -> Result<Arc<Link>, Refusal> {
        let Some(link) = self.links.get(&hello.site) else {
            return Err(Refusal {
                code: RefusalCode::Site,
                text: format!(
                    "site {} does not know site {}; add it to the peers in its configuration",
                    self.config.site, hello.site
                ),
            });
        };
        let lanes_max = BULK + BULK_CONNECTIONS_MAX;
        if hello.lane >= hello.lanes || !(BULK + 1..=lanes_max).contains(&hello.lanes) {
            return Err(Refusal {
                code: RefusalCode::Bundle,
                text: format!(
                    "a link has {} to {lanes_max} connections; this is number {} of {}",
                    BULK + 1,
                    hello.lane,
                    hello.lanes
                ),
            });
        }
        Ok(link.clone())
    }

    /// Keeps a connection until its bundle is complete.
    fn collect(&self, link: &Arc<Link>, hello: &Hello, lane: Lane) {
        let mut all = self.pending();
        let now = Instant::now();
        let pending = all.entry(hello.site.clone()).or_default();
        pending.retain(|other| now.duration_since(other.since) < PENDING_TIMEOUT);
        let known = pending
            .iter()
            .position(|other| other.bundle == hello.bundle);
        let at = known.unwrap_or_else(|| {
            if pending.len() >= PENDING_MAX {
                pending.remove(0);
            }
            pending.push(Pending {
                bundle: hello.bundle,
                since: now,
                lanes: (0..hello.lanes).map(|_| None).collect(),
            });
            pending.len() - 1
        });
        if let Some(place) = pending[at].lanes.get_mut(usize::from(hello.lane)) {
            *place = Some(lane);
        }
        if pending[at].lanes.iter().all(Option::is_some) {
            let lanes = pending.remove(at).lanes.into_iter().flatten().collect();
            // Incomplete ones are older attempts of the same dialler.
            all.remove(&hello.site);
            drop(all);
            link.install(lanes, Origin::Accepted);
        }
    }
}
