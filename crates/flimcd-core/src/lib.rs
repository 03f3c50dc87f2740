//! Vocabulary of flimcd: units, block sets, sequence sets, heat and limits.
//!
//! Nothing in this crate does I/O, reads a clock or allocates in proportion to anything but its
//! arguments. Every other crate speaks in these types, so that a block index can never be taken
//! for a byte offset or a chunk index.

mod block_set;
mod heat;
mod ids;
mod layout;
pub mod limits;
mod seq;
mod time;
mod units;

pub use block_set::BlockSet;
pub use heat::Heat;
pub use ids::{Epoch, InvalidName, MigrationId, SiteName, VolumeId, VolumeName};
pub use layout::VolumeLayout;
pub use seq::{Seq, SeqSet};
pub use time::Time;
pub use units::{
    BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ByteRange, CHUNK_SIZE, ChunkIndex,
    InvalidSize, VolumeSize,
};
