//! Bounds on everything that a peer, a guest or a file can ask for.

/// Largest volume: 64 TiB.
pub const MAX_VOLUME_BYTES: u64 = 64 << 40;
/// Largest payload of one frame on the link, checked before memory is taken.
pub const MAX_FRAME_BYTES: usize = 2 << 20;
/// Most blocks whose content travels in one message: 1 MiB of content.
pub const MAX_BLOCKS_PER_MESSAGE: u64 = 256;
/// Most runs of blocks or numbers in one message.
pub const MAX_RUNS_PER_MESSAGE: usize = 64 * 1024;
/// Longest name of a volume, site or tenant in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest text that a peer may send in an error.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Largest request on NBD: 32 MiB, as other servers have it.
pub const MAX_NBD_REQUEST_BYTES: u32 = 32 << 20;
/// Most volumes that move together.
pub const MAX_VOLUMES_PER_MIGRATION: usize = 32;
/// Longest description of a machine.
pub const MAX_VM_DESCRIPTION_BYTES: usize = 64 * 1024;
/// Longest packed part of a machine's running state.
pub const MAX_VM_PART_BYTES: usize = 256 * 1024;
/// Most chunks in the sample by which a target recognises an image.
pub const MAX_SAMPLE_CHUNKS: usize = 256;
