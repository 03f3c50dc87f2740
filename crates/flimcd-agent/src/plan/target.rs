//! A plan at the target: says what stands here and what of a source's content is here, and keeps nothing.
//!
//! No volume is made and nothing is written, to the disk or to any record. One question is worked off at a time, so that a plan
//! takes little from migrations that arrive meanwhile; what waits holds credits of the link.

use flimcd_core::{Epoch, MigrationId, Seq};
use flimcd_link::Credit;
use flimcd_volume::{Volume, rules::Mode};
use flimcd_wire::{
    Base, Class, ErrorCode, Frame, Message, Open, PlanOpen, Planned, Probe, SampleChunk, SeedOffer,
    SourceStage, VolumeOffer, WireError,
};
use std::{sync::Arc, time::Duration};

use super::nothing::Nothing;
use crate::{
    agent::Agent,
    hosting::DEFAULT_TENANT,
    library::{Finder, Seeds},
    links::{Inbox, LinkInput, PeerLink},
    migration::volumes::VolumeSet,
};

/// A source that says nothing for so long is gone.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// What stands here for a plan.
struct Standings {
    volumes: Arc<VolumeSet>,
    bases: Vec<Base>,
    tenants: Vec<String>,
}

/// A plan that a peer makes; ends with the link, with `Cancel`, or when nothing comes for a while.
struct Answering {
    agent: Arc<Agent>,
    link: Arc<PeerLink>,
    id: MigrationId,
    standings: Arc<Standings>,
    seeds: Option<Arc<Seeds>>,
    finder: Option<Arc<Finder>>,
}

impl Agent {
    /// Answers a peer's plan until it ends.
    pub(crate) async fn answer_plan(
        self: Arc<Self>,
        link: Arc<PeerLink>,
        id: MigrationId,
        open: PlanOpen,
        mut inbox: Inbox,
    ) {
        match self.clone().standings(&link, open).await {
            Ok(standings) => {
                let bases = standings.bases.clone();
                link.send(id, Message::Planned(Planned { bases })).await;
                let mut stop = self.stop_signal();
                let mut answering = Answering {
                    agent: self,
                    link: link.clone(),
                    id,
                    standings: Arc::new(standings),
                    seeds: None,
                    finder: None,
                };
                tokio::select! {
                    () = answering.run(&mut inbox) => {}
                    _ = stop.wait_for(|&stop| stop) => {}
                }
            }
            Err(error) => {
                tracing::info!(plan = %id, from = %link.peer(), "refused a plan: {}", error.text);
                link.send(id, Message::Failed(error)).await;
            }
        }
        link.unregister(id);
    }

    /// Whether the volumes could come, and what stands here.
    async fn standings(
        self: Arc<Self>,
        link: &Arc<PeerLink>,
        plan: PlanOpen,
    ) -> Result<Standings, WireError> {
        let open = Open {
            volumes: plan.volumes,
            session: None,
            epoch: Epoch::FIRST,
            incarnation: 0,
            oldest_unacked: Seq(0),
            stage: SourceStage::Owner,
        };
        self.check_allowed(link.peer(), &open)?;
        let looked = tokio::task::spawn_blocking(move || {
            let bases = self.hosting.check_arrival(&open, &self.config)?;
            let standing = |(offer, base)| self.standing(offer, base);
            let standings = open.volumes.iter().zip(&bases).map(standing);
            let (volumes, tenants) = standings.unzip();
            let volumes = VolumeSet::new(volumes).map_err(|error| {
                let text = format!("the volumes together: {error}");
                WireError::new(ErrorCode::SIZE, text)
            })?;
            Ok(Standings {
                volumes,
                bases,
                tenants,
            })
        });
        looked.await.unwrap_or_else(|panic| {
            let text = format!("the target's agent failed: {panic}");
            Err(WireError::new(ErrorCode::OTHER, text))
        })
    }

    /// The copy that stands where a volume would arrive, or zeroes; and whose it is.
    fn standing(&self, offer: &VolumeOffer, base: &Base) -> (Arc<Volume>, String) {
        let copy = (*base != Base::Zeroes).then(|| self.hosting.by_id(offer.id));
        if let Some(hosted) = copy.flatten() {
            return (hosted.volume().clone(), hosted.record().tenant.clone());
        }
        let device = Arc::new(Nothing(offer.size));
        let volume = Volume::ephemeral(offer.name.clone(), device, Mode::Incoming);
        (volume, DEFAULT_TENANT.to_owned())
    }
}

impl Answering {
    async fn run(&mut self, inbox: &mut Inbox) {
        loop {
            let input = tokio::time::timeout(IDLE_MAX, inbox.recv()).await;
            let goes_on = match input {
                Ok(Some(LinkInput::Up(_))) => true,
                Ok(Some(LinkInput::Message(message, credit))) => self.answer(message, credit).await,
                Ok(Some(LinkInput::Down) | None) | Err(_) => false,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Answers one message; false when there is nothing more to answer.
    async fn answer(&mut self, message: Message, credit: Credit) -> bool {
        let goes_on = match message {
            // What opened it.
            Message::PlanOpen(_) => true,
            Message::SeedAsk { sample, .. } => self.offer_seed(sample).await,
            Message::Probe(probe) => self.probe(probe).await,
            Message::Cancel => false,
            _ => {
                let text = "the source sends something that does not belong to a plan";
                let error = WireError::new(ErrorCode::PROTOCOL, text);
                self.say(Class::Control, Message::Failed(error)).await;
                false
            }
        };
        drop(credit);
        goes_on
    }

    async fn say(&self, class: Class, message: Message) -> bool {
        let frame = Frame {
            migration: self.id,
            class,
            message,
        };
        self.link.handle().send(frame).await.is_ok()
    }

    async fn offer_seed(&mut self, sample: Vec<SampleChunk>) -> bool {
        let (library, standings) = (self.agent.library.clone(), self.standings.clone());
        let chosen = tokio::task::spawn_blocking(move || {
            let Standings {
                volumes,
                bases,
                tenants,
            } = &*standings;
            library.choose(volumes, bases, tenants, &sample)
        });
        let Ok(Some(chosen)) = chosen.await else {
            return self.say(Class::Control, Message::SeedOffer(None)).await;
        };
        self.seeds = Some(chosen.seeds);
        let choice = chosen.choice;
        let parts: Vec<u32> = choice.table.part_numbers().collect();
        let offer = SeedOffer {
            id: choice.id,
            name: choice.name,
            in_place: choice.in_place,
            parts: u32::try_from(parts.len()).unwrap_or(u32::MAX),
        };
        let mut said = self
            .say(Class::Control, Message::SeedOffer(Some(offer)))
            .await;
        for number in parts {
            if let Some(part) = choice.table.part(choice.id, number) {
                said = said && self.say(Class::Control, Message::SeedPart(part)).await;
            }
        }
        said
    }

    async fn probe(&mut self, probe: Probe) -> bool {
        let blocks = self.standings.volumes.layout().size().blocks();
        if probe.blocks.iter().any(|run| run.end > blocks) {
            let text = "the source asks for blocks that no volume has";
            let error = WireError::new(ErrorCode::PROTOCOL, text);
            self.say(Class::Control, Message::Failed(error)).await;
            return false;
        }
        let (library, standings) = (self.agent.library.clone(), self.standings.clone());
        let (seeds, finder) = (self.seeds.clone(), self.finder.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let finder = finder.unwrap_or_else(|| Arc::new(library.finder(&standings.tenants)));
            let probed = finder.probe(seeds.as_deref(), &standings.volumes, &probe);
            // Nothing is going to be taken.
            finder.forget(probe.seq);
            (finder, probed)
        });
        let Ok((finder, probed)) = looked.await else {
            let text = "looking for content at the target failed; its agent's log says more";
            let error = WireError::new(ErrorCode::OTHER, text);
            self.say(Class::Control, Message::Failed(error)).await;
            return false;
        };
        self.finder = Some(finder);
        self.say(Class::Bulk, Message::Probed(probed)).await
    }
}
