//! What is hot: in the API, over restarts, and carried to the target.

use flimcd_agent::api::{
    ApiCode, ClientError, CreateVolume, HeatReport, Phase, Strategy, Switchover,
};
use flimcd_nbd::Client as Nbd;
use std::path::Path;

use crate::site::{World, ended, name, to_beta, until};

const CHUNK: u64 = 65536;
const SIZE: u64 = 64 * CHUNK;

/// Reads chunk 3 most, writes chunk 9, and reads chunk 20 once.
fn work(socket: &Path) {
    let mut guest = Nbd::connect_unix(socket, "vm").unwrap();
    let mut block = vec![0; 4096];
    for at in (0..8).map(|block| 3 * CHUNK + block * 4096) {
        guest.read(at, &mut block).unwrap();
        guest.read(at, &mut block).unwrap();
    }
    guest.read(20 * CHUNK, &mut block).unwrap();
    for _ in 0..5 {
        guest.write(9 * CHUNK + 4096, &[7; 4096], false).unwrap();
    }
}

fn offsets(report: &HeatReport) -> Vec<u64> {
    report
        .hottest
        .iter()
        .map(|hot| hot.offset / CHUNK)
        .collect()
}

fn assert_is_what_was_done(report: &HeatReport) {
    assert_eq!(offsets(report), [3, 9, 20], "{report:?}");
    let [first, second, third] = &report.hottest[..] else {
        unreachable!("there are three")
    };
    assert!(first.written_bytes_per_s == 0.0 && second.read_bytes_per_s == 0.0);
    assert!(first.read_bytes_per_s > third.read_bytes_per_s && third.read_bytes_per_s > 0.0);
    assert!(second.written_bytes_per_s > 0.0);
    let bytes: Vec<_> = report
        .reads
        .shares
        .iter()
        .map(|share| share.bytes)
        .collect();
    assert_eq!(bytes, [CHUNK, CHUNK, 2 * CHUNK]);
    assert_eq!(report.writes.touched_bytes, CHUNK);
    let is_hot = |cell: &flimcd_agent::api::HeatCell| {
        cell.read_bytes_per_s > 0.0 || cell.written_bytes_per_s > 0.0
    };
    let hot: Vec<_> = (0..)
        .zip(&report.cells)
        .filter(|(_, cell)| is_hot(cell))
        .collect();
    let hot: Vec<_> = hot
        .into_iter()
        .map(|(at, _)| at * report.cell_bytes / CHUNK)
        .collect();
    assert_eq!(hot, [2, 8, 20], "cells of two chunks");
}

#[tokio::test(flavor = "multi_thread")]
async fn heat_is_told_survives_a_restart_and_goes_with_the_volume() {
    let mut world = World::new();
    let (source_agent, target_agent) = world.start().await;
    let client = world.source.client();
    let create = CreateVolume {
        name: name("vm"),
        size_bytes: SIZE,
        tenant: None,
    };
    client.create_volume(&create).await.unwrap();
    let cold = client.heat(&name("vm"), 32, 10).await.unwrap();
    assert!(
        cold.hottest.is_empty() && cold.cells.len() == 32,
        "{cold:?}"
    );
    let socket = world.source.socket("vm");
    tokio::task::spawn_blocking(move || work(&socket))
        .await
        .unwrap();
    let report = client.heat(&name("vm"), 32, 10).await.unwrap();
    assert_is_what_was_done(&report);
    assert!(report.reads.requests_per_s > 0.0 && report.size_bytes == SIZE);
    assert_eq!(
        client.heat(&name("vm"), 32, 1).await.unwrap().hottest.len(),
        1
    );

    source_agent.stop().await;
    let source_agent = world.source.start().await.unwrap();
    let report = client.heat(&name("vm"), 32, 10).await.unwrap();
    assert_is_what_was_done(&report);

    let request = to_beta(Strategy::Flimcd, Switchover::Auto);
    client.migrate(&name("vm"), &request).await.unwrap();
    let status = ended(&client, "vm").await;
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    let predicted = status.predicted.expect("it was said at the switch");
    assert!(predicted.bytes_sent_before <= status.bytes_sent);
    let target = world.target.client();
    ended(&target, "vm").await;
    let mut report = None;
    until("what was hot has come along", async || {
        let now = target.heat(&name("vm"), 32, 10).await.unwrap();
        let is_all = now.hottest.len() == 3;
        report = Some(now);
        is_all
    })
    .await;
    let report = report.unwrap();
    assert_is_what_was_done(&report);
    assert_eq!(report.reads.requests_per_s, 0.0, "no guest has been there");
    target_agent.stop().await;
    source_agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heat_of_what_is_not_there_is_refused() {
    let world = World::new();
    let agent = world.target.start().await.unwrap();
    let error = world.target.client().heat(&name("none"), 1, 1).await;
    let Err(ClientError::Refused(error)) = error else {
        panic!("{error:?}")
    };
    assert_eq!(error.code, ApiCode::UnknownVolume);
    agent.stop().await;
}
