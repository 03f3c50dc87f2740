//! What the target's library has at the same place does not cross the link.

use std::{fs, path::Path};

use flimcd_agent::api::{
    AddLibraryImage, Client, ImportVolume, LibraryImage, LibraryState, MigrateRequest,
    MigrationStatus, Phase, Strategy, Switchover,
};
use flimcd_core::BLOCK_SIZE;

use crate::{
    guest::{Guest, content, write_sparse},
    site::{World, ended, in_phase, name, to_beta, until},
};

const MIB: usize = 1 << 20;

async fn add(client: &Client, path: &Path) -> LibraryImage {
    let request = AddLibraryImage {
        name: None,
        path: path.to_owned(),
        tenant: None,
        public: false,
        copy: false,
    };
    let image = client.add_library_image(&request).await.unwrap();
    ready(client, &image.name.to_string()).await
}

async fn ready(client: &Client, image: &str) -> LibraryImage {
    let mut last = None;
    until("the image has been read", async || {
        let image = client.library_image(&name(image)).await.unwrap();
        let is_read = image.state != LibraryState::Scanning;
        last = Some(image);
        is_read
    })
    .await;
    last.unwrap()
}

/// A volume at the source, and what it holds.
async fn volume(world: &World, bytes: usize) -> Vec<u8> {
    let image = world.dir.path().join("disk.img");
    let content = content(bytes, 7);
    write_sparse(&image, &content);
    let request = ImportVolume {
        name: name("vm"),
        path: image,
        tenant: None,
    };
    world.source.client().import_volume(&request).await.unwrap();
    content
}

/// The content with another byte in every chunk of some runs.
fn differing(content: &[u8], chunks: std::ops::Range<usize>) -> Vec<u8> {
    let mut other = content.to_vec();
    for chunk in chunks {
        other[chunk * 65536 + 77] ^= 1;
    }
    other
}

async fn move_it(world: &World, request: &MigrateRequest) -> (MigrationStatus, MigrationStatus) {
    let (source, target) = (world.source.client(), world.target.client());
    source.migrate(&name("vm"), request).await.unwrap();
    (ended(&source, "vm").await, ended(&target, "vm").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_image_at_the_target_saves_what_it_holds() {
    for strategy in [Strategy::Flimcd, Strategy::Postcopy] {
        let mut world = World::new();
        let (source_agent, target_agent) = world.start().await;
        let content = volume(&world, 32 * MIB + 5000).await;
        let base = world.dir.path().join("base.raw");
        write_sparse(&base, &differing(&content, 100..120));
        let unlike = world.dir.path().join("unlike.raw");
        write_sparse(&unlike, &crate::guest::content(32 * MIB, 8));
        let target = world.target.client();
        add(&target, &unlike).await;
        assert_eq!(add(&target, &base).await.state, LibraryState::Ready);
        let (here, there) = move_it(&world, &to_beta(strategy, Switchover::Auto)).await;
        for status in [&here, &there] {
            assert_eq!(status.phase, Phase::Completed, "{status:?}");
            assert_eq!(status.library_image.as_deref(), Some("base"), "{status:?}");
        }
        let sent = here.content;
        assert!(sent.same_blocks > 0, "{here:?}");
        let others = (sent.compressed_blocks + sent.raw_blocks) * BLOCK_SIZE;
        assert!(
            others <= 21 * 65536,
            "only what differs, and the short end: {here:?}"
        );
        assert!(here.bytes_on_link < 4 << 20, "{here:?}");
        target_agent.stop().await;
        source_agent.stop().await;
        assert!(fs::read(world.target.image("vm")).unwrap() == content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_works_while_its_volume_is_made_of_a_base_image() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let content = volume(&world, 32 * MIB).await;
    let base = world.dir.path().join("base.raw");
    write_sparse(&base, &differing(&content, 40..45));
    let (source, target) = (world.source.client(), world.target.client());
    add(&target, &base).await;
    let running = Guest::new(content, 11).start(&[world.source.socket("vm")], "vm");
    until("the guest works", async || running.count() > 50).await;
    source
        .migrate(
            &name("vm"),
            &to_beta(Strategy::Postcopy, Switchover::Manual),
        )
        .await
        .unwrap();
    in_phase(&source, "vm", Phase::Precopy).await;
    let guest = running.stop().await;
    source.switchover(&name("vm")).await.unwrap();
    let running = guest.start(&[world.target.socket("vm")], "vm");
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(status.content.same_blocks > 0, "{status:?}");
    let before = running.count();
    until("the guest works at the target", async || {
        running.count() > before + 50
    })
    .await;
    let guest = running.stop().await;
    guest.check_all(&world.target.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
    guest.check_file(&world.target.image("vm"));
}

/// The file is overwritten behind the library's back: its table lies.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_what_it_was_does_no_harm() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let content = volume(&world, 32 * MIB).await;
    let base = world.dir.path().join("base.raw");
    write_sparse(&base, &content);
    let target = world.target.client();
    add(&target, &base).await;
    // Changed while it is in use: after it was chosen, the library does not look at the file again.
    let source = world.source.client();
    // This strategy sends nothing before the switch.
    let request = to_beta(Strategy::Postcopy, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    until("an image was chosen", async || {
        source.migrations().await.unwrap()[0]
            .library_image
            .is_some()
    })
    .await;
    write_over(&base, &differing(&content, 0..512));
    source.switchover(&name("vm")).await.unwrap();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(
        status.notes.iter().any(|note| note.contains("library")),
        "{status:?}"
    );
    assert_eq!(
        target.library_image(&name("base")).await.unwrap().state,
        LibraryState::Stale
    );
    target_agent.stop().await;
    source_agent.stop().await;
    assert!(fs::read(world.target.image("vm")).unwrap() == content);
}

/// Writes to the file that is there, so that whoever has it open sees it.
fn write_over(path: &Path, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(content, 0).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn precopy_sends_everything_unless_it_is_told_otherwise() {
    for (strategy, library, uses) in [
        (Strategy::Precopy, None, false),
        (Strategy::Precopy, Some(true), true),
        (Strategy::Flimcd, Some(false), false),
    ] {
        let mut world = World::new();
        let (source_agent, target_agent) = world.start().await;
        let content = volume(&world, 8 * MIB).await;
        let base = world.dir.path().join("base.raw");
        write_sparse(&base, &content);
        add(&world.target.client(), &base).await;
        let request = MigrateRequest {
            library,
            ..to_beta(strategy, Switchover::Auto)
        };
        let (status, _) = move_it(&world, &request).await;
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        assert_eq!(status.content.same_blocks > 0, uses, "{status:?}");
        target_agent.stop().await;
        source_agent.stop().await;
        assert!(fs::read(world.target.image("vm")).unwrap() == content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_target_goes_on_with_its_library() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let content = volume(&world, 32 * MIB).await;
    let base = world.dir.path().join("base.raw");
    write_sparse(&base, &differing(&content, 10..20));
    add(&world.target.client(), &base).await;
    let source = world.source.client();
    let request = to_beta(Strategy::Flimcd, Switchover::Manual);
    source.migrate(&name("vm"), &request).await.unwrap();
    until("an image was chosen", async || {
        source.migrations().await.unwrap()[0]
            .library_image
            .is_some()
    })
    .await;
    target_agent.stop().await;
    let target_agent = world.target.start().await.unwrap();
    let target = world.target.client();
    assert_eq!(ready(&target, "base").await.state, LibraryState::Ready);
    source.switchover(&name("vm")).await.unwrap();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(status.content.same_blocks > 0, "{status:?}");
    target_agent.stop().await;
    source_agent.stop().await;
    assert!(fs::read(world.target.image("vm")).unwrap() == content);
}
