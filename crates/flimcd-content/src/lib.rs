//! Fingerprints, the fingerprint tree, and how the content of blocks and streams is packed for the link.

mod encode;
mod fingerprint;
mod same;
mod stream;
mod tree;

pub use encode::{Compression, DecodeError, Decoded, Decoder, Encoded, Encoder, is_zero};
pub use fingerprint::Fingerprint;
pub use same::{Fingerprints, zero_runs};
pub use stream::{Effort, StreamPacker, StreamUnpacker, UnpackError};
pub use tree::{FAN_OUT, FingerprintTree, TreeBuilder};
