//! Integration tests of the lab: relay over loopback, namespaces, loads, traces.

mod baseline;
mod guest;
mod load;
mod nbd;
mod relay;
mod sites;
mod trace;
mod tun;
