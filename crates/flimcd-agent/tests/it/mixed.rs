//! Agents that were killed between the records of volumes that move together: the records are made as such a death
//! leaves them, and the migration has to go on as if nothing had been.

use flimcd_agent::{
    RunningAgent,
    api::{OwnershipState, Phase, Strategy, Switchover},
};
use flimcd_core::{BlockSet, Epoch, MigrationId};
use flimcd_volume::{
    NewVolume, Ownership, Volume, VolumesDir, device::OpenOptions, state::StateDir,
};
use std::fs;

use crate::{
    disks::{AtWork, Disks, THREE, migrate},
    site::{Site, World, ended, in_phase, name, peer_table, to_beta, until},
};

/// Guests at work on three disks, whose migration waits in pre-copy or is in post-copy.
async fn under_way(
    world: &mut World,
    strategy: Strategy,
    phase: Phase,
) -> (RunningAgent, RunningAgent, AtWork, MigrationId) {
    let (source_agent, target_agent) = world.start().await;
    let disks = Disks::import(world, THREE, 31).await;
    let names = disks.names();
    let running = disks.start(&[&world.source, &world.target]);
    let mut request = to_beta(strategy, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(3 << 20);
    let source = world.source.client();
    let id = migrate(&source, &names, &request).await.id;
    if phase == Phase::Postcopy {
        source.switchover(&name("vm")).await.unwrap();
    }
    for client in [&source, &world.target.client()] {
        let status = in_phase(client, "vm", phase).await;
        assert_eq!(status.phase, phase, "{status:?}");
    }
    (source_agent, target_agent, running, id)
}

/// Changes what the record of a volume says, and returns its directory.
fn rewrite(site: &Site, volume: &str, ownership: Ownership) -> StateDir {
    let volumes = VolumesDir::open(site.state_dir().join("volumes")).unwrap();
    let mut state = volumes.open_volume(&name(volume)).unwrap();
    let mut record = state.record().clone();
    assert_ne!(record.ownership, ownership);
    record.ownership = ownership;
    state.store(record).unwrap();
    state
}

async fn all_are(site: &Site, ownership: OwnershipState) {
    for (volume, _) in THREE {
        let found = site.client().volume(&name(volume)).await.unwrap();
        assert_eq!(found.ownership, ownership, "{volume}");
    }
}

async fn arrives_whole(world: &World, agents: (RunningAgent, RunningAgent), running: AtWork) {
    let at_source = ended(&world.source.client(), "vm").await;
    assert_eq!(at_source.phase, Phase::Completed, "{at_source:?}");
    let at_target = ended(&world.target.client(), "vm").await;
    assert_eq!(at_target.phase, Phase::Completed, "{at_target:?}");
    all_are(&world.target, OwnershipState::Owner).await;
    running.works(20).await;
    let disks = running.stop().await;
    disks.check_all(&world.target);
    agents.0.stop().await;
    agents.1.stop().await;
    disks.check_files(&world.target);
}

fn prepared(migration: MigrationId) -> Ownership {
    Ownership::Prepared {
        epoch: Epoch(1),
        migration,
        peer: name_of("beta"),
    }
}

fn name_of(site: &str) -> flimcd_core::SiteName {
    site.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_had_prepared_some_disks_owns_all() {
    let mut world = World::new();
    let (source_agent, target_agent, running, id) =
        under_way(&mut world, Strategy::Flimcd, Phase::Precopy).await;
    source_agent.stop().await;
    drop(rewrite(&world.source, "data", prepared(id)));
    let source_agent = world.source.start().await.unwrap();
    all_are(&world.source, OwnershipState::Owner).await;
    world.source.client().switchover(&name("vm")).await.unwrap();
    arrives_whole(&world, (source_agent, target_agent), running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_had_released_some_disks_has_released_all() {
    let mut world = World::new();
    let (source_agent, target_agent, running, id) =
        under_way(&mut world, Strategy::Postcopy, Phase::Postcopy).await;
    source_agent.stop().await;
    for volume in ["vm", "tiny"] {
        drop(rewrite(&world.source, volume, prepared(id)));
    }
    let source_agent = world.source.start().await.unwrap();
    all_are(&world.source, OwnershipState::Released).await;
    arrives_whole(&world, (source_agent, target_agent), running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_had_taken_over_some_disks_has_taken_none() {
    let mut world = World::new();
    let (source_agent, target_agent, running, id) =
        under_way(&mut world, Strategy::Flimcd, Phase::Precopy).await;
    target_agent.stop().await;
    for volume in ["vm", "data"] {
        let arriving = Ownership::Arriving {
            epoch: Epoch(2),
            migration: id,
            peer: name_of("alpha"),
        };
        let state = rewrite(&world.target, volume, arriving);
        let blocks = state.record().size.blocks();
        state
            .create_missing(Epoch(2), &BlockSet::new(blocks))
            .unwrap();
    }
    let target_agent = world.target.start().await.unwrap();
    all_are(&world.target, OwnershipState::Incoming).await;
    running.works(20).await;
    world.source.client().switchover(&name("vm")).await.unwrap();
    arrives_whole(&world, (source_agent, target_agent), running).await;
}

/// Every block is there, and only some of the records say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_had_completed_some_disks_completes_all() {
    let mut world = World::new();
    let (source_agent, target_agent, running, id) =
        under_way(&mut world, Strategy::Flimcd, Phase::Precopy).await;
    let source = world.source.client();
    source.switchover(&name("vm")).await.unwrap();
    ended(&source, "vm").await;
    ended(&world.target.client(), "vm").await;
    target_agent.stop().await;
    let arriving = Ownership::Arriving {
        epoch: Epoch(2),
        migration: id,
        peer: name_of("alpha"),
    };
    let state = rewrite(&world.target, "data", arriving);
    let none = BlockSet::new(state.record().size.blocks());
    state.create_missing(Epoch(2), &none).unwrap();
    drop(state);
    let path = record_of(&world.target, id);
    let text = fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["status"]["phase"], "completed");
    record["status"]["phase"] = "postcopy".into();
    fs::write(&path, record.to_string()).unwrap();
    let target_agent = world.target.start().await.unwrap();
    arrives_whole(&world, (source_agent, target_agent), running).await;
}

fn record_of(site: &Site, id: MigrationId) -> std::path::PathBuf {
    site.state_dir().join(format!("migrations/{id}.json"))
}

/// Killed after the record of an arrival and the first of its volumes had been made.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_had_made_some_disks_makes_all_anew() {
    let mut world = World::new();
    // The target makes its directories, and is not there when the migration begins.
    let target_agent = world.target.start().await.unwrap();
    let listen = target_agent.listen_address().unwrap().to_string();
    world.target.listen = Some(listen.clone());
    target_agent.stop().await;
    world.source.peers = peer_table("beta", Some(&listen));
    let source_agent = world.source.start().await.unwrap();
    let disks = Disks::import(&world, THREE, 31).await;
    let names = disks.names();
    let source = world.source.client();
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    let id = migrate(&source, &names, &request).await.id;

    let path = record_of(&world.source, id);
    until("the source has its record", async || path.exists()).await;
    let text = fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["role"] = "target".into();
    record["peer"] = "alpha".into();
    record["request"] = serde_json::Value::Null;
    fs::write(record_of(&world.target, id), record.to_string()).unwrap();
    let there = source.volume(&name("vm")).await.unwrap();
    let new = NewVolume {
        id: there.id,
        name: name("vm"),
        tenant: there.tenant,
        image: world.target.image("vm"),
        epoch: Epoch(1),
        ownership: Ownership::Incoming {
            migration: id,
            peer: name_of("alpha"),
        },
    };
    let volumes = VolumesDir::open(world.target.state_dir().join("volumes")).unwrap();
    let size = there.size_bytes.try_into().unwrap();
    drop(Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap());
    // The image of the second one, too.
    let image = fs::File::create(world.target.image("data")).unwrap();
    image.set_len(12 << 20).unwrap();

    let target_agent = world.target.start().await.unwrap();
    let running = disks.start(&[&world.source, &world.target]);
    source.switchover(&name("vm")).await.unwrap();
    arrives_whole(&world, (source_agent, target_agent), running).await;
}
