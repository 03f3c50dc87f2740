//! Migrations that go well, under load.

use flimcd_agent::api::{
    CreateVolume, ImportVolume, MigrationStatus, OwnershipState, Phase, Role, Strategy, Switchover,
};

use crate::{
    guest::{Guest, content, write_sparse},
    site::{World, ended, in_phase, name, to_beta, until},
};

const MIB: usize = 1 << 20;

/// Imports an image of `bytes` at the source and starts a guest on it.
async fn set_up(world: &World, bytes: usize) -> Guest {
    let image = world.dir.path().join("disk.img");
    let content = content(bytes, 7);
    write_sparse(&image, &content);
    let request = ImportVolume {
        name: name("vm"),
        path: image,
        tenant: None,
    };
    world.source.client().import_volume(&request).await.unwrap();
    Guest::new(content, 11)
}

/// The guest works until the migration is ready, is stopped, and goes on at the target.
async fn migrate_with(strategy: Strategy) -> (World, MigrationStatus) {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let guest = set_up(&world, 32 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let running = guest.start(&[world.source.socket("vm")], "vm");
    until("the guest works", async || running.count() > 50).await;
    source
        .migrate(&name("vm"), &to_beta(strategy, Switchover::Auto))
        .await
        .unwrap();
    until("it is ready", async || {
        let status = &source.migrations().await.unwrap()[0];
        assert!(!status.phase.has_ended(), "{status:?}");
        status.ready_for_switchover
    })
    .await;
    // A guest is connected, so nothing happens yet.
    assert_eq!(source.migrations().await.unwrap()[0].phase, Phase::Precopy);
    let guest = running.stop().await;
    let running = guest.start(&[world.target.socket("vm")], "vm");
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
    let before = running.count();
    until("the guest works at the target", async || {
        running.count() > before + 50
    })
    .await;
    let guest = running.stop().await;
    guest.check_all(&world.target.socket("vm"), "vm");
    let here = target.volume(&name("vm")).await.unwrap();
    assert_eq!((here.ownership, here.epoch), (OwnershipState::Owner, 2));
    let there = source.volume(&name("vm")).await.unwrap();
    assert_eq!(
        (there.ownership, there.epoch),
        (OwnershipState::Released, 2)
    );
    target_agent.stop().await;
    source_agent.stop().await;
    guest.check_file(&world.target.image("vm"));
    (world, at_source)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_flimcd() {
    let (_world, status) = migrate_with(Strategy::Flimcd).await;
    assert!(
        status.downtime_ms.is_some() && status.bytes_sent > 0,
        "{status:?}"
    );
    assert!(status.bytes_on_link >= status.bytes_sent, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_postcopy() {
    let (_world, status) = migrate_with(Strategy::Postcopy).await;
    assert!(
        status.missing_blocks_at_switch.unwrap() > 1000,
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_moves_under_load_with_precopy() {
    let (_world, status) = migrate_with(Strategy::Precopy).await;
    assert_eq!(status.missing_blocks_at_switch, Some(0), "{status:?}");
    assert_eq!(status.guest_reads_missed, 0);
}

/// The guest stays connected: its requests are parked, refused as moved, and made again at the target.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_switches_while_the_guest_is_connected() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let guest = set_up(&world, 16 * MIB).await;
    let source = world.source.client();
    let sockets = [world.source.socket("vm"), world.target.socket("vm")];
    let running = guest.start(&sockets, "vm");
    until("the guest works", async || running.count() > 50).await;
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    in_phase(&source, "vm", Phase::Precopy).await;
    source.switchover(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    let before = running.count();
    until("the guest works at the target", async || {
        running.count() > before + 50
    })
    .await;
    let guest = running.stop().await;
    guest.check_all(&world.target.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}

/// Sizes that are no multiple of anything, and a volume that nobody ever wrote to.
#[tokio::test(flavor = "multi_thread")]
async fn odd_and_empty_volumes_move() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    let odd = content(3 * MIB + 1234, 3);
    let image = world.dir.path().join("odd.img");
    write_sparse(&image, &odd);
    let import = ImportVolume {
        name: name("odd"),
        path: image,
        tenant: None,
    };
    source.import_volume(&import).await.unwrap();
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
    Guest::new(odd, 1).check_file(&world.target.image("odd"));
    Guest::new(vec![0; 5_000_000], 1).check_file(&world.target.image("empty"));
}

/// Cancelled before the switch: the guest does not notice, nothing stays at the target, and the volume can
/// be migrated again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_leaves_nothing() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let guest = set_up(&world, 16 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let running = guest.start(&[world.source.socket("vm")], "vm");
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
    let before = running.count();
    until("the guest works on", async || running.count() > before + 50).await;

    request.bandwidth_bytes_per_sec = None;
    request.switchover = Switchover::Auto;
    source.migrate(&name("vm"), &request).await.unwrap();
    let guest = running.stop().await;
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    guest.check_all(&world.target.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}
