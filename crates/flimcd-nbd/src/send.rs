//! From answers to bytes, without I/O.
//!
//! [`Outbox`] keeps the answers that wait to be sent, as a list of slices for one gathering write:
//! headers that it makes, and content that stays in the buffer the disk put it in.

use std::{collections::VecDeque, io::IoSlice};

use flimcd_volume::device::{BufPool, DataExtent, IoBuf};

use crate::proto::{
    BASE_ALLOCATION_ID, CHUNK_MAGIC, Errno, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, chunk,
};

/// Reads of at least this length are looked through for zeroes, in pieces of this length.
const HOLE_BYTES: usize = 64 << 10;
/// Room for the longest header: a chunk's, an offset, a length.
const HEAD_BYTES: usize = 32;
/// Most slices in one gathering write.
const SLICES_MAX: usize = 128;

/// A header and the content behind it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    head: [u8; HEAD_BYTES],
    head_len: usize,
    /// Where the content lies in the answer's buffer.
    from: usize,
    to: usize,
}

/// One answer.
#[derive(Debug)]
struct Answer {
    first: Piece,
    more: Vec<Piece>,
    buf: IoBuf,
}

/// Answers that wait to be sent.
#[derive(Debug)]
pub struct Outbox {
    answers: VecDeque<Answer>,
    /// Bytes of the first answer that are gone.
    sent: usize,
    /// Bytes in all that wait.
    bytes: usize,
    structured: bool,
}

impl Outbox {
    /// An empty one, for a connection with structured replies or without.
    #[must_use]
    pub fn new(structured: bool) -> Self {
        Self {
            answers: VecDeque::new(),
            sent: 0,
            bytes: 0,
            structured,
        }
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Answers a request that has no content with success.
    pub fn done(&mut self, cookie: u64) {
        self.push(Piece::simple(cookie, 0), Vec::new(), IoBuf::empty());
    }

    /// Answers a request with an error. `structured_only`: to a read or a block status request,
    /// where a client that agreed on structured replies takes nothing else.
    pub fn failed(&mut self, cookie: u64, error: Errno, structured_only: bool) {
        if !(self.structured && structured_only) {
            return self.push(
                Piece::simple(cookie, error.code()),
                Vec::new(),
                IoBuf::empty(),
            );
        }
        let mut piece = Piece::chunk(chunk::FLAG_DONE, chunk::ERROR, cookie, 6);
        piece.put(&error.code().to_be_bytes());
        piece.put(&0u16.to_be_bytes());
        self.push(piece, Vec::new(), IoBuf::empty());
    }

    /// Answers a read of `buf.len()` bytes at `offset`. `in_one_piece`: without holes.
    pub fn content(&mut self, cookie: u64, offset: u64, buf: IoBuf, in_one_piece: bool) {
        if !self.structured {
            let piece = Piece {
                to: buf.len(),
                ..Piece::simple(cookie, 0)
            };
            return self.push(piece, Vec::new(), buf);
        }
        if in_one_piece || buf.len() < HOLE_BYTES {
            let piece = Piece::data(chunk::FLAG_DONE, cookie, offset, 0, buf.len());
            return self.push(piece, Vec::new(), buf);
        }
        let mut pieces = Vec::new();
        let runs = zero_runs(&buf);
        for (index, &(from, to, is_zero)) in runs.iter().enumerate() {
            let flags = if index + 1 == runs.len() {
                chunk::FLAG_DONE
            } else {
                0
            };
            pieces.push(if is_zero {
                Piece::hole(flags, cookie, offset + from as u64, to - from)
            } else {
                Piece::data(flags, cookie, offset, from, to)
            });
        }
        let first = pieces.remove(0);
        self.push(first, pieces, buf);
    }

    /// Answers a block status request.
    pub fn extents(&mut self, cookie: u64, extents: &[DataExtent]) {
        let mut body = Vec::with_capacity(extents.len() * 8);
        for extent in extents {
            let state = if extent.is_hole {
                STATE_HOLE | STATE_ZERO
            } else {
                0
            };
            body.extend(
                u32::try_from(extent.range.len())
                    .unwrap_or(u32::MAX)
                    .to_be_bytes(),
            );
            body.extend(state.to_be_bytes());
        }
        let mut piece = Piece::chunk(
            chunk::FLAG_DONE,
            chunk::BLOCK_STATUS,
            cookie,
            body.len() + 4,
        );
        piece.put(&BASE_ALLOCATION_ID.to_be_bytes());
        piece.to = body.len();
        self.push(piece, Vec::new(), IoBuf::copy_of(&body));
    }

    fn push(&mut self, first: Piece, more: Vec<Piece>, buf: IoBuf) {
        let answer = Answer { first, more, buf };
        self.bytes += answer.len();
        self.answers.push_back(answer);
    }

    /// The slices to send next, in order; not necessarily all of them.
    #[must_use]
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut slices = Vec::with_capacity(SLICES_MAX.min(self.answers.len() * 2 + 2));
        let mut skip = self.sent;
        let pieces = self
            .answers
            .iter()
            .flat_map(|a| a.pieces().map(move |p| (p, &a.buf)));
        for (piece, buf) in pieces {
            for part in [&piece.head[..piece.head_len], &buf[piece.from..piece.to]] {
                let gone = skip.min(part.len());
                skip -= gone;
                if gone < part.len() {
                    slices.push(IoSlice::new(&part[gone..]));
                }
            }
            if slices.len() + 2 > SLICES_MAX {
                break;
            }
        }
        slices
    }

    /// The first `bytes` bytes of [`slices`](Self::slices) are gone.
    pub fn sent(&mut self, bytes: usize, pool: &mut BufPool) {
        self.sent += bytes;
        self.bytes -= bytes;
        while let Some(answer) = self.answers.front()
            && self.sent >= answer.len()
        {
            self.sent -= answer.len();
            if let Some(answer) = self.answers.pop_front() {
                pool.give(answer.buf);
            }
        }
    }
}

impl Answer {
    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        std::iter::once(&self.first).chain(&self.more)
    }

    fn len(&self) -> usize {
        self.pieces()
            .map(|piece| piece.head_len + piece.to - piece.from)
            .sum()
    }
}

impl Piece {
    const EMPTY: Self = Self {
        head: [0; HEAD_BYTES],
        head_len: 0,
        from: 0,
        to: 0,
    };

    fn put(&mut self, bytes: &[u8]) {
        self.head[self.head_len..self.head_len + bytes.len()].copy_from_slice(bytes);
        self.head_len += bytes.len();
    }

    fn simple(cookie: u64, error: u32) -> Self {
        let mut piece = Self::EMPTY;
        piece.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        piece.put(&error.to_be_bytes());
        piece.put(&cookie.to_be_bytes());
        piece
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: usize) -> Self {
        let mut piece = Self::EMPTY;
        piece.put(&CHUNK_MAGIC.to_be_bytes());
        piece.put(&flags.to_be_bytes());
        piece.put(&kind.to_be_bytes());
        piece.put(&cookie.to_be_bytes());
        piece.put(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes());
        piece
    }

    fn data(flags: u16, cookie: u64, offset: u64, from: usize, to: usize) -> Self {
        let mut piece = Self::chunk(flags, chunk::OFFSET_DATA, cookie, to - from + 8);
        piece.put(&(offset + from as u64).to_be_bytes());
        Self { from, to, ..piece }
    }

    fn hole(flags: u16, cookie: u64, offset: u64, len: usize) -> Self {
        let mut piece = Self::chunk(flags, chunk::OFFSET_HOLE, cookie, 12);
        piece.put(&offset.to_be_bytes());
        piece.put(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        piece
    }
}

/// Cuts `data` into runs (start, end, all zero), looking at pieces of [`HOLE_BYTES`].
fn zero_runs(data: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    let mut at = 0;
    for piece in data.chunks(HOLE_BYTES) {
        let is_zero = is_zero(piece);
        let end = at + piece.len();
        match runs.last_mut() {
            Some(last) if last.2 == is_zero => last.1 = end,
            _ => runs.push((at, end, is_zero)),
        }
        at = end;
    }
    runs
}

/// Whether all bytes are zero. Most content says no in its first bytes.
fn is_zero(data: &[u8]) -> bool {
    data.chunks(1024)
        .all(|part| part.iter().fold(0, |all, &byte| all | byte) == 0)
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use flimcd_core::ByteRange;

    use super::*;

    /// All bytes, taken `step` at a time.
    fn bytes(outbox: &mut Outbox, step: usize) -> Vec<u8> {
        let (mut all, mut pool) = (Vec::new(), BufPool::new(1 << 20));
        while !outbox.is_empty() {
            let mut left = step;
            for slice in outbox.slices() {
                let count = left.min(slice.len());
                all.extend(&slice[..count]);
                left -= count;
            }
            outbox.sent(step.saturating_sub(left), &mut pool);
        }
        assert_eq!(outbox.bytes(), 0);
        all
    }

    fn fill(structured: bool) -> Outbox {
        let mut outbox = Outbox::new(structured);
        let mut content = vec![0; 4 * HOLE_BYTES + 10];
        content[HOLE_BYTES + 1] = 1;
        content[4 * HOLE_BYTES..].fill(2);
        outbox.done(1);
        outbox.content(2, 4096, IoBuf::copy_of(&content), false);
        outbox.failed(3, Errno::Io, true);
        outbox.failed(4, Errno::NoSpc, false);
        outbox.content(5, 0, IoBuf::copy_of(&content), true);
        let extent = |start, end, is_hole| DataExtent {
            range: ByteRange::new(start, end),
            is_hole,
        };
        outbox.extents(6, &[extent(0, 5, true), extent(5, 9, false)]);
        outbox
    }

    #[test]
    fn partial_sends_lose_and_repeat_nothing() {
        for structured in [false, true] {
            let whole = bytes(&mut fill(structured), usize::MAX);
            assert_eq!(fill(structured).bytes(), whole.len());
            for step in [13, 4096, 100_001] {
                assert!(bytes(&mut fill(structured), step) == whole, "{step}");
            }
        }
    }

    #[test]
    fn zeroes_of_large_reads_become_hole_chunks() {
        let mut outbox = Outbox::new(true);
        let mut content = vec![0; 4 * HOLE_BYTES];
        content[HOLE_BYTES + 1] = 1;
        outbox.content(2, 4096, IoBuf::copy_of(&content), false);
        let all = bytes(&mut outbox, usize::MAX);
        // Hole, data, hole: three chunks, one of them with 64 KiB of content.
        assert_eq!(all.len(), 3 * 20 + 12 + 8 + HOLE_BYTES + 12);
        assert_eq!(all[6..8], chunk::OFFSET_HOLE.to_be_bytes());
        assert_eq!(all[4..6], [0, 0], "not done yet");
        let data = &all[32..];
        assert_eq!(data[6..8], chunk::OFFSET_DATA.to_be_bytes());
        assert_eq!(data[20..28], (4096 + HOLE_BYTES as u64).to_be_bytes());
        let last = &all[all.len() - 32..];
        assert_eq!(last[4..6], chunk::FLAG_DONE.to_be_bytes());
        assert_eq!(last[28..], (2 * HOLE_BYTES as u32).to_be_bytes());
    }
}
