//! Clients that break the protocol, or do not read, or leave in the middle.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

use flimcd_nbd::{
    Client,
    proto::{CHUNK_MAGIC, Errno, OPTION_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command, option},
};

use crate::fixture::{Fixture, pattern};

/// A client that writes what it likes.
struct Raw(UnixStream);

impl Raw {
    /// Past the greeting.
    fn connect(fixture: &Fixture) -> Self {
        let mut socket = UnixStream::connect(&fixture.socket).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        Self(socket)
    }

    /// In the transmission phase, with simple replies.
    fn attached(fixture: &Fixture) -> Self {
        let mut raw = Self::connect(fixture);
        raw.option(option::EXPORT_NAME, b"disk");
        raw.read(10);
        raw
    }

    fn option(&mut self, number: u32, data: &[u8]) {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.0.write_all(&bytes).unwrap();
    }

    fn request(&mut self, number: u16, flags: u16, offset: u64, length: u32) {
        self.0
            .write_all(&request(number, flags, offset, length))
            .unwrap();
    }

    fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The error of one simple reply without content.
    fn error(&mut self) -> u32 {
        let reply = self.read(16);
        assert_eq!(reply[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    fn assert_closed(mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap_or(0), 0);
    }
}

fn request(number: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes.extend(77u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The server must be well after whatever happened.
fn assert_serves(fixture: &Fixture) {
    let mut got = [0; 512];
    fixture.client().read(0, &mut got).unwrap();
    assert_eq!(got[..], fixture.content()[..512]);
}

#[test]
fn senseless_requests_get_errors_and_the_connection_lives() {
    let fixture = Fixture::new(&pattern(1 << 20));
    let mut raw = Raw::attached(&fixture);
    let cases = [
        (command::READ, 0, 0, 0, Errno::Inval),
        (command::READ, 0, 0, u32::MAX, Errno::Inval),
        (command::READ, 0, u64::MAX, 512, Errno::Inval),
        (command::READ, 1 << 2, 0, 512, Errno::Inval),
        (command::READ, 1 << 15, 0, 512, Errno::Inval),
        (command::TRIM, 0, 1 << 20, 1, Errno::Inval),
        (command::WRITE_ZEROES, 0, 1 << 19, 1 << 20, Errno::NoSpc),
        (command::BLOCK_STATUS, 0, 0, 512, Errno::Inval),
        (command::FLUSH, 1 << 4, 0, 0, Errno::Inval),
        (99, 0, 0, 0, Errno::Inval),
    ];
    for (number, flags, offset, length, want) in cases {
        raw.request(number, flags, offset, length);
        assert_eq!(
            raw.error(),
            want.code(),
            "{number} {flags:#x} {offset} {length}"
        );
    }
    // The payload of a refused write is skipped, even of one that is too long to be kept.
    raw.request(command::WRITE, 0, 1 << 20, 4096);
    raw.0.write_all(&[9; 4096]).unwrap();
    assert_eq!(raw.error(), Errno::NoSpc.code());
    raw.request(command::WRITE, 0, 0, 40 << 20);
    assert_eq!(raw.error(), Errno::Inval.code());
    for _ in 0..40 {
        raw.0.write_all(&[9; 1 << 20]).unwrap();
    }
    raw.request(command::READ, 0, 512, 512);
    assert_eq!(raw.error(), 0);
    assert_eq!(raw.read(512), pattern(1024)[512..]);
    assert!(fixture.content() == pattern(1 << 20));
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let fixture = Fixture::new(&pattern(4096));
    for garbage in [
        &b"GET / HTTP/1.1\r\n"[..],
        &[0; 64],
        &CHUNK_MAGIC.to_be_bytes(),
    ] {
        let mut raw = Raw::attached(&fixture);
        raw.0.write_all(garbage).unwrap();
        raw.assert_closed();
    }
    assert_serves(&fixture);
}

#[test]
fn malformed_handshakes_harm_nobody() {
    let fixture = Fixture::new(&pattern(4096));
    let check = |send: &dyn Fn(&mut Raw)| {
        let mut raw = Raw::connect(&fixture);
        send(&mut raw);
        raw.assert_closed();
    };
    check(&|raw| raw.0.write_all(b"not an option at all").unwrap());
    check(&|raw| raw.option(option::EXPORT_NAME, b"nothing"));
    check(&|raw| raw.option(option::EXPORT_NAME, &[0xff; 100]));
    check(&|raw| {
        let mut huge = OPTION_MAGIC.to_be_bytes().to_vec();
        huge.extend([0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]);
        raw.0.write_all(&huge).unwrap();
    });
    // Errors that can be answered are, and the handshake goes on.
    let mut raw = Raw::connect(&fixture);
    let malformed: [(u32, &[u8]); 7] = [
        (option::GO, b""),
        (option::GO, &[0xff; 6]),
        (option::INFO, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 9]),
        (option::LIST, b"x"),
        (option::SET_META_CONTEXT, &[0; 3]),
        (option::STARTTLS, b""),
        (12345, &[1; 16 << 10]),
    ];
    for (number, data) in malformed {
        raw.option(number, data);
        let reply = raw.read(20);
        assert_eq!(reply[8..12], number.to_be_bytes());
        assert_eq!(reply[12] & 0x80, 0x80, "an error for {number}: {reply:?}");
        let text = u32::from_be_bytes(reply[16..20].try_into().unwrap());
        raw.read(text as usize);
    }
    raw.option(3333, &vec![0; 1 << 20]);
    let reply = raw.read(20);
    raw.read(usize::from(reply[19]));
    raw.option(option::EXPORT_NAME, b"disk");
    assert_eq!(raw.read(10)[..8], 4096u64.to_be_bytes());
    assert_serves(&fixture);
}

#[test]
fn clients_may_leave_at_any_byte() {
    let fixture = Fixture::new(&pattern(1 << 20));
    let mut whole = Vec::new();
    whole.extend(request(command::READ, 0, 0, 65536));
    whole.extend(request(command::WRITE, 0, 0, 512));
    whole.extend(&pattern(512));
    whole.extend(request(command::FLUSH, 0, 0, 0));
    for end in (0..whole.len()).step_by(29) {
        let mut raw = Raw::attached(&fixture);
        raw.0.write_all(&whole[..end]).unwrap();
        if end % 2 == 0 {
            raw.0.shutdown(Shutdown::Write).unwrap();
            // What was asked for as a whole may be answered; then it ends.
            let _ = raw.0.read_to_end(&mut Vec::new());
        }
    }
    assert_serves(&fixture);
    assert!(fixture.content() == pattern(1 << 20));
}

/// A client that only asks must not make the server hold its answers without bound, nor starve
/// others.
#[test]
fn a_client_that_does_not_read_is_bounded() {
    let fixture = Fixture::new(&pattern(8 << 20));
    let mut raw = Raw::attached(&fixture);
    raw.0
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let batch: Vec<u8> = (0..512)
        .flat_map(|_| request(command::READ, 0, 0, 8 << 20))
        .collect();
    // 4 GiB of answers per batch: the server stops taking requests long before all of these.
    let mut sent = 0usize;
    while sent < 64 << 20 {
        match raw.0.write(&batch) {
            Ok(bytes) => sent += bytes,
            Err(_) => break,
        }
    }
    assert!(sent < 64 << 20, "the server took {sent} bytes of requests");
    assert_serves(&fixture);
    drop(raw);
    assert!(fixture.server.unexport("disk"));
}

#[test]
fn shutting_down_ends_clients_in_any_phase() {
    let fixture = Fixture::new(&pattern(1 << 20));
    let handshaking = Raw::connect(&fixture);
    let mut busy = Raw::attached(&fixture);
    busy.request(command::WRITE, 0, 0, 1 << 20);
    let mut client = Client::connect_unix(&fixture.socket, "disk").unwrap();
    client.flush().unwrap();
    fixture.volume.freeze();
    client
        .submit(flimcd_nbd::client::Op::Read {
            offset: 0,
            length: 512,
        })
        .unwrap();
    client.flush_requests().unwrap();
    fixture.server.shutdown();
    assert!(!fixture.socket.exists());
    assert_eq!(fixture.volume.connections(), 0);
    handshaking.assert_closed();
    assert!(client.recv().is_err());
    assert!(Client::connect_unix(&fixture.socket, "disk").is_err());
}

#[test]
fn only_a_dead_servers_socket_is_replaced() {
    use flimcd_nbd::{BindError, Server};
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new(&[0; 512]);
    assert!(matches!(
        Server::bind(&fixture.socket),
        Err(BindError::InUse { .. })
    ));
    assert!(matches!(
        Server::bind(&fixture.image),
        Err(BindError::NotASocket { .. })
    ));
    let mode = std::fs::metadata(&fixture.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let stale = fixture.dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    Server::bind(&stale).unwrap();
    assert_serves(&fixture);
}
