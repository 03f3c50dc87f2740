//! Messages between two agents, their codec, and version negotiation. Bytes in, bytes out.
//!
//! # A connection
//! ```text
//! dialler                                   listener
//!    │ ── Hello (magic, versions, site, …) ──► │     fixed prefix, the same in every version
//!    │ ◄────────────── Welcome or Refusal ──── │
//!    │ ═══════════════ frames ═══════════════  │     both ways, until either closes
//! ```
//! Every connection of a bundle begins with a [`Hello`]; after that it carries frames:
//! ```text
//! offset size
//!      0    4  length of the body in bytes, at most MAX_FRAME_BYTES
//!      4    1  kind: 1 link, 2 migration (0 and all others are refused)
//!      5    1  class: 1 fault, 2 control, 3 RAM, 4 prefetch, 5 bulk
//!      6    2  zero
//!      8    8  migration id (zero for kind 1)
//!     16    n  body: a postcard value, then what the message carries, up to the end
//! ```
//! All numbers are little-endian. Zero is invalid in every enum, so that a zeroed or shifted buffer
//! is refused instead of understood. Decoders take memory only for bytes that have arrived, and
//! check every count and range before it is used; what they let through is structurally sound, while
//! whether it makes sense for a volume is decided by the machines.

mod check;
mod frame;
mod heat;
mod hello;
mod message;
mod plan;
mod probe;
mod seal;
mod seed;
mod set;
mod vm;

pub use check::{
    CHECK_HASH_BYTES, CheckAsk, CheckOpen, CheckPart, MAX_CHECK_BLOCKS, MAX_CHECK_PIECES,
};
pub use frame::{Body, DecodeError, Encoded, Frame, FrameDecoder, LinkMessage, encode};
pub use heat::{HEAT_PART_CHUNKS, HeatKind, HeatPart, MAX_TOUCHED};
pub use hello::{
    Hello, HelloError, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Refusal, RefusalCode, Welcome,
    decode_hello, decode_reply, encode_hello, encode_reply,
};
pub use message::{
    Accept, Base, Blocks, Class, Content, Entry, ErrorCode, Message, Open, SourceStage,
    TargetReport, TargetStage, VolumeOffer, WireError,
};
pub use plan::{PlanOpen, Planned};
pub use probe::{BlockPrefix, PROBE_PREFIX_BYTES, Probe, Probed};
pub use seal::Seal;
pub use seed::{ChunkPrefix, SampleChunk, SeedId, SeedOffer, SeedPart, SeedTable};
pub use set::{Runs, SeqRuns, SetPart, split_set};
pub use vm::{VmMessage, VmOpen, VmStage};
