//! The binary as its users run it: real processes, real sockets, messages and exit codes.
#![allow(clippy::print_stderr, reason = "skipped tests say so")]

mod bench_content;
mod bench_strategies;
mod by_hand;
mod demo;
mod heat;
mod library;
mod messages;
mod util;
mod vm_care;
mod vm_move;
mod walkthrough;
