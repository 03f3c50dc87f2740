//! WAN emulation: one link model behind two front ends.
//!
//! [`LinkModel`] says what a link is, [`Link`] decides packet by packet and reads no clock.
//! - [`relay`]: TCP connections through user space, for a user without any rights. It models rate,
//!   delay, jitter and queue. It **cannot model loss or reordering**: TCP has repaired both before
//!   a relay sees a byte.
//! - [`tun`]: a router between two network namespaces, packet by packet, faithful for any
//!   protocol. It needs root, or a user namespace where the system allows one.
//! - [`Wan`]: either of them, for what runs over both.

mod front;
mod link;
mod model;
pub mod relay;
pub mod tun;

pub use front::{Wan, WanBytes, WanError};
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

/// Makes the calling thread keep time as well as the system lets it: timers that fire within a
/// microsecond, and priority over others (as root). An emulator that comes late is wrong.
fn prefer_this_thread() {
    // SAFETY: PR_SET_TIMERSLACK takes a number and changes only the calling thread's timers.
    let result = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1000u64, 0, 0, 0) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "timer slack stays");
    }
    // SAFETY: a sched_param is plain data, all zeroes are a valid one.
    let mut priority: libc::sched_param = unsafe { std::mem::zeroed() };
    priority.sched_priority = 1;
    // SAFETY: 0 is the calling thread, and the parameter lives through the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const priority) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no real-time priority");
    }
}
