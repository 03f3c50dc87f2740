//! The agent's HTTP/JSON API over a unix socket: its types, and the client that the command line uses.

pub mod check;
pub mod client;
pub mod heat;
mod heat_server;
pub mod plan;
mod plan_server;
pub mod replicate;
mod replicate_server;
pub(crate) mod server;
pub mod types;
pub mod vm;
pub mod vm_move;
mod vm_server;

pub use check::*;
pub use client::{Client, ClientError};
pub use heat::*;
pub use plan::*;
pub use replicate::*;
pub use server::openapi_json;
pub use types::*;
pub use vm::*;
pub use vm_move::*;
