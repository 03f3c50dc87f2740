//! The rules of a volume behind their mutex, and who has to be told when they change.
//!
//! Lock order: [`Unacked`](super::source) before the core; the core is never held while I/O runs or while
//! anybody is told anything. A panic inside the rules means that they contradict themselves: the mutex stays
//! poisoned and the volume fails every request from then on, since going on would risk the guest's data.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use crate::{
    port::{Inbox, InboxItem, PeekedPart},
    rules::{Admission, ApplyPlan, ApplyToken, Completion, GuestOp, Mode, Outcome, Rules, Ticket},
};

/// Whoever wants to know what happens in a volume. Called without locks held, from any thread; keep it short.
pub trait VolumeObserver: Send + Sync {
    /// Blocks are needed, and perhaps were said to be needed before: call [`Volume::poll_fault`](super::Volume::poll_fault) until it is empty.
    fn on_fault(&self) {}
    /// The guest reads, and the log of that was empty: call [`Volume::take_reads`](super::Volume::take_reads). Only while the log is on.
    fn on_reads(&self) {}
    /// The source is to be asked for blocks: call [`Volume::poll_peek`](super::Volume::poll_peek) until it is empty.
    fn on_peek(&self) {}
    /// The last request in flight of a frozen volume ended after [`freeze`](super::Volume::freeze) had returned.
    fn on_drained(&self) {}
    /// A write is held that the target is to get: take the dirty marks soon.
    fn on_held(&self) {}
    /// The last guest connection was closed.
    fn on_guests_gone(&self) {}
}

/// What the mutex protects.
pub(crate) struct Core {
    pub(crate) rules: Rules,
    /// The port that waits for each parked request and each held write.
    parked_at: HashMap<Ticket, Arc<Inbox>>,
    /// What came for reads before the switch that are not complete.
    peeked: HashMap<Ticket, Vec<PeekedPart>>,
    /// Applies that waited and may run now.
    ready: HashMap<ApplyToken, ApplyPlan>,
    /// Whether somebody waits to hear of the drain's end.
    pub(crate) draining: bool,
    /// A write was held, and nobody was told.
    held: bool,
}

impl Core {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            parked_at: HashMap::new(),
            peeked: HashMap::new(),
            ready: HashMap::new(),
            draining: false,
            held: false,
        }
    }

    /// Asks the rules for a request of the port that `inbox` belongs to.
    #[inline]
    pub(crate) fn begin(
        &mut self,
        op: GuestOp,
        range: flimcd_core::ByteRange,
        inbox: &Arc<Inbox>,
    ) -> Admission {
        let admission = self.rules.begin(op, range);
        if let Admission::Parked { ticket } = admission {
            self.parked_at.insert(ticket, inbox.clone());
        }
        admission
    }

    /// A request of the port that `inbox` belongs to ended.
    #[inline]
    pub(crate) fn finish(
        &mut self,
        ticket: Ticket,
        outcome: Outcome,
        inbox: &Arc<Inbox>,
    ) -> Completion {
        let completion = self.rules.finish(ticket, outcome);
        if completion == Completion::Held {
            self.parked_at.insert(ticket, inbox.clone());
            self.held = true;
        }
        completion
    }

    /// Forgets a held write.
    pub(crate) fn forget_held(&mut self, ticket: Ticket) {
        self.parked_at.remove(&ticket);
        self.rules.forget_held(ticket);
    }

    /// Forgets a parked request.
    pub(crate) fn cancel_parked(&mut self, ticket: Ticket) {
        self.parked_at.remove(&ticket);
        self.peeked.remove(&ticket);
        self.rules.cancel_parked(ticket);
    }

    /// The source's answer to a question; `None` when it could not read the blocks. As many bytes as they have.
    pub(crate) fn answer_peek(&mut self, number: u64, bytes: Option<&[u8]>) {
        let Some(question) = self.rules.peeked(number) else {
            return;
        };
        let expected = question.range.bytes(self.rules.size()).len();
        let bytes = bytes.filter(|bytes| bytes.len() as u64 == expected);
        if let Some(bytes) = bytes {
            let start = question.range.start * flimcd_core::BLOCK_SIZE;
            let part = PeekedPart {
                start,
                bytes: bytes.to_vec(),
            };
            self.peeked.entry(question.ticket).or_default().push(part);
        }
        self.rules.end_peek(number, bytes.is_some());
    }

    /// Whether blocks may be missing: trims have to be run as zeroing then.
    pub(crate) fn in_postcopy(&self) -> bool {
        self.rules.mode() == Mode::PostCopy
    }

    /// Moves what the rules have to say to those it is for.
    fn collect(&mut self) -> Notices {
        let mut notices = Notices {
            reads: self.rules.poll_read_news(),
            ..Notices::default()
        };
        if !self.rules.has_output() && !self.draining && !self.held {
            return notices;
        }
        let in_postcopy = self.in_postcopy();
        while let Some((ticket, admission)) = self.rules.poll_woken() {
            let Some(inbox) = self.parked_at.remove(&ticket) else {
                unreachable!("a parked request belongs to a port until it is cancelled");
            };
            let parts = self.peeked.remove(&ticket).unwrap_or_default();
            inbox.put(match admission {
                Admission::Answered => InboxItem::Peeked { ticket, parts },
                _ => InboxItem::Decided {
                    ticket,
                    admission,
                    in_postcopy,
                },
            });
            notices.inboxes.push(inbox);
        }
        while let Some(ticket) = self.rules.poll_released() {
            let Some(inbox) = self.parked_at.remove(&ticket) else {
                unreachable!("a held write belongs to a port until it is forgotten");
            };
            inbox.put(InboxItem::Released { ticket });
            notices.inboxes.push(inbox);
        }
        notices.held = std::mem::take(&mut self.held);
        while let Some(plan) = self.rules.poll_apply_ready() {
            self.ready.insert(plan.token, plan);
            notices.ready = true;
        }
        notices.fault = self.rules.has_faults();
        notices.peek = self.rules.has_peeks();
        notices.drained = self.draining && self.rules.is_drained();
        if notices.drained {
            self.draining = false;
        }
        notices
    }
}

#[derive(Default)]
struct Notices {
    inboxes: Vec<Arc<Inbox>>,
    ready: bool,
    fault: bool,
    peek: bool,
    reads: bool,
    drained: bool,
    held: bool,
}

/// The core and the way to those who are told.
pub(crate) struct SharedCore {
    core: Mutex<Core>,
    apply_ready: Condvar,
    observer: Mutex<Option<Arc<dyn VolumeObserver>>>,
}

impl SharedCore {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            core: Mutex::new(Core::new(rules)),
            apply_ready: Condvar::new(),
            observer: Mutex::new(None),
        }
    }

    #[expect(
        clippy::expect_used,
        reason = "the module says why nothing may go on after a panic in the rules"
    )]
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core
            .lock()
            .expect("the rules of this volume contradicted themselves")
    }

    /// Runs `change` on the core, then tells who has to know.
    #[inline]
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.lock();
        let result = change(&mut core);
        let notices = core.collect();
        drop(core);
        self.tell(notices);
        result
    }

    #[inline]
    fn tell(&self, notices: Notices) {
        for inbox in notices.inboxes {
            inbox.signal();
        }
        if notices.ready {
            self.apply_ready.notify_all();
        }
        if notices.reads {
            self.observe(|observer| observer.on_reads());
        }
        if notices.fault || notices.peek || notices.drained || notices.held {
            self.observe(|observer| {
                if notices.fault {
                    observer.on_fault();
                }
                if notices.peek {
                    observer.on_peek();
                }
                if notices.drained {
                    observer.on_drained();
                }
                if notices.held {
                    observer.on_held();
                }
            });
        }
    }

    pub(crate) fn observe(&self, tell: impl FnOnce(&dyn VolumeObserver)) {
        let observer = self.observer_slot().clone();
        if let Some(observer) = observer {
            tell(&*observer);
        }
    }

    pub(crate) fn set_observer(&self, observer: Arc<dyn VolumeObserver>) {
        *self.observer_slot() = Some(observer);
    }

    fn observer_slot(&self) -> MutexGuard<'_, Option<Arc<dyn VolumeObserver>>> {
        self.observer
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until the apply `token` may run.
    #[expect(clippy::expect_used, reason = "as in lock")]
    pub(crate) fn wait_for_apply(&self, token: ApplyToken) -> ApplyPlan {
        let mut core = self.lock();
        loop {
            if let Some(plan) = core.ready.remove(&token) {
                return plan;
            }
            core = self
                .apply_ready
                .wait(core)
                .expect("the rules of this volume contradicted themselves");
        }
    }
}
