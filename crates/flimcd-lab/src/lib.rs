//! WAN emulator, checked loads, trace readers and benchmarks for flimcd.
//!
//! - [`wan`]: a link model behind two front ends, a TCP relay and a TUN router.
//! - [`image`]: disk images with realistic content from a seed.
//! - [`load`]: a guest load that checks every byte it reads.

mod content;
pub mod image;
pub mod load;
mod rng;
pub mod wan;
