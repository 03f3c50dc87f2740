//! Fingerprints, and how the content of blocks and streams is packed for the link.

mod encode;
mod fingerprint;
mod stream;

pub use encode::{Compression, DecodeError, Decoded, Decoder, Encoded, Encoder, is_zero};
pub use fingerprint::Fingerprint;
pub use stream::{Effort, StreamPacker, StreamUnpacker, UnpackError};
