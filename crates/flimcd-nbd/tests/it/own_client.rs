//! What the protocol promises, asked for by our own client.

use std::{collections::HashMap, sync::Arc, thread};

use flimcd_core::ByteRange;
use flimcd_nbd::{
    Client, ClientError,
    client::Op,
    proto::{Errno, STATE_HOLE, STATE_ZERO},
};
use flimcd_volume::device::fault::FaultDevice;

use crate::fixture::{Fixture, pattern};

#[test]
fn reads_see_writes_of_any_alignment() {
    let fixture = Fixture::new(&vec![0; 1_000_003]);
    let mut client = fixture.client();
    assert_eq!(client.size(), 1_000_003);
    let mut model = vec![0; 1_000_003];
    for (offset, len) in [
        (0, 4096),
        (513, 1000),
        (999_000, 1003),
        (4000, 300_000),
        (1_000_002, 1),
    ] {
        let data = pattern(len);
        client.write(offset as u64, &data, offset == 513).unwrap();
        model[offset..offset + len].copy_from_slice(&data);
    }
    client.write_zeroes(600, 100, true).unwrap();
    model[600..700].fill(0);
    client.trim(8192, 98_304).unwrap();
    model[8192..106_496].fill(0);
    client.flush().unwrap();
    let mut got = vec![1; 1_000_003];
    client.read(0, &mut got).unwrap();
    assert!(got == model);
    client.disconnect().unwrap();
    assert!(fixture.content() == model);
}

#[test]
fn many_requests_in_flight_are_all_answered_with_their_own_content() {
    let content = pattern(4 << 20);
    let fixture = Fixture::new(&content);
    let mut client = fixture.client();
    let mut wanted = HashMap::new();
    for round in 0..40u64 {
        for index in 0..32u64 {
            let offset = (round * 7919 + index * 4096 * 13) % (4 << 20);
            let length = ((index * 3 + 1) * 512).min((4 << 20) - offset);
            let length = u32::try_from(length).unwrap();
            wanted.insert(client.submit(Op::Read { offset, length }).unwrap(), offset);
        }
        while client.in_flight() > 8 {
            let reply = client.recv().unwrap();
            let offset = usize::try_from(wanted.remove(&reply.cookie).unwrap()).unwrap();
            reply.result.unwrap();
            assert!(reply.data == content[offset..offset + reply.data.len()]);
            client.recycle(reply.data);
        }
    }
    while client.in_flight() > 0 {
        client.recv().unwrap();
    }
}

#[test]
fn holes_of_large_reads_read_as_zero() {
    let mut content = vec![0; 3 << 20];
    content[1 << 20..(1 << 20) + 5].fill(9);
    content[(3 << 20) - 1] = 1;
    let fixture = Fixture::new(&content);
    let mut got = vec![7; 3 << 20];
    fixture.client().read(0, &mut got).unwrap();
    assert!(got == content);
}

#[test]
fn block_status_tells_holes() {
    let mut content = vec![0; 1 << 20];
    content[65536..131_072].fill(1);
    let fixture = Fixture::new(&content);
    let mut client = fixture.client();
    assert!(client.has_block_status());
    client.write_zeroes(0, 65536, true).unwrap();
    client.trim(131_072, (1 << 20) - 131_072).unwrap();
    let got = client.block_status(0, 1 << 20).unwrap();
    let hole = STATE_HOLE | STATE_ZERO;
    let want = [
        (ByteRange::new(0, 65536), hole),
        (ByteRange::new(65536, 131_072), 0),
        (ByteRange::new(131_072, 1 << 20), hole),
    ];
    assert_eq!(got, want);
}

#[test]
fn errors_of_the_medium_reach_the_guest_as_what_they_are() {
    let mut faults = None;
    let fixture = Fixture::on(&pattern(1 << 20), |device| {
        let (device, control) = FaultDevice::new(device);
        faults = Some(control);
        Arc::new(device)
    });
    let faults = faults.unwrap();
    let mut client = fixture.client();
    let refused = |result: Result<(), ClientError>, want| match result {
        Err(ClientError::Refused(got)) => assert_eq!(got, want),
        other => panic!("{other:?} instead of {want:?}"),
    };
    faults.fail_reads(ByteRange::new(4096, 4097));
    refused(client.read(0, &mut [0; 8192]), Errno::Io);
    client.read(0, &mut [0; 4096]).unwrap();
    faults.fill_after(4096);
    client.write(0, &[1; 4096], false).unwrap();
    refused(client.write(0, &[1; 512], true), Errno::NoSpc);
    faults.fail_sync(true);
    refused(client.flush(), Errno::Io);
    faults.clear();
    refused(client.write(1 << 20, &[1], false), Errno::NoSpc);
    refused(client.read(1 << 20, &mut [1]), Errno::Inval);
    refused(client.read(u64::MAX, &mut [1]), Errno::Inval);
    refused(client.trim(1, 1 << 20), Errno::Inval);
    // What the failed sync lost nobody knows: the volume never says "durable" again.
    refused(client.flush(), Errno::Io);
}

#[test]
fn requests_wait_while_the_volume_is_frozen_and_are_refused_once_it_moved() {
    let fixture = Fixture::new(&pattern(1 << 20));
    let mut client = fixture.client();
    fixture.volume.start_tracking(None).unwrap();
    fixture.volume.freeze();
    let write = Op::Write {
        offset: 4096,
        data: &[5; 4096],
        fua: true,
    };
    let cookie = client.submit(write).unwrap();
    client
        .submit(Op::Read {
            offset: 0,
            length: 4096,
        })
        .unwrap();
    client.flush_requests().unwrap();
    // Another connection is served its handshake meanwhile, and sees nothing of the write.
    assert_eq!(fixture.client().size(), 1 << 20);
    assert!(fixture.content() == pattern(1 << 20));
    fixture.volume.thaw();
    let replies = [client.recv().unwrap(), client.recv().unwrap()];
    assert!(replies.iter().all(|reply| reply.result.is_ok()));
    assert!(replies.iter().any(|reply| reply.cookie == cookie));
    assert_eq!(fixture.content()[4096..8192], [5; 4096]);

    fixture.volume.freeze();
    client.submit(write).unwrap();
    client.submit(Op::Flush).unwrap();
    client.flush_requests().unwrap();
    fixture.volume.release();
    let first = client.recv().unwrap();
    let second = client.recv().unwrap();
    let moved = Err(Errno::Shutdown);
    assert!(
        first.result == moved || second.result == moved,
        "{first:?} {second:?}"
    );
    assert!(matches!(
        client.read(0, &mut [0; 512]),
        Err(ClientError::Refused(Errno::Shutdown))
    ));
}

#[test]
fn exports_are_found_by_name_and_can_be_taken_away() {
    let fixture = Fixture::new(&[0; 4096]);
    assert_eq!(Client::list_unix(&fixture.socket).unwrap(), ["disk"]);
    let missing = Client::connect_unix(&fixture.socket, "other").unwrap_err();
    assert!(matches!(missing, ClientError::NoSuchExport(_)), "{missing}");
    // The only export is the default one.
    let mut client = Client::connect_unix(&fixture.socket, "").unwrap();
    client.flush().unwrap();
    assert_eq!(fixture.server.clients("disk"), 1);
    assert!(fixture.server.unexport("disk"));
    assert_eq!(fixture.server.clients("disk"), 0);
    assert!(client.flush().is_err());
    assert!(!fixture.server.unexport("disk"));
}

#[test]
fn several_connections_see_each_others_flushed_writes() {
    let fixture = Fixture::new(&vec![0; 1 << 20]);
    thread::scope(|scope| {
        for lane in 0..4u64 {
            let fixture = &fixture;
            scope.spawn(move || {
                let (mut writer, mut reader) = (fixture.client(), fixture.client());
                for round in 0..50u8 {
                    let offset = (lane * 64 + u64::from(round)) * 4096;
                    writer.write(offset, &[round + 1; 4096], false).unwrap();
                    // CAN_MULTI_CONN: a flush on one connection covers what another one was
                    // answered.
                    reader.flush().unwrap();
                    let mut got = [0; 4096];
                    reader.read(offset, &mut got).unwrap();
                    assert!(got == [round + 1; 4096]);
                }
            });
        }
    });
}
