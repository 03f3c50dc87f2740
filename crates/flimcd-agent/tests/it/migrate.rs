//! Migrations that go well, under load.

use flimcd_agent::api::{
    CreateVolume, MigrationStatus, OwnershipState, Phase, Role, Strategy, Switchover,
};

use crate::{
    disks::{Disk, Disks, THREE, TWO, migrate},
    guest::Guest,
    site::{World, ended, in_phase, name, to_beta, until},
};

const MIB: usize = 1 << 20;
const SMALL: &[Disk] = &[("vm", 16 * MIB)];

/// The guests work until the migration is ready, are stopped, and go on at the target.
async fn migrate_with(strategy: Strategy, disks: &[Disk]) -> (World, MigrationStatus) {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disks = Disks::import(&world, disks, 7).await;
    let names = disks.names();
    let (source, target) = (world.source.client(), world.target.client());
    let running = disks.start(&[&world.source]);
    running.works(50).await;
    let begun = migrate(&source, &names, &to_beta(strategy, Switchover::Auto)).await;
    assert_eq!(begun.volumes, names);
    until("it is ready", async || {
        let status = &source.migrations().await.unwrap()[0];
        assert!(!status.phase.has_ended(), "{status:?}");
        status.ready_for_switchover
    })
    .await;
    // Guests are connected, so nothing happens yet.
    assert_eq!(source.migrations().await.unwrap()[0].phase, Phase::Precopy);
    let running = running.stop().await.start(&[&world.target]);
    let at_source = ended(&source, "vm").await;
    let at_target = ended(&target, "vm").await;
    assert_eq!(
        (at_source.phase, at_source.error.clone()),
        (Phase::Completed, None)
    );
    assert_eq!(
        (at_target.phase, at_target.role),
        (Phase::Completed, Role::Target)
    );
    assert_eq!(
        (&at_target.volumes, at_target.bytes_total),
        (&names, begun.bytes_total)
    );
    running.works(50).await;
    let disks = running.stop().await;
    disks.check_all(&world.target);
    for volume in &names {
        let here = target.volume(volume).await.unwrap();
        assert_eq!((here.ownership, here.epoch), (OwnershipState::Owner, 2));
        let there = source.volume(volume).await.unwrap();
        assert_eq!(
            (there.ownership, there.epoch),
            (OwnershipState::Released, 2)
        );
    }
    target_agent.stop().await;
    source_agent.stop().await;
    disks.check_files(&world.target);
    (world, at_source)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_flimcd() {
    let (_world, status) = migrate_with(Strategy::Flimcd, &[("vm", 32 * MIB)]).await;
    assert!(
        status.downtime_ms.is_some() && status.bytes_sent > 0,
        "{status:?}"
    );
    assert!(status.bytes_on_link >= status.bytes_sent, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_postcopy() {
    let (_world, status) = migrate_with(Strategy::Postcopy, &[("vm", 32 * MIB)]).await;
    assert!(
        status.missing_blocks_at_switch.unwrap() > 1000,
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_precopy() {
    let (_world, status) = migrate_with(Strategy::Precopy, &[("vm", 32 * MIB)]).await;
    assert_eq!(status.missing_blocks_at_switch, Some(0), "{status:?}");
    assert_eq!(status.guest_reads_missed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_disks_move_together_with_flimcd() {
    let (_world, status) = migrate_with(Strategy::Flimcd, THREE).await;
    let sizes: usize = THREE.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(status.bytes_total, sizes as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_disks_move_together_with_postcopy() {
    let (_world, status) = migrate_with(Strategy::Postcopy, THREE).await;
    assert!(
        status.missing_blocks_at_switch.unwrap() > 1000,
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_move_together_with_precopy() {
    let (_world, status) = migrate_with(Strategy::Precopy, TWO).await;
    assert_eq!(status.missing_blocks_at_switch, Some(0), "{status:?}");
}

/// The guest stays connected: its requests are parked, refused as moved, and made again at the target.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_switches_while_the_guest_is_connected() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disks = Disks::import(&world, TWO, 7).await;
    let names = disks.names();
    let source = world.source.client();
    let running = disks.start(&[&world.source, &world.target]);
    running.works(50).await;
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    migrate(&source, &names, &request).await;
    in_phase(&source, "vm", Phase::Precopy).await;
    source.switchover(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    running.works(50).await;
    running.stop().await.check_all(&world.target);
    target_agent.stop().await;
    source_agent.stop().await;
}

/// Sizes that are no multiple of anything, and a volume that nobody ever wrote to.
#[tokio::test(flavor = "multi_thread")]
async fn odd_and_empty_volumes_move() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    let odd = Disks::import(&world, &[("odd", 3 * MIB + 1234)], 3).await;
    let create = CreateVolume {
        name: name("empty"),
        size_bytes: 5_000_000,
        tenant: None,
    };
    source.create_volume(&create).await.unwrap();
    for volume in ["odd", "empty"] {
        let request = to_beta(Strategy::Flimcd, Switchover::Auto);
        source.migrate(&name(volume), &request).await.unwrap();
    }
    for volume in ["odd", "empty"] {
        assert_eq!(
            ended(&source, volume).await.phase,
            Phase::Completed,
            "{volume}"
        );
        assert_eq!(
            ended(&target, volume).await.phase,
            Phase::Completed,
            "{volume}"
        );
    }
    target_agent.stop().await;
    source_agent.stop().await;
    odd.check_files(&world.target);
    Guest::new(vec![0; 5_000_000], 1).check_file(&world.target.image("empty"));
}

/// Cancelled before the switch: the guest does not notice, nothing stays at the target, and the volume can
/// be migrated again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_leaves_nothing() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disks = Disks::import(&world, SMALL, 7).await;
    let (source, target) = (world.source.client(), world.target.client());
    let running = disks.start(&[&world.source]);
    let mut request = to_beta(Strategy::Flimcd, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(1 << 20);
    source.migrate(&name("vm"), &request).await.unwrap();
    in_phase(&source, "vm", Phase::Precopy).await;
    until("something has arrived", async || {
        world.target.image("vm").exists()
    })
    .await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    assert_eq!(ended(&target, "vm").await.phase, Phase::Cancelled);
    until("the target is clean", async || {
        target.volumes().await.unwrap().is_empty()
            && !world.target.image("vm").exists()
            && !world.target.socket("vm").exists()
    })
    .await;
    running.works(50).await;

    request.bandwidth_bytes_per_sec = None;
    request.switchover = Switchover::Auto;
    source.migrate(&name("vm"), &request).await.unwrap();
    let disks = running.stop().await;
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    disks.check_all(&world.target);
    target_agent.stop().await;
    source_agent.stop().await;
}
