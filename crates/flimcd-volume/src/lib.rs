//! Volumes: the rules every guest request and transfer meets, back ends, durable state

pub mod device;
pub mod port;
pub mod rules;
mod volume;

pub use port::{GuestError, GuestPort, GuestReply, GuestRequest, RequestKind};
pub use volume::{Applied, ApplyData, Volume, VolumeObserver};
