//! Integration tests of the lab: relay over loopback, namespaces, loads, traces.

mod load;
mod nbd;
mod relay;
mod trace;
mod tun;
