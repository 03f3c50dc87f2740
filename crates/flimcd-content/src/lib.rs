//! Fingerprints, the fingerprint tree, and how the content of blocks and streams is packed for the link.

mod decode;
mod encode;
mod examine;
mod fingerprint;
mod recent;
mod stream;
mod tree;
mod zero;

pub use decode::{DecodeError, Decoded, Decoder};
pub use encode::{Compression, Encoded, Encoder};
pub use examine::Examined;
pub use fingerprint::Fingerprint;
pub use recent::Recent;
pub use stream::{Effort, StreamPacker, StreamUnpacker, UnpackError};
pub use tree::{FAN_OUT, FingerprintTree, TreeBuilder};
pub use zero::{is_zero, zero_runs};
