//! Frames from the links to the migrations they belong to.
//!
//! ```text
//!  link to a peer ──► router (one task per peer) ──► inbox of a migration ──► its driver
//!                          └── Open of a migration that is not known ──► admission
//! ```
//! A migration belongs to one peer: frames with its number from another peer do not reach it. An inbox sees
//! `Up` before every frame of that generation, and `Down` after the last one. It is not bounded itself;
//! each frame comes with its share of the link's bounded receive queue, which the driver holds until
//! the frame is worked off. So a migration that is slow holds the peer up and not this agent's memory.

use flimcd_core::{Epoch, MigrationId, SiteName};
use flimcd_link::{Credit, LinkEvent, LinkHandle};
use flimcd_wire::{CheckOpen, Class, Frame, Message, Open, PlanOpen, VmMessage, VmOpen};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// What a link tells a migration.
#[derive(Debug)]
pub(crate) enum LinkInput {
    /// The link is up.
    Up(u64),
    /// It is down again.
    Down,
    /// The peer said this.
    Message(Message, Credit),
}

/// Receiving end of a migration's inbox.
pub(crate) type Inbox = UnboundedReceiver<LinkInput>;

/// Who answers to an `Open` that no migration is registered for.
pub(crate) trait Admit: Send + Sync + 'static {
    /// A peer wants to begin or go on with a migration. The inbox is registered already and holds what
    /// has come, the `Open` included.
    fn admit(self: Arc<Self>, link: &Arc<PeerLink>, id: MigrationId, open: Open, inbox: Inbox);

    /// A peer wants to move a machine here, or goes on with that. The inbox is registered already and holds what has
    /// come.
    fn admit_vm(self: Arc<Self>, link: &Arc<PeerLink>, id: MigrationId, open: VmOpen, inbox: Inbox);

    /// A peer wants to know what a migration would cost. The inbox is registered already.
    fn admit_plan(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: PlanOpen,
        inbox: Inbox,
    );

    /// A peer wants to know whether copies are equal. The inbox is registered already.
    fn admit_check(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: CheckOpen,
        inbox: Inbox,
    );

    /// A peer wants `epoch` back, in a migration that no driver waits for.
    fn cancel_switch(self: Arc<Self>, link: &Arc<PeerLink>, id: MigrationId, epoch: Epoch);

    /// The link to a peer has come up.
    fn peer_is_up(self: Arc<Self>, link: &Arc<PeerLink>);
}

/// The link to one peer, and who gets its frames.
pub(crate) struct PeerLink {
    handle: LinkHandle,
    routes: Mutex<Routes>,
    /// Migrations whose guests can fault at the other end.
    paced_for: Mutex<HashSet<MigrationId>>,
}

#[derive(Default)]
struct Routes {
    up: Option<u64>,
    inboxes: HashMap<MigrationId, UnboundedSender<LinkInput>>,
}

impl Routes {
    /// Makes an inbox that knows whether the link is up.
    fn register(&mut self, id: MigrationId) -> Inbox {
        let (sender, inbox) = unbounded_channel();
        if let Some(generation) = self.up {
            let _ = sender.send(LinkInput::Up(generation));
        }
        self.inboxes.insert(id, sender);
        inbox
    }

    fn tell_all(&self, input: impl Fn() -> LinkInput) {
        for sender in self.inboxes.values() {
            // A driver that has just ended does not listen any more.
            let _ = sender.send(input());
        }
    }
}

impl PeerLink {
    pub(crate) fn new(handle: LinkHandle) -> Arc<Self> {
        Arc::new(Self {
            handle,
            routes: Mutex::default(),
            paced_for: Mutex::default(),
        })
    }

    /// The link itself, for sending and measuring.
    pub(crate) fn handle(&self) -> &LinkHandle {
        &self.handle
    }

    /// The site at the other end.
    pub(crate) fn peer(&self) -> &SiteName {
        self.handle.peer()
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an inbox for a migration. The one it may have had gets nothing more.
    pub(crate) fn register(&self, id: MigrationId) -> Inbox {
        self.routes().register(id)
    }

    /// Ends a migration's inbox.
    pub(crate) fn unregister(&self, id: MigrationId) {
        self.routes().inboxes.remove(&id);
    }

    /// Whether a migration's guest can fault. The link is paced as long as there is one.
    pub(crate) fn set_pacing(&self, id: MigrationId, is_on: bool) {
        let mut paced_for = self
            .paced_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if is_on {
            paced_for.insert(id);
        } else {
            paced_for.remove(&id);
        }
        self.handle.set_pacing(!paced_for.is_empty());
    }

    /// Sends one message outside of any driver; if the link is down it is not sent.
    pub(crate) async fn send(&self, migration: MigrationId, message: Message) -> bool {
        let frame = Frame {
            migration,
            class: Class::Control,
            message,
        };
        self.handle.send(frame).await.is_ok()
    }

    /// Hands frames out until the endpoint is stopped.
    pub(crate) async fn route(self: Arc<Self>, admit: Arc<impl Admit>) {
        while let Some(event) = self.handle.next_event().await {
            match event {
                LinkEvent::Up { generation } => {
                    let mut routes = self.routes();
                    routes.up = Some(generation);
                    routes.tell_all(|| LinkInput::Up(generation));
                    drop(routes);
                    admit.clone().peer_is_up(&self);
                }
                LinkEvent::Down { .. } => {
                    let mut routes = self.routes();
                    routes.up = None;
                    routes.tell_all(|| LinkInput::Down);
                }
                LinkEvent::Frame { frame, credit } => self.dispatch(frame, credit, &admit),
            }
        }
    }

    fn dispatch(self: &Arc<Self>, frame: Frame, credit: Credit, admit: &Arc<impl Admit>) {
        let id = frame.migration;
        let mut routes = self.routes();
        if let Some(sender) = routes.inboxes.get(&id) {
            let _ = sender.send(LinkInput::Message(frame.message, credit));
            return;
        }
        match frame.message {
            Message::Open(open) => {
                let inbox = routes.register(id);
                let message = Message::Open(open.clone());
                if let Some(sender) = routes.inboxes.get(&id) {
                    let _ = sender.send(LinkInput::Message(message, credit));
                }
                drop(routes);
                admit.clone().admit(self, id, open, inbox);
            }
            Message::Vm(VmMessage::Open(open)) => {
                let inbox = routes.register(id);
                if let Some(sender) = routes.inboxes.get(&id) {
                    let message = Message::Vm(VmMessage::Open(open.clone()));
                    let _ = sender.send(LinkInput::Message(message, credit));
                }
                drop(routes);
                admit.clone().admit_vm(self, id, open, inbox);
            }
            Message::PlanOpen(open) => {
                let inbox = routes.register(id);
                drop(routes);
                admit.clone().admit_plan(self, id, open, inbox);
            }
            Message::CheckOpen(open) => {
                let inbox = routes.register(id);
                drop(routes);
                admit.clone().admit_check(self, id, open, inbox);
            }
            Message::CancelSwitch { epoch } => {
                drop(routes);
                admit.clone().cancel_switch(self, id, epoch);
            }
            // What was under way when the migration ended here.
            _ => {
                tracing::trace!(migration = %id, peer = %self.peer(), "a frame that nobody waits for");
            }
        }
    }
}
