//! The link over real sockets on loopback.
#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and numbers in tests are small"
)]

mod classes;
mod hostile;
mod identity;
mod pair;
mod proxy;
mod raw;
mod up_and_down;
