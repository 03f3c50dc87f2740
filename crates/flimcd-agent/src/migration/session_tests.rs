//! Disks that belong to a machine: its move decides about the switch, and hears what happens. Whole agents, real
//! files and links; the machine is the test.

use flimcd_core::{MigrationId, VolumeName};
use std::{fs, sync::Arc};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{Command, hooks::DisksEvent};
use crate::{
    RunningAgent,
    agent::Agent,
    api::{ImportVolume, OwnershipState, Strategy, Switchover},
    site::{Site, World, name, to_beta, until},
};

const SESSION: MigrationId = MigrationId(0xfeed);
const SIZES: [usize; 2] = [(1 << 20) + 700, 3 << 20];

#[expect(clippy::cast_possible_truncation, reason = "the low byte is wanted")]
fn content(number: usize) -> Vec<u8> {
    let stamp = |at: usize| ((at / 7) ^ (at >> 9) ^ number) as u8;
    (0..SIZES[number]).map(stamp).collect()
}

fn names() -> Vec<VolumeName> {
    vec![name("system"), name("data")]
}

/// Two sites, and the disks of a machine that has begun to move.
struct Move {
    world: World,
    source: Option<RunningAgent>,
    target: Option<RunningAgent>,
    disks: MigrationId,
}

type Events = UnboundedReceiver<DisksEvent>;

impl Move {
    async fn begin() -> Self {
        let mut world = World::new();
        let (source, target) = world.start().await;
        for (number, volume) in names().into_iter().enumerate() {
            let path = world.dir.path().join(format!("{volume}.img"));
            fs::write(&path, content(number)).unwrap();
            let import = ImportVolume {
                name: volume,
                path,
                tenant: None,
            };
            source.agent().import_volume(import).await.unwrap();
        }
        // No guest is connected, and `Auto` would switch at once.
        let request = to_beta(Strategy::Flimcd, Switchover::Auto);
        let begun = source
            .agent()
            .begin_migration(names(), request, Some(SESSION))
            .await
            .unwrap();
        assert_eq!((begun.session, begun.volumes), (Some(SESSION), names()));
        Self {
            disks: begun.id,
            world,
            source: Some(source),
            target: Some(target),
        }
    }

    fn source(&self) -> &Arc<Agent> {
        self.source.as_ref().unwrap().agent()
    }

    fn target(&self) -> &Arc<Agent> {
        self.target.as_ref().unwrap().agent()
    }

    async fn restart_source(&mut self) {
        self.source.take().unwrap().stop().await;
        self.source = Some(self.world.source.start().await.unwrap());
    }

    async fn restart_target(&mut self) {
        self.target.take().unwrap().stop().await;
        self.target = Some(self.world.target.start().await.unwrap());
    }

    async fn switch_now(&self) {
        let source = self.source();
        source
            .command_migration(self.disks, Command::SwitchNow)
            .await
            .unwrap();
    }

    async fn vm_is_ready(&self, is_ready: bool) {
        let make = |answer| Command::VmReady(is_ready, answer);
        let target = self.target();
        target.command_migration(self.disks, make).await.unwrap();
    }

    async fn all_are(&self, site: &Site, ownership: OwnershipState) {
        for volume in names() {
            let found = site.client().volume(&volume).await.unwrap();
            assert_eq!(found.ownership, ownership, "{volume}");
        }
    }

    /// Compares the disks at a site, whose agent is stopped.
    async fn end(self, has_moved: bool) {
        self.source.unwrap().stop().await;
        self.target.unwrap().stop().await;
        for (number, volume) in names().into_iter().enumerate() {
            let image = if has_moved {
                self.world.target.image(volume.as_str())
            } else {
                self.world.dir.path().join(format!("{volume}.img"))
            };
            assert!(fs::read(image).unwrap() == content(number), "{volume}");
        }
    }
}

/// Takes events up to `last`, and returns those before it.
async fn up_to(events: &mut Events, last: &DisksEvent) -> Vec<DisksEvent> {
    let mut before = Vec::new();
    loop {
        let wait = tokio::time::timeout(std::time::Duration::from_secs(60), events.recv());
        let event = wait
            .await
            .expect("an event in time")
            .expect("one more event");
        if event == *last {
            return before;
        }
        before.push(event);
    }
}

fn is_ready(event: &DisksEvent) -> bool {
    matches!(event, DisksEvent::Ready(_))
}

/// Whether the offer of the source has reached the target.
async fn offered(of: &Move) {
    until("the target has the offer", async || {
        let status = of.target().migration(of.disks);
        status.is_ok_and(|status| status.phase == crate::api::Phase::Switchover)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_machine_decides_when() {
    let the_move = Move::begin().await;
    let mut at_source = the_move.source().disks_of(SESSION);
    up_to(&mut at_source, &DisksEvent::Ready(true)).await;
    let refused = the_move.source().switchover(&name("data")).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("machine"), "{refused}");
    the_move
        .all_are(&the_move.world.source, OwnershipState::Owner)
        .await;

    the_move.switch_now().await;
    let before = up_to(&mut at_source, &DisksEvent::Prepared).await;
    assert!(before.iter().all(is_ready), "{before:?}");
    offered(&the_move).await;
    the_move
        .all_are(&the_move.world.target, OwnershipState::Incoming)
        .await;
    the_move.vm_is_ready(true).await;
    let mut at_target = the_move.target().disks_of(SESSION);
    assert_eq!(
        up_to(&mut at_target, &DisksEvent::Completed).await,
        [DisksEvent::Owned]
    );
    assert_eq!(
        up_to(&mut at_source, &DisksEvent::Completed).await,
        [DisksEvent::Moved]
    );
    assert_eq!(
        (at_source.recv().await, at_target.recv().await),
        (None, None)
    );
    the_move.end(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_is_taken_back_while_the_machine_is_not_ready() {
    let the_move = Move::begin().await;
    let mut at_source = the_move.source().disks_of(SESSION);
    up_to(&mut at_source, &DisksEvent::Ready(true)).await;
    the_move.switch_now().await;
    up_to(&mut at_source, &DisksEvent::Prepared).await;
    offered(&the_move).await;
    the_move.vm_is_ready(false).await;
    the_move.source().cancel(&name("system")).await.unwrap();
    let ended = DisksEvent::Ended(Ok(()));
    assert_eq!(up_to(&mut at_source, &ended).await, []);
    the_move
        .all_are(&the_move.world.source, OwnershipState::Owner)
        .await;
    let mut at_target = the_move.target().disks_of(SESSION);
    assert_eq!(up_to(&mut at_target, &ended).await, []);
    until("the target is clean", async || {
        the_move.target().list_volumes().is_empty()
    })
    .await;
    the_move.end(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_source_does_not_switch_by_itself() {
    let mut the_move = Move::begin().await;
    let mut at_source = the_move.source().disks_of(SESSION);
    up_to(&mut at_source, &DisksEvent::Ready(true)).await;
    // Asked for while it cannot happen, so that it is forgotten for sure.
    the_move.target.take().unwrap().stop().await;
    until("the link is down", async || {
        let status = the_move.source().migration(the_move.disks).unwrap();
        !status.link_up
    })
    .await;
    the_move.switch_now().await;
    the_move.target = Some({
        the_move.source.take().unwrap().stop().await;
        the_move.world.target.start().await.unwrap()
    });
    the_move.source = Some(the_move.world.source.start().await.unwrap());
    let mut at_source = the_move.source().disks_of(SESSION);
    let before = up_to(&mut at_source, &DisksEvent::Ready(true)).await;
    assert!(before.iter().all(is_ready), "{before:?}");
    the_move
        .all_are(&the_move.world.source, OwnershipState::Owner)
        .await;
    the_move.switch_now().await;
    up_to(&mut at_source, &DisksEvent::Prepared).await;
    the_move.vm_is_ready(true).await;
    up_to(&mut at_source, &DisksEvent::Completed).await;
    the_move.end(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_was_offered_survives_restarts() {
    let mut the_move = Move::begin().await;
    let mut at_source = the_move.source().disks_of(SESSION);
    up_to(&mut at_source, &DisksEvent::Ready(true)).await;
    the_move.switch_now().await;
    up_to(&mut at_source, &DisksEvent::Prepared).await;
    offered(&the_move).await;
    the_move.restart_target().await;
    the_move.restart_source().await;
    let mut at_source = the_move.source().disks_of(SESSION);
    assert_eq!(up_to(&mut at_source, &DisksEvent::Prepared).await, []);
    offered(&the_move).await;
    the_move.vm_is_ready(true).await;
    let mut at_target = the_move.target().disks_of(SESSION);
    up_to(&mut at_target, &DisksEvent::Owned).await;
    up_to(&mut at_source, &DisksEvent::Moved).await;
    up_to(&mut at_source, &DisksEvent::Completed).await;
    up_to(&mut at_target, &DisksEvent::Completed).await;
    the_move.end(true).await;
}
