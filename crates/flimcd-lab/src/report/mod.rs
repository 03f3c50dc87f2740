//! What a demonstration or a benchmark hands to people and to scripts: named figures as JSON, and
//! plain tables.

mod demo;
mod table;

pub use demo::{DemoReport, LinkReport, LowerBound, StrategyReport};
pub use table::{Align, Table};
