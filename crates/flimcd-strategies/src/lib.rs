//! Every strategy of the literature on the same engine, the same link and the same load, beside an oracle that knows the
//! future.
//!
//! ```text
//!   Cell (load, size, link, replica, strategy, what is left out, seed)
//!     ├── sim    the machines and the volume's rules in virtual time: seconds for a TiB
//!     ├── real   two agents, files, sockets and the WAN relay (the caller hands in the run)
//!     └── oracle the least bytes, time and misses that were possible
//!                  ▼
//!   CellResult ──► report: a table, JSON, one HTML page
//! ```

mod cell;
pub mod oracle;
pub mod report;
pub mod sim;

pub use cell::{
    Bound, Cell, CellResult, Kinds, LinkModel, Phase, Prediction, ReadLatency, Region, Sample,
};
