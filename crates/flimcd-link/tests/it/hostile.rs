//! A peer with a valid certificate that sends what it should not.

use std::time::Duration;

use flimcd_core::MigrationId;
use flimcd_link::{Endpoint, LinkError, LinkEvent};
use flimcd_wire::{Body, Class, DecodeError, Frame, LinkMessage, Message, encode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    pair::{Authority, message, next, next_frame, next_up, site},
    raw::{bundle, read_to_end},
};

fn bytes(body: &Body) -> Vec<u8> {
    let encoded = encode(body);
    [&encoded.head[..], &encoded.payload[..]].concat()
}

/// Sends `rubbish` on one lane of a bundle that is up, and returns why it went down.
async fn down_after(rubbish: &[u8], lane: usize) -> LinkError {
    let authority = Authority::new();
    let endpoint = authority.endpoint("east", &["west"]);
    let address = endpoint.listen("127.0.0.1:0").await.unwrap().to_string();
    let identity = authority.identity("west");
    let east = endpoint.peer(&site("west")).unwrap();
    let mut lanes = bundle(&address, &identity, "west", 1).await;
    assert_eq!(next_up(&east).await, 1);
    lanes[lane].write_all(rubbish).await.unwrap();
    lanes[lane].flush().await.unwrap();
    let LinkEvent::Down {
        generation: 1,
        reason,
    } = next(&east).await
    else {
        panic!("the link stays up")
    };
    for lane in &mut lanes {
        read_to_end(lane).await;
    }
    // Nothing is the worse for it: the next bundle works.
    let mut lanes = bundle(&address, &identity, "west", 2).await;
    assert_eq!(next_up(&east).await, 2);
    let frame = message(5, Class::Control);
    lanes[0]
        .write_all(&bytes(&Body::Frame(frame.clone())))
        .await
        .unwrap();
    assert_eq!(next_frame(&east).await, frame);
    endpoint.stop();
    reason
}

#[tokio::test]
async fn garbage_ends_the_bundle() {
    for lane in 0..3 {
        let reason = down_after(&[0xa5; 300], lane).await;
        assert!(matches!(reason, LinkError::Malformed(_)), "{reason:?}");
    }
}

#[tokio::test]
async fn an_oversized_frame_ends_the_bundle_before_it_is_received() {
    let mut header = bytes(&Body::Frame(message(1, Class::Bulk)));
    header[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let reason = down_after(&header[..16], 2).await;
    assert!(
        matches!(reason, LinkError::Malformed(DecodeError::TooLong(u32::MAX))),
        "{reason:?}"
    );
}

#[tokio::test]
async fn a_frame_on_the_wrong_lane_ends_the_bundle() {
    for (class, lane) in [
        (Class::Bulk, 0),
        (Class::Bulk, 1),
        (Class::Fault, 2),
        (Class::Control, 2),
    ] {
        let reason = down_after(&bytes(&Body::Frame(message(1, class))), lane).await;
        assert!(
            matches!(reason, LinkError::WrongLane { .. }),
            "{class:?}: {reason:?}"
        );
    }
    let ping = bytes(&Body::Link(LinkMessage::Ping(1)));
    let reason = down_after(&ping, 1).await;
    assert!(
        matches!(reason, LinkError::WrongLane { lane: 1, .. }),
        "{reason:?}"
    );
}

#[tokio::test]
async fn a_message_of_no_kind_ends_the_bundle() {
    let frame = Body::Frame(Frame {
        migration: MigrationId(1),
        class: Class::Control,
        message: Message::Invalid,
    });
    let reason = down_after(&bytes(&frame), 0).await;
    assert!(matches!(reason, LinkError::Malformed(_)), "{reason:?}");
}

#[tokio::test]
async fn bytes_that_are_not_tls_end_the_bundle() {
    let authority = Authority::new();
    let endpoint = authority.endpoint("east", &["west"]);
    let address = endpoint.listen("127.0.0.1:0").await.unwrap().to_string();
    let east = endpoint.peer(&site("west")).unwrap();
    let mut lanes = bundle(&address, &authority.identity("west"), "west", 1).await;
    next_up(&east).await;
    lanes[1]
        .get_mut()
        .0
        .write_all(b"in plain words")
        .await
        .unwrap();
    let LinkEvent::Down { reason, .. } = next(&east).await else {
        panic!("the link stays up")
    };
    assert!(matches!(reason, LinkError::Tls { .. }), "{reason:?}");
    endpoint.stop();
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_taken_for_a_link_that_is_down() {
    let authority = Authority::new();
    let mut config = authority.config("east", &["west"]);
    config.silence_max = Duration::from_millis(200);
    let endpoint = Endpoint::new(config).unwrap();
    let address = endpoint.listen("127.0.0.1:0").await.unwrap().to_string();
    let east = endpoint.peer(&site("west")).unwrap();
    let mut lanes = bundle(&address, &authority.identity("west"), "west", 1).await;
    next_up(&east).await;
    let mut ping = [0; 16];
    lanes[0].read_exact(&mut ping).await.unwrap();
    assert_eq!(ping[4], 1, "a message of the link's own");
    let LinkEvent::Down { reason, .. } = next(&east).await else {
        panic!("the link stays up")
    };
    assert!(matches!(reason, LinkError::Silent { .. }), "{reason:?}");
    endpoint.stop();
}

#[tokio::test]
async fn a_bundle_that_is_never_completed_disturbs_nobody() {
    let authority = Authority::new();
    let endpoint = authority.endpoint("east", &["west"]);
    let address = endpoint.listen("127.0.0.1:0").await.unwrap().to_string();
    let identity = authority.identity("west");
    let east = endpoint.peer(&site("west")).unwrap();
    let mut half = bundle(&address, &identity, "west", 1).await;
    assert_eq!(next_up(&east).await, 1);
    // Four attempts that stop half-way, while the first bundle is at work.
    let mut attempts = Vec::new();
    for number in 2..6 {
        let mut stream = crate::raw::connect(&address, Some(&identity)).await;
        let hello = flimcd_wire::Hello {
            bundle: number,
            ..crate::raw::hello("west", 0, 3)
        };
        let greeting = flimcd_wire::encode_hello(&hello);
        crate::raw::greet(&mut stream, &greeting)
            .await
            .unwrap()
            .unwrap();
        attempts.push(stream);
    }
    let frame = message(5, Class::Control);
    half[0]
        .write_all(&bytes(&Body::Frame(frame.clone())))
        .await
        .unwrap();
    assert_eq!(next_frame(&east).await, frame);
    // A complete one replaces it.
    let _lanes = bundle(&address, &identity, "west", 9).await;
    let LinkEvent::Down {
        generation: 1,
        reason,
    } = next(&east).await
    else {
        panic!("the old bundle stays")
    };
    assert!(matches!(reason, LinkError::Replaced), "{reason:?}");
    assert_eq!(next_up(&east).await, 2);
    endpoint.stop();
}

#[tokio::test]
async fn a_host_that_only_connects_is_bounded_and_recovers() {
    let authority = Authority::new();
    let mut config = authority.config("east", &["west"]);
    config.handshake_timeout = Duration::from_secs(600);
    let endpoint = Endpoint::new(config).unwrap();
    let address = endpoint.listen("127.0.0.1:0").await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..24 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut one_too_many = TcpStream::connect(address).await.unwrap();
    let _ = one_too_many.read_to_end(&mut Vec::new()).await;
    drop(silent);
    let west = authority.endpoint("west", &["east"]);
    let link = west.link(&site("east"), &address.to_string()).unwrap();
    next_up(&link).await;
    west.stop();
    endpoint.stop();
}
