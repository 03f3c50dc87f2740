//! Volumes: the rules every guest request and transfer meets, back ends, durable state

pub mod device;
pub mod rules;
