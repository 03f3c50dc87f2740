//! WAN emulator, checked loads, trace readers and benchmarks for flimcd.
//!
//! - [`wan`]: a link model behind two front ends, a TCP relay and a TUN router.
//! - [`image`]: disk images with realistic content from a seed.
//! - [`changes`]: changes to an image, from a seed.
//! - [`load`]: a guest load that checks every byte it reads.
//! - [`sparse`]: files with holes.
//! - [`trace`]: recorded disk traces as loads.
//! - [`mod@bench`]: benchmarks that compare side by side.
//! - [`report`]: figures for people and scripts.
//! - [`vm`]: real guests in QEMU.

pub mod bench;
pub mod changes;
mod content;
pub mod image;
pub mod load;
pub mod report;
mod rng;
pub mod sparse;
pub mod trace;
pub mod vm;
pub mod wan;
