//! Volumes: the rules every guest request and transfer meets, back ends, durable state

pub mod device;
pub mod port;
pub mod rules;
pub mod state;
mod volume;

pub use port::{GuestError, GuestPort, GuestReply, GuestRequest, RequestKind};
pub use state::{Ownership, StateError, VolumeRecord, VolumesDir};
pub use volume::{Applied, ApplyData, NewVolume, Sending, Volume, VolumeError, VolumeObserver};
