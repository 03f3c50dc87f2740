//! WAN emulation: one link model behind two front ends.
//!
//! [`LinkModel`] says what a link is, [`Link`] decides packet by packet and reads no clock.
//! - [`relay`]: TCP connections through user space, for a user without any rights. It models rate,
//!   delay, jitter and queue. It **cannot model loss or reordering**: TCP has repaired both before
//!   a relay sees a byte.
//! - [`tun`]: a router between two network namespaces, packet by packet, faithful for any
//!   protocol. It needs root, or a user namespace where the system allows one.

mod link;
mod model;
pub mod relay;

pub use link::{DropCause, Link, LinkCounters, Verdict};
pub use model::{LinkModel, ParseLinkError};

/// An end of the emulated link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Side {
    /// The first site.
    A,
    /// The second site.
    B,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 0 or 1.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}
