//! A bundle of connections at work: per lane a reader and a writer, and for all of them a keeper that
//! pings and a sampler that measures and paces. The first that fails ends the bundle.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::BytesMut;
use flimcd_wire::{Body, Class, Encoded, Frame, FrameDecoder, LinkMessage};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    LinkError,
    inbox::Stale,
    lane::{self, BULK, CONTROL, FAULTS, GATHERED_MAX, Lane, READ_BYTES, RECORD_BYTES},
    link::Link,
    pacer::Sample,
    socket,
};

/// How often the kernel is asked how the connections fare.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
/// Unsent data in the kernel, as time at the estimated rate: enough for the runtime to wake up.
const UNSENT_TIME_SECS: f64 = 0.004;
const UNSENT_MAX: u32 = 1 << 20;
/// RAM and bulk frames that wait in the outbox, as time at the estimated rate.
const QUEUED_TIME_SECS: f64 = 0.010;
/// How long a lane leaves a fault to the other one.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Pings within the longest silence.
const PINGS: u32 = 4;

/// What the tasks of one bundle share.
struct Bundle {
    link: Arc<Link>,
    generation: u64,
    lanes: Vec<Lane>,
    born: Instant,
    /// When something last came from the peer, in milliseconds since `born`.
    heard_ms: AtomicU64,
    /// The control lane's reader waits for the consumer, so that silence says nothing.
    is_held_up: AtomicBool,
    /// A bulk lane found nothing to send, or had to wait for the user's ceiling.
    was_starved: AtomicBool,
}

/// Runs a bundle until it fails; then its connections are closed.
pub(crate) async fn run(link: Arc<Link>, generation: u64, lanes: Vec<Lane>) -> LinkError {
    let bundle = Arc::new(Bundle {
        link,
        generation,
        lanes,
        born: Instant::now(),
        heard_ms: AtomicU64::new(0),
        is_held_up: AtomicBool::new(false),
        was_starved: AtomicBool::new(true),
    });
    let mut tasks = JoinSet::new();
    for index in 0..bundle.lanes.len() {
        let (reader, writer) = (bundle.clone(), bundle.clone());
        tasks.spawn(async move { reader.read(index).await });
        tasks.spawn(async move { writer.write(index).await });
    }
    let (keeper, sampler) = (bundle.clone(), bundle.clone());
    tasks.spawn(async move { Err(keeper.keep().await) });
    tasks.spawn(async move { sampler.watch().await });
    // Dropping this on the way out closes every connection; until then data that nobody will wait
    // for must not leave.
    let _closing = Closing(&bundle);
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    LinkError::Closed
}

struct Closing<'a>(&'a Bundle);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        for lane in &self.0.lanes {
            lane.discard_on_close();
        }
    }
}

impl Bundle {
    /// Ends without an error when the generation is over.
    async fn read(&self, index: usize) -> Result<(), LinkError> {
        let lane = &self.lanes[index];
        let mut decoder = FrameDecoder::new();
        let mut scratch = vec![0; READ_BYTES];
        lane.take_early(decoder.buffer())?;
        loop {
            loop {
                let before = decoder.buffer().len();
                let Some(body) = decoder.poll()? else { break };
                let bytes = before - decoder.buffer().len();
                match body {
                    Body::Link(message) => self.handle_link_message(lane, message)?,
                    Body::Frame(frame) => {
                        if self.deliver(lane, frame, bytes).await? == Err(Stale) {
                            return Ok(());
                        }
                    }
                }
            }
            reserve(decoder.buffer());
            lane.read(&mut scratch, decoder.buffer(), &self.link.traffic)
                .await?;
            self.hear();
        }
    }

    async fn deliver(
        &self,
        lane: &Lane,
        frame: Frame,
        bytes: usize,
    ) -> Result<Result<(), Stale>, LinkError> {
        if !lane::classes(lane.index).contains(&frame.class) {
            return Err(LinkError::WrongLane {
                class: class_name(frame.class),
                lane: lane.index,
            });
        }
        let pushed = self.link.inbox.push(self.generation, frame, bytes);
        if lane.index != CONTROL {
            return Ok(pushed.await);
        }
        self.is_held_up.store(true, Ordering::Relaxed);
        let result = pushed.await;
        self.is_held_up.store(false, Ordering::Relaxed);
        self.hear();
        Ok(result)
    }

    fn handle_link_message(&self, lane: &Lane, message: LinkMessage) -> Result<(), LinkError> {
        if lane.index != CONTROL {
            return Err(LinkError::WrongLane {
                class: "link",
                lane: lane.index,
            });
        }
        if let LinkMessage::Ping(number) = message {
            self.link.outbox.push_link(LinkMessage::Pong(number));
        }
        Ok(())
    }

    fn hear(&self) {
        self.heard_ms.store(self.age_ms(), Ordering::Relaxed);
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Sends what the lane carries, most urgent first, each frame chosen when the socket has room.
    async fn write(&self, index: usize) -> Result<(), LinkError> {
        let lane = &self.lanes[index];
        let (outbox, traffic) = (&self.link.outbox, &self.link.traffic);
        if lane.index < BULK {
            socket::keep_short(&lane.tcp);
        }
        loop {
            lane.writable().await?;
            if lane.index == CONTROL {
                while let Some(message) = outbox.pop_link() {
                    lane.write(&[message], false, traffic).await?;
                }
            }
            let Some((class, bytes)) = outbox.peek(self.generation, lane.index) else {
                self.starve(lane);
                outbox.work(lane.index).await;
                continue;
            };
            if class == Class::Fault && self.fault_lane(bytes) != lane.index {
                outbox.wake_lane(CONTROL + FAULTS - lane.index);
                // The other lane may see it differently by now, or have become busy: look again soon.
                tokio::select! {
                    () = sleep(LOOK_AGAIN) => {}
                    () = outbox.work(lane.index) => {}
                }
                continue;
            }
            let wait = self.link.bucket().wait(class, Instant::now());
            if !wait.is_zero() {
                self.starve(lane);
                // Something more urgent may come meanwhile, and pings always pass.
                tokio::select! {
                    () = sleep(wait) => {}
                    () = outbox.work(lane.index) => {}
                }
                continue;
            }
            // Another lane may have been faster.
            let Some(frame) = outbox.pop(self.generation, class) else {
                continue;
            };
            self.count(class, &frame);
            let mut frames = vec![frame];
            let mut more_follows = false;
            if lane.index >= BULK {
                self.gather(lane, &mut frames);
                // Of a long frame one packet in many is not full, which is not worth a word to the kernel.
                let is_small = frames.iter().map(Encoded::len).sum::<usize>() <= RECORD_BYTES;
                more_follows = is_small && outbox.peek(self.generation, lane.index).is_some();
            }
            lane.write(&frames, more_follows, traffic).await?;
        }
    }

    fn count(&self, class: Class, frame: &Encoded) {
        self.link.bucket().spend(class, frame.len());
        self.link.count_sent(class, frame.len());
    }

    /// Adds to `frames` what comes next on the lane, as long as all of it fits one record and may go now.
    fn gather(&self, lane: &Lane, frames: &mut Vec<Encoded>) {
        let mut room = RECORD_BYTES.saturating_sub(frames[0].len());
        while frames.len() < GATHERED_MAX {
            let Some((class, bytes)) = self.link.outbox.peek(self.generation, lane.index) else {
                return;
            };
            if bytes > room || !self.link.bucket().wait(class, Instant::now()).is_zero() {
                return;
            }
            // Another lane may have taken that one, and the one behind it may be longer.
            let outbox = &self.link.outbox;
            let Some(frame) = outbox.pop_within(self.generation, class, room) else {
                return;
            };
            self.count(class, &frame);
            room -= frame.len();
            frames.push(frame);
        }
    }

    /// Which lane a fault of `bytes` goes by: the one that can send it at once and has nothing to send
    /// again, which would hold up what follows; of two such the one with less under way, so that a lost
    /// packet holds up few; when in doubt, the faults' own.
    fn fault_lane(&self, bytes: usize) -> u8 {
        let [faults, control] = [FAULTS, CONTROL].map(|index| {
            let info = socket::tcp_info(&self.lanes[usize::from(index)].tcp)?;
            let packets = bytes.div_ceil(info.packet_bytes as usize);
            let is_ready = info.is_in_order && info.unsent_bytes == 0;
            (is_ready && info.room as usize >= packets).then_some(info.in_flight)
        });
        match (faults, control) {
            (None, Some(_)) => CONTROL,
            (Some(faults), Some(control)) if control < faults => CONTROL,
            _ => FAULTS,
        }
    }

    /// Nothing may go on `lane` now.
    fn starve(&self, lane: &Lane) {
        lane.push();
        if lane.index >= BULK {
            self.was_starved.store(true, Ordering::Relaxed);
        }
    }

    /// Pings, and ends when the peer was silent for too long.
    async fn keep(&self) -> LinkError {
        let silence_max = self.link.silence_max;
        let mut ticks = interval(silence_max / PINGS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut number = 0;
        loop {
            ticks.tick().await;
            number += 1;
            self.link.outbox.push_link(LinkMessage::Ping(number));
            if self.is_held_up.load(Ordering::Relaxed) {
                self.hear();
            }
            let silence = self.age_ms() - self.heard_ms.load(Ordering::Relaxed).min(self.age_ms());
            if u128::from(silence) >= silence_max.as_millis() {
                return LinkError::Silent { after: silence_max };
            }
        }
    }

    /// Measures, and sets the pace of the bulk lanes.
    async fn watch(&self) -> Result<(), LinkError> {
        let mut ticks = interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut applied = Applied::default();
        loop {
            ticks.tick().await;
            self.sample();
            self.apply(&mut applied);
        }
    }

    fn sample(&self) {
        let (mut delivered_bytes, mut unsent_bytes) = (0, 0);
        let (mut rtt, mut rtt_min) = (Duration::ZERO, None);
        for lane in &self.lanes {
            let Some(info) = socket::tcp_info(&lane.tcp) else {
                continue;
            };
            rtt_min = match (rtt_min, info.rtt_min) {
                (Some(a), Some(b)) => Some(Duration::min(a, b)),
                (a, b) => a.or(b),
            };
            if lane.index >= BULK {
                delivered_bytes += info.delivered_bytes;
                unsent_bytes += info.unsent_bytes;
                rtt = rtt.max(info.rtt);
            }
        }
        let was_starved = self.was_starved.swap(false, Ordering::Relaxed);
        let mut meter = self.link.meter();
        meter.rtt_min = rtt_min.or(meter.rtt_min);
        meter.unsent_bytes = unsent_bytes;
        if let Some(rtt_min) = rtt_min {
            meter.pacer.sample(Sample {
                now: Instant::now(),
                delivered_bytes,
                is_saturated: !was_starved,
                rtt,
                rtt_min,
            });
        }
    }

    /// Tells the kernel, where something changed.
    fn apply(&self, applied: &mut Applied) {
        let (estimate, pace) = {
            let meter = self.link.meter();
            (meter.pacer.estimate(), meter.pacer.pace())
        };
        // The ceiling in the kernel as well, so that its bursts are spread out.
        let ceiling = self.link.bucket().rate().map(|rate| to_f64(rate) * 1.05);
        tracing::trace!(?estimate, ?pace, ?ceiling, "pace");
        let total = match (pace, ceiling) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let bulk = self.lanes.iter().filter(|lane| lane.index >= BULK);
        let count = to_f64(bulk.clone().count() as u64);
        let pacing = total.map(|total| to_u64(total / count));
        let unsent = estimate.map_or(socket::NOTSENT_LOWAT, |rate| {
            let bytes = to_u64(rate * UNSENT_TIME_SECS / count).min(UNSENT_MAX.into());
            u32::try_from(bytes)
                .unwrap_or(UNSENT_MAX)
                .max(socket::NOTSENT_LOWAT)
        });
        if *applied != (Applied { pacing, unsent }) {
            for lane in bulk {
                socket::set_pacing_rate(&lane.tcp, pacing);
                socket::set_notsent_lowat(&lane.tcp, unsent);
            }
            *applied = Applied { pacing, unsent };
            let queued = estimate.map_or(0, |rate| to_u64(rate * QUEUED_TIME_SECS));
            self.link
                .outbox
                .set_queue_limit(usize::try_from(queued).unwrap_or(usize::MAX));
        }
    }
}

/// What the kernel was told last.
#[derive(Default, PartialEq)]
struct Applied {
    pacing: Option<u64>,
    unsent: u32,
}

/// Room for what one read brings, so that appending rarely moves what is there.
fn reserve(buffer: &mut BytesMut) {
    if buffer.capacity() - buffer.len() < READ_BYTES {
        buffer.reserve(READ_BYTES);
    }
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Fault => "fault",
        Class::Control => "control",
        Class::Ram => "RAM",
        Class::Prefetch => "prefetch",
        Class::Bulk => "bulk",
    }
}

fn to_f64(value: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "rates need not be exact to the byte"
    )]
    let value = value as f64;
    value
}

fn to_u64(value: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are positive, and the cast saturates"
    )]
    let value = value as u64;
    value
}
