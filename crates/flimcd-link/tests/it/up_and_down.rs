//! Frames both ways, and what happens when connections break.

use flimcd_link::SendError;
use flimcd_wire::Class;

use crate::pair::{Pair, blocks, message, next_frame};

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
        pair.stop();
        assert_eq!(
            pair.west.try_send(message(1, Class::Bulk)),
            Err(SendError::Down)
        );
    }
}
