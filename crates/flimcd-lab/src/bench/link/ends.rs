//! Both ends of the measured link: a source that answers demands and sends bulk, and a target that
//! demands and measures. Each runs on a runtime of its own.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use flimcd_core::{BLOCK_SIZE, BlockRange, CHUNK_SIZE, MigrationId, Seq};
use flimcd_link::{Endpoint, LinkConfig, LinkEvent, LinkHandle};
use flimcd_wire::{Blocks, Class, Content, Entry, Frame, Message, Runs};
use tokio::sync::watch;

use super::{Latency, LinkBenchError};
use crate::rng::Rng;

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
pub(super) fn ends(
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
pub(super) struct Source {
    config: LinkConfig,
    addresses: mpsc::Receiver<SocketAddr>,
    phases: watch::Receiver<Phase>,
    /// For the target to look at; 0 for none.
    estimate: Arc<AtomicU64>,
}

impl Source {
    /// `way` says how the target's address is reached. Returns the congestion control.
    pub(super) fn run(
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
pub(super) struct Target {
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
    pub(super) fn run(self) -> Result<Measured, LinkBenchError> {
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
pub(super) struct Measured {
    pub(super) idle_fault: Latency,
    /// Goodput, estimate and faults without and with pacing.
    pub(super) under_bulk: Vec<(f64, Option<u64>, Latency)>,
}
