//! Several TCP connections with mutual TLS as one link between two agents.
//!
//! # A bundle
//! ```text
//!            lane 0   control: what moves migrations on, pings;       ┐ one TCP connection each,
//!                     faults, when that is faster than lane 1         │ TLS 1.3 with certificates
//!  agent ══  lane 1   faults: demands and their answers               │ on both sides, a greeting,
//!            lane 2   bulk; RAM goes here before prefetch and bulk    │ then frames
//!            lane 3…  bulk, all sharing one queue per class           ┘
//! ```
//! Demand data never shares a queue with bulk data: not in the sender (one queue per class), not in a
//! TCP connection, not in the receiver (one bounded queue and one reader per lane). Kernels hold little
//! unsent data (`TCP_NOTSENT_LOWAT`), so that what is sent next is decided late. In the bottleneck's
//! own queue nothing can be overtaken; therefore bulk is paced while guests can fault (module `pacer`).
//!
//! # Life
//! ```text
//!  down ── all lanes greeted ──► up (generation g) ── a lane fails, silence, a newer bundle ──► down
//!   ▲                                                                                            │
//!   └───────────────────── dialled again, 50 ms to 2 s between attempts ◄────────────────────────┘
//! ```
//! A bundle lives and dies as a whole. Each gets the next generation number on each side (the two sides
//! count for themselves). After `Up{g+1}` no frame of generation g is delivered, and none that was
//! queued for g is sent. Silence means that the *link* is down; that a peer is dead is never concluded.
//!
//! # Who may connect
//! A peer is a named site: the name in its certificate, which must come from the same authority. It must
//! be among the configured peers, and equal to the name in its greeting. Handshakes are bounded in
//! number and time, and every length in bytes. Whatever is malformed closes the bundle and is logged;
//! nothing of it reaches a volume.
//!
//! # Limits
//! Memory per link: receive queues of at most 42 MiB in all when the consumer stalls in every class,
//! send queues of at most 17 MiB, and less than 3 MiB per connection.

mod bucket;
mod bundle;
mod config;
mod dial;
mod endpoint;
mod error;
mod greet;
mod identity;
mod inbox;
mod lane;
mod link;
mod outbox;
mod pacer;
pub mod pki;
mod socket;

pub use config::{BULK_CONNECTIONS_MAX, LinkConfig};
pub use endpoint::Endpoint;
pub use error::{ConfigError, IdentityError, LinkError, ListenError, UnknownPeer};
pub use identity::TlsIdentity;
pub use inbox::{Credit, LinkEvent};
pub use link::{LinkEstimate, LinkHandle, LinkStatus};
pub use outbox::SendError;
