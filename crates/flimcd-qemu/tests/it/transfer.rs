//! Moving memory between two QEMUs on one host, with the states that a coordinator has to handle.

use std::{path::Path, time::Duration};

use flimcd_qemu::{
    EventKind, Qmp, RunState,
    commands::{Cont, Stop},
    transfer::{
        IncomingSettings, OutgoingSettings, TransferError, TransferState, cancel,
        continue_switchover, finish, listen_incoming, rescue_guest, resume_guest, run_state,
        start_outgoing, start_postcopy, status, wait_for,
    },
};
use tempfile::TempDir;

use crate::vm::{Vm, has_qemu};

const PATIENCE: Duration = Duration::from_secs(20);

struct Pair {
    dir: TempDir,
    source_vm: Vm,
    source: Qmp,
    target_vm: Vm,
    target: Qmp,
    settings: OutgoingSettings,
}

fn incoming(dir: &Path, name: &str) -> Vm {
    let args = ["-incoming", "defer", "-S"].map(str::to_owned);
    Vm::start(dir, name, &args)
}

/// Two QEMUs, connected until the source waits before the switch.
async fn at_switchover(postcopy: bool) -> Pair {
    let dir = TempDir::new().unwrap();
    let mut source_vm = Vm::start(dir.path(), "source", &[]);
    let mut target_vm = incoming(dir.path(), "target");
    let (source, target) = (source_vm.connect().await, target_vm.connect().await);
    let uri = format!("unix:{}", dir.path().join("ram").display());
    listen_incoming(&target, &uri, IncomingSettings { postcopy })
        .await
        .unwrap();
    let settings = OutgoingSettings {
        uri,
        downtime_limit_ms: Some(300),
        max_bandwidth_bytes_per_sec: None,
        postcopy,
    };
    assert_eq!(status(&source).await.unwrap().status, TransferState::None);
    let mut events = source.events();
    start_outgoing(&source, &settings).await.unwrap();
    if postcopy {
        start_postcopy(&source).await.unwrap();
    }
    let wanted = |s| s == TransferState::PreSwitchover;
    let now = wait_for(&source, "copying memory", PATIENCE, wanted)
        .await
        .unwrap();
    assert!(
        now.ram.total_bytes >= 32 << 20 && now.ram.transferred_bytes > 0,
        "{now:?}"
    );
    // The guest stands still before the state says so.
    while events.next().await.unwrap().kind != EventKind::Stop {}
    assert_eq!(run_state(&source).await.unwrap(), RunState::FinishMigrate);
    assert_eq!(run_state(&target).await.unwrap(), RunState::Inmigrate);
    Pair {
        dir,
        source_vm,
        source,
        target_vm,
        target,
        settings,
    }
}

async fn wait_run(qmp: &Qmp, wanted: RunState) {
    let mut events = qmp.events();
    while run_state(qmp).await.unwrap() != wanted {
        tokio::time::timeout(PATIENCE, events.next())
            .await
            .unwrap()
            .unwrap();
    }
}

fn is_final(s: TransferState) -> bool {
    s.is_final()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_moves_before_or_after_the_switch() {
    if !has_qemu() {
        return;
    }
    for postcopy in [false, true] {
        let pair = at_switchover(postcopy).await;
        continue_switchover(&pair.source).await.unwrap();
        for qmp in [&pair.source, &pair.target] {
            let end = wait_for(qmp, "completing", PATIENCE, is_final)
                .await
                .unwrap();
            assert_eq!(end.status, TransferState::Completed, "{end:?}");
        }
        // The run state follows the migration's.
        wait_run(&pair.source, RunState::Postmigrate).await;
        wait_run(&pair.target, RunState::Paused).await;
        resume_guest(&pair.target).await.unwrap();
        assert_eq!(run_state(&pair.target).await.unwrap(), RunState::Running);
        // Too late, and a second switch is none.
        let error = cancel(&pair.source).await.unwrap_err();
        assert!(
            matches!(
                error,
                TransferError::State {
                    status: TransferState::Completed,
                    ..
                }
            ),
            "{error}"
        );
        let error = continue_switchover(&pair.source).await.unwrap_err();
        assert!(matches!(error, TransferError::State { .. }), "{error}");
    }
}

/// A guest that writes to none of its memory runs until we stop it: QEMU would start it again by itself if the stream broke
/// after it had stopped it by itself.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_guest_is_not_stopped_before_its_time() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut source_vm = Vm::start(dir.path(), "source", &[]);
    let mut target_vm = incoming(dir.path(), "target");
    let (source, target) = (source_vm.connect().await, target_vm.connect().await);
    if !source.version().is_at_least(8, 1) {
        eprintln!("SKIPPED: needs QEMU 8.1: an older one stops an idle guest by itself");
        return;
    }
    let uri = format!("unix:{}", dir.path().join("ram").display());
    let incoming = IncomingSettings { postcopy: false };
    listen_incoming(&target, &uri, incoming).await.unwrap();
    let settings = OutgoingSettings {
        uri,
        downtime_limit_ms: None,
        max_bandwidth_bytes_per_sec: None,
        postcopy: false,
    };
    start_outgoing(&source, &settings).await.unwrap();
    let begin = std::time::Instant::now();
    loop {
        let now = status(&source).await.unwrap();
        assert!(begin.elapsed() < PATIENCE, "{now:?}");
        assert!(
            matches!(now.status, TransferState::Setup | TransferState::Active),
            "{now:?}"
        );
        // Passes over memory that had nothing to send.
        if now.ram.dirty_sync_count > 20 && now.ram.remaining_bytes == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(run_state(&source).await.unwrap(), RunState::Running);
    source.execute(Stop {}).await.unwrap();
    finish(&source).await.unwrap();
    let wanted = |s| s == TransferState::PreSwitchover;
    wait_for(&source, "copying memory", PATIENCE, wanted)
        .await
        .unwrap();
    continue_switchover(&source).await.unwrap();
    let end = wait_for(&target, "completing", PATIENCE, is_final)
        .await
        .unwrap();
    assert_eq!(end.status, TransferState::Completed, "{end:?}");
}

/// The target may be told to run before it can: it then runs as soon as it can.
#[tokio::test(flavor = "multi_thread")]
async fn resuming_the_target_ahead() {
    if !has_qemu() {
        return;
    }
    for postcopy in [false, true] {
        let pair = at_switchover(postcopy).await;
        resume_guest(&pair.target).await.unwrap();
        assert_eq!(run_state(&pair.target).await.unwrap(), RunState::Inmigrate);
        continue_switchover(&pair.source).await.unwrap();
        wait_run(&pair.target, RunState::Running).await;
        let end = wait_for(&pair.source, "completing", PATIENCE, is_final)
            .await
            .unwrap();
        assert_eq!(end.status, TransferState::Completed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_the_switch_the_guest_runs_at_the_source() {
    if !has_qemu() {
        return;
    }
    for postcopy in [false, true] {
        let pair = at_switchover(postcopy).await;
        assert_eq!(cancel(&pair.source).await.unwrap(), RunState::Running);
        let end = wait_for(&pair.target, "failing", PATIENCE, is_final)
            .await
            .unwrap();
        assert_eq!(end.status, TransferState::Failed);
        // It is still there to be asked, but can take nothing in any more.
        let error =
            listen_incoming(&pair.target, "unix:/nowhere", IncomingSettings { postcopy }).await;
        assert!(
            matches!(error, Err(TransferError::Guest { .. })),
            "{error:?}"
        );
        // Cancelling again is fine.
        assert_eq!(cancel(&pair.source).await.unwrap(), RunState::Running);
        // And a new target takes it.
        let mut vm = incoming(pair.dir.path(), "target2");
        let target = vm.connect().await;
        let uri = format!("unix:{}", pair.dir.path().join("ram2").display());
        listen_incoming(&target, &uri, IncomingSettings { postcopy: false })
            .await
            .unwrap();
        let settings = OutgoingSettings {
            uri,
            postcopy: false,
            ..pair.settings.clone()
        };
        start_outgoing(&pair.source, &settings).await.unwrap();
        let wanted = |s| s == TransferState::PreSwitchover;
        wait_for(&pair.source, "copying memory", PATIENCE, wanted)
            .await
            .unwrap();
        continue_switchover(&pair.source).await.unwrap();
        let end = wait_for(&target, "completing", PATIENCE, is_final)
            .await
            .unwrap();
        assert_eq!(end.status, TransferState::Completed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_paused_stays_so() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut source_vm = Vm::start(dir.path(), "source", &[]);
    let mut target_vm = incoming(dir.path(), "target");
    let (source, target) = (source_vm.connect().await, target_vm.connect().await);
    source.execute(Stop {}).await.unwrap();
    let uri = format!("unix:{}", dir.path().join("ram").display());
    listen_incoming(&target, &uri, IncomingSettings { postcopy: false })
        .await
        .unwrap();
    let settings = OutgoingSettings {
        uri,
        downtime_limit_ms: Some(300),
        max_bandwidth_bytes_per_sec: Some(1 << 30),
        postcopy: false,
    };
    start_outgoing(&source, &settings).await.unwrap();
    let wanted = |s| s == TransferState::PreSwitchover;
    wait_for(&source, "copying memory", PATIENCE, wanted)
        .await
        .unwrap();
    let state = cancel(&source).await.unwrap();
    // 7.2 forgets that it was paused and says that it was migrated, which is stopped too.
    let old = !source.version().is_at_least(9, 0);
    assert!(state == RunState::Paused || old && state == RunState::Postmigrate);
}

/// Until the source has seen that its stream is broken.
async fn wait_error(qmp: &Qmp) {
    let seen = async {
        while status(qmp).await.unwrap().error.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.unwrap();
}

/// The target dies while the source waits: the source stays as it is, and is brought back.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_before_the_switch() {
    if !has_qemu() {
        return;
    }
    for postcopy in [false, true] {
        let mut pair = at_switchover(postcopy).await;
        pair.target_vm.kill();
        wait_error(&pair.source).await;
        let now = status(&pair.source).await.unwrap();
        assert_eq!(now.status, TransferState::PreSwitchover);
        let error = continue_switchover(&pair.source).await.unwrap_err();
        assert!(
            matches!(
                &error,
                TransferError::State {
                    status: TransferState::PreSwitchover,
                    error: Some(_),
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(cancel(&pair.source).await.unwrap(), RunState::Running);
    }
}

/// What happens to a source that goes on with a broken stream. With pre-copy QEMU lets the guest run again by
/// itself; with post-copy 10.0 forgets it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_goes_on_with_a_broken_stream() {
    if !has_qemu() {
        return;
    }
    for postcopy in [false, true] {
        let mut pair = at_switchover(postcopy).await;
        pair.target_vm.kill();
        wait_error(&pair.source).await;
        let state = TransferState::PreSwitchover;
        let go_on = flimcd_qemu::commands::MigrateContinue { state };
        pair.source.execute(go_on).await.unwrap();
        let left = |s| s != TransferState::PreSwitchover;
        wait_for(&pair.source, "going on", PATIENCE, left)
            .await
            .unwrap();
        let socket = pair.dir.path().join("rescue");
        rescue_guest(&pair.source, &socket).await.unwrap();
        assert_eq!(run_state(&pair.source).await.unwrap(), RunState::Running);
        // A guest that runs is left alone.
        rescue_guest(&pair.source, &socket).await.unwrap();
    }
}

/// A source that has completed can run its guest again, and only then migrate again.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_after_the_switch() {
    if !has_qemu() {
        return;
    }
    let mut pair = at_switchover(false).await;
    continue_switchover(&pair.source).await.unwrap();
    let end = wait_for(&pair.target, "completing", PATIENCE, is_final)
        .await
        .unwrap();
    assert_eq!(end.status, TransferState::Completed);
    wait_for(&pair.source, "completing", PATIENCE, is_final)
        .await
        .unwrap();
    pair.target_vm.kill();
    let error = start_outgoing(&pair.source, &pair.settings)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("previous migration"), "{error}");
    resume_guest(&pair.source).await.unwrap();
    assert_eq!(run_state(&pair.source).await.unwrap(), RunState::Running);
    drop(pair.source_vm);
}

/// Nobody listens: the guest never stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_to_nowhere() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut vm = Vm::start(dir.path(), "source", &[]);
    let qmp = vm.connect().await;
    let settings = OutgoingSettings {
        uri: format!("unix:{}", dir.path().join("nobody").display()),
        downtime_limit_ms: Some(300),
        max_bandwidth_bytes_per_sec: None,
        postcopy: false,
    };
    match start_outgoing(&qmp, &settings).await {
        Err(TransferError::Qmp { .. }) => {}
        Err(error) => panic!("{error}"),
        Ok(()) => {
            let end = wait_for(&qmp, "failing", PATIENCE, is_final).await.unwrap();
            assert_eq!(end.status, TransferState::Failed);
        }
    }
    assert_eq!(run_state(&qmp).await.unwrap(), RunState::Running);
    let error = listen_incoming(&qmp, "unix:/nowhere", IncomingSettings::default()).await;
    assert!(
        matches!(error, Err(TransferError::Guest { .. })),
        "{error:?}"
    );
    qmp.execute(Cont {}).await.unwrap();
}
