//! NBD over flimcd volumes: the server that guests talk to, and a small client for loads and tests.
//!
//! The protocol is sans-IO in three parts, each tested and fuzzed without a socket: [`handshake`]
//! (until an export is chosen), [`receive`] (bytes to requests) and [`send`] (answers to bytes).
//! [`server`] joins them with sockets, threads and volumes.

pub mod client;
pub mod handshake;
pub mod proto;
pub mod receive;
pub mod send;
pub mod server;

pub use client::{Client, ClientError};
pub use server::{BindError, Server};
