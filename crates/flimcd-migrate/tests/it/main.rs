//! The two machines joined in memory, with a clock that jumps to the next thing that happens.

mod crashes;
mod handover;
mod links;
mod pair;
mod probes;
mod seal;
mod seeds;
mod store;
mod strategies;
mod vm;
mod vm_idle;
