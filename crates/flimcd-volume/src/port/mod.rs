//! A guest's way into a volume: one [`GuestPort`] per connection, used by one thread.
//!
//! ```text
//!   submit ──► submitted ──kick──► rules ──Go──► I/O queue ──► done ──► finish ──► reply
//!                                    │                          │ FUA or flush
//!                                    └─Parked─► inbox ──Go──►   └─► sync ─► presence ─► reply
//! ```
//! A write that the rules hold (mirroring, a limit of writes) is replied to when they let it go.
//!
//! Requests are collected by [`submit`](GuestPort::submit), and [`kick`](GuestPort::kick) admits all of them under one short
//! lock and hands them to the kernel. [`poll`](GuestPort::poll) never waits; a thread with nothing to do waits for the
//! descriptors of [`wait_fds`](GuestPort::wait_fds) and polls again. Requests are independent of each other: they run in parallel and
//! their replies come in any order, as NBD has it. A flush covers every request, of any connection, that was replied to before it was
//! submitted.
//!
//! The port owns what it submitted: dropping it forgets requests that wait, and waits for I/O in flight. Such I/O counts as
//! failed for the rules, because nobody hears of it: what it wrote may or may not be there.

mod inbox;
mod request;
mod slots;
#[cfg(test)]
mod tests;

use std::{io, os::fd::BorrowedFd, sync::Arc};

pub(crate) use inbox::{Inbox, InboxItem, PeekedPart};
pub use request::{GuestError, GuestReply, GuestRequest, RequestKind};

use crate::{
    device::{IoBuf, IoDone, IoKind, IoOp, IoQueue},
    rules::{Admission, Completion, FlushPlan, FlushStep, Mode, Outcome, Refusal, Ticket},
    volume::{FlushJob, Touch, Volume},
};
use slots::{InFlight, Slots, Stage};

/// Requests a queue keeps in flight; more wait in the queue.
const QUEUE_DEPTH: u32 = 128;

/// One guest connection's access to a volume. See the module.
pub struct GuestPort {
    volume: Arc<Volume>,
    /// Gone only while the port is being dropped.
    queue: Option<Box<dyn IoQueue>>,
    inbox: Arc<Inbox>,
    submitted: Vec<GuestRequest>,
    slots: Slots,
    replies: Vec<GuestReply>,
    // Scratch, kept for its memory.
    done: Vec<IoDone>,
    messages: Vec<InboxItem>,
    admitted: Vec<Admitted>,
    /// Requests that are not counted in the volume's heat.
    touched: Vec<Touch>,
    /// Whether something was pushed to the queue since it was last submitted.
    pushed: bool,
}

/// A request on its way from the rules to the queue.
struct Admitted {
    slot: usize,
    newly_dirty: bool,
}

impl GuestPort {
    pub(crate) fn new(volume: Arc<Volume>) -> io::Result<Self> {
        let queue = volume.device().open_queue(QUEUE_DEPTH)?;
        let inbox = Arc::new(Inbox::new()?);
        volume.port_opened();
        Ok(Self {
            volume,
            queue: Some(queue),
            inbox,
            submitted: Vec::new(),
            slots: Slots::default(),
            replies: Vec::new(),
            done: Vec::new(),
            messages: Vec::new(),
            admitted: Vec::new(),
            touched: Vec::new(),
            pushed: false,
        })
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Takes a request. Nothing happens to it before [`kick`](Self::kick).
    pub fn submit(&mut self, request: GuestRequest) {
        self.submitted.push(request);
    }

    /// Number of requests that were submitted and not replied to.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.submitted.len() + self.slots.len() + self.replies.len()
    }

    /// Starts everything submitted so far.
    ///
    /// # Errors
    /// When the queue itself is broken: the port is of no more use then.
    pub fn kick(&mut self) -> io::Result<()> {
        self.admit();
        let submitted = self.submit_queue(false);
        self.count_heat();
        submitted
    }

    /// As [`kick`](Self::kick), for a caller that has nothing else to do: may do the I/O right here and wait for it, which is
    /// faster when a single request is outstanding.
    ///
    /// # Errors
    /// As [`kick`](Self::kick).
    pub fn kick_inline(&mut self) -> io::Result<()> {
        self.admit();
        let submitted = self.submit_queue(true);
        self.count_heat();
        submitted
    }

    /// Appends the replies that are there to `out`. Never waits.
    ///
    /// # Errors
    /// As [`kick`](Self::kick).
    pub fn poll(&mut self, out: &mut Vec<GuestReply>) -> io::Result<()> {
        self.take_messages();
        loop {
            let mut done = std::mem::take(&mut self.done);
            self.queue_mut().completions(&mut done);
            let any = !done.is_empty();
            self.complete(&mut done);
            self.done = done;
            if !any && !self.pushed {
                break;
            }
            self.submit_queue(false)?;
        }
        out.append(&mut self.replies);
        Ok(())
    }

    /// What to wait for when [`poll`](Self::poll) has nothing: the I/O queue, when it has a descriptor, and requests that waited
    /// and go on.
    #[must_use]
    pub fn wait_fds(&self) -> (Option<BorrowedFd<'_>>, BorrowedFd<'_>) {
        let queue = self.queue.as_ref().and_then(|queue| queue.poll_fd());
        (queue, self.inbox.fd())
    }

    #[expect(clippy::expect_used, reason = "only drop takes the queue away")]
    fn queue_mut(&mut self) -> &mut dyn IoQueue {
        &mut **self.queue.as_mut().expect("a queue until the drop")
    }

    fn submit_queue(&mut self, inline: bool) -> io::Result<()> {
        self.pushed = false;
        if inline {
            self.queue_mut().submit_inline()
        } else {
            self.queue_mut().submit()
        }
    }

    /// Counts what was admitted, once it is on its way: nobody waits for that.
    fn count_heat(&mut self) {
        self.volume.heat_book().count(&mut self.touched);
    }

    // ---- from the guest to the rules

    fn admit(&mut self) {
        if self.submitted.is_empty() {
            return;
        }
        let size = self.volume.size();
        let (submitted, slots, inbox) = (&mut self.submitted, &mut self.slots, &self.inbox);
        let (replies, admitted) = (&mut self.replies, &mut self.admitted);
        let touched = &mut self.touched;
        self.volume.core().change(|core| {
            // What is asked for before the switch is of no guest that runs here.
            let counts = core.rules.mode() != Mode::Incoming;
            for request in submitted.drain(..) {
                if let Err(error) = request.check(size) {
                    replies.push(request.reply(Err(error)));
                    continue;
                }
                if request.kind == RequestKind::Flush {
                    let plan = core.rules.begin_flush();
                    let slot = slots.insert(InFlight::flush(request, plan));
                    admitted.push(Admitted {
                        slot,
                        newly_dirty: false,
                    });
                    continue;
                }
                let is_hint = request.kind == RequestKind::Cache && core.rules.is_peeking();
                let asked = request.guest_op(size).filter(|_| !is_hint);
                let Some((op, range)) = asked else {
                    replies.push(request.reply(Ok(())));
                    continue;
                };
                let admission = core.begin(op, range, inbox);
                if counts && !matches!(admission, Admission::Refused(_)) {
                    touched.extend(Touch::of(op, range));
                }
                match admission {
                    Admission::Go {
                        ticket,
                        newly_dirty,
                    } => {
                        let (stage, in_postcopy) = (Stage::Io(ticket), core.in_postcopy());
                        let slot = slots.insert(InFlight::data(request, range, stage, in_postcopy));
                        admitted.push(Admitted { slot, newly_dirty });
                    }
                    Admission::Parked { ticket } => {
                        slots.park(InFlight::data(request, range, Stage::Parked(ticket), false));
                    }
                    Admission::Refused(refusal) => {
                        replies.push(request.reply(Err(refused(refusal))));
                    }
                    Admission::Answered => unreachable!("only a parked request is answered"),
                }
            }
        });
        self.push_admitted();
    }

    /// Parked requests that were decided.
    fn take_messages(&mut self) {
        let mut messages = std::mem::take(&mut self.messages);
        self.inbox.take(&mut messages);
        for message in messages.drain(..) {
            let (ticket, admission, in_postcopy) = match message {
                InboxItem::Decided {
                    ticket,
                    admission,
                    in_postcopy,
                } => (ticket, admission, in_postcopy),
                InboxItem::Peeked { ticket, parts } => {
                    self.end_peek(ticket, &parts);
                    continue;
                }
                InboxItem::Flushed { slot, result } => {
                    self.end_flush(slot, result);
                    continue;
                }
                InboxItem::Released { ticket } => {
                    self.end_hold(ticket);
                    continue;
                }
            };
            let slot = self.slots.unpark(ticket);
            match admission {
                Admission::Go { newly_dirty, .. } => {
                    let request = self.slots.get_mut(slot);
                    request.stage = Stage::Io(ticket);
                    request.in_postcopy = in_postcopy;
                    self.admitted.push(Admitted { slot, newly_dirty });
                }
                Admission::Parked { .. } | Admission::Answered => {
                    unreachable!("a decision is not to park again, and answers come by themselves")
                }
                Admission::Refused(refusal) => {
                    let request = self.slots.remove(slot);
                    self.replies.push(request.reply(Err(refused(refusal))));
                }
            }
        }
        self.messages = messages;
        self.push_admitted();
    }

    /// A read before the switch has what stood at the source.
    fn end_peek(&mut self, ticket: Ticket, parts: &[PeekedPart]) {
        let slot = self.slots.unpark(ticket);
        let mut request = self.slots.remove(slot);
        for part in parts {
            request.fill(part.start, &part.bytes);
        }
        self.replies.push(request.reply(Ok(())));
    }

    /// A write that was held may be replied to, once it is durable if it has to be.
    fn end_hold(&mut self, ticket: Ticket) {
        let slot = self.slots.unpark(ticket);
        if !self.slots.get_mut(slot).fua {
            let request = self.slots.remove(slot);
            self.replies.push(request.reply(Ok(())));
            return;
        }
        let mut plan = self.volume.core().change(|core| core.rules.begin_flush());
        start(&mut plan);
        self.slots.get_mut(slot).stage = Stage::Sync(plan);
        self.push_sync(slot);
    }

    /// Hands admitted requests to the queue. Blocks that became dirty are recorded durably before.
    fn push_admitted(&mut self) {
        let mut admitted = std::mem::take(&mut self.admitted);
        for Admitted { slot, newly_dirty } in admitted.drain(..) {
            let range = self.slots.get_mut(slot).range;
            if newly_dirty && let Err(error) = self.volume.note_dirty(range) {
                self.end_io(slot, Err(error));
                continue;
            }
            let op = self.slots.get_mut(slot).io_op(slot);
            match op {
                Some(op) => {
                    self.queue_mut().push(op);
                    self.pushed = true;
                }
                // NBD's CACHE: once the blocks are here there is nothing to do.
                None => self.end_io(slot, Ok(())),
            }
        }
        self.admitted = admitted;
    }

    // ---- from the device to the guest

    /// The data I/O of one request ended outside of the queue.
    fn end_io(&mut self, slot: usize, result: io::Result<()>) {
        let buf = std::mem::take(&mut self.slots.get_mut(slot).buf);
        self.complete(&mut vec![IoDone {
            id: slot as u64,
            result,
            buf,
        }]);
    }

    fn complete(&mut self, done: &mut Vec<IoDone>) {
        if done.is_empty() {
            return;
        }
        for IoDone { id, result, .. } in done.iter_mut() {
            #[expect(clippy::cast_possible_truncation, reason = "ids are slot numbers")]
            let request = self.slots.get_mut(*id as usize);
            if result.is_ok()
                && let Some(blocks) = request.may_become_present(self.volume.size())
            {
                *result = self.volume.note_present(blocks);
            }
        }
        let (slots, replies, inbox) = (&mut self.slots, &mut self.replies, &self.inbox);
        let mut synced = Vec::new();
        let mut syncs = Vec::new();
        self.volume.core().change(|core| {
            for IoDone { id, result, buf } in done.drain(..) {
                #[expect(clippy::cast_possible_truncation, reason = "ids are slot numbers")]
                let slot = id as usize;
                let request = slots.get_mut(slot);
                if buf.capacity() > 0 {
                    request.buf = buf;
                }
                match std::mem::replace(&mut request.stage, Stage::Ended) {
                    Stage::Io(ticket) => {
                        let outcome = if result.is_ok() {
                            Outcome::Done
                        } else {
                            Outcome::Failed
                        };
                        if core.finish(ticket, outcome, inbox) == Completion::Held {
                            slots.hold(slot, ticket);
                            continue;
                        }
                        if request.fua && result.is_ok() {
                            let mut plan = core.rules.begin_flush();
                            start(&mut plan);
                            request.stage = Stage::Sync(plan);
                            syncs.push(slot);
                        } else {
                            let request = slots.remove(slot);
                            replies.push(request.reply(result.map_err(GuestError::Io)));
                        }
                    }
                    Stage::Sync(plan) => synced.push((slot, plan, result)),
                    Stage::Parked(_) | Stage::Held(_) | Stage::Presence | Stage::Ended => {
                        unreachable!("no I/O in this stage")
                    }
                }
            }
        });
        for slot in syncs {
            self.push_sync(slot);
        }
        for (slot, plan, result) in synced {
            self.end_sync(slot, plan, result);
        }
    }

    fn push_sync(&mut self, slot: usize) {
        self.queue_mut().push(IoOp {
            id: slot as u64,
            kind: IoKind::Sync,
            offset: 0,
            length: 0,
            buf: IoBuf::empty(),
        });
        self.pushed = true;
    }

    /// The data is durable, or is not. In post-copy the presence follows, on another thread.
    fn end_sync(&mut self, slot: usize, mut plan: FlushPlan, result: io::Result<()>) {
        let mut result = self.volume.check_sync(result);
        if result.is_ok() {
            if !plan.is_data_only() {
                self.slots.get_mut(slot).stage = Stage::Presence;
                self.finish_elsewhere(slot, plan);
                return;
            }
            result = self.volume.run_flush(&mut plan);
        }
        self.volume
            .core()
            .change(|core| core.rules.end_flush(plan, result.is_ok()));
        self.end_flush(slot, result);
    }

    fn finish_elsewhere(&self, slot: usize, plan: FlushPlan) {
        let inbox = self.inbox.clone();
        self.volume.finish_flush(FlushJob {
            volume: self.volume.clone(),
            plan,
            done: Box::new(move |result| {
                inbox.put(InboxItem::Flushed { slot, result });
                inbox.signal();
            }),
        });
    }

    fn end_flush(&mut self, slot: usize, result: io::Result<()>) {
        let request = self.slots.remove(slot);
        self.replies
            .push(request.reply(result.map_err(GuestError::Io)));
    }
}

impl Drop for GuestPort {
    fn drop(&mut self) {
        // Waits for the I/O in flight, whose requests are then ended below.
        drop(self.queue.take());
        self.volume.heat_book().count_last(&mut self.touched);
        let slots = std::mem::take(&mut self.slots);
        self.volume.core().change(|core| {
            // Decided requests that this port never heard of are admitted: end them as failed. New ones cannot come, since
            // what is still parked is cancelled under the same lock.
            let mut messages = Vec::new();
            self.inbox.take_last(&mut messages);
            let mut decided = Vec::new();
            for message in messages {
                match message {
                    InboxItem::Decided {
                        ticket, admission, ..
                    } => {
                        decided.push(ticket);
                        if matches!(admission, Admission::Go { .. }) {
                            let _ = core.rules.finish(ticket, Outcome::Failed);
                        }
                    }
                    InboxItem::Peeked { ticket, .. } | InboxItem::Released { ticket } => {
                        decided.push(ticket);
                    }
                    InboxItem::Flushed { .. } => {}
                }
            }
            for request in slots.into_all() {
                match request.stage {
                    Stage::Io(ticket) => {
                        let _ = core.rules.finish(ticket, Outcome::Failed);
                    }
                    Stage::Held(ticket) if !decided.contains(&ticket) => core.forget_held(ticket),
                    Stage::Parked(ticket) if !decided.contains(&ticket) => {
                        core.cancel_parked(ticket);
                    }
                    Stage::Sync(plan) => core.rules.end_flush(plan, false),
                    Stage::Parked(_) | Stage::Held(_) | Stage::Presence | Stage::Ended => {}
                }
            }
        });
        self.volume.port_closed();
    }
}

/// Takes the first step off a plan: the data sync, which the port gives to its queue.
fn start(plan: &mut FlushPlan) {
    let step = plan.next();
    assert_eq!(step, FlushStep::SyncData, "a flush begins with the data");
}

fn refused(refusal: Refusal) -> GuestError {
    match refusal {
        Refusal::Moved => GuestError::Moved,
        Refusal::NotHere => GuestError::NotHere,
        Refusal::Unreadable => GuestError::Io(io::Error::other(refusal)),
    }
}
