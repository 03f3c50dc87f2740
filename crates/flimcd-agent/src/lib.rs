//! The flimcd daemon: the only crate that wires volumes, machines and links together.
//!
//! ```text
//!        command line                                   other agents
//!             │ HTTP, unix socket                            │ mutual TLS
//!      ┌──────▼──────┐   ┌──────────────────────────┐   ┌────▼────┐
//!      │ api::server │──►│ agent: registry, hosting │◄──│  links  │
//!      └─────────────┘   └──────┬────────────┬──────┘   └────┬────┘
//!                               │            │               │ inboxes
//!   guests ── NBD ── Volume ◄───┴── migration: one driver task per migration
//! ```
//! - `hosting` owns the volumes and their exports, `registry` knows which migrations run,
//!   `migration` drives them, `library` has the images that arriving volumes are compared with, `admission` decides what a peer may begin here.
//! - Who owns a volume is in the volume's durable record; which migrations there are is in
//!   `migration::store`. Everything else is made anew from these two when an agent starts, so stopping it
//!   gently and killing it differ only in how long guests wait.
//! - No lock is held across an await or while a disk works; no state is kept in two places.

mod admission;
mod agent;
pub mod api;
mod check;
pub mod config;
mod dirs;
mod error;
mod heat;
mod hosting;
mod library;
mod links;
mod migration;
mod ops;
mod plan;
mod records;
mod registry;
mod replicas;
mod replicate;
mod resume;
mod tasks;
mod vm;

#[cfg(test)]
extern crate self as flimcd_agent;
/// Whole agents for tests that need what the API does not show.
#[cfg(test)]
#[allow(clippy::print_stderr, reason = "a test that failed shows the log")]
#[path = "../tests/it/site.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod site;

pub use agent::{RunningAgent, run, start};
pub use config::Config;
pub use error::StartError;
