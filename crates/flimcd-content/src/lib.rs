//! Fingerprints, and how the content of blocks is packed for the link.

mod encode;
mod fingerprint;

pub use encode::{Compression, DecodeError, Decoded, Decoder, Encoded, Encoder, is_zero};
pub use fingerprint::Fingerprint;
