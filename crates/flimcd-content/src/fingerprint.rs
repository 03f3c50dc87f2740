//! What identifies the content of a block or chunk.

use std::fmt;

use flimcd_wire::ChunkPrefix;

/// BLAKE3 of a block's or chunk's bytes, 256 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Bytes of a fingerprint.
    pub const BYTES: usize = 32;

    /// The fingerprint of `content`.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// A fingerprint that was stored or sent.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What of it stands in the table of a seed.
    #[must_use]
    pub const fn prefix(&self) -> ChunkPrefix {
        ChunkPrefix::of(&self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.16}", blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Display for Fingerprint {
    /// All of it, in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}
