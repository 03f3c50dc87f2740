//! Agents that are killed as `kill -9` does, or stopped, in every phase, and started again.

use std::time::Duration;

use flimcd_agent::api::{OwnershipState, Phase, Strategy, Switchover};

use crate::{
    disks::{Disk, Disks, ONE, THREE, TWO, migrate},
    guest::Rng,
    site::{Process, World, ended, in_phase, name, peer_table, to_beta, until},
};

/// What goes down.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Down {
    KillSource,
    KillTarget,
    KillBoth,
    StopSource,
    StopTarget,
}

impl Down {
    fn source(self) -> bool {
        matches!(self, Self::KillSource | Self::KillBoth | Self::StopSource)
    }

    fn target(self) -> bool {
        matches!(self, Self::KillTarget | Self::KillBoth | Self::StopTarget)
    }

    fn is_gentle(self) -> bool {
        matches!(self, Self::StopSource | Self::StopTarget)
    }
}

/// Both agents as processes.
async fn start(world: &mut World) -> (Process, Process) {
    let target = world.target.start_process().await;
    let listen = target.client.status().await.unwrap().listen.unwrap();
    world.target.listen = Some(listen.clone());
    world.source.peers = peer_table("beta", Some(&listen));
    (world.source.start_process().await, target)
}

/// Migrates disks under load, slowly enough to be interrupted. Once the migration is in `phase`, agents go
/// down and are started again. The guests must never see wrong content, and the disks must arrive whole.
async fn interrupted(down: Down, phase: Phase, strategy: Strategy, disks: &[Disk]) {
    let mut world = World::new();
    let (mut source, mut target) = start(&mut world).await;
    let disks = Disks::import(&world, disks, 5).await;
    let names = disks.names();
    let sockets = [world.source.socket("vm"), world.target.socket("vm")];
    let running = disks.start(&[&world.source, &world.target]);
    running.works(20).await;
    let mut request = to_beta(strategy, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(6 << 20);
    migrate(&source.client, &names, &request).await;
    if phase == Phase::Precopy {
        until("a part has arrived", async || {
            let status = &source.client.migrations().await.unwrap()[0];
            assert!(!status.phase.has_ended(), "{status:?}");
            status.phase == Phase::Precopy && status.bytes_sent > 1 << 20
        })
        .await;
    } else {
        source.client.switchover(&name("vm")).await.unwrap();
        let status = in_phase(&source.client, "vm", phase).await;
        assert_eq!(status.phase, phase, "{status:?}");
    }

    if down.source() {
        source.end(down.is_gentle()).await;
    }
    if down.target() {
        target.end(down.is_gentle()).await;
    }
    if down.is_gentle() {
        // Whoever stops gently takes its sockets along.
        let socket = if down.source() {
            &sockets[0]
        } else {
            &sockets[1]
        };
        assert!(!socket.exists());
    }
    if down.source() {
        source = world.source.start_process().await;
    }
    if down.target() {
        target = world.target.start_process().await;
    }

    if phase == Phase::Precopy {
        source.client.switchover(&name("vm")).await.unwrap();
    }
    let at_source = ended(&source.client, "vm").await;
    assert_eq!(at_source.phase, Phase::Completed, "{at_source:?}");
    let at_target = ended(&target.client, "vm").await;
    assert_eq!(at_target.phase, Phase::Completed, "{at_target:?}");
    running.works(20).await;
    let disks = running.stop().await;
    disks.check_all(&world.target);
    for volume in &names {
        let here = target.client.volume(volume).await.unwrap();
        assert_eq!((here.ownership, here.epoch), (OwnershipState::Owner, 2));
    }
    source.end(true).await;
    target.end(true).await;
    disks.check_files(&world.target);
}

macro_rules! interruptions {
    ($($name:ident: $disks:ident, $down:ident, $phase:ident, $strategy:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                interrupted(Down::$down, Phase::$phase, Strategy::$strategy, $disks).await;
            }
        )*
    };
}

interruptions! {
    source_killed_in_precopy: ONE, KillSource, Precopy, Flimcd;
    target_killed_in_precopy: ONE, KillTarget, Precopy, Flimcd;
    both_killed_in_precopy: ONE, KillBoth, Precopy, Flimcd;
    source_stopped_in_precopy: ONE, StopSource, Precopy, Precopy;
    target_stopped_in_precopy: ONE, StopTarget, Precopy, Precopy;
    source_killed_in_postcopy: ONE, KillSource, Postcopy, Postcopy;
    target_killed_in_postcopy: ONE, KillTarget, Postcopy, Postcopy;
    both_killed_in_postcopy: ONE, KillBoth, Postcopy, Postcopy;
    source_stopped_in_postcopy: ONE, StopSource, Postcopy, Postcopy;
    target_stopped_in_postcopy: ONE, StopTarget, Postcopy, Postcopy;
    source_killed_in_precopy_of_three: THREE, KillSource, Precopy, Flimcd;
    target_killed_in_precopy_of_two: TWO, KillTarget, Precopy, Flimcd;
    both_killed_in_precopy_of_three: THREE, KillBoth, Precopy, Flimcd;
    source_killed_in_postcopy_of_two: TWO, KillSource, Postcopy, Postcopy;
    target_killed_in_postcopy_of_three: THREE, KillTarget, Postcopy, Postcopy;
    both_killed_in_postcopy_of_three: THREE, KillBoth, Postcopy, Postcopy;
    source_stopped_in_postcopy_of_three: THREE, StopSource, Postcopy, Postcopy;
}

/// Not part of a normal run: agents are killed at random moments, over and over, with every strategy.
/// `FLIMCD_SOAK_SEEDS=1..20 cargo test -p flimcd-agent --test it soak -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; for looking for rare faults"]
async fn soak() {
    let seeds = std::env::var("FLIMCD_SOAK_SEEDS").unwrap_or_else(|_| "1..5".to_owned());
    let (first, end) = seeds.split_once("..").unwrap();
    for seed in first.parse().unwrap()..end.parse().unwrap() {
        let summary = soak_once(seed).await;
        eprintln!("seed {seed}: {summary}");
    }
}

async fn soak_once(seed: u64) -> String {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut world = World::new();
    let (mut source, mut target) = start(&mut world).await;
    let disks = Disks::import(&world, [ONE, TWO, THREE][rng.below(3) as usize], seed).await;
    let names = disks.names();
    let running = disks.start(&[&world.source, &world.target]);
    let strategy = Strategy::ALL[rng.below(3) as usize];
    let mut request = to_beta(strategy, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(4 << 20);
    migrate(&source.client, &names, &request).await;
    // Asked for in the beginning: it stays on record, whoever is killed.
    source.client.switchover(&name("vm")).await.unwrap();
    let mut kills = 0;
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(rng.below(600))).await;
        let all = source.client.migrations().await.unwrap();
        if all[0].phase.has_ended() {
            break;
        }
        kills += 1;
        let who = rng.below(3);
        if who != 0 {
            source.end(false).await;
        }
        if who != 1 {
            target.end(false).await;
        }
        if who != 1 {
            target = world.target.start_process().await;
        }
        if who != 0 {
            source = world.source.start_process().await;
        }
    }
    let at_source = ended(&source.client, "vm").await;
    assert_eq!(at_source.phase, Phase::Completed, "{at_source:?}");
    assert_eq!(ended(&target.client, "vm").await.phase, Phase::Completed);
    running.works(20).await;
    let requests = running.requests();
    let disks = running.stop().await;
    disks.check_all(&world.target);
    source.end(true).await;
    target.end(true).await;
    disks.check_files(&world.target);
    format!(
        "{strategy}, {} disks, {kills} kills, {requests} requests, downtime {:?} ms",
        names.len(),
        at_source.downtime_ms
    )
}
