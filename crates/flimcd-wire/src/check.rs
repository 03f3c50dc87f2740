//! Whether two copies are equal, asked after a migration: only hashes cross the link.
//!
//! ```text
//!  source                                          target
//!    CheckOpen (migration) ──────────────────────►   is that still what stands here?
//!                          ◄──────────────────────   CheckReady, or Failed
//!    CheckAsk (range)      ──────────────────────►   reads it
//!                          ◄──────────────────────   CheckPart: what its guest has written of it, hashes of the rest
//!    … finer, where a hash differs …
//!    Cancel                ──────────────────────►   the target forgets it
//! ```
//! A check has a migration's number of its own. Answers come in the order of the questions. Nothing is changed on either side.
//!
//! The hash of a piece is the fingerprint of the run of its blocks (BLAKE3 of their fingerprints, one after the other), with those left
//! out that the target's guest has written since the switch.

use bytes::Bytes;
use flimcd_core::{BLOCK_SIZE, BlockRange, MigrationId, VolumeId, limits};
use serde::{Deserialize, Serialize};

use crate::Runs;

/// Blocks that one question is about at most: 16 MiB.
pub const MAX_CHECK_BLOCKS: u64 = 4096;
/// Pieces that one question asks for at most.
pub const MAX_CHECK_PIECES: u64 = 256;
/// Bytes of a piece's hash.
pub const CHECK_HASH_BYTES: usize = 32;

/// First message of a check; see the module of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckOpen {
    /// The migration that moved them.
    pub migration: MigrationId,
    /// The volumes, each once.
    pub volumes: Vec<VolumeId>,
}

/// Hashes of a range of blocks, please.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckAsk {
    /// Which of the volumes of [`CheckOpen`].
    pub volume: u32,
    /// The blocks: at least one, at most [`MAX_CHECK_BLOCKS`].
    pub range: BlockRange,
    /// Blocks in a piece, but for the last one: at most [`MAX_CHECK_PIECES`] pieces.
    pub piece_blocks: u64,
}

/// Answer to [`CheckAsk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckPart {
    /// What it answers.
    pub ask: CheckAsk,
    /// Blocks of it that the guest at the target has written: they are in no hash.
    pub written: Runs,
    /// One hash after the other.
    #[serde(skip)]
    pub payload: Bytes,
}

impl CheckOpen {
    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        (1..=limits::MAX_VOLUMES_PER_MIGRATION).contains(&self.volumes.len())
    }
}

impl CheckAsk {
    /// How many pieces it has.
    #[must_use]
    pub fn pieces(&self) -> u64 {
        self.range.len().div_ceil(self.piece_blocks.max(1))
    }

    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        let BlockRange { start, end } = self.range;
        start < end
            && end <= limits::MAX_VOLUME_BYTES / BLOCK_SIZE
            && end - start <= MAX_CHECK_BLOCKS
            && self.piece_blocks > 0
            && self.pieces() <= MAX_CHECK_PIECES
    }
}

impl CheckPart {
    /// The hashes.
    pub fn hashes(&self) -> impl Iterator<Item = [u8; CHECK_HASH_BYTES]> + '_ {
        self.payload
            .chunks_exact(CHECK_HASH_BYTES)
            .filter_map(|hash| hash.try_into().ok())
    }

    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        let range = self.ask.range;
        self.ask.is_sound()
            && self.payload.len() as u64 == self.ask.pieces() * CHECK_HASH_BYTES as u64
            && self
                .written
                .iter()
                .all(|run| range.start <= run.start && run.end <= range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Body, Class, Frame, FrameDecoder, Message, encode};

    /// Sends a message through the frame codec.
    fn sent(message: Message) -> Option<Message> {
        let frame = Frame {
            migration: MigrationId(1),
            class: Class::Bulk,
            message,
        };
        let encoded = encode(&Body::Frame(frame));
        let mut decoder = FrameDecoder::new();
        decoder.buffer().extend_from_slice(&encoded.head);
        decoder.buffer().extend_from_slice(&encoded.payload);
        match decoder.poll() {
            Ok(Some(Body::Frame(frame))) => Some(frame.message),
            _ => None,
        }
    }

    #[track_caller]
    fn check(message: &Message, expected: bool) {
        let back = sent(message.clone());
        assert_eq!(back, expected.then(|| message.clone()), "{message:?}");
    }

    fn ask(start: u64, end: u64, piece_blocks: u64) -> CheckAsk {
        CheckAsk {
            volume: 1,
            range: BlockRange { start, end },
            piece_blocks,
        }
    }

    #[test]
    fn questions_are_bounded() {
        let most = MAX_CHECK_BLOCKS;
        let end = limits::MAX_VOLUME_BYTES / BLOCK_SIZE;
        for (asked, expected) in [
            (ask(0, 1, 1), true),
            (ask(0, most, most), true),
            (ask(0, most, most / MAX_CHECK_PIECES), true),
            (ask(0, most, most / MAX_CHECK_PIECES - 1), false),
            (ask(0, most + 1, most), false),
            (ask(0, 16, 0), false),
            (ask(3, 3, 1), false),
            (ask(4, 3, 1), false),
            (ask(end - 1, end, 1), true),
            (ask(end, end + 1, 1), false),
        ] {
            check(&Message::CheckAsk(asked), expected);
        }
        for count in [0, 1, limits::MAX_VOLUMES_PER_MIGRATION + 1] {
            let open = CheckOpen {
                migration: MigrationId(3),
                volumes: vec![VolumeId(1); count],
            };
            check(&Message::CheckOpen(open), count == 1);
        }
        check(&Message::CheckReady, true);
    }

    #[test]
    fn answers_fit_their_questions() {
        let part = |written: &[(u64, u64)], bytes: usize| {
            Message::CheckPart(CheckPart {
                ask: ask(16, 48, 16),
                written: Runs::new(
                    written
                        .iter()
                        .map(|&(start, end)| BlockRange { start, end }),
                ),
                payload: vec![7; bytes].into(),
            })
        };
        check(&part(&[(16, 17), (40, 48)], 64), true);
        check(&part(&[], 64), true);
        check(&part(&[], 63), false);
        check(&part(&[], 96), false);
        check(&part(&[(15, 17)], 64), false);
        check(&part(&[(47, 49)], 64), false);
    }
}
