//! WAN emulator, checked loads, trace readers and benchmarks for flimcd.
//!
//! - [`wan`]: a link model behind two front ends, a TCP relay and a TUN router.

mod content;
mod rng;
pub mod wan;
