//! Benchmarks that compare, side by side and in one run.

pub mod copy;
pub mod debian;
pub mod harness;
pub mod link;
pub mod nbd;
pub mod wan;
