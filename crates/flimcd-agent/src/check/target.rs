//! A check at the target: hashes of what arrived, without what the guest has written since.
//!
//! One question is worked off at a time; what waits holds credits of the link. While guests of the volume do anything, reading rests three
//! times as long after each answer as that took.

use flimcd_core::MigrationId;
use flimcd_link::Credit;
use flimcd_volume::Volume;
use flimcd_wire::{
    CheckAsk, CheckOpen, CheckPart, Class, ErrorCode, Frame, Message, Runs, WireError,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

use super::{hash::hash, unless_stopped};
use crate::{
    agent::Agent,
    hosting::Hosted,
    links::{Inbox, LinkInput, PeerLink},
};

/// A source that says nothing for so long is gone.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// While guests are active, reading rests so many times as long as it took.
const REST: u32 = 3;

struct Answering {
    link: Arc<PeerLink>,
    session: MigrationId,
    migration: MigrationId,
    volumes: Vec<Arc<Hosted>>,
    stop: watch::Receiver<bool>,
}

impl Agent {
    /// Answers a peer's check until it ends.
    pub(crate) async fn answer_check(
        self: Arc<Self>,
        link: Arc<PeerLink>,
        session: MigrationId,
        open: CheckOpen,
        mut inbox: Inbox,
    ) {
        let find = |id| {
            let hosted = self.hosting.by_id(id)?;
            let record = hosted.record();
            let of = record.baseline.as_ref()?;
            (of.site == *link.peer() && of.migration == open.migration).then_some(hosted)
        };
        let volumes: Option<Vec<_>> = open.volumes.iter().copied().map(find).collect();
        match volumes {
            Some(volumes) => {
                link.send(session, Message::CheckReady).await;
                let mut answering = Answering {
                    link: link.clone(),
                    session,
                    migration: open.migration,
                    volumes,
                    stop: self.stop_signal(),
                };
                answering.run(&mut inbox).await;
            }
            None => {
                link.send(session, Message::Failed(moved_on())).await;
            }
        }
        link.unregister(session);
    }
}

fn moved_on() -> WireError {
    let text = "it is not known any more what the guest has written since that migration: the volume has moved on, was removed, \
                or the machine was started again";
    WireError::new(ErrorCode::UNKNOWN_MIGRATION, text)
}

impl Answering {
    async fn run(&mut self, inbox: &mut Inbox) {
        loop {
            let input = tokio::time::timeout(IDLE_MAX, inbox.recv());
            let input = unless_stopped(&mut self.stop, input).await;
            let goes_on = match input {
                Some(Ok(Some(LinkInput::Up(_)))) => true,
                Some(Ok(Some(LinkInput::Message(message, credit)))) => {
                    self.answer(message, credit).await
                }
                Some(Ok(Some(LinkInput::Down) | None) | Err(_)) | None => false,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Answers one message; false when there is nothing more to answer.
    async fn answer(&mut self, message: Message, credit: Credit) -> bool {
        let result = match message {
            // What opened it.
            Message::CheckOpen(_) => return true,
            Message::Cancel => return false,
            Message::CheckAsk(ask) => self.hashes(ask).await,
            _ => {
                let text = "the source sends something that does not belong to a check";
                Err(WireError::new(ErrorCode::PROTOCOL, text))
            }
        };
        drop(credit);
        match result {
            Ok(part) => {
                let frame = Frame {
                    migration: self.session,
                    class: Class::Bulk,
                    message: Message::CheckPart(part),
                };
                let sent = unless_stopped(&mut self.stop, self.link.handle().send(frame)).await;
                sent.is_some_and(|sent| sent.is_ok())
            }
            Err(error) => {
                self.link.send(self.session, Message::Failed(error)).await;
                false
            }
        }
    }

    async fn hashes(&mut self, ask: CheckAsk) -> Result<CheckPart, WireError> {
        let volume = usize::try_from(ask.volume).ok();
        let hosted = volume.and_then(|index| self.volumes.get(index));
        let hosted = hosted.filter(|hosted| ask.range.end <= hosted.volume().size().blocks());
        let Some(hosted) = hosted.cloned() else {
            let text = "the source asks for blocks that no volume has";
            return Err(WireError::new(ErrorCode::PROTOCOL, text));
        };
        let (site, migration) = (self.link.peer().clone(), self.migration);
        let before = requests(hosted.volume());
        let begun = Instant::now();
        let read = {
            let hosted = hosted.clone();
            tokio::task::spawn_blocking(move || {
                let volume = hosted.volume();
                hash(volume, ask, |part| {
                    volume.written_since(&site, migration, part)
                })
            })
        };
        let pieces = match read.await {
            Ok(Ok(Some(pieces))) => pieces,
            Ok(Ok(None)) => return Err(moved_on()),
            Ok(Err(error)) => {
                let text = format!("reading {} at the target failed: {error}", hosted.name());
                return Err(WireError::new(ErrorCode::DISK, text));
            }
            Err(panic) => {
                let text = format!("the target's agent failed: {panic}");
                return Err(WireError::new(ErrorCode::OTHER, text));
            }
        };
        if requests(hosted.volume()) != before {
            let rest = tokio::time::sleep(begun.elapsed() * REST);
            let _ = unless_stopped(&mut self.stop, rest).await;
        }
        let payload: Vec<u8> = (pieces.hashes.iter())
            .flat_map(|hash| *hash.as_bytes())
            .collect();
        Ok(CheckPart {
            ask,
            written: Runs::new(pieces.left_out),
            payload: payload.into(),
        })
    }
}

/// Counts what guests do.
fn requests(volume: &Volume) -> u64 {
    let stats = volume.stats();
    stats.guest_reads + stats.guest_writes + stats.guest_zeroes + stats.guest_trims
}
