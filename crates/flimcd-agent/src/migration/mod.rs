//! Migrations: one task each, which drives a machine of `flimcd-migrate` over real files and links.
//!
//! ```text
//!        link inbox ─┐
//!  answers of workers ┤                      ┌─► machine.handle_*
//!   volume's notices ─┼─► Event ─► apply ────┤
//!           commands ─┤                      └─► act: poll_action → workers, volume
//!        timer, room ─┘                               poll_transmit → link
//!                                                     poll_event → status, log
//! ```
//! The machine has all the state of a migration; the driver knows only what it has begun and not heard of
//! again. It never waits for anything but the next event: blocking work is done by [`Workers`], and the
//! link is only given what it has room for.
//!
//! One migration moves one volume or several together, see [`volumes`]; what their records say together is in
//! [`settle`]. The disks of a machine tell the machine's move how they fare through [`hooks`].

mod arrive;
mod base;
mod capture;
mod heat;
pub(crate) mod hooks;
mod peeks;
mod policies;
pub(crate) mod port;
mod predicted;
pub(crate) mod progress;
#[cfg(test)]
mod session_tests;
pub(crate) mod settle;
mod source;
pub(crate) mod store;
mod target;
pub(crate) mod volumes;
mod workers;
mod writes;

pub(crate) use base::{Command, CommandAnswer, CommandError, Outcome, Setup};
pub(crate) use policies::choose_policy;
pub(crate) use source::SourceDriver;
pub(crate) use target::{TargetBegin, TargetDriver};
