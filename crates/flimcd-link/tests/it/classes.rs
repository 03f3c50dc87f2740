//! Priorities, backpressure and the user's ceiling.

use std::time::Instant;

use flimcd_link::LinkEvent;
use flimcd_wire::Class;

use crate::pair::{Pair, blocks, message, next, next_frame};

const FRAME: usize = 64 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_consumer_of_bulk_still_gets_faults_and_control() {
    let pair = Pair::up(|_| ()).await;
    let west = pair.west.clone();
    let flood = tokio::spawn(async move {
        let mut id = 0;
        while west.send(blocks(id, Class::Bulk, FRAME)).await.is_ok() {
            id += 1;
        }
    });
    // Take bulk and work none of it off, until no more is let in.
    let mut held = Vec::new();
    while held.len() * FRAME < 4 << 20 {
        let LinkEvent::Frame { frame, credit } = next(&pair.east).await else {
            panic!("the link went down")
        };
        assert_eq!(
            (frame.class, frame.migration.0),
            (Class::Bulk, held.len() as u64)
        );
        held.push(credit);
    }
    for id in 0..100 {
        let class = if id % 2 == 0 {
            Class::Fault
        } else {
            Class::Control
        };
        let frame = blocks(1000 + id, class, 4096);
        pair.west.send(frame.clone()).await.unwrap();
        assert_eq!(next_frame(&pair.east).await, frame);
    }
    // Once it is worked off, bulk goes on where it was.
    let count = held.len() as u64;
    drop(held);
    assert_eq!(
        next_frame(&pair.east).await,
        blocks(count, Class::Bulk, FRAME)
    );
    pair.stop();
    flood.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_makes_its_own_class_wait_only() {
    let pair = Pair::up(|config| config.ceiling_bytes_per_sec = Some(16_000)).await;
    while pair.west.try_send(blocks(1, Class::Bulk, FRAME)).is_ok() {}
    assert!(!pair.west.has_room(Class::Bulk));
    for class in [Class::Prefetch, Class::Ram, Class::Control, Class::Fault] {
        assert!(pair.west.has_room(class), "{class:?}");
    }
    pair.west.wait_room(Class::Fault).await;
    pair.west.set_ceiling(None);
    pair.west.wait_room(Class::Bulk).await;
    pair.stop();
    assert!(
        !pair.west.has_room(Class::Fault),
        "a link that is down takes nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ceiling_holds_bulk_and_lets_faults_pass() {
    const RATE: u64 = 2_000_000;
    let begun = Instant::now();
    let pair = Pair::up(|config| config.ceiling_bytes_per_sec = Some(RATE)).await;
    let west = pair.west.clone();
    let flood =
        tokio::spawn(
            async move { while west.send(blocks(1, Class::Bulk, FRAME)).await.is_ok() {} },
        );
    let mut faults = 0;
    for id in 0..20 {
        let fault = blocks(id, Class::Fault, FRAME);
        pair.west.send(fault.clone()).await.unwrap();
        faults += FRAME as u64;
        loop {
            let frame = next_frame(&pair.east).await;
            if frame.class == Class::Fault {
                assert_eq!(frame, fault);
                break;
            }
        }
        if id == 10 {
            // Long enough that the ceiling, and not the start, decides.
            while pair.west.bytes_sent_of(Class::Bulk) < 10 * FRAME as u64 {
                next_frame(&pair.east).await;
            }
        }
    }
    // Holds however slow the machine is: more time only allows more bytes.
    let sent = pair.west.bytes_sent_of(Class::Bulk);
    let allowed = begun.elapsed().as_secs_f64() * RATE as f64 + RATE as f64 / 50.0;
    assert!(
        sent as f64 <= allowed + 2.0 * FRAME as f64,
        "{sent} of {allowed}"
    );
    assert!(pair.west.bytes_sent_of(Class::Fault) >= faults);
    assert!(pair.west.bytes_sent() >= sent + faults);
    pair.stop();
    flood.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ram_goes_before_bulk_that_was_queued_earlier() {
    let pair = Pair::up(|config| config.ceiling_bytes_per_sec = Some(16_000)).await;
    // The first frame is on its way at once; the ceiling then holds the others in their queues.
    pair.west.send(blocks(0, Class::Bulk, FRAME)).await.unwrap();
    assert_eq!(next_frame(&pair.east).await.class, Class::Bulk);
    for class in [Class::Bulk, Class::Prefetch, Class::Ram] {
        pair.west.send(message(1, class)).await.unwrap();
    }
    pair.west.set_ceiling(None);
    let mut order = Vec::new();
    for _ in 0..3 {
        order.push(next_frame(&pair.east).await.class);
    }
    assert_eq!(order, [Class::Ram, Class::Prefetch, Class::Bulk]);
    pair.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_frames_of_bulk_share_records() {
    const SMALL: usize = 2000;
    /// Header, type and tag of a TLS 1.3 record.
    const RECORD_OVERHEAD: u64 = 22;
    let pair = Pair::up(|config| config.ceiling_bytes_per_sec = Some(16_000)).await;
    // The first frame is on its way at once; the ceiling then holds the others in their queue.
    pair.west.send(blocks(0, Class::Bulk, FRAME)).await.unwrap();
    next_frame(&pair.east).await;
    let overhead = || pair.west.bytes_sent() - pair.west.bytes_sent_of(Class::Bulk);
    let before = overhead();
    for id in 1..=100 {
        pair.west
            .send(blocks(id, Class::Bulk, SMALL))
            .await
            .unwrap();
    }
    pair.west.set_ceiling(None);
    let mut ids = Vec::new();
    while ids.len() < 100 {
        let frame = next_frame(&pair.east).await;
        assert_eq!(frame, blocks(frame.migration.0, Class::Bulk, SMALL));
        ids.push(frame.migration.0);
    }
    ids.sort_unstable();
    assert!(ids.into_iter().eq(1..=100));
    // Pings are among it too.
    let added = overhead() - before;
    assert!(added < 50 * RECORD_OVERHEAD, "{added} bytes for 100 frames");
    pair.stop();
}
