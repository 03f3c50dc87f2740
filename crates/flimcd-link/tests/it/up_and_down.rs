//! Frames both ways, and what happens when connections break.

use std::{net::TcpListener, time::Duration};

use flimcd_link::{Endpoint, LinkError, LinkEvent, LinkHandle, SendError};
use flimcd_wire::Class;

use crate::{
    pair::{Authority, Pair, blocks, message, next, next_frame, next_up, site},
    proxy::{Proxy, Way},
};

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_every_class_and_size_cross_both_ways() {
    for bulk_connections in [1, 3] {
        let pair = Pair::up(|config| config.bulk_connections = Some(bulk_connections)).await;
        for (from, to) in [(&pair.west, &pair.east), (&pair.east, &pair.west)] {
            for (id, class) in (1..).zip(Class::ALL) {
                for frame in [
                    message(id, class),
                    blocks(id, class, 4096),
                    blocks(id, class, 1 << 20),
                ] {
                    from.send(frame.clone()).await.unwrap();
                    assert_eq!(next_frame(to).await, frame);
                }
            }
        }
        assert!(pair.west.bytes_sent() > 5 << 20);
        assert!(pair.west.congestion_control().is_some());
        pair.stop();
        assert_eq!(
            pair.west.try_send(message(1, Class::Bulk)),
            Err(SendError::Down)
        );
    }
}

/// Two endpoints with a proxy in between.
async fn through_proxy(silence_max: Duration) -> (Endpoint, Endpoint, Proxy) {
    let authority = Authority::new();
    let endpoint = |name, peer| {
        let mut config = authority.config(name, &[peer]);
        config.silence_max = silence_max;
        Endpoint::new(config).unwrap()
    };
    let (east, west) = (endpoint("east", "west"), endpoint("west", "east"));
    let proxy = Proxy::to(east.listen("127.0.0.1:0").await.unwrap()).await;
    west.link(&site("east"), &proxy.address).unwrap();
    (east, west, proxy)
}

/// Sends bulk for as long as the endpoint lives, each frame stamped with the generation it was sent in.
async fn flood(west: LinkHandle) {
    while let Some(event) = west.next_event().await {
        if let LinkEvent::Up { generation } = event {
            let mut count = 0;
            while west
                .send(blocks(generation, Class::Bulk, 60_000 + count))
                .await
                .is_ok()
            {
                count = (count + 1) % 1000;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_mid_frame_comes_back_and_no_old_frame_with_it() {
    let (east, west, proxy) = through_proxy(Duration::from_secs(10)).await;
    let sender = tokio::spawn(flood(west.peer(&site("east")).unwrap()));
    let link = east.peer(&site("west")).unwrap();
    let (mut stamp, mut last_generation) = (0, 0);
    for round in 0..8 {
        let generation = next_up(&link).await;
        assert!(generation > last_generation);
        last_generation = generation;
        let first = next_frame(&link).await.migration.0;
        assert!(first > stamp, "a frame of generation {stamp} came after Up");
        stamp = first;
        let carried = proxy.carried();
        while proxy.carried() < carried + 300_000 + round * 1777 {
            assert_eq!(next_frame(&link).await.migration.0, stamp);
        }
        proxy.kill();
        loop {
            match next(&link).await {
                LinkEvent::Frame { frame, .. } => assert_eq!(frame.migration.0, stamp),
                LinkEvent::Down { generation, .. } => {
                    break assert_eq!(generation, last_generation);
                }
                LinkEvent::Up { .. } => panic!("Up without Down"),
            }
        }
    }
    west.stop();
    east.stop();
    sender.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_takes_the_link_down_and_its_end_brings_it_back() {
    let (east, west, proxy) = through_proxy(Duration::from_secs(2)).await;
    let (e, w) = (
        east.peer(&site("west")).unwrap(),
        west.peer(&site("east")).unwrap(),
    );
    assert_eq!((next_up(&e).await, next_up(&w).await), (1, 1));
    proxy.set(Way::Frozen);
    for link in [&e, &w] {
        let LinkEvent::Down { generation: 1, .. } = next(link).await else {
            panic!("the link stays up")
        };
        assert!(!link.status().is_up);
        assert_eq!(
            link.send(message(1, Class::Fault)).await,
            Err(SendError::Down)
        );
    }
    proxy.kill();
    proxy.set(Way::Open);
    for link in [&e, &w] {
        while !matches!(next(link).await, LinkEvent::Up { .. }) {}
    }
    let frame = message(3, Class::Fault);
    w.send(frame.clone()).await.unwrap();
    assert_eq!(next_frame(&e).await, frame);
    assert!(w.last_error().is_none());
    west.stop();
    east.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_starts_late_is_found_and_a_restarted_one_again() {
    let authority = Authority::new();
    let vacant = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = vacant.local_addr().unwrap().to_string();
    drop(vacant);
    let west = authority.endpoint("west", &["east"]);
    let link = west.link(&site("east"), &address).unwrap();
    for generation in 1..=2 {
        let east = authority.endpoint("east", &["west"]);
        east.listen(&address).await.unwrap();
        assert_eq!(next_up(&link).await, generation);
        east.stop();
        let LinkEvent::Down { reason, .. } = next(&link).await else {
            panic!("the link stays up")
        };
        assert!(
            matches!(reason, LinkError::Closed | LinkError::Io { .. }),
            "{reason:?}"
        );
    }
    west.stop();
    assert!(
        link.next_event().await.is_none(),
        "stopped while it was down"
    );
}

/// Answers with the same frame, for ever.
async fn echo(link: LinkHandle) {
    while let Some(event) = link.next_event().await {
        if let LinkEvent::Frame { frame, .. } = event {
            let _ = link.send(frame).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_may_dial_and_end_up_on_the_same_bundle() {
    for _ in 0..10 {
        let authority = Authority::new();
        let (east, west) = (
            authority.endpoint("east", &["west"]),
            authority.endpoint("west", &["east"]),
        );
        let to_east = east.listen("127.0.0.1:0").await.unwrap().to_string();
        let to_west = west.listen("127.0.0.1:0").await.unwrap().to_string();
        let e = east.link(&site("west"), &to_west).unwrap();
        let w = west.link(&site("east"), &to_east).unwrap();
        let echo = tokio::spawn(echo(w));
        // A bundle may be replaced while they agree; an answer shows that they have.
        loop {
            let frame = message(next_up(&e).await, Class::Control);
            // If it is down again already, the next event says so.
            let _ = e.send(frame.clone()).await;
            match next(&e).await {
                LinkEvent::Frame { frame: answer, .. } => break assert_eq!(answer, frame),
                LinkEvent::Down { .. } => {}
                LinkEvent::Up { .. } => panic!("Up without Down"),
            }
        }
        east.stop();
        west.stop();
        echo.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_address_takes_the_place_of_the_old_one() {
    let authority = Authority::new();
    let west = authority.endpoint("west", &["east"]);
    let vacant = TcpListener::bind("127.0.0.1:0").unwrap();
    let wrong = vacant.local_addr().unwrap().to_string();
    drop(vacant);
    let link = west.link(&site("east"), &wrong).unwrap();
    let east = authority.endpoint("east", &["west"]);
    let right = east.listen("127.0.0.1:0").await.unwrap().to_string();
    west.link(&site("east"), &right).unwrap();
    assert_eq!(next_up(&link).await, 1);
    // Again the same: there is still one dialler, and the link stays as it is.
    west.link(&site("east"), &right).unwrap();
    let frame = message(1, Class::Control);
    link.send(frame.clone()).await.unwrap();
    let e = east.peer(&site("west")).unwrap();
    assert_eq!(next_up(&e).await, 1);
    assert_eq!(next_frame(&e).await, frame);
    west.stop();
    east.stop();
}
