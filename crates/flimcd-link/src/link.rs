//! The link to one peer: what outlives its bundles, and the handle through which it is used.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flimcd_core::SiteName;
use flimcd_wire::{Class, Frame};
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
};

use crate::{
    LinkError, LinkEvent, SendError,
    bucket::Bucket,
    bundle,
    inbox::Inbox,
    lane::{Lane, Traffic},
    outbox::{Outbox, slot},
    pacer::Pacer,
    socket,
};

/// What is known of a link's path.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkEstimate {
    /// Bytes per second that it carries towards the peer; `None` until enough was sent to tell.
    pub rate_bytes_per_sec: Option<u64>,
    /// Least round trip of the connections in use.
    pub rtt_min: Option<Duration>,
    /// Bytes of bulk that this side's kernel holds and has not sent yet, plus what waits in the queues.
    pub unsent_bytes: u64,
}

/// Whether a link is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// Number of the last bundle of connections, 0 before the first.
    pub generation: u64,
    /// Whether that bundle stands.
    pub is_up: bool,
}

/// Measurements of a link.
pub(crate) struct Meter {
    pub(crate) pacer: Pacer,
    pub(crate) rtt_min: Option<Duration>,
    pub(crate) unsent_bytes: u64,
}

/// See the module. Locks are held for a moment each, one at a time except where noted.
pub(crate) struct Link {
    pub(crate) peer: SiteName,
    /// Which of two bundles is kept when both sides dialled at once: the one that the site with the
    /// lesser name dialled. True on that site.
    pub(crate) has_precedence: bool,
    pub(crate) silence_max: Duration,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) outbox: Outbox,
    pub(crate) traffic: Traffic,
    sent_by_class: [AtomicU64; Class::ALL.len()],
    bucket: Mutex<Bucket>,
    meter: Mutex<Meter>,
    failure: Mutex<Option<LinkError>>,
    congestion: Mutex<Option<String>>,
    dialler: Mutex<Option<AbortHandle>>,
    /// Taken before any other lock of the link while bundles come and go.
    active: Mutex<Active>,
    pub(crate) status: watch::Sender<LinkStatus>,
}

#[derive(Default)]
struct Active {
    generation: u64,
    is_stopped: bool,
    /// The bundle in use.
    bundle: Option<InUse>,
}

struct InUse {
    origin: Origin,
    since: Instant,
    /// Tells it why it has to end.
    ending: Ending,
}

/// Who set a bundle up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// This side.
    Dialled,
    /// The peer.
    Accepted,
}

/// Two bundles that come up within this time were dialled by both sides at once.
const CROSSED: Duration = Duration::from_secs(2);

struct Ending {
    reason: Arc<Mutex<Option<LinkError>>>,
    now: Arc<Notify>,
}

impl Ending {
    fn end(self, reason: LinkError) {
        *lock(&self.reason) = Some(reason);
        self.now.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its data whole, so a panic elsewhere does no harm here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(crate) fn new(
        site: &SiteName,
        peer: SiteName,
        silence_max: Duration,
        bucket: Bucket,
    ) -> Arc<Self> {
        Arc::new(Self {
            has_precedence: site < &peer,
            peer,
            silence_max,
            inbox: Arc::new(Inbox::new()),
            outbox: Outbox::new(),
            traffic: Traffic::default(),
            sent_by_class: Default::default(),
            bucket: Mutex::new(bucket),
            meter: Mutex::new(Meter {
                pacer: Pacer::new(),
                rtt_min: None,
                unsent_bytes: 0,
            }),
            failure: Mutex::new(None),
            congestion: Mutex::new(None),
            dialler: Mutex::new(None),
            active: Mutex::default(),
            status: watch::Sender::default(),
        })
    }

    pub(crate) fn bucket(&self) -> MutexGuard<'_, Bucket> {
        lock(&self.bucket)
    }

    pub(crate) fn meter(&self) -> MutexGuard<'_, Meter> {
        lock(&self.meter)
    }

    pub(crate) fn count_sent(&self, class: Class, bytes: usize) {
        self.sent_by_class[slot(class)].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Keeps why the link is not up, and logs it once.
    pub(crate) fn fail(&self, error: LinkError) {
        let mut failure = lock(&self.failure);
        let text = error.to_string();
        if failure.as_ref().is_none_or(|old| old.to_string() != text) {
            tracing::warn!(peer = %self.peer, "link: {text}");
        }
        *failure = Some(error);
    }

    /// Keeps why a connection of the peer was turned away, unless the link is up all the same.
    pub(crate) fn note_turned_away(&self, error: LinkError) {
        if !self.status.borrow().is_up {
            self.fail(error);
        }
    }

    /// Notes who dials now; the one before ends.
    pub(crate) fn set_dialler(&self, dialler: AbortHandle) {
        if let Some(old) = lock(&self.dialler).replace(dialler) {
            old.abort();
        }
    }

    /// Puts a complete bundle to use, in place of the one there may be. When both sides dialled at
    /// once, both see both bundles and keep the same one.
    pub(crate) fn install(self: &Arc<Self>, lanes: Vec<Lane>, origin: Origin) {
        let mut active = lock(&self.active);
        let is_preferred = |origin| (origin == Origin::Dialled) == self.has_precedence;
        let is_crossed = active.bundle.as_ref().is_some_and(|old| {
            is_preferred(old.origin) && !is_preferred(origin) && old.since.elapsed() < CROSSED
        });
        if active.is_stopped || is_crossed {
            return;
        }
        self.retire(&mut active, LinkError::Replaced);
        active.generation += 1;
        let generation = active.generation;
        let ending = Ending {
            reason: Arc::default(),
            now: Arc::default(),
        };
        let (reason, now) = (ending.reason.clone(), ending.now.clone());
        active.bundle = Some(InUse {
            origin,
            since: Instant::now(),
            ending,
        });
        *lock(&self.congestion) = lanes
            .last()
            .map(|lane| socket::congestion_control(&lane.tcp));
        *lock(&self.failure) = None;
        self.meter().pacer.restart();
        self.status.send_replace(LinkStatus {
            generation,
            is_up: true,
        });
        self.inbox.up(generation);
        tracing::info!(peer = %self.peer, generation, connections = lanes.len(), ?origin, "link is up");
        let link = self.clone();
        tokio::spawn(async move {
            let error = tokio::select! {
                error = bundle::run(link.clone(), generation, lanes) => error,
                () = now.notified() => lock(&reason).take().unwrap_or(LinkError::Closed),
            };
            link.end(generation, error);
        });
    }

    /// The bundle of `generation` has ended by itself, or was told to.
    fn end(&self, generation: u64, error: LinkError) {
        let mut active = lock(&self.active);
        if active.generation == generation && active.bundle.is_some() {
            self.fail(error.clone());
            self.retire(&mut active, error);
        }
    }

    /// Ends the bundle in use, if there is one.
    fn retire(&self, active: &mut Active, reason: LinkError) {
        let Some(bundle) = active.bundle.take() else {
            return;
        };
        let generation = active.generation;
        tracing::info!(peer = %self.peer, generation, %reason, "link is down");
        self.outbox.close();
        // Before the event, so that whoever has seen the event sees the status as well.
        self.status.send_replace(LinkStatus {
            generation,
            is_up: false,
        });
        self.inbox.down(generation, reason.clone());
        bundle.ending.end(reason);
    }

    /// Ends the bundle and takes no other.
    pub(crate) fn stop(&self) {
        let mut active = lock(&self.active);
        active.is_stopped = true;
        self.retire(&mut active, LinkError::Stopped);
        self.inbox.stop();
    }
}

/// A link to one peer, cheap to clone. All clones are the same link.
///
/// # Events
/// [`LinkHandle::next_event`] hands each event out once, whichever clone asks. Somebody must keep
/// asking: frames wait in bounded queues, one per class, and a full queue holds its senders up.
///
/// # Sending
/// Frames are queued per class and sent by the connection of that class: faults and control have
/// one each; RAM, prefetch and bulk share the others, in this order. Control and RAM keep their order,
/// prefetch and bulk too with a single bulk connection. Faults may overtake each other, because they
/// use control's connection as well. Between classes there is no order.
/// What is queued or under way when the link goes down is gone.
///
/// A frame is taken only while the link is up *and* its `Up` was handed out. Where frames come from
/// several tasks, an answer to something of an old generation could still slip into a new one: use
/// [`LinkHandle::try_send_in`] there.
#[derive(Clone)]
pub struct LinkHandle(pub(crate) Arc<Link>);

impl std::fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let status = self.status();
        f.debug_struct("LinkHandle")
            .field("peer", &self.0.peer)
            .field("status", &status)
            .finish_non_exhaustive()
    }
}

impl LinkHandle {
    /// The site at the other end.
    #[must_use]
    pub fn peer(&self) -> &SiteName {
        &self.0.peer
    }

    /// The next event, `None` after the endpoint was stopped. Cancel-safe.
    pub async fn next_event(&self) -> Option<LinkEvent> {
        let event = self.0.inbox.next().await?;
        if let LinkEvent::Up { generation } = event {
            // Under the lock, so that a generation that just ended is not opened again.
            let active = lock(&self.0.active);
            if active.generation == generation && active.bundle.is_some() {
                self.0.outbox.open(generation);
            }
        }
        Some(event)
    }

    /// Queues a frame, waiting for room in its class. Cancel-safe: it is queued or not.
    ///
    /// # Errors
    /// [`SendError::Down`] at once when the link is down or goes down meanwhile.
    ///
    /// # Panics
    /// When the frame is larger than a frame may be, as [`flimcd_wire::encode`] does.
    pub async fn send(&self, frame: Frame) -> Result<(), SendError> {
        let mut frame = frame;
        let Some(generation) = self.0.outbox.generation() else {
            return Err(SendError::Down);
        };
        loop {
            let class = frame.class;
            match self.0.outbox.push(Some(generation), frame) {
                Err(SendError::Full(back)) => frame = *back,
                result => return result,
            }
            tokio::select! {
                () = self.0.outbox.room(class) => {}
                () = self.generation_ended(generation) => return Err(SendError::Down),
            }
        }
    }

    /// Queues a frame if its class has room.
    ///
    /// # Errors
    /// [`SendError::Full`] gives the frame back; [`SendError::Down`] does not.
    ///
    /// # Panics
    /// As [`LinkHandle::send`].
    pub fn try_send(&self, frame: Frame) -> Result<(), SendError> {
        self.0.outbox.push(None, frame)
    }

    /// As [`LinkHandle::try_send`], but only if the link is still in this generation.
    ///
    /// # Errors
    /// As there; [`SendError::Down`] for another generation.
    ///
    /// # Panics
    /// As [`LinkHandle::send`].
    pub fn try_send_in(&self, generation: u64, frame: Frame) -> Result<(), SendError> {
        self.0.outbox.push(Some(generation), frame)
    }

    /// Whether a frame of this class would be taken now.
    #[must_use]
    pub fn has_room(&self, class: Class) -> bool {
        self.0.outbox.has_room(class)
    }

    /// Waits until a frame of this class would be taken; for ever if the link stays down. Cancel-safe.
    pub async fn wait_room(&self, class: Class) {
        self.0.outbox.room(class).await;
    }

    /// Whether the link is up, as of now. Events may still say otherwise.
    #[must_use]
    pub fn status(&self) -> LinkStatus {
        *self.0.status.borrow()
    }

    /// Why the link is not up, or why it last failed to be set up; `None` while it is up.
    #[must_use]
    pub fn last_error(&self) -> Option<LinkError> {
        lock(&self.0.failure).clone()
    }

    /// What is known of the path.
    #[must_use]
    pub fn estimate(&self) -> LinkEstimate {
        let queued = self.0.outbox.queued_bytes() as u64;
        let meter = self.0.meter();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive rate; the cast saturates"
        )]
        let rate_bytes_per_sec = meter.pacer.estimate().map(|rate| rate as u64);
        LinkEstimate {
            rate_bytes_per_sec,
            rtt_min: meter.rtt_min,
            unsent_bytes: meter.unsent_bytes + queued,
        }
    }

    /// While on, bulk is sent a little more slowly than the path carries, so that its queues stay empty
    /// and a fault takes a round trip and not more. Switch it on while guests can fault.
    pub fn set_pacing(&self, is_on: bool) {
        self.0.meter().pacer.set_on(is_on);
    }

    /// Changes the ceiling on what is sent, in bytes per second. Values below 16 kB/s are raised to that.
    pub fn set_ceiling(&self, bytes_per_sec: Option<u64>) {
        let rate = bytes_per_sec.map(|rate| rate.max(crate::config::CEILING_MIN));
        self.0.bucket().set_rate(rate, Instant::now());
    }

    /// Bytes written to this link's connections since the endpoint began, TLS included.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.0.traffic.sent.load(Ordering::Relaxed)
    }

    /// Bytes read from this link's connections since the endpoint began, TLS included.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        self.0.traffic.received.load(Ordering::Relaxed)
    }

    /// Bytes of frames of one class handed to the connections since the endpoint began, without TLS.
    #[must_use]
    pub fn bytes_sent_of(&self, class: Class) -> u64 {
        self.0.sent_by_class[slot(class)].load(Ordering::Relaxed)
    }

    /// Congestion control of the bulk connections (`bbr`, `cubic`, …); `None` before the first bundle.
    #[must_use]
    pub fn congestion_control(&self) -> Option<String> {
        lock(&self.0.congestion).clone()
    }

    async fn generation_ended(&self, generation: u64) {
        let mut status = self.0.status.subscribe();
        // An error means that the link itself is gone.
        let _ = status
            .wait_for(|status| status.generation != generation || !status.is_up)
            .await;
    }
}
