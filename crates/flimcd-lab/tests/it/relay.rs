//! The TCP relay over loopback: bytes intact, counters, cuts, closes. No speed is asserted here.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use flimcd_lab::wan::{
    LinkModel, Side,
    relay::{Cut, Relay, RelayError, RelayOptions, Route},
};

/// Fast enough for tests, slow enough that queues form.
fn model() -> LinkModel {
    "400mbit,4ms,queue=100KB".parse().unwrap()
}

fn relay_to(target: SocketAddr) -> Relay {
    let route = Route {
        listen: "127.0.0.1:0".parse().unwrap(),
        target,
        from: Side::A,
    };
    Relay::start(&RelayOptions {
        model: model(),
        routes: vec![route],
        seed: 1,
    })
    .unwrap()
}

/// A server that answers every connection with the bytes it got, then closes.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                let mut writer = stream;
                let _ = std::io::copy(&mut reader, &mut writer);
                let _ = writer.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[7]
    };
    (0..len).map(|_| next()).collect()
}

/// Sends `data` through, closes its side, and returns what comes back.
fn round_trip(address: SocketAddr, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let stream = TcpStream::connect(address)?;
    let mut reader = stream.try_clone()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut writer = stream;
            let _ = writer.write_all(data);
            let _ = writer.shutdown(Shutdown::Write);
        });
        let mut back = Vec::new();
        reader.read_to_end(&mut back)?;
        Ok(back)
    })
}

#[test]
fn bytes_of_many_connections_arrive_intact_and_are_counted() {
    let relay = relay_to(echo_server());
    let address = relay.addresses()[0];
    let lengths = [0, 1, 1448, 100_000, 1_000_000];
    thread::scope(|scope| {
        for (seed, len) in (1..).zip(lengths) {
            scope.spawn(move || {
                let data = pattern(seed, len);
                let back = round_trip(address, &data).unwrap();
                assert!(back == data, "{len} bytes came back as {}", back.len());
            });
        }
    });
    let counters = relay.counters();
    let total: usize = lengths.iter().sum();
    assert_eq!(counters.a_to_b.bytes, total as u64);
    assert_eq!(counters.b_to_a.bytes, total as u64);
    assert_eq!(counters.connections, lengths.len() as u64);
    assert!(counters.a_to_b.queue_bytes_max <= 100_000, "{counters:?}");
    assert_eq!(counters.a_to_b.dropped_queue, 0);
}

#[test]
fn a_reader_that_does_not_read_holds_only_itself_back() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = relay_to(listener.local_addr().unwrap());
    let mut stuck = TcpStream::connect(relay.addresses()[0]).unwrap();
    let (_never_read, _) = listener.accept().unwrap();
    stuck.set_nonblocking(true).unwrap();
    // Until neither the sockets nor the relay take any more, for as long as an echo takes.
    let echo = echo_server();
    let other = Route {
        listen: "127.0.0.1:0".parse().unwrap(),
        target: echo,
        from: Side::A,
    };
    let second = Relay::start(&RelayOptions {
        model: model(),
        routes: vec![other],
        seed: 1,
    })
    .unwrap();
    let chunk = vec![1; 65536];
    let mut written = 0;
    loop {
        match stuck.write(&chunk) {
            Ok(n) => written += n,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let before = relay.counters().a_to_b.bytes;
                round_trip(second.addresses()[0], &pattern(1, 100_000)).unwrap();
                if relay.counters().a_to_b.bytes == before && before > 0 {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(written < 256 << 20, "the relay takes everything");
    }
}

#[test]
fn a_reset_cut_breaks_connections_until_it_is_restored() {
    let relay = relay_to(echo_server());
    let address = relay.addresses()[0];
    let mut open = TcpStream::connect(address).unwrap();
    open.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    open.read_exact(&mut back).unwrap();
    relay.cut(Cut::Reset);
    let broken = open.read(&mut back);
    assert!(broken.is_err() || matches!(broken, Ok(0)), "{broken:?}");
    let refused = round_trip(address, b"x");
    assert!(
        refused.is_err() || matches!(&refused, Ok(bytes) if bytes.is_empty()),
        "{refused:?}"
    );
    relay.restore();
    assert_eq!(round_trip(address, b"again").unwrap(), b"again");
}

#[test]
fn a_black_hole_keeps_connections_and_loses_nothing() {
    let relay = relay_to(echo_server());
    let mut stream = TcpStream::connect(relay.addresses()[0]).unwrap();
    let mut back = [0; 5];
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut back).unwrap();
    relay.cut(Cut::BlackHole);
    stream.write_all(b"while").unwrap();
    let before = relay.counters();
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert!(stream.read(&mut back).is_err());
    assert_eq!(relay.counters(), before);
    relay.restore();
    stream.set_read_timeout(None).unwrap();
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"while");
}

#[test]
fn an_unreachable_target_resets_the_client() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let relay = relay_to(gone);
    let result = round_trip(relay.addresses()[0], b"x");
    assert!(
        result.is_err() || matches!(&result, Ok(bytes) if bytes.is_empty()),
        "{result:?}"
    );
}

#[test]
fn a_reset_of_one_end_reaches_the_other() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = relay_to(listener.local_addr().unwrap());
    let client = TcpStream::connect(relay.addresses()[0]).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    let mut byte = [0];
    assert!(server.read(&mut byte).is_err());
}

#[test]
fn the_model_can_be_changed_and_wrong_addresses_are_refused() {
    let relay = relay_to(echo_server());
    relay.set_model("1gbit,0.1ms".parse().unwrap());
    assert_eq!(round_trip(relay.addresses()[0], b"fast").unwrap(), b"fast");
    assert!(relay.cannot_model().is_none());

    let route = |listen: &str| Route {
        listen: listen.parse().unwrap(),
        target: relay.addresses()[0],
        from: Side::B,
    };
    let start = |route| {
        let model = "1gbit,1ms,loss=1%".parse().unwrap();
        Relay::start(&RelayOptions {
            model,
            routes: vec![route],
            seed: 1,
        })
    };
    assert!(matches!(
        start(route("0.0.0.0:0")),
        Err(RelayError::NotLoopback(_))
    ));
    let taken = relay.addresses()[0].to_string();
    assert!(matches!(
        start(route(&taken)),
        Err(RelayError::Listen { .. })
    ));
    let lossy = start(route("127.0.0.1:0")).unwrap();
    assert!(lossy.cannot_model().unwrap().contains("loss"));
    // From side B, so the other direction counts.
    assert_eq!(round_trip(lossy.addresses()[0], b"both").unwrap(), b"both");
    assert_eq!(lossy.counters().b_to_a.bytes, 4);
}

#[test]
fn a_light_connection_waits_for_the_queue_and_no_longer() {
    let relay = relay_to(echo_server());
    let address = relay.addresses()[0];
    let mut light = TcpStream::connect(address).unwrap();
    let mut bulk = TcpStream::connect(address).unwrap();
    let mut drain = bulk.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let chunk = [1; 65536];
        while bulk.write_all(&chunk).is_ok() {}
    });
    let reader = thread::spawn(move || {
        let mut buffer = [0; 65536];
        while matches!(drain.read(&mut buffer), Ok(1..)) {}
    });
    let sent = || relay.counters().a_to_b.bytes;
    while relay.counters().a_to_b.queue_bytes_max < 90_000 {
        thread::yield_now();
    }
    // What the bulk sends while one byte goes there and back: a round trip (200 kB) and two full
    // queues (200 kB) at the link's rate. The machine may make any of them take longer, but not
    // each, unless the byte stands behind more than the queue.
    let mut least = u64::MAX;
    for _ in 0..20 {
        let before = sent();
        let mut byte = [5];
        light.write_all(&byte).unwrap();
        light.read_exact(&mut byte).unwrap();
        least = least.min(sent() - before);
    }
    assert!(least < 600_000, "{least} bytes of bulk went by");
    relay.cut(Cut::Reset);
    writer.join().unwrap();
    reader.join().unwrap();
}
