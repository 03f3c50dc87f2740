//! Links that break: the migration goes on where it was, or ends as it was told to.

use flimcd_agent::{
    RunningAgent,
    api::{ImportVolume, OwnershipState, Phase, Strategy, Switchover},
};

use crate::{
    guest::{Guest, content, write_sparse},
    proxy::Proxy,
    site::{World, ended, in_phase, name, peer_table, to_beta, until},
};

const MIB: usize = 1 << 20;

/// Both agents, with a wire that can be cut, and a volume with a guest's content at the source.
async fn start(world: &mut World, bytes: usize) -> (RunningAgent, RunningAgent, Proxy, Guest) {
    let target = world.target.start().await.unwrap();
    let listen = target.listen_address().unwrap();
    world.target.listen = Some(listen.to_string());
    let proxy = Proxy::start(listen).await;
    world.source.peers = peer_table("beta", Some(&proxy.address.to_string()));
    let source = world.source.start().await.unwrap();
    let image = world.dir.path().join("disk.img");
    let content = content(bytes, 21);
    write_sparse(&image, &content);
    let import = ImportVolume {
        name: name("vm"),
        path: image,
        tenant: None,
    };
    world.source.client().import_volume(&import).await.unwrap();
    (source, target, proxy, Guest::new(content, 17))
}

/// The link is cut every time that it has carried a little, from the first byte to the last.
async fn cut_again_and_again(strategy: Strategy) {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, guest) = start(&mut world, 16 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let sockets = [world.source.socket("vm"), world.target.socket("vm")];
    let running = guest.start(&sockets, "vm");
    let mut request = to_beta(strategy, Switchover::Manual);
    request.bandwidth_bytes_per_sec = Some(6 << 20);
    source.migrate(&name("vm"), &request).await.unwrap();
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
    let before = running.count();
    until("the guest works", async || running.count() > before + 20).await;
    let guest = running.stop().await;
    guest.check_all(&sockets[1], "vm");
    target_agent.stop().await;
    source_agent.stop().await;
    guest.check_file(&world.target.image("vm"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_with_flimcd() {
    cut_again_and_again(Strategy::Flimcd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_again_and_again_with_postcopy() {
    cut_again_and_again(Strategy::Postcopy).await;
}

/// Cancelled while the target cannot be told: the guest goes on at once, and the target hears of it when the link is
/// there again, even if the source's agent was restarted meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_hears_later_of_a_cancellation() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, guest) = start(&mut world, 8 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let running = guest.start(&[world.source.socket("vm")], "vm");
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    in_phase(&target, "vm", Phase::Precopy).await;
    proxy.cut();
    until("the source sees it", async || {
        !source.migrations().await.unwrap()[0].link_up
    })
    .await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    let guest = running.stop().await;
    source_agent.stop().await;
    assert_eq!(
        target.volumes().await.unwrap()[0].ownership,
        OwnershipState::Incoming
    );
    let source_agent = world.source.start().await.unwrap();
    proxy.mend();
    assert_eq!(ended(&target, "vm").await.phase, Phase::Cancelled);
    until("the target is clean", async || {
        target.volumes().await.unwrap().is_empty()
    })
    .await;
    guest.check_all(&world.source.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}

/// Cancelled and begun anew while the target cannot be told: the new migration takes the place of the old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_migration_takes_the_place_of_a_cancelled_one() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, guest) = start(&mut world, 8 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    in_phase(&target, "vm", Phase::Precopy).await;
    proxy.cut();
    until("the source sees it", async || {
        !source.migrations().await.unwrap()[0].link_up
    })
    .await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    let request = to_beta(Strategy::Flimcd, Switchover::Auto);
    source.migrate(&name("vm"), &request).await.unwrap();
    proxy.mend();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    guest.check_all(&world.target.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}

/// The target ends it while the source cannot be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_hears_later_that_the_target_gave_up() {
    let mut world = World::new();
    let (source_agent, target_agent, proxy, guest) = start(&mut world, 8 * MIB).await;
    let (source, target) = (world.source.client(), world.target.client());
    let running = guest.start(&[world.source.socket("vm")], "vm");
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    in_phase(&target, "vm", Phase::Precopy).await;
    proxy.cut();
    until("the target sees it", async || {
        !target.migrations().await.unwrap()[0].link_up
    })
    .await;
    target.cancel(&name("vm")).await.unwrap();
    assert!(ended(&target, "vm").await.phase.has_ended());
    proxy.mend();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Failed);
    assert!(
        status.error.as_ref().unwrap().contains("target"),
        "{status:?}"
    );
    let guest = running.stop().await;
    guest.check_all(&world.source.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}
