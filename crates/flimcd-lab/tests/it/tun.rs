//! The TUN router. These tests need the right to make network namespaces (root); without it they
//! say so and pass.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use flimcd_lab::wan::{
    LinkModel, Side,
    tun::{NamespaceError, NamespaceLab, NamespaceOptions, in_user_namespace},
};

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn lab(model: &str) -> Option<NamespaceLab> {
    let model: LinkModel = model.parse().unwrap();
    match NamespaceLab::new(&NamespaceOptions::new(model)) {
        Ok(lab) => Some(lab),
        Err(error @ (NamespaceError::NotAllowed(_) | NamespaceError::NoTun(_))) => {
            eprintln!("SKIPPED: needs network namespaces and TUN devices: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn udp(lab: &NamespaceLab, side: Side) -> UdpSocket {
    let socket = lab.run_in(side, move || {
        UdpSocket::bind((NamespaceLab::address(side), 7000)).unwrap()
    });
    let socket = socket.unwrap().join().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

const B: (Ipv4Addr, u16) = (NamespaceLab::address(Side::B), 7000);

#[test]
fn tcp_bytes_arrive_intact_over_a_lossy_reordering_link() {
    let Some(lab) = lab("1gbit,2ms,loss=1%,reorder=1%,jitter=0.2ms") else {
        return;
    };
    let (ready, address) = std::sync::mpsc::channel();
    let server = lab
        .run_in(Side::B, move || {
            let listener = TcpListener::bind((NamespaceLab::address(Side::B), 0)).unwrap();
            ready.send(listener.local_addr().unwrap()).unwrap();
            let mut bytes = Vec::new();
            listener
                .accept()
                .unwrap()
                .0
                .read_to_end(&mut bytes)
                .unwrap();
            bytes
        })
        .unwrap();
    let sent: Vec<u8> = (0..2_000_000u32)
        .map(|i| u8::try_from(i / 7 % 251).unwrap())
        .collect();
    let address = address.recv().unwrap();
    let data = sent.clone();
    let client = lab
        .run_in(Side::A, move || {
            TcpStream::connect(address)
                .unwrap()
                .write_all(&data)
                .unwrap();
        })
        .unwrap();
    client.join().unwrap();
    assert!(server.join().unwrap() == sent);
    let counters = lab.counters();
    assert!(counters.a_to_b.bytes > 2_000_000, "{counters:?}");
    assert!(counters.a_to_b.dropped_loss > 0, "{counters:?}");
    assert_eq!(counters.refused, 0, "{counters:?}");
}

#[test]
fn a_cut_drops_packets_and_the_model_can_be_changed() {
    let Some(lab) = lab("100mbit,1ms") else {
        return;
    };
    let (a, b) = (udp(&lab, Side::A), udp(&lab, Side::B));
    let mut byte = [0; 1];
    a.send_to(&[1], B).unwrap();
    b.recv(&mut byte).unwrap();
    lab.cut();
    a.send_to(&[2], B).unwrap();
    while lab.counters().a_to_b.dropped_cut == 0 {
        std::thread::yield_now();
    }
    lab.restore();
    a.send_to(&[3], B).unwrap();
    b.recv(&mut byte).unwrap();
    assert_eq!(byte, [3]);
    lab.set_model("100mbit,1ms,loss=100%".parse().unwrap());
    a.send_to(&[4], B).unwrap();
    while lab.counters().a_to_b.dropped_loss == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn the_queue_drops_what_it_cannot_hold() {
    let Some(lab) = lab("1mbit,1ms,queue=10KB") else {
        return;
    };
    let (a, _b) = (udp(&lab, Side::A), udp(&lab, Side::B));
    for _ in 0..40 {
        a.send_to(&[0; 1000], B).unwrap();
    }
    while lab.counters().a_to_b.packets + lab.counters().a_to_b.dropped_queue < 40 {
        std::thread::yield_now();
    }
    let counters = lab.counters().a_to_b;
    // 1 Mbit/s is 125 bytes a millisecond: the burst is over long before the queue is.
    assert!(counters.dropped_queue > 10, "{counters:?}");
    assert!(counters.queue_bytes_max <= 10_000, "{counters:?}");
}

#[test]
fn processes_run_in_a_side_and_leave_nothing() {
    let Some(lab) = lab("100mbit,1ms") else {
        return;
    };
    let mut command = Command::new("cat");
    command
        .arg("/proc/net/dev")
        .stdout(std::process::Stdio::piped());
    let mut child = lab.spawn(Side::A, command).unwrap();
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(text.contains("wan0"), "{text}");
    assert!(
        !std::fs::read_to_string("/proc/net/dev")
            .unwrap()
            .contains("wan0")
    );

    let mut sleeper = Command::new("sleep");
    sleeper.arg("1000");
    let sleeper = lab.spawn(Side::B, sleeper).unwrap();
    let process = format!("/proc/{}", sleeper.id());
    drop(sleeper);
    assert!(!std::path::Path::new(&process).exists());
}

#[test]
fn both_sides_have_the_congestion_control_that_was_set() {
    let Some(lab) = lab("100mbit,1ms") else {
        return;
    };
    // Every kernel has it.
    lab.set_congestion_control("reno").unwrap();
    for side in [Side::A, Side::B] {
        assert_eq!(lab.congestion_control(side).unwrap(), "reno");
    }
    assert!(lab.set_congestion_control("no-such-thing").is_err());
    let read = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap();
    let limits = lab.run_in(Side::A, read).unwrap().join().unwrap();
    assert!(limits.trim().ends_with("33554432"), "{limits}");
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn a_user_namespace_is_enough() {
    // The other test again, in a process that is root of a user namespace only.
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "tun::a_cut_drops_packets_and_the_model_can_be_changed",
        "--nocapture",
    ]);
    in_user_namespace(&mut command);
    match command.output() {
        Err(error) => eprintln!("SKIPPED: needs user namespaces: {error}"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            if text.contains("SKIPPED") {
                eprintln!("SKIPPED in a user namespace: {text}");
            }
        }
    }
}
