//! Tests with real QEMU. Without it they say so and pass.
#![expect(
    clippy::print_stderr,
    reason = "a skipped test says so, and stalls are reported"
)]

mod adopt;
mod guest;
mod host;
mod inspect;
mod monitor;
mod transfer;
mod vm;
