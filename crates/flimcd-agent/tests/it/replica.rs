//! Away and back: copies that stay, what the way back costs, and copies that are not what they were.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use flimcd_agent::{
    RunningAgent,
    api::{
        Client, CreateVolume, MigrateRequest, MigrationStatus, OwnershipState, Phase, Strategy,
        Switchover,
    },
};
use flimcd_core::MigrationId;
use flimcd_nbd::Client as Nbd;

use crate::{
    disks::{Disks, ONE, TWO, migrate},
    guest::{Rng, content, write_sparse},
    site::{Process, Site, World, name, peer_table, to_beta, until},
};

const MIB: usize = 1 << 20;

fn to_alpha(strategy: Strategy, switchover: Switchover) -> MigrateRequest {
    MigrateRequest {
        to: "alpha".parse().unwrap(),
        ..to_beta(strategy, switchover)
    }
}

/// Waits for the end of one migration.
async fn ended_as(client: &Client, id: MigrationId) -> MigrationStatus {
    let mut last = None;
    until("the migration has ended", async || {
        let Ok(all) = client.migrations().await else {
            return false;
        };
        last = all.into_iter().find(|status| status.id == id);
        last.as_ref().is_some_and(|status| status.phase.has_ended())
    })
    .await;
    last.unwrap()
}

async fn completed(client: &Client, id: MigrationId) -> MigrationStatus {
    let status = ended_as(client, id).await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    status
}

/// Moves it with nobody connected.
async fn moved(from: &Client, to: &Client, request: &MigrateRequest) -> MigrationStatus {
    let begun = from.migrate(&name("vm"), request).await.unwrap();
    completed(to, begun.id).await;
    completed(from, begun.id).await
}

/// Both agents once more; now the target can dial.
async fn start_again(world: &mut World) -> (RunningAgent, RunningAgent) {
    world.source.listen = Some("127.0.0.1:0".to_owned());
    let source = world.source.start().await.unwrap();
    let address = source.listen_address().unwrap().to_string();
    world.target.peers = peer_table("alpha", Some(&address));
    (source, world.target.start().await.unwrap())
}

/// Writes random blocks through the export; returns what the disk has then.
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
    client.flush().unwrap();
    client.disconnect().unwrap();
}

fn check(site: &Site, model: &[u8]) {
    let mut client = Nbd::connect_unix(site.socket("vm"), "vm").unwrap();
    let mut got = vec![0; model.len()];
    for (at, part) in got.chunks_mut(MIB).enumerate() {
        client.read((at * MIB) as u64, part).unwrap();
    }
    client.disconnect().unwrap();
    let wrong = (got.chunks(4096).zip(model.chunks(4096))).position(|(got, model)| got != model);
    assert_eq!(wrong, None, "the first block that is wrong");
}

/// A volume of the agent's own at the source with this content.
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
        if part.iter().any(|&byte| byte != 0) {
            client.write((at * 65536) as u64, part, false).unwrap();
        }
    }
    client.disconnect().unwrap();
    model
}

const AUTO: Switchover = Switchover::Auto;

#[tokio::test(flavor = "multi_thread")]
async fn the_way_back_and_every_way_after_cost_what_changed() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let mut model = make(&world, 16 * MIB, 3).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    let first = moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    assert!(first.bytes_sent > 4 << 20, "{first:?}");
    let copy = alpha.volume(&name("vm")).await.unwrap().replica.unwrap();
    assert!(copy.is_untouched && !copy.imported && copy.since_unix_ms > 0);
    assert_eq!(beta.volume(&name("vm")).await.unwrap().replica, None);

    let blocks: Vec<_> = (0..100).map(|n| (n * 37 + 5) % 4096).collect();
    for (round, strategy) in (0..).zip([Strategy::Flimcd, Strategy::Precopy, Strategy::Postcopy]) {
        let is_back = round % 2 == 0;
        let (from, to, site) = if is_back {
            (&beta, &alpha, &world.target)
        } else {
            (&alpha, &beta, &world.source)
        };
        write_blocks(site, &mut model, &blocks, round + 9);
        let request = if is_back {
            to_alpha(strategy, AUTO)
        } else {
            to_beta(strategy, AUTO)
        };
        let status = moved(from, to, &request).await;
        let changed = blocks.len() as u64 * 4096;
        eprintln!(
            "{strategy:?}: {changed} bytes changed, {} sent",
            status.bytes_sent
        );
        assert!(
            status.bytes_sent < changed * 105 / 100 + 8192,
            "{strategy:?}: {} for {changed}: {status:?}",
            status.bytes_sent
        );
        let to_site = if is_back {
            &world.source
        } else {
            &world.target
        };
        check(to_site, &model);
    }
    alpha_agent.stop().await;
    beta_agent.stop().await;
    assert!(fs::read(world.source.image("vm")).unwrap() == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_were_restarted_still_know_what_changed() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let mut model = make(&world, 8 * MIB, 4).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    write_blocks(&world.target, &mut model, &[1, 500, 501], 1);
    alpha_agent.stop().await;
    beta_agent.stop().await;
    let (alpha_agent, beta_agent) = start_again(&mut world).await;
    write_blocks(&world.target, &mut model, &[7], 2);
    let status = moved(&beta, &alpha, &to_alpha(Strategy::Flimcd, AUTO)).await;
    assert!(status.bytes_sent < 5 * 4096, "{status:?}");
    check(&world.source, &model);
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

/// What somebody does to the file of a copy.
fn touch(image: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(bytes, at).unwrap();
    // Tests are quicker than the clock that files get their times from.
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_touched_is_compared_as_a_whole() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let mut model = make(&world, 8 * MIB, 5).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    write_blocks(&world.target, &mut model, &[3], 1);
    // Where there was data, and where there was a hole.
    for chunk in 0..128 {
        touch(
            &world.source.image("vm"),
            chunk * 65536 + 8192,
            &[0xee; 5000],
        );
    }
    let copy = alpha.volume(&name("vm")).await.unwrap().replica.unwrap();
    assert!(!copy.is_untouched);
    moved(&beta, &alpha, &to_alpha(Strategy::Flimcd, AUTO)).await;
    check(&world.source, &model);
    alpha_agent.stop().await;
    beta_agent.stop().await;
    assert!(fs::read(world.source.image("vm")).unwrap() == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_file_is_gone_is_refused_and_can_be_dropped() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let model = make(&world, 2 * MIB, 6).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    let refused = alpha.drop_replica(&name("other"), false).await;
    refused.unwrap_err();
    beta.drop_replica(&name("vm"), false).await.unwrap_err();
    fs::remove_file(world.source.image("vm")).unwrap();
    let back = to_alpha(Strategy::Flimcd, AUTO);
    let begun = beta.migrate(&name("vm"), &back).await.unwrap();
    let status = ended_as(&beta, begun.id).await;
    assert_eq!(status.phase, Phase::Failed);
    let why = status.error.unwrap();
    assert!(why.contains("replica drop vm"), "{why}");
    check(&world.target, &model);
    alpha.drop_replica(&name("vm"), true).await.unwrap();
    let status = moved(&beta, &alpha, &back).await;
    assert_eq!(status.phase, Phase::Completed);
    check(&world.source, &model);
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_starts_although_the_file_of_a_copy_is_gone() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    make(&world, 2 * MIB, 6).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    alpha_agent.stop().await;
    beta_agent.stop().await;
    fs::remove_file(world.source.image("vm")).unwrap();
    let (alpha_agent, beta_agent) = start_again(&mut world).await;
    assert!(alpha.volumes().await.unwrap().is_empty());
    moved(&beta, &alpha, &to_alpha(Strategy::Flimcd, AUTO)).await;
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_that_is_cancelled_leaves_the_copy_and_the_next_one_sends_the_rest() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let mut model = make(&world, 16 * MIB, 7).await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    let blocks: Vec<_> = (0..1000).collect();
    write_blocks(&world.target, &mut model, &blocks, 1);
    let mut slowly = to_alpha(Strategy::Flimcd, Switchover::Manual);
    slowly.bandwidth_bytes_per_sec = Some(2 << 20);
    let begun = beta.migrate(&name("vm"), &slowly).await.unwrap();
    until("a part has arrived", async || {
        let status = beta.migrations().await.unwrap();
        status.last().unwrap().bytes_sent > 1 << 20
    })
    .await;
    beta.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended_as(&beta, begun.id).await.phase, Phase::Cancelled);
    assert_eq!(ended_as(&alpha, begun.id).await.phase, Phase::Cancelled);
    let there = alpha.volume(&name("vm")).await.unwrap();
    assert_eq!(there.ownership, OwnershipState::Released);
    assert!(there.replica.unwrap().is_untouched);
    write_blocks(&world.target, &mut model, &[0], 2);
    let status = moved(&beta, &alpha, &to_alpha(Strategy::Flimcd, AUTO)).await;
    assert!(status.bytes_sent < 1000 * 4096 - (1 << 19), "{status:?}");
    check(&world.source, &model);
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_wanted_goes_and_an_imported_file_stays() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    let mut request = to_beta(Strategy::Flimcd, AUTO);
    request.keep_replica = Some(false);
    let model = make(&world, 2 * MIB, 8).await;
    moved(&alpha, &beta, &request).await;
    until("the copy is gone", async || {
        // Its name is taken out of the list before the file goes.
        alpha.volumes().await.unwrap().is_empty() && !world.source.image("vm").exists()
    })
    .await;
    check(&world.target, &model);

    let disks = Disks::import(&world, &[("data", MIB)], 3).await;
    let file: PathBuf = world.dir.path().join("data.img");
    let begun = migrate(&alpha, &disks.names(), &request).await;
    completed(&alpha, begun.id).await;
    until("the copy is gone", async || {
        alpha.volumes().await.unwrap().is_empty()
    })
    .await;
    assert!(file.exists());
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_copies_go_when_there_are_too_many() {
    let mut world = World::new();
    world.source.extra = "replicas = \"3MiB\"\n".to_owned();
    let (alpha_agent, beta_agent) = world.start().await;
    let alpha = world.source.client();
    for volume in ["one", "two", "three"] {
        let request = CreateVolume {
            name: name(volume),
            size_bytes: 2 << 20,
            tenant: None,
        };
        alpha.create_volume(&request).await.unwrap();
        let mut client = Nbd::connect_unix(world.source.socket(volume), volume).unwrap();
        client.write(0, &vec![7; 3 * MIB / 2], false).unwrap();
        client.disconnect().unwrap();
        let request = to_beta(Strategy::Flimcd, AUTO);
        let begun = alpha.migrate(&name(volume), &request).await.unwrap();
        completed(&alpha, begun.id).await;
    }
    until("the oldest copy is gone", async || {
        let left = alpha.volumes().await.unwrap();
        let left: Vec<_> = left.iter().map(|volume| volume.name.to_string()).collect();
        left == ["three", "two"]
    })
    .await;
    alpha_agent.stop().await;
    beta_agent.stop().await;
}

/// Both agents as processes.
async fn start(world: &mut World) -> (Process, Process) {
    let target = world.target.start_process().await;
    let listen = target.client.status().await.unwrap().listen.unwrap();
    world.target.listen = Some(listen.clone());
    world.source.peers = peer_table("beta", Some(&listen));
    (world.source.start_process().await, target)
}

/// Away under load, and back under load with agents killed in `phase`.
async fn killed_on_the_way_back(
    kills: (bool, bool),
    phase: Phase,
    strategy: Strategy,
    disks: &[crate::disks::Disk],
) {
    let mut world = World::new();
    let (mut alpha, mut beta) = start(&mut world).await;
    let disks = Disks::import(&world, disks, 5).await;
    let names = disks.names();
    let running = disks.start(&[&world.source, &world.target]);
    running.works(20).await;
    let away = to_beta(Strategy::Flimcd, Switchover::Manual);
    let begun = migrate(&alpha.client, &names, &away).await;
    alpha.client.switchover(&name("vm")).await.unwrap();
    completed(&alpha.client, begun.id).await;
    completed(&beta.client, begun.id).await;
    running.works(100).await;

    let mut back = to_alpha(strategy, Switchover::Manual);
    back.bandwidth_bytes_per_sec = Some(256 << 10);
    let begun = migrate(&beta.client, &names, &back).await;
    if phase == Phase::Postcopy {
        beta.client.switchover(&name("vm")).await.unwrap();
    }
    until("it is in its phase", async || {
        let all = beta.client.migrations().await.unwrap();
        let status = all.iter().find(|status| status.id == begun.id).unwrap();
        assert!(!status.phase.has_ended(), "{status:?}");
        status.phase == phase && (phase == Phase::Postcopy || status.bytes_sent > 64 << 10)
    })
    .await;
    if kills.0 {
        alpha.end(false).await;
    }
    if kills.1 {
        beta.end(false).await;
    }
    if kills.0 {
        alpha = world.source.start_process().await;
    }
    if kills.1 {
        beta = world.target.start_process().await;
    }
    if phase == Phase::Precopy {
        beta.client.switchover(&name("vm")).await.unwrap();
    }
    completed(&beta.client, begun.id).await;
    completed(&alpha.client, begun.id).await;
    running.works(20).await;
    let disks = running.stop().await;
    disks.check_all(&world.source);

    // And away once more, onto the copy that the second move left.
    let again = migrate(&alpha.client, &names, &to_beta(Strategy::Flimcd, AUTO)).await;
    completed(&alpha.client, again.id).await;
    completed(&beta.client, again.id).await;
    disks.check_all(&world.target);
    alpha.end(true).await;
    beta.end(true).await;
    disks.check_files(&world.target);
}

macro_rules! killed {
    ($($name:ident: $disks:ident, $alpha:literal, $beta:literal, $phase:ident, $strategy:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let kills = ($alpha, $beta);
                killed_on_the_way_back(kills, Phase::$phase, Strategy::$strategy, $disks).await;
            }
        )*
    };
}

killed! {
    nobody_killed_in_precopy_back: ONE, false, false, Precopy, Flimcd;
    target_killed_in_precopy_back: ONE, true, false, Precopy, Flimcd;
    source_killed_in_precopy_back: ONE, false, true, Precopy, Flimcd;
    both_killed_in_precopy_back_of_two: TWO, true, true, Precopy, Precopy;
    target_killed_in_postcopy_back: ONE, true, false, Postcopy, Postcopy;
    source_killed_in_postcopy_back: ONE, false, true, Postcopy, Postcopy;
    both_killed_in_postcopy_back_of_two: TWO, true, true, Postcopy, Postcopy;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_volume_of_the_same_name_is_no_copy() {
    let mut world = World::new();
    let (alpha_agent, beta_agent) = world.start().await;
    let (alpha, beta) = (world.source.client(), world.target.client());
    let model = make(&world, MIB, 9).await;
    moved(&alpha, &beta, &to_beta(Strategy::Flimcd, AUTO)).await;
    alpha.drop_replica(&name("vm"), false).await.unwrap();
    let image = world.dir.path().join("other.img");
    write_sparse(&image, &content(MIB, 10));
    let import = flimcd_agent::api::ImportVolume {
        name: name("vm"),
        path: image.clone(),
        tenant: None,
    };
    alpha.import_volume(&import).await.unwrap();
    let back = to_alpha(Strategy::Flimcd, AUTO);
    let begun = beta.migrate(&name("vm"), &back).await.unwrap();
    let status = ended_as(&beta, begun.id).await;
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    assert!(fs::read(&image).unwrap() == content(MIB, 10));
    check(&world.target, &model);
    alpha_agent.stop().await;
    beta_agent.stop().await;
}
