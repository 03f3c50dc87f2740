//! Whatever cannot be done is refused with a reason and a way out, and leaves nothing behind.

use flimcd_agent::api::{
    ApiCode, Client, ClientError, CreateVolume, ErrorBody, ImportVolume, Phase, Strategy,
    Switchover,
};
use std::fs;

use crate::{
    guest::content,
    site::{World, ended, name, peer_table, to_beta, until},
};

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, code: ApiCode, part: &str) {
    match result {
        Err(ClientError::Refused(ErrorBody { code: got, .. })) if got != code => {
            panic!("{got:?} instead of {code:?}")
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
        Ok(answer) => panic!("not refused: {answer:?}"),
    }
}

async fn create(client: &Client, volume: &str, size_bytes: u64) {
    let request = CreateVolume {
        name: name(volume),
        size_bytes,
        tenant: None,
    };
    client.create_volume(&request).await.unwrap();
}

fn auto() -> flimcd_agent::api::MigrateRequest {
    to_beta(Strategy::Flimcd, Switchover::Auto)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let client = world.source.client();
    create(&client, "vm", 1 << 20).await;
    let again = CreateVolume {
        name: name("vm"),
        size_bytes: 5,
        tenant: None,
    };
    refused(
        client.create_volume(&again).await,
        ApiCode::Exists,
        "already",
    );
    let api = CreateVolume {
        name: name("api"),
        ..again.clone()
    };
    refused(
        client.create_volume(&api).await,
        ApiCode::BadRequest,
        "another name",
    );
    let nothing = CreateVolume {
        name: name("empty"),
        size_bytes: 0,
        tenant: None,
    };
    refused(
        client.create_volume(&nothing).await,
        ApiCode::BadRequest,
        "1 byte to 64 TiB",
    );
    refused(
        client.export(&name("other")).await,
        ApiCode::UnknownVolume,
        "no volume other",
    );
    refused(
        client.cancel(&name("vm")).await,
        ApiCode::UnknownMigration,
        "not migrating",
    );
    refused(
        client.migrate(&name("other"), &auto()).await,
        ApiCode::UnknownVolume,
        "other",
    );
    let mut nowhere = auto();
    nowhere.to = "gamma".parse().unwrap();
    refused(
        client.migrate(&name("vm"), &nowhere).await,
        ApiCode::UnknownSite,
        "known sites: beta",
    );
    nowhere.to = "alpha".parse().unwrap();
    refused(
        client.migrate(&name("vm"), &nowhere).await,
        ApiCode::BadRequest,
        "own",
    );
    let import = |path: &std::path::Path| ImportVolume {
        name: name("import"),
        path: path.to_owned(),
        tenant: None,
    };
    let missing = world.dir.path().join("missing.img");
    refused(
        client.import_volume(&import(&missing)).await,
        ApiCode::Image,
        "missing.img",
    );
    let twice = world.source.image("vm");
    refused(
        client.import_volume(&import(&twice)).await,
        ApiCode::Exists,
        "image of volume vm",
    );
    let removed = client.remove_volume(&name("vm"), true).await.unwrap();
    assert!(removed.image_deleted && !removed.image.exists());
    assert!(!world.source.socket("vm").exists());
    assert!(client.volumes().await.unwrap().is_empty());
    target_agent.stop().await;
    source_agent.stop().await;
}

/// Each of these is refused by the target; afterwards the source has its volume and the target nothing new.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_does_not_want_it() {
    let mut world = World::new();
    world.target.peers = world
        .target
        .peers
        .replace("may_send = [\"*\"]", "may_send = [\"vm*\"]");
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    create(&source, "secret", 1 << 20).await;
    create(&source, "vm", 1 << 20).await;
    create(&source, "vm-huge", 10 << 40).await;
    create(&source, "vm-file", 1 << 20).await;
    create(&target, "vm", 1 << 20).await;
    fs::write(world.target.image("vm-file"), "precious").unwrap();
    for (volume, part) in [
        ("secret", "may_send"),
        ("vm", "another volume called vm"),
        ("vm-huge", "too little room"),
        ("vm-file", "move it away"),
    ] {
        source.migrate(&name(volume), &auto()).await.unwrap();
        let status = ended(&source, volume).await;
        assert_eq!(status.phase, Phase::Failed, "{volume}");
        let text = status.error.unwrap();
        assert!(text.contains(part), "{volume}: {text:?} lacks {part:?}");
        let state = source.volume(&name(volume)).await.unwrap().ownership;
        assert_eq!(state, flimcd_agent::api::OwnershipState::Owner);
        // It can be asked for again at once.
        assert!(
            source
                .volume(&name(volume))
                .await
                .unwrap()
                .migration
                .is_none()
        );
    }
    assert_eq!(target.volumes().await.unwrap().len(), 1);
    assert_eq!(
        fs::read(world.target.image("vm-file")).unwrap(),
        b"precious"
    );
    assert_eq!(
        fs::read_dir(world.target.state_dir().join("images"))
            .unwrap()
            .count(),
        2
    );
    target_agent.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_may_not_send() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    source_agent.stop().await;
    world.source.peers = world
        .source
        .peers
        .replace("may_receive = [\"*\"]", "may_receive = []");
    let source_agent = world.source.start().await.unwrap();
    let source = world.source.client();
    create(&source, "vm", 1 << 20).await;
    refused(
        source.migrate(&name("vm"), &auto()).await,
        ApiCode::NotAllowed,
        "may_receive",
    );
    target_agent.stop().await;
    source_agent.stop().await;
}

/// A peer whose certificate is another site's: the link does not come up, the status says why, and the
/// migration can be cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_somebody_else() {
    let mut world = World::new();
    flimcd_link::pki::issue(
        &world.dir.path().join("pki"),
        &"gamma".parse().unwrap(),
        false,
    )
    .unwrap();
    let target = world.target.start().await.unwrap();
    let address = target.listen_address().unwrap().to_string();
    // Beta's address, but it is called gamma.
    world.source.peers = peer_table("gamma", Some(&address));
    let source_agent = world.source.start().await.unwrap();
    let source = world.source.client();
    create(&source, "vm", 1 << 20).await;
    let mut request = auto();
    request.to = "gamma".parse().unwrap();
    source.migrate(&name("vm"), &request).await.unwrap();
    until("the status says why", async || {
        let status = source.status().await.unwrap();
        let in_link = status.links[0].last_error.clone().unwrap_or_default();
        let in_migration = status.migrations[0].error.clone().unwrap_or_default();
        in_link.contains("beta") && in_migration.contains("beta")
    })
    .await;
    source.cancel(&name("vm")).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Cancelled);
    target.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_cannot_start() {
    let world = World::new();
    let first = world.target.start().await.unwrap();
    let check = async |site: &crate::site::Site, parts: &[&str]| {
        let error = site.start().await.map(|_| ()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    };
    let pid = std::process::id().to_string();
    check(&world.target, &["another agent", &pid]).await;
    // The port of the running one.
    let mut other = World::new();
    other.target.listen = Some(first.listen_address().unwrap().to_string());
    check(&other.target, &["listen", "stop the process"]).await;
    // What the failed start had opened is closed again.
    other.target.listen = Some("127.0.0.1:0".to_owned());
    let second = other.target.start().await.unwrap();
    second.stop().await;
    assert_eq!(fs::read_dir(other.target.runtime_dir()).unwrap().count(), 0);
    fs::remove_file(other.dir.path().join("pki/beta.key")).unwrap();
    check(
        &other.target,
        &["tls.key", "beta.key", "flimcd pki issue beta"],
    )
    .await;
    first.stop().await;
}

/// An image that another process holds open as QEMU does.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_use() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let path = world.dir.path().join("disk.img");
    fs::write(&path, content(1 << 20, 1)).unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    flimcd_volume::device::lock::lock_image(&file, &path, false).unwrap();
    let request = ImportVolume {
        name: name("vm"),
        path: path.clone(),
        tenant: None,
    };
    let client = world.source.client();
    refused(
        client.import_volume(&request).await,
        ApiCode::Image,
        "in use by another process",
    );
    assert!(client.volumes().await.unwrap().is_empty());
    drop(file);
    client.import_volume(&request).await.unwrap();
    target_agent.stop().await;
    source_agent.stop().await;
    assert_eq!(fs::read(&path).unwrap(), content(1 << 20, 1));
}

/// A target whose file system is too small for what is written to it, although it promised otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_disk_gets_full() {
    let mut world = World::new();
    let Some(small) = Tmpfs::mount(&world.dir.path().join("small"), "8m") else {
        eprintln!("SKIPPED: needs root to mount a tmpfs");
        return;
    };
    world.target.images_dir = Some(small.0.clone());
    world.target.extra = "overcommit = true\n".to_owned();
    let (source_agent, target_agent) = world.start().await;
    let image = world.dir.path().join("disk.img");
    let content = content(32 << 20, 5);
    crate::guest::write_sparse(&image, &content);
    let request = ImportVolume {
        name: name("vm"),
        path: image,
        tenant: None,
    };
    let (source, target) = (world.source.client(), world.target.client());
    source.import_volume(&request).await.unwrap();
    let guest = crate::guest::Guest::new(content, 9);
    let running = guest.start(&[world.source.socket("vm")], "vm");
    source.migrate(&name("vm"), &auto()).await.unwrap();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Failed);
    let text = status.error.unwrap();
    assert!(
        text.contains("target") && text.contains("No space left"),
        "{text}"
    );
    until("the target is clean", async || {
        target.volumes().await.unwrap().is_empty() && fs::read_dir(&small.0).unwrap().count() == 0
    })
    .await;
    let before = running.count();
    until("the guest works on", async || running.count() > before + 50).await;
    let guest = running.stop().await;
    guest.check_all(&world.source.socket("vm"), "vm");
    target_agent.stop().await;
    source_agent.stop().await;
}

/// A small file system, gone when this is dropped.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(path: &std::path::Path, size: &str) -> Option<Self> {
        fs::create_dir(path).unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(path)
            .output();
        mount
            .is_ok_and(|done| done.status.success())
            .then(|| Self(path.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .output();
    }
}
