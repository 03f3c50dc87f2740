//! QEMU's own migration over the emulated WAN. Needs root and QEMU; without them these tests say so and
//! pass.

use std::time::Duration;

use flimcd_lab::{
    vm::{
        AtTarget, GuestImage, GuestSpec, Layout, LoadSettings, Stage, StageOptions,
        baseline::{BaselineOptions, CopyMode, Outcome, Phase, Sync, migrate, run_case},
    },
    wan::LinkModel,
};

use crate::{guest::tools, sites};

fn stage(link: &str, layout: Layout) -> StageOptions {
    StageOptions {
        link: link.parse::<LinkModel>().unwrap(),
        seed: 1,
        memory_mib: 192,
        load: LoadSettings::default(),
        layout,
        warm_up_s: 1,
    }
}

#[test]
fn a_guest_moves_and_its_disks_are_the_same_at_both_ends() {
    let Some(tools) = tools().filter(|_| sites::are_possible()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default()).unwrap();
    let stage = stage("200mbit,20ms,loss=0.01%", Layout::Raw);
    let options = BaselineOptions {
        compares: true,
        ..BaselineOptions::default()
    };
    let report = run_case(
        &tools,
        dir.path(),
        &image,
        &stage,
        AtTarget::Nothing,
        &options,
    )
    .unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    assert_eq!(report.difference, Some(None));
    assert!(
        report.verified.as_ref().unwrap().ends_with("errors=0"),
        "{report:?}"
    );
    assert_eq!(report.complaints, Vec::<String>::new());
    assert_eq!(report.client.tcp.broken, None);
    assert!(report.wire_bytes > report.wire_bytes_mirror && report.wire_bytes_mirror > 40 << 20);
    assert!(
        report.stop_to_resume_ms.is_some() && report.load.writes > 0,
        "{report:?}"
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["outcome"], "completed");
}

#[test]
fn an_overlay_over_a_base_that_the_target_has_is_mirrored_alone() {
    let Some(tools) = tools().filter(|_| sites::are_possible()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default()).unwrap();
    let stage = stage("200mbit,20ms,loss=0.01%", Layout::Overlay);
    let options = BaselineOptions {
        sync: Sync::Top,
        copy_mode: CopyMode::WriteBlocking,
        compares: true,
        ..BaselineOptions::default()
    };
    let report = run_case(
        &tools,
        dir.path(),
        &image,
        &stage,
        AtTarget::Image,
        &options,
    )
    .unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    assert_eq!(report.difference, Some(None));
    assert!(
        report.verified.as_ref().unwrap().ends_with("errors=0"),
        "{report:?}"
    );
    assert!(report.wire_bytes_mirror < 40 << 20, "{report:?}");
}

#[test]
fn a_mirror_that_never_gets_ready_is_a_result_and_the_guest_stays() {
    let Some(tools) = tools().filter(|_| sites::are_possible()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default()).unwrap();
    let stage = Stage::start(
        &tools,
        dir.path(),
        &image,
        &stage("5mbit,20ms", Layout::Raw),
    )
    .unwrap();
    let disks = stage.target_disks(AtTarget::Nothing).unwrap();
    let target = stage.spawn_target(disks).unwrap();
    let options = BaselineOptions {
        mirror_max: Duration::from_secs(2),
        ..BaselineOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let report = runtime
        .block_on(migrate(&stage, &target, &options))
        .unwrap();
    let Outcome::NotConverged { phase, left_bytes } = report.outcome else {
        panic!("{report:?}");
    };
    assert!(
        phase == Phase::Mirror && left_bytes > 10 << 20,
        "{report:?}"
    );
    let verified = stage.source.control("verify").unwrap();
    assert!(verified.ends_with("errors=0"), "{verified}");
}
