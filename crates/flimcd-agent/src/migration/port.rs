//! A driver's way to its peer: sends what a machine has to say while the link has room.

use flimcd_core::MigrationId;
use flimcd_link::SendError;
use flimcd_wire::{Class, Frame, Message};
use std::{cell::Cell, sync::Arc};

use crate::links::PeerLink;

/// See the module.
pub(crate) struct LinkPort {
    link: Arc<PeerLink>,
    migration: MigrationId,
    generation: Option<u64>,
    /// A frame that another migration was faster than; it goes before all others.
    stuck: Option<Box<Frame>>,
    /// Classes that had no room when the machine was last asked.
    full: Cell<u8>,
}

const fn bit(class: Class) -> u8 {
    1 << class as u8
}

impl LinkPort {
    pub(crate) fn new(link: Arc<PeerLink>, migration: MigrationId) -> Self {
        Self {
            link,
            migration,
            generation: None,
            stuck: None,
            full: Cell::new(0),
        }
    }

    pub(crate) fn link(&self) -> &Arc<PeerLink> {
        &self.link
    }

    pub(crate) fn is_up(&self) -> bool {
        self.generation.is_some()
    }

    pub(crate) fn set_up(&mut self, generation: u64) {
        self.generation = Some(generation);
        self.stuck = None;
    }

    pub(crate) fn set_down(&mut self) {
        self.generation = None;
        self.stuck = None;
    }

    /// Whether everything that the machine had was taken.
    pub(crate) fn is_idle(&self) -> bool {
        self.stuck.is_none() && self.full.get() == 0
    }

    /// Sends as long as there is room. What is taken after the link broke is lost, as the machine expects.
    pub(crate) fn transmit(
        &mut self,
        mut poll: impl FnMut(&dyn Fn(Class) -> bool) -> Option<(Class, Message)>,
    ) {
        self.full.set(0);
        let Some(generation) = self.generation else {
            return;
        };
        let handle = self.link.handle();
        if let Some(frame) = self.stuck.take()
            && let Err(SendError::Full(frame)) = handle.try_send_in(generation, *frame)
        {
            self.full.set(bit(frame.class));
            self.stuck = Some(frame);
            return;
        }
        let full = &self.full;
        let has_room = |class: Class| {
            let has_room = handle.has_room(class);
            if !has_room {
                full.set(full.get() | bit(class));
            }
            has_room
        };
        while let Some((class, message)) = poll(&has_room) {
            let frame = Frame {
                migration: self.migration,
                class,
                message,
            };
            match handle.try_send_in(generation, frame) {
                Ok(()) | Err(SendError::Down) => {}
                Err(SendError::Full(frame)) => {
                    full.set(full.get() | bit(frame.class));
                    self.stuck = Some(frame);
                    return;
                }
            }
        }
    }

    /// Waits until a class that was full has room; for ever if none was.
    pub(crate) fn room(&self) -> impl Future<Output = ()> + use<> {
        let full = self.full.get();
        let handle = self.link.handle().clone();
        let wait = move |class: Class| {
            let handle = handle.clone();
            async move {
                if full & bit(class) == 0 {
                    std::future::pending::<()>().await;
                }
                handle.wait_room(class).await;
            }
        };
        async move {
            tokio::select! {
                () = wait(Class::Fault) => {}
                () = wait(Class::Control) => {}
                () = wait(Class::Ram) => {}
                () = wait(Class::Prefetch) => {}
                () = wait(Class::Bulk) => {}
            }
        }
    }
}
