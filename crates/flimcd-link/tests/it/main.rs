//! The link over real sockets on loopback.

mod pair;
mod up_and_down;
