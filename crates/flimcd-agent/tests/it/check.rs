//! After a migration the copy that stayed is compared with what arrived.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use flimcd_agent::api::{
    ApiCode, CheckPhase, CheckStatus, Client, ClientError, CreateVolume, DifferentBlocks,
    MigrationStatus, Phase, Strategy, Switchover,
};
use flimcd_core::{BLOCK_SIZE, MigrationId};
use flimcd_nbd::Client as Nbd;

use crate::{
    guest::content,
    site::{World, name, to_beta, until},
};

const SIZE: u64 = 40 << 20;
const BLOCKS: u64 = SIZE / BLOCK_SIZE;

/// Waits for the end of a migration and then of its check.
async fn checked(client: &Client, id: MigrationId) -> CheckStatus {
    let mut last = None;
    until("the copies have been compared", async || {
        let status = client.migration(id).await.unwrap();
        last = status.check;
        last.as_ref().is_some_and(|check| check.phase.has_ended())
    })
    .await;
    last.unwrap()
}

async fn completed(client: &Client, id: MigrationId) -> MigrationStatus {
    let mut last = None;
    until("the migration has ended", async || {
        let status = client.migration(id).await.unwrap();
        let has_ended = status.phase.has_ended();
        last = Some(status);
        has_ended
    })
    .await;
    let status = last.unwrap();
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    status
}

/// A volume with content at the source.
async fn volume(source: &Client) {
    let request = CreateVolume {
        name: name("vm"),
        size_bytes: SIZE,
        tenant: None,
    };
    let made = source.create_volume(&request).await.unwrap();
    let disk = content(SIZE as usize, 11);
    let mut guest = Nbd::connect_unix(&made.export.unwrap().socket, "vm").unwrap();
    for (at, part) in (0..).step_by(1 << 20).zip(disk.chunks(1 << 20)) {
        guest.write(at, part, false).unwrap();
    }
    guest.disconnect().unwrap();
}

/// Changes a byte of a block behind everybody's back.
fn flip(image: &Path, block: u64) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    let at = block * BLOCK_SIZE + 77;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_equal_but_for_what_the_guest_wrote_and_a_flipped_byte_is_found() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    volume(&source).await;
    let mut request = to_beta(Strategy::Flimcd, Switchover::Auto);
    request.check = Some(true);
    let id = source.migrate(&name("vm"), &request).await.unwrap().id;
    completed(&source, id).await;
    completed(&target, id).await;
    let check = checked(&source, id).await;
    assert_eq!(check.phase, CheckPhase::Equal, "{check:?}");
    assert_eq!((check.blocks_total, check.blocks_equal), (BLOCKS, BLOCKS));
    assert_eq!((check.blocks_written, check.error), (0, None));

    // The guest goes on at the target: what it writes is not compared, whole blocks or parts.
    let mut guest = Nbd::connect_unix(world.target.socket("vm"), "vm").unwrap();
    for block in [0, 1, 17, 5000, BLOCKS - 1] {
        guest
            .write(block * BLOCK_SIZE + 100, &[0xee; 50], false)
            .unwrap();
    }
    source.check(id).await.unwrap();
    let check = checked(&source, id).await;
    assert_eq!(check.phase, CheckPhase::Equal, "{check:?}");
    assert_eq!((check.blocks_equal, check.blocks_written), (BLOCKS - 5, 5));

    // One byte of what arrived is wrong; and one of a block that the guest has written, which nobody can know.
    let image = target.volume(&name("vm")).await.unwrap().image;
    for block in [17, 4321, 4322, 9000] {
        flip(&image, block);
    }
    source.check(id).await.unwrap();
    let check = checked(&source, id).await;
    assert_eq!(check.phase, CheckPhase::Different, "{check:?}");
    let run = |first, blocks| DifferentBlocks {
        volume: name("vm"),
        first,
        blocks,
    };
    assert_eq!(check.different, [run(4321, 2), run(9000, 1)]);
    assert_eq!(check.blocks_different, 3);
    assert_eq!(check.blocks_equal, BLOCKS - 5 - 3);
    let error = check.error.unwrap();
    assert!(
        error.contains("blocks 4321 to 4322 of vm") && error.contains("block 9000 of vm"),
        "{error}"
    );
    assert!(source.volume(&name("vm")).await.unwrap().replica.is_some());

    // The other side is not the one to ask, and without a copy there is nothing to compare.
    let refused = target.check(id).await.unwrap_err();
    assert!(matches!(refused, ClientError::Refused(body) if body.code == ApiCode::BadRequest));
    guest.disconnect().unwrap();
    source.drop_replica(&name("vm"), false).await.unwrap();
    let refused = source.check(id).await.unwrap_err();
    assert!(matches!(refused, ClientError::Refused(body) if body.code == ApiCode::Busy));
    target_agent.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_is_not_made_unasked_and_ends_when_the_volume_moves_on() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    volume(&source).await;
    let mut request = to_beta(Strategy::Precopy, Switchover::Auto);
    request.check = Some(false);
    let id = source.migrate(&name("vm"), &request).await.unwrap().id;
    let status = completed(&source, id).await;
    assert_eq!(status.check, None);
    completed(&target, id).await;
    // The target's owner begins to move it elsewhere, or has lost count: it says that it does not know any more.
    target.remove_volume(&name("vm"), true).await.unwrap();
    source.check(id).await.unwrap();
    let check = checked(&source, id).await;
    assert_eq!(check.phase, CheckPhase::Stopped, "{check:?}");
    let error = check.error.unwrap();
    assert!(error.contains("was removed"), "{error}");
    assert_eq!(source.migration(id).await.unwrap().phase, Phase::Completed);
    target_agent.stop().await;
    source_agent.stop().await;
}
