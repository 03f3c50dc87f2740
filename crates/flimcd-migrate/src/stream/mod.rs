//! The bytes that two hypervisors say to each other, carried over a link that may break.
//!
//! A hypervisor sends its running state over connections that must not break: it has no way to go on where a
//! connection was lost while it copies ahead of the switch. So the agents number the bytes in *parts*, keep each until
//! the other side has given it to its hypervisor, and send again from there after a link break. The two hypervisors
//! see a pause.
//!
//! ```text
//!  hypervisor ─push─► Sender: acked ┃ sent ┃ unsent        ═ Part, End ═►   Receiver: delivered ┃ queued ─poll_delivery─► hypervisor
//!                             kept (≤ window)              ◄═ PartAck ═     (≤ window)
//! ```
//! Parts are opaque here: they are packed before and unpacked afterwards, each once and in order, because packing
//! refers to earlier parts.
//!
//! # Numbers
//! Parts of one direction of a stream count from 0. The end of a direction takes the number after its last part, and is
//! acknowledged like a part. `PartAck{next}` says that everything below `next` has been given to the hypervisor.
//!
//! # After every link-up
//! Both sides say `PartAck` for each stream, the side that opens streams also for those that the other side has never
//! heard of: that is how a stream is opened. Nothing is sent on a stream before the other side has said so. Then
//! everything from its `next` on is sent. It may be that what is sent again still stands in the receiver's queue; that
//! is dropped there.
//!
//! # Order
//! Parts and ends go in one class of the link, which keeps its order, so a gap is the other side's mistake and not the
//! network's, and ends the attempt. Acknowledgements go in another class; they only ever grow.
//!
//! # A peer that means harm
//! can make a receiver hold one window per stream and no more than [`STREAMS_MAX`] streams, each part counted with an
//! overhead so that tiny ones are no cheaper; a sender holds what its own hypervisor gave it. All else is an error, after
//! which the attempt is over.
//!
//! # Ends
//! When an agent dies, what it kept is gone and so is the connection to its hypervisor: the attempt is over, and whoever
//! looks after it begins the next one, with other streams. Messages of another attempt are refused.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;
use flimcd_core::{Time, limits};
use flimcd_wire::{Class, VmMessage};

use receiver::Receiver;
use sender::Sender;

/// Most streams of an attempt. Hypervisors use one, and a second one for pages that a guest waits for.
pub const STREAMS_MAX: u8 = 4;
/// Bytes that one direction of a stream may have on its way and unacknowledged: 8 MiB, which is 80 ms at 800 Mbit/s.
pub const WINDOW_BYTES: usize = 8 << 20;
/// Bytes that may wait to be sent, beside what waits in the link: whatever stands here when the guest is stopped
/// makes it stand longer.
const UNSENT_BYTES_MAX: usize = 64 * 1024;
/// What a part counts beside its bytes.
const PART_OVERHEAD_BYTES: usize = 128;
/// An acknowledgement goes out at the latest when this much was delivered since the last one…
const ACK_BYTES: usize = 256 * 1024;
/// …or this time after something was.
const ACK_DELAY: Duration = Duration::from_millis(20);

/// What a part counts against a window.
const fn cost(part: &Bytes) -> usize {
    part.len() + PART_OVERHEAD_BYTES
}

/// What the other side did that ends the attempt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// A message of another attempt.
    #[error("a part of attempt {got} came while attempt {expected} is under way")]
    Attempt {
        /// Whose message it is.
        got: u32,
        /// Which one is under way.
        expected: u32,
    },
    /// A stream that cannot be.
    #[error("stream {stream} was spoken of, which is not open and cannot be opened")]
    Stream {
        /// Its number.
        stream: u8,
    },
    /// Parts are missing.
    #[error("part {got} of stream {stream} came where {expected} was next")]
    Gap {
        /// Which stream.
        stream: u8,
        /// Number that came.
        got: u64,
        /// Number that should have come.
        expected: u64,
    },
    /// Something came after the end of a stream, or another end.
    #[error("part {got} of stream {stream} came, which contradicts its end")]
    AfterEnd {
        /// Which stream.
        stream: u8,
        /// Number that came.
        got: u64,
    },
    /// More is on its way than the window allows.
    #[error("more came on stream {stream} than its window of {WINDOW_BYTES} bytes allows")]
    Window {
        /// Which stream.
        stream: u8,
    },
    /// A part too large or empty.
    #[error("a part of {bytes} bytes came on stream {stream}")]
    Size {
        /// Which stream.
        stream: u8,
        /// Its bytes.
        bytes: usize,
    },
    /// An acknowledgement of what was never sent, or one that takes back an earlier one. The latter means that the other
    /// side has lost parts that it had.
    #[error("part {next} of stream {stream} was acknowledged, which was not possible")]
    Ack {
        /// Which stream.
        stream: u8,
        /// First number that is said not to be there.
        next: u64,
    },
    /// Not a message of streams.
    #[error("a message that does not belong to a stream")]
    Message,
}

/// What comes next for a hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Unpack this and write it.
    Part(Bytes),
    /// The other hypervisor sends nothing more on this stream.
    End,
}

/// Bytes of parts of one stream, counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamStats {
    /// Taken from the hypervisor here, packed.
    pub pushed_bytes: u64,
    /// Of those, given to the hypervisor over there.
    pub acked_bytes: u64,
    /// Given to the hypervisor here, packed.
    pub delivered_bytes: u64,
}

/// All streams of one attempt, on one side. After every `handle_*`, and after the calls on its streams, ask
/// `poll_opened`, `poll_transmit` and `poll_timeout`; and `poll_delivery` of each stream.
#[derive(Debug)]
pub struct Streams {
    attempt: u32,
    /// Whether streams are opened on this side.
    opens: bool,
    streams: Vec<Stream>,
    /// Streams that were said to be opened.
    told: usize,
    is_up: bool,
}

impl Streams {
    /// The side whose hypervisor opens connections, without any yet; the link counts as down.
    #[must_use]
    pub const fn opening(attempt: u32) -> Self {
        Self::new(attempt, true)
    }

    /// The other side.
    #[must_use]
    pub const fn following(attempt: u32) -> Self {
        Self::new(attempt, false)
    }

    const fn new(attempt: u32, opens: bool) -> Self {
        Self {
            attempt,
            opens,
            streams: Vec::new(),
            told: 0,
            is_up: false,
        }
    }

    /// Which attempt this is.
    #[must_use]
    pub const fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many streams there are. They are numbered from 0.
    #[must_use]
    pub fn count(&self) -> u8 {
        u8::try_from(self.streams.len()).unwrap_or(STREAMS_MAX)
    }

    /// Opens a stream because the hypervisor opened a connection; `None` when there are too many.
    ///
    /// # Panics
    /// On the following side.
    pub fn open(&mut self) -> Option<u8> {
        assert!(self.opens, "the other side opens streams");
        let number = self.count();
        if number == STREAMS_MAX {
            return None;
        }
        self.add();
        Some(number)
    }

    fn add(&mut self) {
        let mut stream = Stream::new(self.attempt, self.count());
        if self.is_up {
            stream.handle_link_up();
        }
        self.streams.push(stream);
    }

    /// On the following side: a stream that has been opened, to be connected to the hypervisor. Each once, in order.
    pub fn poll_opened(&mut self) -> Option<u8> {
        if self.opens || self.told == self.streams.len() {
            return None;
        }
        let number = u8::try_from(self.told).ok()?;
        self.told += 1;
        Some(number)
    }

    /// A stream.
    ///
    /// # Panics
    /// When there is none of this number.
    pub fn stream(&mut self, number: u8) -> &mut Stream {
        &mut self.streams[usize::from(number)]
    }

    /// The link is up; nothing of what an earlier one carried will come.
    pub fn handle_link_up(&mut self) {
        self.is_up = true;
        for stream in &mut self.streams {
            stream.handle_link_up();
        }
    }

    /// The link is down.
    pub fn handle_link_down(&mut self) {
        self.is_up = false;
        for stream in &mut self.streams {
            stream.handle_link_down();
        }
    }

    /// A `Part`, `PartAck` or `End`. Every error ends the attempt.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub fn handle_message(&mut self, message: VmMessage) -> Result<(), StreamError> {
        let (attempt, number) = match &message {
            VmMessage::Part {
                attempt, stream, ..
            }
            | VmMessage::PartAck {
                attempt, stream, ..
            }
            | VmMessage::End {
                attempt, stream, ..
            } => (*attempt, *stream),
            _ => return Err(StreamError::Message),
        };
        if attempt != self.attempt {
            return Err(StreamError::Attempt {
                got: attempt,
                expected: self.attempt,
            });
        }
        if number == self.count()
            && number < STREAMS_MAX
            && !self.opens
            && matches!(message, VmMessage::PartAck { next: 0, .. })
        {
            self.add();
        }
        match self.streams.get_mut(usize::from(number)) {
            Some(stream) => stream.handle_message(message),
            None => Err(StreamError::Stream { stream: number }),
        }
    }

    /// The next message that may go now, with its class.
    pub fn poll_transmit(
        &mut self,
        now: Time,
        has_room: &dyn Fn(Class) -> bool,
    ) -> Option<(Class, VmMessage)> {
        if !self.is_up {
            return None;
        }
        let acks = self.streams.iter_mut();
        if let Some(ack) = acks
            .filter(|stream| stream.receiver.ack_is_due(now))
            .find_map(|stream| {
                has_room(Class::Control).then(|| (Class::Control, stream.make_ack()))
            })
        {
            return Some(ack);
        }
        // The later ones first: a hypervisor opens a second one for the pages that a guest waits for.
        self.streams
            .iter_mut()
            .rev()
            .filter(|stream| stream.sender.has_next())
            .find_map(|stream| {
                let message = has_room(Class::Ram).then(|| stream.make_next());
                message.flatten().map(|message| (Class::Ram, message))
            })
    }

    /// When to ask `poll_transmit` again although nothing happened.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if !self.is_up {
            return None;
        }
        let acks = self.streams.iter();
        acks.filter_map(|stream| stream.receiver.ack_due()).min()
    }

    /// Whether there was a stream, and everything of all streams has arrived, ends included.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        !self.streams.is_empty() && self.streams.iter().all(Stream::is_finished)
    }

    /// Sums over all streams.
    #[must_use]
    pub fn stats(&self) -> StreamStats {
        let mut sum = StreamStats::default();
        for stream in &self.streams {
            sum.pushed_bytes += stream.sender.pushed_bytes();
            sum.acked_bytes += stream.sender.acked_bytes();
            sum.delivered_bytes += stream.receiver.delivered_bytes();
        }
        sum
    }
}

/// Both directions of one connection between the hypervisors.
#[derive(Debug)]
pub struct Stream {
    attempt: u32,
    number: u8,
    sender: Sender,
    receiver: Receiver,
}

impl Stream {
    fn new(attempt: u32, number: u8) -> Self {
        Self {
            attempt,
            number,
            sender: Sender::default(),
            receiver: Receiver::default(),
        }
    }

    fn handle_link_up(&mut self) {
        self.sender.handle_link_up();
        self.receiver.handle_link_up();
    }

    fn handle_link_down(&mut self) {
        self.sender.handle_link_down();
        self.receiver.handle_link_down();
    }

    fn handle_message(&mut self, message: VmMessage) -> Result<(), StreamError> {
        let stream = self.number;
        match message {
            VmMessage::Part { seq, payload, .. } => {
                if payload.is_empty() || payload.len() > limits::MAX_VM_PART_BYTES {
                    let bytes = payload.len();
                    return Err(StreamError::Size { stream, bytes });
                }
                self.receiver.handle_part(stream, seq, &payload)
            }
            VmMessage::End { seq, .. } => self.receiver.handle_end(stream, seq),
            VmMessage::PartAck { next, .. } => self.sender.handle_ack(stream, next),
            _ => Err(StreamError::Message),
        }
    }

    fn make_ack(&mut self) -> VmMessage {
        VmMessage::PartAck {
            attempt: self.attempt,
            stream: self.number,
            next: self.receiver.make_ack(),
        }
    }

    fn make_next(&mut self) -> Option<VmMessage> {
        let (attempt, stream) = (self.attempt, self.number);
        let (seq, part) = self.sender.take_next()?;
        Some(match part {
            Some(payload) => VmMessage::Part {
                attempt,
                stream,
                seq,
                payload,
            },
            None => VmMessage::End {
                attempt,
                stream,
                seq,
            },
        })
    }

    /// Whether to read more from the hypervisor now. Not when nothing could be done with it: then it waits, as it
    /// would before a slow network.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.sender.wants_more()
    }

    /// A packed part of what the hypervisor says.
    ///
    /// # Panics
    /// When it is empty or longer than [`limits::MAX_VM_PART_BYTES`], or after [`push_end`](Self::push_end).
    pub fn push(&mut self, part: Bytes) {
        assert!(
            (1..=limits::MAX_VM_PART_BYTES).contains(&part.len()),
            "a part of {} bytes",
            part.len()
        );
        self.sender.push(part);
    }

    /// The hypervisor says nothing more. Saying it again changes nothing.
    pub fn push_end(&mut self) {
        self.sender.push_end();
    }

    /// What the hypervisor gets next. `None` as long as [`handle_delivered`](Self::handle_delivered) was not called for
    /// the one before.
    pub fn poll_delivery(&mut self) -> Option<Delivery> {
        self.receiver.poll_delivery()
    }

    /// Whether [`poll_delivery`](Self::poll_delivery) has something.
    #[must_use]
    pub fn has_delivery(&self) -> bool {
        self.receiver.has_delivery()
    }

    /// All of the last delivery is with the hypervisor.
    ///
    /// # Panics
    /// When there was none.
    pub fn handle_delivered(&mut self, now: Time) {
        self.receiver.handle_delivered(now);
    }

    /// Whether everything in both directions has arrived, ends included.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.sender.is_finished() && self.receiver.is_finished()
    }
}
