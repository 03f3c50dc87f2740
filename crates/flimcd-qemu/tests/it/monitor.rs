//! The client against real monitors, and against what is none.

use std::{io::Write, os::unix::net::UnixListener};

use flimcd_qemu::{
    EventKind, Qmp, QmpError,
    commands::{Cont, Quit, Stop},
};
use serde_json::json;
use tempfile::TempDir;

use crate::vm::{BlockdevAddRaw, Vm, has_qemu};

#[tokio::test(flavor = "multi_thread")]
async fn commands_events_and_the_end() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut vm = Vm::start(dir.path(), "vm", &[]);
    let qmp = vm.connect().await;
    assert_eq!(qmp.pid(), Some(vm.pid()));
    let mut events = qmp.events();
    qmp.execute(Stop {}).await.unwrap();
    qmp.execute(Cont {}).await.unwrap();
    assert_eq!(events.next().await.unwrap().kind, EventKind::Stop);
    let resume = events.next().await.unwrap();
    assert!(resume.kind == EventKind::Resume && resume.time_us > 0);
    let error = qmp
        .execute(BlockdevAddRaw(json!({"driver": "none"})))
        .await
        .unwrap_err();
    assert!(
        matches!(
            &error,
            QmpError::Command {
                command: "blockdev-add",
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.is_fatal() && !qmp.is_closed());

    // Somebody else holds it.
    let error = Qmp::connect(&vm.socket).await.unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");

    qmp.execute(Quit {}).await.unwrap();
    qmp.closed().await;
    assert!(qmp.is_closed());
    while events.next().await.is_some() {}
    let error = qmp.execute(Stop {}).await.unwrap_err();
    assert!(
        matches!(error, QmpError::Closed { command: "stop" }),
        "{error}"
    );
    vm.kill();
    let error = Qmp::connect(&vm.socket).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connecting_again_after_the_last_handle_is_gone() {
    if !has_qemu() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let mut vm = Vm::start(dir.path(), "vm", &[]);
    for _ in 0..3 {
        let qmp = vm.connect().await;
        qmp.execute(Stop {}).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_monitor() {
    let dir = TempDir::new().unwrap();
    for (name, greeting) in [
        ("http", "HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("json", "{\"return\": {}}\n"),
        ("nothing", ""),
    ] {
        let socket = dir.path().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(greeting.as_bytes()).unwrap();
        });
        let error = Qmp::connect(&socket).await.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{name}: {error}");
        server.join().unwrap();
    }
}
