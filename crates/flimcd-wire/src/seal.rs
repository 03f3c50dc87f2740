//! The end of an increment of a replica: everything of one moment has arrived, and is made the copy's content for good.

use serde::{Deserialize, Serialize};

/// Names the moment that a copy is of: in [`Message::Seal`](crate::Message::Seal) as a request, in
/// [`Message::Sealed`](crate::Message::Sealed) as what is durable now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// When the guest stood still, by the source's clock, in milliseconds since 1970. For people, and to tell one from another.
    pub as_of_unix_ms: u64,
}
