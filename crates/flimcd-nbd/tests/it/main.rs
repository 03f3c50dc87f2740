//! The server under tools that others wrote, and under clients that mean harm.

#![expect(clippy::print_stderr, reason = "a test that cannot test says so")]

mod fixture;
mod hostile;
mod interop;
mod own_client;
