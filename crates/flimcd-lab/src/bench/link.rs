//! The link between two agents over an emulated WAN: goodput of bulk, and how long a fault takes
//! beside it.
//!
//! ```text
//!  target ── Demand, class Fault ──► source          every 20 ms, whether or not the last came back
//!         ◄── Blocks, 4 KiB, class Fault ──
//!         ◄══ Blocks, 64 KiB, class Bulk ══          as much as the link takes; does not compress
//! ```
//! Both ends are real endpoints with their own certificates, each on a runtime of its own in its own
//! network namespace, with the TUN router between them. Where namespaces cannot be had, the TCP relay
//! takes its place; loss is then not modelled, and the report says so.
//!
//! Three measurements follow each other on one link: faults alone; bulk and faults without pacing, as
//! before a switchover; bulk and faults with pacing, as while guests can fault.

use std::{
    collections::HashMap,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use flimcd_core::{BLOCK_SIZE, BlockRange, CHUNK_SIZE, MigrationId, Seq};
use flimcd_link::{
    ConfigError, Endpoint, LinkConfig, LinkEvent, LinkHandle, ListenError, TlsIdentity,
    UnknownPeer,
    pki::{self, PkiError},
};
use flimcd_wire::{Blocks, Class, Content, Entry, Frame, Message, Runs};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    rng::Rng,
    wan::{
        LinkModel, Side,
        relay::{Relay, RelayError, RelayOptions, Route},
        tun::{NamespaceError, NamespaceLab, NamespaceOptions},
    },
};

/// Faults on the idle link, one after the other.
const IDLE_FAULTS: usize = 60;
/// Pause between two faults beside bulk: 50 a second take 0.8% of 200 Mbit/s.
const FAULT_EVERY: Duration = Duration::from_millis(20);
/// Time that bulk gets to reach its speed, and to settle after pacing was switched on.
const SETTLE: Duration = Duration::from_secs(3);
/// How long the last faults may take to come back.
const STRAGGLERS: Duration = Duration::from_secs(10);
/// How long the link may take to come up.
const UP: Duration = Duration::from_secs(20);
/// Different payloads, so that nothing on the way could profit from repetition.
const PAYLOADS: usize = 16;

/// What to measure.
#[derive(Clone, Debug)]
pub struct LinkBenchOptions {
    /// Links to emulate, one after the other.
    pub models: Vec<LinkModel>,
    /// Length of each of the two measurements with bulk.
    pub duration: Duration,
    /// Bulk connections; `None` for the product's default.
    pub bulk_connections: Option<u8>,
    /// Decides what is lost.
    pub seed: u64,
}

impl Default for LinkBenchOptions {
    /// The links that the project's figures are stated for.
    fn default() -> Self {
        let mut lossy = LinkModel::new(200_000_000, Duration::from_millis(40));
        lossy.loss = 0.001;
        Self {
            models: vec![
                LinkModel::new(200_000_000, Duration::from_millis(40)),
                lossy,
                LinkModel::new(1_000_000_000, Duration::from_millis(20)),
            ],
            duration: Duration::from_secs(15),
            bulk_connections: None,
            seed: 1,
        }
    }
}

/// All measurements.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkBenchReport {
    /// One per link.
    pub cases: Vec<LinkBenchCase>,
}

/// What was measured on one link.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkBenchCase {
    /// The link, as text.
    pub link: String,
    /// `tun` or `relay`.
    pub front_end: String,
    /// What the front end could not emulate; empty if it could do all of it.
    pub not_modelled: String,
    /// Rate of the link in bytes per second, headers included.
    pub rate_bytes_per_sec: f64,
    /// Its round trip.
    pub rtt_ms: f64,
    /// Congestion control of the bulk connections.
    pub congestion_control: String,
    /// Faults on the idle link.
    pub idle_fault: Latency,
    /// Bulk and faults without pacing.
    pub unpaced: UnderBulk,
    /// Bulk and faults with pacing.
    pub paced: UnderBulk,
    /// Packets that the emulator handed over too late: if there are many, the machine was too busy
    /// and the figures mean little.
    pub late_packets: u64,
}

/// One measurement beside bulk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UnderBulk {
    /// Content that arrived in bulk frames, bytes per second.
    pub goodput_bytes_per_sec: f64,
    /// That divided by the link's rate.
    pub goodput_share: f64,
    /// What the source's link took for the path's rate at the end, bytes per second.
    pub estimate_bytes_per_sec: Option<u64>,
    /// Faults meanwhile.
    pub fault: Latency,
}

/// How long faults took, from the demand to the last byte of the answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Faults answered.
    pub count: usize,
    /// Faults without an answer.
    pub lost: usize,
    /// Median.
    pub p50_ms: f64,
    /// 99 of 100 took at most this long.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latency {
    fn new(mut took: Vec<Duration>, lost: usize) -> Self {
        took.sort_unstable();
        let at = |percent: usize| {
            let index = (took.len() * percent).div_ceil(100).saturating_sub(1);
            took.get(index)
                .map_or(f64::NAN, |took| took.as_secs_f64() * 1e3)
        };
        Self {
            count: took.len(),
            lost,
            p50_ms: at(50),
            p99_ms: at(99),
            max_ms: at(100),
        }
    }
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum LinkBenchError {
    /// The TUN router does not start, for another reason than missing rights.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The relay does not start.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// Certificates could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// An endpoint could not be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An endpoint cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// An endpoint does not know the other one.
    #[error(transparent)]
    Peer(#[from] UnknownPeer),
    /// A thread, runtime or file could not be had.
    #[error("cannot set the benchmark up: {0}")]
    Io(#[from] io::Error),
    /// The link did not come up, or broke.
    #[error("the link over the emulated WAN failed: {0}")]
    Link(String),
}

/// Measures every link of `options`; `progress` gets each case as it is done.
///
/// # Errors
/// [`LinkBenchError`] of the first case that failed.
pub fn run(
    options: &LinkBenchOptions,
    mut progress: impl FnMut(&LinkBenchCase),
) -> Result<LinkBenchReport, LinkBenchError> {
    let mut cases = Vec::new();
    for model in &options.models {
        let case = run_case(*model, options)?;
        progress(&case);
        cases.push(case);
    }
    Ok(LinkBenchReport { cases })
}

fn run_case(model: LinkModel, options: &LinkBenchOptions) -> Result<LinkBenchCase, LinkBenchError> {
    let directory = tempfile::tempdir()?;
    pki::create_ca(directory.path(), false)?;
    let source = config(directory.path(), "source", "target", options)?;
    let target = config(directory.path(), "target", "source", options)?;
    let namespace_options = NamespaceOptions {
        seed: options.seed,
        ..NamespaceOptions::new(model)
    };
    match NamespaceLab::new(&namespace_options) {
        Ok(lab) => {
            let listen = format!("{}:0", NamespaceLab::address(Side::B));
            let (source, target) = ends(source, target, listen, options.duration);
            let target = lab.run_in(Side::B, move || target.run())?;
            let source = lab.run_in(Side::A, move || source.run(Ok))?;
            let measured = joined(target.join())?;
            let congestion_control = joined(source.join())?;
            let late = lab.counters().late;
            Ok(measured.into_case(model, "tun", String::new(), congestion_control, late))
        }
        Err(error @ (NamespaceError::NotAllowed(_) | NamespaceError::NoTun(_))) => {
            let listen = format!("{}:0", Ipv4Addr::LOCALHOST);
            let (source, target) = ends(source, target, listen, options.duration);
            let (keep, kept) = mpsc::channel();
            let seed = options.seed;
            let target = thread::spawn(move || target.run());
            let source = thread::spawn(move || {
                source.run(|target| {
                    let relay = relay(model, target, seed)?;
                    let address = relay.addresses()[0];
                    // The relay lives as long as the receiver of this channel.
                    let _ = keep.send(relay);
                    Ok(address)
                })
            });
            let measured = joined(target.join())?;
            let congestion_control = joined(source.join())?;
            let missing = kept
                .try_recv()
                .ok()
                .and_then(|relay| relay.cannot_model().map(str::to_owned));
            let note = format!("{}; {error}", missing.unwrap_or_default());
            Ok(measured.into_case(model, "relay", note, congestion_control, 0))
        }
        Err(error) => Err(error.into()),
    }
}

fn joined<T>(result: thread::Result<Result<T, LinkBenchError>>) -> Result<T, LinkBenchError> {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn relay(model: LinkModel, target: SocketAddr, seed: u64) -> Result<Relay, LinkBenchError> {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let route = Route {
        listen,
        target,
        from: Side::A,
    };
    Ok(Relay::start(&RelayOptions {
        model,
        routes: vec![route],
        seed,
    })?)
}

fn config(
    directory: &Path,
    name: &str,
    peer: &str,
    options: &LinkBenchOptions,
) -> Result<LinkConfig, LinkBenchError> {
    let site = |name: &str| name.parse().expect("a constant name");
    let issued = pki::issue(directory, &site(name), false)?;
    let tls = TlsIdentity {
        ca_pem: fs::read_to_string(directory.join("ca.pem"))?,
        cert_pem: fs::read_to_string(issued.certificate)?,
        key_pem: fs::read_to_string(issued.key)?,
    };
    let mut config = LinkConfig::new(site(name), tls);
    config.peers = vec![site(peer)];
    config.bulk_connections = options.bulk_connections;
    Ok(config)
}

/// What the source does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It answers demands.
    Idle,
    /// And sends bulk.
    Bulk { is_paced: bool },
    /// All is measured.
    Done,
}

/// Both ends, connected for what is outside of the link.
fn ends(
    source: LinkConfig,
    target: LinkConfig,
    listen: String,
    duration: Duration,
) -> (Source, Target) {
    let (phase, phases) = watch::channel(Phase::Idle);
    let (address, addresses) = mpsc::channel();
    let estimate = Arc::new(AtomicU64::new(0));
    let target = Target {
        config: target,
        listen,
        address,
        phase,
        duration,
        estimate: Arc::clone(&estimate),
    };
    let source = Source {
        config: source,
        addresses,
        phases,
        estimate,
    };
    (source, target)
}

/// A runtime on the calling thread, so that all sockets belong to its namespace.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

async fn up(link: &LinkHandle) -> Result<(), LinkBenchError> {
    let failed = |what: &str| {
        let why = link.last_error().map(|error| error.to_string());
        LinkBenchError::Link(why.unwrap_or_else(|| what.to_owned()))
    };
    match tokio::time::timeout(UP, link.next_event()).await {
        Ok(Some(LinkEvent::Up { .. })) => Ok(()),
        Ok(_) => Err(failed("it did not come up")),
        Err(_) => Err(failed("it did not come up in time")),
    }
}

/// The end that has the blocks.
struct Source {
    config: LinkConfig,
    addresses: mpsc::Receiver<SocketAddr>,
    phases: watch::Receiver<Phase>,
    /// For the target to look at; 0 for none.
    estimate: Arc<AtomicU64>,
}

impl Source {
    /// `way` says how the target's address is reached. Returns the congestion control.
    fn run(
        self,
        way: impl FnOnce(SocketAddr) -> Result<SocketAddr, LinkBenchError>,
    ) -> Result<String, LinkBenchError> {
        let target = self.addresses.recv();
        let target = target.map_err(|_| LinkBenchError::Link("the target ended".into()))?;
        let address = way(target)?;
        runtime()?.block_on(self.serve(address))
    }

    async fn serve(self, address: SocketAddr) -> Result<String, LinkBenchError> {
        let peer = self.config.peers[0].clone();
        let endpoint = Endpoint::new(self.config)?;
        let link = endpoint.link(&peer, &address.to_string())?;
        up(&link).await?;
        let bulk = tokio::spawn(send_bulk(link.clone(), self.phases.clone()));
        let mut phases = self.phases;
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let payload = payloads(1, BLOCK_SIZE).remove(0);
        while *phases.borrow_and_update() != Phase::Done {
            tokio::select! {
                event = link.next_event() => match event {
                    Some(LinkEvent::Frame { frame, .. }) => answer(&link, frame, &payload).await?,
                    Some(LinkEvent::Up { .. }) => {}
                    Some(LinkEvent::Down { reason, .. }) => {
                        return Err(LinkBenchError::Link(reason.to_string()));
                    }
                    None => break,
                },
                _ = phases.changed() => {}
                _ = tick.tick() => {
                    let rate = link.estimate().rate_bytes_per_sec.unwrap_or(0);
                    self.estimate.store(rate, Ordering::Relaxed);
                }
            }
        }
        bulk.abort();
        let congestion_control = link.congestion_control().unwrap_or_default();
        endpoint.stop();
        Ok(congestion_control)
    }
}

async fn answer(link: &LinkHandle, frame: Frame, payload: &Bytes) -> Result<(), LinkBenchError> {
    let Message::Demand { runs } = frame.message else {
        return Ok(());
    };
    for range in runs.iter() {
        let answer = blocks(range, Class::Fault, payload.clone());
        let sent = link.send(answer).await;
        sent.map_err(|error| LinkBenchError::Link(error.to_string()))?;
    }
    Ok(())
}

async fn send_bulk(link: LinkHandle, mut phases: watch::Receiver<Phase>) {
    let payloads = payloads(PAYLOADS, CHUNK_SIZE);
    let per_chunk = CHUNK_SIZE / BLOCK_SIZE;
    let mut block = 0;
    loop {
        let phase = *phases.borrow_and_update();
        match phase {
            Phase::Idle => {
                if phases.changed().await.is_err() {
                    return;
                }
            }
            Phase::Bulk { is_paced } => {
                link.set_pacing(is_paced);
                for payload in &payloads {
                    let range = BlockRange::new(block, block + per_chunk);
                    if link
                        .send(blocks(range, Class::Bulk, payload.clone()))
                        .await
                        .is_err()
                    {
                        return;
                    }
                    block += per_chunk;
                }
            }
            Phase::Done => return,
        }
    }
}

fn blocks(range: BlockRange, class: Class, payload: Bytes) -> Frame {
    let len = u32::try_from(payload.len()).expect("payloads are short");
    let entry = Entry {
        range,
        content: Content::Raw { len },
    };
    Frame {
        migration: MigrationId(1),
        class,
        message: Message::Blocks(Blocks {
            seq: Seq(range.start),
            entries: vec![entry],
            payload,
        }),
    }
}

/// Bytes that do not compress.
fn payloads(count: usize, len: u64) -> Vec<Bytes> {
    let mut rng = Rng::new(7);
    let mut make = || {
        let words = (0..len / 8).flat_map(|_| rng.next_u64().to_le_bytes());
        Bytes::from(words.collect::<Vec<u8>>())
    };
    (0..count).map(|_| make()).collect()
}

/// The end whose guest waits.
struct Target {
    config: LinkConfig,
    listen: String,
    address: mpsc::Sender<SocketAddr>,
    phase: watch::Sender<Phase>,
    duration: Duration,
    estimate: Arc<AtomicU64>,
}

/// What the target has received and waits for.
#[derive(Default)]
struct Received {
    bulk_bytes: u64,
    /// Block and time of each demand without an answer.
    waiting: HashMap<u64, Instant>,
    took: Vec<Duration>,
    failure: Option<String>,
}

type Shared = Arc<Mutex<Received>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Received> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Target {
    fn run(self) -> Result<Measured, LinkBenchError> {
        runtime()?.block_on(self.measure())
    }

    async fn measure(self) -> Result<Measured, LinkBenchError> {
        let peer = self.config.peers[0].clone();
        let endpoint = Endpoint::new(self.config)?;
        let address = endpoint.listen(&self.listen).await?;
        let link = endpoint.peer(&peer)?;
        let _ = self.address.send(address);
        up(&link).await?;
        let received = Shared::default();
        let receiver = tokio::spawn(receive(link.clone(), Arc::clone(&received)));
        let mut run = Run {
            link,
            received,
            next_block: 1 << 30,
        };
        let idle_fault = run.idle().await?;
        let mut under_bulk = Vec::new();
        for is_paced in [false, true] {
            let _ = self.phase.send(Phase::Bulk { is_paced });
            tokio::time::sleep(SETTLE).await;
            let (goodput, fault) = run.under_bulk(self.duration).await?;
            let estimate = self.estimate.load(Ordering::Relaxed);
            under_bulk.push((goodput, (estimate > 0).then_some(estimate), fault));
        }
        receiver.abort();
        let _ = self.phase.send(Phase::Done);
        Ok(Measured {
            idle_fault,
            under_bulk,
        })
    }
}

async fn receive(link: LinkHandle, received: Shared) {
    while let Some(event) = link.next_event().await {
        let mut received = lock(&received);
        match event {
            LinkEvent::Frame { frame, .. } => {
                let Message::Blocks(blocks) = frame.message else {
                    continue;
                };
                if frame.class == Class::Bulk {
                    received.bulk_bytes += blocks.payload.len() as u64;
                } else if let Some(sent) = received.waiting.remove(&blocks.seq.0) {
                    received.took.push(sent.elapsed());
                }
            }
            LinkEvent::Down { reason, .. } => received.failure = Some(reason.to_string()),
            LinkEvent::Up { .. } => {}
        }
    }
}

/// The target's side of the measurements.
struct Run {
    link: LinkHandle,
    received: Shared,
    next_block: u64,
}

impl Run {
    async fn idle(&mut self) -> Result<Latency, LinkBenchError> {
        for _ in 0..IDLE_FAULTS {
            self.demand().await?;
            self.wait_for_answers().await?;
        }
        Ok(self.latency())
    }

    /// Goodput in bytes per second, and faults.
    async fn under_bulk(&mut self, duration: Duration) -> Result<(f64, Latency), LinkBenchError> {
        let (begun, before) = (Instant::now(), lock(&self.received).bulk_bytes);
        let mut tick = tokio::time::interval(FAULT_EVERY);
        while begun.elapsed() < duration {
            tick.tick().await;
            self.demand().await?;
        }
        let bytes = lock(&self.received).bulk_bytes - before;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let goodput = bytes as f64 / begun.elapsed().as_secs_f64();
        self.wait_for_answers().await?;
        Ok((goodput, self.latency()))
    }

    async fn demand(&mut self) -> Result<(), LinkBenchError> {
        let block = self.next_block;
        self.next_block += 1;
        lock(&self.received).waiting.insert(block, Instant::now());
        let frame = Frame {
            migration: MigrationId(1),
            class: Class::Fault,
            message: Message::Demand {
                runs: Runs::new([BlockRange::new(block, block + 1)]),
            },
        };
        let sent = self.link.send(frame).await;
        sent.map_err(|error| LinkBenchError::Link(error.to_string()))
    }

    async fn wait_for_answers(&self) -> Result<(), LinkBenchError> {
        let begun = Instant::now();
        while begun.elapsed() < STRAGGLERS && !lock(&self.received).waiting.is_empty() {
            if let Some(failure) = lock(&self.received).failure.take() {
                return Err(LinkBenchError::Link(failure));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    fn latency(&self) -> Latency {
        let mut received = lock(&self.received);
        let lost = received.waiting.len();
        received.waiting.clear();
        Latency::new(std::mem::take(&mut received.took), lost)
    }
}

/// What the target measured.
struct Measured {
    idle_fault: Latency,
    /// Goodput, estimate and faults without and with pacing.
    under_bulk: Vec<(f64, Option<u64>, Latency)>,
}

impl Measured {
    fn into_case(
        self,
        model: LinkModel,
        front_end: &str,
        not_modelled: String,
        congestion_control: String,
        late_packets: u64,
    ) -> LinkBenchCase {
        #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
        let rate = model.rate_bytes_per_sec() as f64;
        let mut under_bulk = self
            .under_bulk
            .into_iter()
            .map(|(goodput, estimate, fault)| UnderBulk {
                goodput_bytes_per_sec: goodput,
                goodput_share: goodput / rate,
                estimate_bytes_per_sec: estimate,
                fault,
            });
        let (Some(unpaced), Some(paced)) = (under_bulk.next(), under_bulk.next()) else {
            unreachable!("both were measured")
        };
        LinkBenchCase {
            link: model.to_string(),
            front_end: front_end.to_owned(),
            not_modelled,
            rate_bytes_per_sec: rate,
            rtt_ms: model.rtt().as_secs_f64() * 1e3,
            congestion_control,
            idle_fault: self.idle_fault,
            unpaced,
            paced,
            late_packets,
        }
    }
}
