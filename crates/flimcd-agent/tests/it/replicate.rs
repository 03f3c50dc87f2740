//! Replicas that are kept up to date: what they cost, what they are of, and what is left when an increment is broken off.

use std::{fs, path::PathBuf};

use flimcd_agent::api::{
    Client, CreateVolume, OwnershipState, Phase, ReplicateRequest, ReplicationState,
    ReplicationStatus, Strategy, Switchover,
};
use flimcd_nbd::Client as Nbd;

use crate::{
    guest::{Rng, content},
    site::{Site, World, name, peer_table, to_beta, until},
};

fn every(seconds: Option<u64>, bandwidth: Option<u64>) -> ReplicateRequest {
    ReplicateRequest {
        to: "beta".parse().unwrap(),
        every_s: seconds,
        bandwidth_bytes_per_sec: bandwidth,
    }
}

/// A volume at the source with this content.
async fn make(world: &World, bytes: usize, seed: u64) -> Vec<u8> {
    let model = content(bytes, seed);
    let request = CreateVolume {
        name: name("vm"),
        size_bytes: bytes as u64,
        tenant: None,
    };
    world.source.client().create_volume(&request).await.unwrap();
    let mut client = Nbd::connect_unix(world.source.socket("vm"), "vm").unwrap();
    for (at, part) in model.chunks(65536).enumerate() {
        client.write((at * 65536) as u64, part, false).unwrap();
    }
    client.disconnect().unwrap();
    model
}

/// Writes random blocks; returns what the disk has then.
fn write_blocks(site: &Site, model: &mut [u8], blocks: &[usize], seed: u64) {
    let mut client = Nbd::connect_unix(site.socket("vm"), "vm").unwrap();
    let mut rng = Rng(seed | 1);
    for &block in blocks {
        let part = &mut model[block * 4096..][..4096];
        for word in part.chunks_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        client.write(block as u64 * 4096, part, false).unwrap();
    }
    client.disconnect().unwrap();
}

async fn until_increments(client: &Client, count: u64) -> ReplicationStatus {
    let mut last = None;
    until("an increment has ended", async || {
        last = client.replication(&name("vm")).await.ok();
        last.as_ref()
            .is_some_and(|status| status.increments >= count && status.running.is_none())
    })
    .await;
    last.unwrap()
}

async fn image_at(client: &Client) -> PathBuf {
    client.volume(&name("vm")).await.unwrap().image
}

/// Where an image is not what it should be.
fn differs(image: &PathBuf, model: &[u8]) -> Option<usize> {
    let found = fs::read(image).unwrap();
    assert_eq!(found.len(), model.len());
    (found.chunks(4096).zip(model.chunks(4096))).position(|(found, model)| found != model)
}

const SIZE: usize = 16 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_costs_what_changed_and_a_migration_moves_what_is_left() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    let mut model = make(&world, SIZE, 11).await;
    let begun = alpha
        .replicate(&name("vm"), &every(None, None))
        .await
        .unwrap();
    assert_eq!((begun.consistent_unix_ms, begun.increments), (None, 0));
    let first = until_increments(&alpha, 1).await;
    assert_eq!(
        (first.state, first.behind.as_deref()),
        (ReplicationState::Done, None)
    );
    assert!(first.stall_ms.is_some() && first.consistent_unix_ms.is_some());
    let image = image_at(&beta).await;
    assert_eq!(differs(&image, &model), None);
    let replica = beta.volume(&name("vm")).await.unwrap();
    assert_eq!(replica.ownership, OwnershipState::Released);
    assert!(replica.replica.unwrap().is_untouched);
    assert_eq!(
        alpha.volume(&name("vm")).await.unwrap().ownership,
        OwnershipState::Owner
    );

    let changed: Vec<_> = (0..40).map(|at| at * 97).collect();
    write_blocks(&world.source, &mut model, &changed, 3);
    alpha
        .replicate(&name("vm"), &every(None, None))
        .await
        .unwrap();
    let second = until_increments(&alpha, 2).await;
    assert_eq!(differs(&image, &model), None);
    let bytes = 40 * 4096;
    eprintln!(
        "changed {bytes} bytes, sent {} ({} on the link)",
        second.bytes_sent, second.bytes_on_link
    );
    assert!(
        second.bytes_sent >= bytes && second.bytes_sent < bytes + bytes / 20,
        "{second:?}"
    );
    assert!(second.consistent_unix_ms > first.consistent_unix_ms);

    // A migration goes over it, and the schedule stops.
    write_blocks(&world.source, &mut model, &[5, 6, 7], 4);
    alpha
        .replicate(&name("vm"), &every(Some(3600), None))
        .await
        .unwrap();
    until_increments(&alpha, 3).await;
    write_blocks(&world.source, &mut model, &[9, 10], 5);
    let request = to_beta(Strategy::Flimcd, Switchover::Auto);
    let moved = alpha.migrate(&name("vm"), &request).await.unwrap();
    until("it has moved", async || {
        let all = alpha.migrations().await.unwrap();
        all.iter()
            .any(|status| status.id == moved.id && status.phase == Phase::Completed)
    })
    .await;
    let all = alpha.migrations().await.unwrap();
    let status = all
        .into_iter()
        .find(|status| status.id == moved.id)
        .unwrap();
    assert!(status.bytes_sent < 64 << 10, "{status:?}");
    assert_eq!(
        beta.volume(&name("vm")).await.unwrap().ownership,
        OwnershipState::Owner
    );
    assert_eq!(differs(&image, &model), None);
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_a_guest_that_writes_all_the_time_is_of_one_moment() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    make(&world, SIZE, 12).await;
    // Every write has a higher number than all before it: at any moment the disk has all numbers up to one.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (socket, stopped) = (world.source.socket("vm"), stop.clone());
    let blocks = SIZE as u64 / 4096;
    let place = move |number: u64| number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % blocks;
    let writer = std::thread::spawn(move || {
        let mut client = Nbd::connect_unix(socket, "vm").unwrap();
        let mut number = 0_u64;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            number += 1;
            let block = number.to_le_bytes().repeat(512);
            client.write(place(number) * 4096, &block, false).unwrap();
        }
        client.disconnect().unwrap();
        number
    });
    alpha
        .replicate(&name("vm"), &every(Some(1), None))
        .await
        .unwrap();
    let status = until_increments(&alpha, 3).await;
    alpha.stop_replication(&name("vm")).await.unwrap();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let last = writer.join().unwrap();
    until("nothing arrives", async || {
        matches!(beta.volume(&name("vm")).await, Ok(volume) if volume.ownership == OwnershipState::Released)
    })
    .await;
    let restored = beta.restore_replica(&name("vm"), true).await.unwrap();
    let image = fs::read(&restored.image).unwrap();
    let found = |block: u64| {
        let at = block as usize * 4096;
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    };
    let newest = (1..=last)
        .rev()
        .find(|&number| found(place(number)) == number)
        .unwrap();
    let mut model = std::collections::BTreeMap::new();
    for number in 1..=newest {
        model.insert(place(number), number);
    }
    let wrong = model.iter().find(|&(&block, &number)| {
        image[block as usize * 4096..][..4096] != number.to_le_bytes().repeat(512)
    });
    assert_eq!(wrong, None, "written up to {newest} of {last}");
    eprintln!(
        "{last} writes, the replica has {newest}; the guest stood {:?} ms",
        status.stall_ms
    );
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_target_keeps_the_last_moment_and_the_schedule_goes_on() {
    let mut world = World::new();
    let mut beta_process = world.target.start_process().await;
    let address = beta_process.client.status().await.unwrap().listen.unwrap();
    world.target.listen = Some(address.clone());
    world.source.peers = peer_table("beta", Some(&address));
    let alpha_agent = world.source.start().await.unwrap();
    let (alpha, beta) = (world.source.client(), world.target.client());
    let mut model = make(&world, SIZE, 13).await;
    alpha
        .replicate(&name("vm"), &every(None, None))
        .await
        .unwrap();
    let first = until_increments(&alpha, 1).await;
    let consistent = model.clone();
    // Enough that it takes seconds at this rate, and killed on the way.
    let changed: Vec<_> = (0..2000).collect();
    write_blocks(&world.source, &mut model, &changed, 6);
    alpha
        .replicate(&name("vm"), &every(None, Some(1 << 20)))
        .await
        .unwrap();
    let image = image_at(&beta).await;
    until("some of it has arrived", async || {
        differs(&image, &consistent).is_some()
    })
    .await;
    beta_process.end(false).await;
    assert!(differs(&image, &model).is_some(), "it was not slow enough");
    // Broken off for good: the source is gone.
    alpha_agent.stop().await;
    let beta_process = world.target.start_process().await;
    until("the target answers", async || beta.status().await.is_ok()).await;
    beta.cancel(&name("vm")).await.unwrap();
    until("the increment has been given up", async || {
        matches!(beta.volume(&name("vm")).await, Ok(volume) if volume.ownership == OwnershipState::Released)
    })
    .await;
    let mut restored = None;
    until(
        "the increment is cleaned up and the copy restored",
        async || {
            restored = beta.restore_replica(&name("vm"), false).await.ok();
            restored.is_some()
        },
    )
    .await;
    let restored = restored.unwrap();
    assert_eq!(Some(restored.consistent_unix_ms), first.consistent_unix_ms);
    assert!(restored.blocks > 0);
    assert_eq!(differs(&image, &consistent), None);
    // Nothing more to put back.
    assert_eq!(
        beta.restore_replica(&name("vm"), false)
            .await
            .unwrap()
            .blocks,
        0
    );

    // The source comes back, and the schedule with it.
    let alpha_agent = world.source.start().await.unwrap();
    until("it knows that the increment was given up", async || {
        alpha
            .replication(&name("vm"))
            .await
            .unwrap()
            .running
            .is_none()
    })
    .await;
    alpha
        .replicate(&name("vm"), &every(None, None))
        .await
        .unwrap();
    let second = until_increments(&alpha, 2).await;
    assert!(second.consistent_unix_ms > first.consistent_unix_ms);
    assert_eq!(differs(&image, &model), None);
    alpha_agent.stop().await;
    drop(beta_process);
}
