//! The flimcd daemon: wires volumes, machines and links together.

pub mod api;
pub mod config;

pub use config::Config;
