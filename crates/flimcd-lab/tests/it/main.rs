//! Integration tests of the lab: relay over loopback, namespaces, loads.

mod load;
mod relay;
mod tun;
