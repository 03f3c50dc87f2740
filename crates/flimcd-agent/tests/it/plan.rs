//! A plan says what a migration then costs, changes nothing, and fails with words.

use std::{fs, path::Path};

use flimcd_agent::api::{
    AddLibraryImage, ApiCode, Client, ClientError, ContentStats, CreateVolume, ImportVolume,
    LibraryState, Phase, PlanBase, PlanPhase, PlanRequest, PlanStatus, Strategy, Switchover,
};
use flimcd_core::BLOCK_SIZE;

use crate::{
    guest::{Rng, content, write_sparse},
    site::{Site, World, ended, name, to_beta, until},
};

const CHUNK: usize = 65536;
const RATE: u64 = 10 << 20;

fn request(volume: &str) -> PlanRequest {
    PlanRequest {
        volumes: vec![name(volume)],
        to: "beta".parse().unwrap(),
        bandwidth_bytes_per_sec: Some(RATE),
        sample: None,
        watch_s: Some(0),
    }
}

async fn import(client: &Client, volume: &str, path: &Path) {
    let request = ImportVolume {
        name: name(volume),
        path: path.to_owned(),
        tenant: None,
    };
    client.import_volume(&request).await.unwrap();
}

async fn library_image(client: &Client, path: &Path) {
    let request = AddLibraryImage {
        name: None,
        path: path.to_owned(),
        tenant: None,
        public: false,
        copy: false,
    };
    let image = client.add_library_image(&request).await.unwrap();
    until("the image has been read", async || {
        client.library_image(&image.name).await.unwrap().state == LibraryState::Ready
    })
    .await;
}

/// Makes a plan and waits for its end.
async fn planned(client: &Client, request: &PlanRequest) -> PlanStatus {
    let id = client.make_plan(request).await.unwrap().id;
    let mut last = None;
    until("the plan has ended", async || {
        let status = client.plan(id).await.unwrap();
        let has_ended = status.phase.has_ended();
        last = Some(status);
        has_ended
    })
    .await;
    last.unwrap()
}

fn random(content: &mut [u8], seed: u64) {
    let mut rng = Rng(seed | 1);
    for part in content.chunks_mut(8) {
        part.copy_from_slice(&rng.next().to_le_bytes()[..part.len()]);
    }
}

fn chunks(content: &mut [u8], range: std::ops::Range<usize>) -> &mut [u8] {
    &mut content[range.start * CHUNK..range.end * CHUNK]
}

/// A volume at the source with content of all kinds, and images of the library at the target that have some of it.
async fn all_kinds(world: &World) -> Vec<u8> {
    let mut disk = content(1536 * CHUNK, 5);
    random(chunks(&mut disk, 100..164), 61);
    for byte in chunks(&mut disk, 100..132) {
        *byte = b'a' + (*byte & 15);
    }
    random(chunks(&mut disk, 640..832), 71);
    let again = chunks(&mut disk, 640..704).to_vec();
    chunks(&mut disk, 1408..1472).copy_from_slice(&again);
    random(chunks(&mut disk, 1472..1536), 81);
    for half in chunks(&mut disk, 1472..1536)
        .chunks_mut(CHUNK / 2)
        .step_by(2)
    {
        half.fill(0);
    }
    let mut base = disk.clone();
    for missing in [100..164, 640..832, 1408..1536] {
        chunks(&mut base, missing).fill(0);
    }
    let mut other = vec![1; 4096];
    other.extend_from_slice(chunks(&mut disk, 704..832));
    let dir = world.dir.path();
    for (file, bytes) in [("disk", &disk), ("base", &base), ("other", &other)] {
        write_sparse(&dir.join(file), bytes);
    }
    import(&world.source.client(), "vm", &dir.join("disk")).await;
    for image in ["base", "other"] {
        library_image(&world.target.client(), &dir.join(image)).await;
    }
    disk
}

fn kinds(content: &ContentStats) -> [u64; 6] {
    [
        content.zero_blocks,
        content.same_blocks,
        content.elsewhere_blocks,
        content.repeated_blocks,
        content.compressed_blocks,
        content.raw_blocks,
    ]
}

fn is_near(planned: u64, happened: u64) -> bool {
    planned.abs_diff(happened) * 50 <= happened.max(planned)
}

/// Everything below a directory, with sizes.
fn files(site: &Site) -> Vec<(std::path::PathBuf, u64)> {
    let mut found = Vec::new();
    let mut left = vec![site.state_dir()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                left.push(entry.path());
            } else {
                found.push((entry.path(), metadata.len()));
            }
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_planned_is_what_happens() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disk = all_kinds(&world).await;
    let (source, target) = (world.source.client(), world.target.client());
    let before = files(&world.target);

    let plan = planned(&source, &request("vm")).await;
    assert_eq!(plan.phase, PlanPhase::Completed, "{plan:?}");
    assert_eq!(plan.base, PlanBase::Nothing);
    assert_eq!(plan.library_image.as_deref(), Some("base"));
    assert_eq!(plan.bytes_read, plan.bytes_to_move);
    assert!(
        kinds(&plan.content).iter().all(|&blocks| blocks > 0),
        "{plan:?}"
    );
    assert!(target.volumes().await.unwrap().is_empty());
    assert!(target.migrations().await.unwrap().is_empty());
    assert_eq!(files(&world.target), before, "nothing stays at the target");

    let asked = to_beta(Strategy::Flimcd, Switchover::Auto);
    source.migrate(&name("vm"), &asked).await.unwrap();
    let status = ended(&source, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    let said = status.planned.clone().unwrap();
    assert_eq!(said.id, plan.id);
    assert_eq!(said.content, Some(plan.content));
    let (expected, happened) = (kinds(&plan.content), kinds(&status.content));
    for (planned, happened) in expected.into_iter().zip(happened) {
        assert!(is_near(planned, happened), "{plan:?}\n{status:?}");
    }
    assert!(
        is_near(plan.bytes_on_link, status.bytes_on_link),
        "{plan:?}\n{status:?}"
    );
    let estimate = said.estimate;
    assert_eq!(estimate.strategy, "flimcd");
    let seconds = plan.bytes_on_link as f64 / RATE as f64;
    assert!(
        (estimate.total_s.unwrap() - seconds).abs() < 1.0,
        "{estimate:?}"
    );
    target_agent.stop().await;
    source_agent.stop().await;
    assert!(fs::read(world.target.image("vm")).unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_says_how_far_off_it_may_be() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    all_kinds(&world).await;
    let source = world.source.client();
    let exact = planned(&source, &request("vm")).await;
    let quick = PlanRequest {
        sample: Some(100),
        ..request("vm")
    };
    let quick = planned(&source, &quick).await;
    assert_eq!(quick.phase, PlanPhase::Completed, "{quick:?}");
    assert!(quick.bytes_read < exact.bytes_read / 2, "{quick:?}");
    assert_eq!(quick.bytes_to_move, exact.bytes_to_move);
    let errors = quick.content_error_95.unwrap();
    // What is repeated counts as new in a sample. Twice the stated error: fewer than one sample in ten thousand is further off.
    for at in [0, 1, 2] {
        let (found, truth) = (kinds(&quick.content)[at], kinds(&exact.content)[at]);
        assert!(
            found.abs_diff(truth) <= 2 * kinds(&errors)[at] + 1,
            "{quick:?}\n{exact:?}"
        );
    }
    assert!(quick.bytes_on_link_error_95.unwrap() > 0);
    target_agent.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_planned_is_said() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let (source, target) = (world.source.client(), world.target.client());
    let refused = |result: Result<PlanStatus, ClientError>| match result {
        Err(ClientError::Refused(body)) => body,
        other => panic!("{other:?}"),
    };
    let body = refused(source.make_plan(&request("none")).await);
    assert_eq!(body.code, ApiCode::UnknownVolume, "{body}");
    let create = CreateVolume {
        name: name("vm"),
        size_bytes: 8 << 20,
        tenant: None,
    };
    source.create_volume(&create).await.unwrap();
    let mut elsewhere = request("vm");
    elsewhere.to = "gamma".parse().unwrap();
    let body = refused(source.make_plan(&elsewhere).await);
    assert_eq!(body.code, ApiCode::UnknownSite, "{body}");
    let mut nothing = request("vm");
    nothing.sample = Some(0);
    let body = refused(source.make_plan(&nothing).await);
    assert_eq!(body.code, ApiCode::BadRequest, "{body}");
    // Another volume of that name.
    target.create_volume(&create).await.unwrap();
    let plan = planned(&source, &request("vm")).await;
    assert_eq!(plan.phase, PlanPhase::Failed, "{plan:?}");
    let error = plan.error.unwrap();
    assert!(
        error.contains("beta refuses") && error.contains("another volume called vm"),
        "{error}"
    );
    target_agent.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_can_be_ended_and_ends_with_the_link() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disk = world.dir.path().join("disk");
    write_sparse(&disk, &content(64 * CHUNK, 3));
    let source = world.source.client();
    import(&source, "vm", &disk).await;
    let long = PlanRequest {
        watch_s: Some(3600),
        ..request("vm")
    };
    let begun = source.make_plan(&long).await.unwrap();
    let body = match source.make_plan(&long).await {
        Err(ClientError::Refused(body)) => body,
        other => panic!("{other:?}"),
    };
    assert_eq!(body.code, ApiCode::Busy, "{body}");
    source.cancel_plan(begun.id).await.unwrap();
    until("the plan is ended", async || {
        source.plan(begun.id).await.unwrap().phase == PlanPhase::Cancelled
    })
    .await;
    target_agent.stop().await;
    let plan = planned(&source, &request("vm")).await;
    assert_eq!(plan.phase, PlanPhase::Failed, "{plan:?}");
    let error = plan.error.unwrap();
    assert!(error.contains("the link to beta"), "{error}");
    source_agent.stop().await;
}

/// There and back, with a few writes between: the copy that stayed is known, and only what changed is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_known_copy_only_what_changed_is_read() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let disk = world.dir.path().join("disk");
    let mut bytes = content(256 * CHUNK, 3);
    write_sparse(&disk, &bytes);
    let (source, target) = (world.source.client(), world.target.client());
    import(&source, "vm", &disk).await;
    let asked = to_beta(Strategy::Flimcd, Switchover::Auto);
    source.migrate(&name("vm"), &asked).await.unwrap();
    assert_eq!(ended(&source, "vm").await.phase, Phase::Completed);
    ended(&target, "vm").await;
    let socket = world.target.socket("vm");
    let changed = tokio::task::spawn_blocking(move || {
        let mut guest = flimcd_nbd::Client::connect_unix(&socket, "vm").unwrap();
        for at in [3usize, 77, 130] {
            random(&mut bytes[at * CHUNK..at * CHUNK + 4096], at as u64);
            guest
                .write(
                    (at * CHUNK) as u64,
                    &bytes[at * CHUNK..at * CHUNK + 4096],
                    true,
                )
                .unwrap();
        }
    });
    changed.await.unwrap();
    let mut back = request("vm");
    back.to = "alpha".parse().unwrap();
    let plan = planned(&target, &back).await;
    assert_eq!(plan.phase, PlanPhase::Completed, "{plan:?}");
    assert_eq!(plan.base, PlanBase::KnownCopy, "{plan:?}");
    assert_eq!(plan.bytes_to_move, 3 * BLOCK_SIZE, "{plan:?}");
    assert_eq!(plan.content.raw_blocks, 3, "{plan:?}");
    target_agent.stop().await;
    source_agent.stop().await;
}
