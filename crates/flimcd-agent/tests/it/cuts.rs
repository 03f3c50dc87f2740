//! Links that break: the migration goes on where it was, or ends as it was told to.

use flimcd_agent::{
    RunningAgent,
    api::{Client, OwnershipState, Phase, Strategy, Switchover},
};
use flimcd_core::VolumeName;

use crate::{
    disks::{Disk, Disks, THREE, TWO, migrate},
    proxy::Proxy,
    site::{World, ended, in_phase, name, peer_table, to_beta, until},
};

const SMALL: &[Disk] = &[("vm", 8 << 20)];

/// Both agents, with a wire that can be cut, and disks at the source.
async fn start(world: &mut World, disks: &[Disk]) -> (RunningAgent, RunningAgent, Proxy, Disks) {
    let target = world.target.start().await.unwrap();
    let listen = target.listen_address().unwrap();
    world.target.listen = Some(listen.to_string());
    let proxy = Proxy::start(listen).await;
    world.source.peers = peer_table("beta", Some(&proxy.address.to_string()));
    let source = world.source.start().await.unwrap();
    let disks = Disks::import(world, disks, 21).await;
    (source, target, proxy, disks)
}

/// Begins a migration that waits for the operator, and cuts the link while content crosses. Returns when
/// `noticed_by` knows that the link is down.
async fn cut_in_precopy(world: &World, proxy: &Proxy, volumes: &[VolumeName], noticed_by: &Client) {
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    migrate(&world.source.client(), volumes, &request).await;
    in_phase(&world.target.client(), "vm", Phase::Precopy).await;
    proxy.cut();
    until("the link is known to be down", async || {
        !noticed_by.migrations().await.unwrap()[0].link_up
    })
    .await;
}

/// The link is cut every time that it has carried a little, from the first byte to the last.
async fn cut_again_and_again(strategy: Strategy, disks: &[Disk]) {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, disks) = start(&mut world, disks).await;
    let (source, target) = (world.source.client(), world.target.client());
    let names = disks.names();
    let running = disks.start(&[&world.source, &world.target]);
    let mut request = to_beta(strategy, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(6 << 20);
    migrate(&source, &names, &request).await;
    source.switchover(&name("vm")).await.unwrap();
    let (mut cuts, mut at_cut) = (0, 0);
    until("the migration has ended", async || {
        let status = &source.migrations().await.unwrap()[0];
        if status.link_up && status.bytes_on_link > at_cut + (1 << 20) && cuts < 8 {
            at_cut = status.bytes_on_link;
            cuts += 1;
            proxy.cut();
            until("nothing stands", async || proxy.open() == 0).await;
            proxy.mend();
        }
        status.phase.has_ended()
    })
    .await;
    assert!(cuts > 3, "{cuts} cuts only");
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    assert_eq!(ended(&target, "vm").await.phase, Phase::Completed);
    running.works(20).await;
    let disks = running.stop().await;
    disks.check_all(&world.target);
    target_agent.stop().await;
    source_agent.stop().await;
    disks.check_files(&world.target);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_with_flimcd() {
    cut_again_and_again(Strategy::Flimcd, &[("vm", 16 << 20)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_with_postcopy() {
    cut_again_and_again(Strategy::Postcopy, &[("vm", 16 << 20)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_under_three_disks() {
    cut_again_and_again(Strategy::Flimcd, THREE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_under_two_disks_with_postcopy() {
    cut_again_and_again(Strategy::Postcopy, TWO).await;
}

/// Cancelled while the target cannot be told: the guest goes on at once, and the target hears of it when the link is
/// there again, even if the source's agent was restarted meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_hears_later_of_a_cancellation() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, disks) = start(&mut world, TWO).await;
    let (source, target) = (world.source.client(), world.target.client());
    let names = disks.names();
    let running = disks.start(&[&world.source]);
    cut_in_precopy(&world, &proxy, &names, &source).await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    let disks = running.stop().await;
    source_agent.stop().await;
    let arriving = target.volumes().await.unwrap();
    assert_eq!(arriving.len(), names.len());
    for volume in arriving {
        assert_eq!(volume.ownership, OwnershipState::Incoming);
    }
    let source_agent = world.source.start().await.unwrap();
    proxy.mend();
    assert_eq!(ended(&target, "vm").await.phase, Phase::Cancelled);
    until("the target is clean", async || {
        target.volumes().await.unwrap().is_empty()
    })
    .await;
    disks.check_all(&world.source);
    target_agent.stop().await;
    source_agent.stop().await;
}

/// Cancelled and begun anew while the target cannot be told: the new migration takes the place of the old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_migration_takes_the_place_of_a_cancelled_one() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, disks) = start(&mut world, TWO).await;
    let source = world.source.client();
    let names = disks.names();
    cut_in_precopy(&world, &proxy, &names, &source).await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    let request = to_beta(Strategy::Flimcd, Switchover::Auto);
    migrate(&source, &names, &request).await;
    proxy.mend();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    disks.check_all(&world.target);
    target_agent.stop().await;
    source_agent.stop().await;
}

/// The target ends it while the source cannot be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_hears_later_that_the_target_gave_up() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, disks) = start(&mut world, SMALL).await;
    let (source, target) = (world.source.client(), world.target.client());
    let names = disks.names();
    let running = disks.start(&[&world.source]);
    cut_in_precopy(&world, &proxy, &names, &target).await;
    target.cancel(&name("vm")).await.unwrap();
    assert!(ended(&target, "vm").await.phase.has_ended());
    proxy.mend();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Failed);
    assert!(
        status.error.as_ref().unwrap().contains("target"),
        "{status:?}"
    );
    let disks = running.stop().await;
    disks.check_all(&world.source);
    target_agent.stop().await;
    source_agent.stop().await;
}
