//! Sites and clients: a guest on the network across both sites. Needs root and QEMU; without them
//! these tests say so and pass.

use std::{
    net::{TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use flimcd_lab::{
    vm::{Client, DiskSpec, GuestImage, GuestSpec, Place, QemuSpec, Sites, SitesError},
    wan::{Side, tun::NamespaceError},
};

use crate::guest::tools;

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn sites(model: &str) -> Option<Sites> {
    match Sites::new(model.parse().unwrap(), 1) {
        Ok(sites) => Some(sites),
        Err(
            error @ (SitesError::NoTool(_)
            | SitesError::Namespace(
                NamespaceError::NotAllowed(_) | NamespaceError::NoTun(_),
            )),
        ) => {
            eprintln!("SKIPPED: needs root, namespaces and iproute2: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_client_reaches_a_guest_at_either_site() {
    let (Some(tools), Some(sites)) = (tools(), sites("100mbit,4ms")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = GuestImage::build(&tools, dir.path(), &GuestSpec::default()).unwrap();
    // At B, so that everything between client and guest is in the path.
    let mut spec = QemuSpec::new("vm", &dir.path().join("run"), &image);
    spec.disks = vec![DiskSpec::new("disk0", &image.disks[0])];
    spec.net = Sites::net();
    let at_b = Place::Site(Side::B);
    let qemu = spec
        .spawn_with(&tools, |command| sites.put_in(at_b, command))
        .unwrap();
    qemu.wait_ready().unwrap();
    let client = Client::start(&sites).unwrap();
    let start = Instant::now();
    assert!(client.wait_answers_after(start, Duration::from_secs(30)));
    let marked = sites.ask_guest("mark one 8").unwrap();
    assert_eq!(
        qemu.control("sums").unwrap(),
        format!("SUM one {}\nOK", &marked[3..])
    );
    assert!(sites.ask_guest("nonsense").is_err());
    let before = sites.counters();
    assert!(
        before.a_to_b.bytes > 0 && before.b_to_a.bytes > 0,
        "{before:?}"
    );
    sites.wan().cut();
    let cut = Instant::now();
    // Nothing sent from now on is answered.
    assert!(!client.wait_answers_after(cut, Duration::from_millis(300)));
    sites.wan().restore();
    let restored = Instant::now();
    assert!(client.wait_answers_after(restored, Duration::from_secs(30)));
    let report = client.report(start, Instant::now());
    assert!(report.ping.gap_ms_max >= 290.0, "{report:?}");
    assert_eq!((report.ping.broken, report.tcp.broken), (None, None));
    assert_eq!(qemu.complaints(), Vec::<String>::new());
}

#[test]
fn connections_between_the_sites_have_the_congestion_control_that_was_set() {
    let Some(sites) = sites("100mbit,1ms") else {
        return;
    };
    // Every kernel has it.
    sites.set_congestion_control("reno").unwrap();
    assert!(sites.set_congestion_control("no-such-thing").is_err());
    let (ready, go) = std::sync::mpsc::channel();
    let algorithm = |stream: &TcpStream| {
        let name = socket2::SockRef::from(stream).tcp_congestion().unwrap();
        String::from_utf8_lossy(&name)
            .trim_end_matches('\0')
            .to_owned()
    };
    let server = sites.run_in(Place::Site(Side::B), move || {
        let listener = TcpListener::bind((Sites::address(Side::B), 0)).unwrap();
        ready.send(listener.local_addr().unwrap()).unwrap();
        algorithm(&listener.accept().unwrap().0)
    });
    let client = sites.run_in(Place::Site(Side::A), move || {
        algorithm(&TcpStream::connect(go.recv().unwrap()).unwrap())
    });
    assert_eq!(client.unwrap().join().unwrap(), "reno");
    assert_eq!(server.unwrap().join().unwrap(), "reno");
}

#[test]
fn others_enter_a_place_by_its_prefix_and_nothing_is_left() {
    let Some(sites) = sites("100mbit,1ms") else {
        return;
    };
    let prefix = sites.prefix(Place::Site(Side::B));
    let run = || {
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).args(["ip", "-o", "link"]);
        command.output().unwrap()
    };
    let text = String::from_utf8(run().stdout).unwrap();
    assert!(
        text.contains("vx100") && text.contains("tap0") && !text.contains("client0"),
        "{text}"
    );
    drop(sites);
    assert!(!run().status.success());
    let text = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert!(
        !text.contains("vx100") && !text.contains("client0"),
        "{text}"
    );
}

/// Whether sites can be made here; says so if not.
pub(crate) fn are_possible() -> bool {
    sites("100mbit,1ms").is_some()
}
