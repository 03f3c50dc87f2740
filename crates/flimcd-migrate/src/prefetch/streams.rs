//! Streams in what a guest reads: sequential, backwards, strided, several at once between each other.
//!
//! A read that begins where an earlier one ended, or as far from one as that was from the one before it, makes a stream. Each
//! stream has a *window*: how far ahead of the guest content is asked for. It grows while the guest reads what was fetched for
//! it and shrinks while it goes elsewhere; a stream that nobody follows is forgotten.

use std::{collections::VecDeque, time::Duration};

use flimcd_core::{BlockRange, Time};

/// Streams that are followed at once; the one that was followed longest ago goes.
const STREAMS_MAX: usize = 32;
/// Reads among which a new stream is looked for.
const RECENT_MAX: usize = 64;
/// First window, in steps of the stream.
const WINDOW_MIN: u64 = 4;
/// Longest stride, in blocks: 16 MiB.
const STRIDE_MAX: i64 = 4096;
/// A stream that nobody follows for so long is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);

/// Reads that follow each other.
#[derive(Clone, Debug)]
struct Stream {
    /// Where the guest will read next.
    next: i64,
    /// From the beginning of a read to that of the next.
    stride: i64,
    /// Blocks of a read.
    len: u64,
    /// Steps ahead of `next` that are wanted.
    window: u64,
    /// Steps ahead of `next` that have been handed out.
    given: u64,
    followed: Time,
}

impl Stream {
    /// How many steps ahead of the guest a read is, if it is of this stream.
    fn step_of(&self, read: BlockRange) -> Option<i64> {
        let offset = signed(read.start) - self.next;
        let is_near = (-1..=2 * i64::try_from(self.window).unwrap_or(i64::MAX) + 1)
            .contains(&offset.checked_div_euclid(self.stride)?);
        let fits = offset.rem_euclid(self.stride) == 0
            || (self.stride.unsigned_abs() <= self.len && self.stride > 0);
        (is_near && fits).then(|| offset.div_euclid(self.stride))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: VecDeque<Stream>,
    recent: VecDeque<BlockRange>,
}

impl Streams {
    /// The guest reads. `waited`: it had to wait for it. True when it is of a stream.
    pub(super) fn read(
        &mut self,
        now: Time,
        read: BlockRange,
        waited: bool,
        window_max: u64,
    ) -> bool {
        self.streams
            .retain(|stream| now.since(stream.followed) < FORGOTTEN_AFTER);
        let followed = self
            .streams
            .iter()
            .enumerate()
            .find_map(|(at, stream)| stream.step_of(read).map(|step| (at, step)));
        if let Some((at, step)) = followed {
            let mut stream = self.streams.remove(at).expect("it was found there");
            stream.followed = now;
            if let Ok(ahead @ 0..) = u64::try_from(step) {
                let was_given = stream.given > ahead;
                stream.given = stream.given.saturating_sub(ahead + 1);
                stream.next += (step + 1) * stream.stride;
                // What was fetched came in time: go on further. Too late, or not at all: ask for more at once.
                let grown = if waited || was_given {
                    stream.window * 2
                } else {
                    stream.window
                };
                let steps_max = window_max / stream.len.max(1);
                stream.window = grown.clamp(WINDOW_MIN, steps_max.max(WINDOW_MIN));
            }
            self.streams.push_front(stream);
            return true;
        }
        let begun = self.begin(now, read);
        self.recent.push_front(read);
        self.recent.truncate(RECENT_MAX);
        begun
    }

    /// Looks for earlier reads that make a stream with this one.
    fn begin(&mut self, now: Time, read: BlockRange) -> bool {
        let start = signed(read.start);
        let mut stride = None;
        for (at, before) in self.recent.iter().enumerate() {
            let step = start - signed(before.start);
            if before.end == read.start {
                stride = Some(step);
                break;
            }
            if before.start == read.end {
                // Backwards, which two reads could do by chance.
                let third = self.recent.iter().skip(at + 1);
                if third.clone().any(|third| third.start == before.end) {
                    stride = Some(step);
                    break;
                }
                continue;
            }
            if step == 0 || step.abs() > STRIDE_MAX {
                continue;
            }
            // As far as that one was from one before it, and the same length.
            let mut earlier = self.recent.iter().skip(at + 1);
            let is_third = |third: &BlockRange| {
                signed(before.start) - signed(third.start) == step && third.len() == read.len()
            };
            if before.len() == read.len() && earlier.any(is_third) {
                stride = Some(step);
                break;
            }
        }
        let Some(stride) = stride else { return false };
        self.streams.push_front(Stream {
            next: start + stride,
            stride,
            len: read.len(),
            window: WINDOW_MIN,
            given: 0,
            followed: now,
        });
        self.streams.truncate(STREAMS_MAX);
        true
    }

    /// The next step of a stream that is to be fetched, most recently followed first, as a run of blocks. Each is given
    /// once.
    pub(super) fn next(&mut self, blocks: u64) -> Option<BlockRange> {
        for stream in &mut self.streams {
            if stream.given < stream.window {
                let start = stream.next
                    + stream
                        .stride
                        .saturating_mul(i64::try_from(stream.given).unwrap_or(i64::MAX));
                stream.given += 1;
                let Ok(start) = u64::try_from(start) else {
                    continue;
                };
                if start >= blocks {
                    continue;
                }
                return Some(BlockRange::new(start, (start + stream.len).min(blocks)));
            }
        }
        None
    }
}

fn signed(block: u64) -> i64 {
    i64::try_from(block).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1 << 20;

    fn fetched(streams: &mut Streams) -> Vec<u64> {
        std::iter::from_fn(|| streams.next(BLOCKS))
            .map(|run| run.start)
            .collect()
    }

    fn read(streams: &mut Streams, start: u64, len: u64, waited: bool) -> bool {
        let range = BlockRange::new(start, start + len);
        streams.read(Time::ZERO, range, waited, 1024)
    }

    #[test]
    fn a_sequential_stream_is_fetched_ahead_ever_further() {
        let mut streams = Streams::default();
        assert!(!read(&mut streams, 100, 2, true));
        assert!(read(&mut streams, 102, 2, true));
        assert_eq!(fetched(&mut streams), [104, 106, 108, 110]);
        assert!(read(&mut streams, 104, 2, false));
        assert_eq!(fetched(&mut streams), [112, 114, 116, 118, 120]);
        assert!(read(&mut streams, 106, 2, false));
        assert_eq!(fetched(&mut streams).len(), 9);
    }

    #[test]
    fn strides_and_steps_back_are_streams_too() {
        let mut streams = Streams::default();
        for start in [1000, 1050] {
            assert!(!read(&mut streams, start, 1, true));
        }
        assert!(read(&mut streams, 1100, 1, true));
        assert_eq!(fetched(&mut streams), [1150, 1200, 1250, 1300]);
        let mut streams = Streams::default();
        for start in [508, 504] {
            assert!(!read(&mut streams, start, 4, true));
        }
        assert!(read(&mut streams, 500, 4, true));
        assert_eq!(fetched(&mut streams), [496, 492, 488, 484]);
    }

    #[test]
    fn interleaved_streams_are_told_apart() {
        let mut streams = Streams::default();
        for step in 0..3 {
            for base in [10_000, 50_000, 90_000] {
                read(&mut streams, base + step * 8, 8, true);
            }
        }
        let fetched = fetched(&mut streams);
        for base in [10_024, 50_024, 90_024] {
            assert!(fetched.contains(&base), "{base} of {fetched:?}");
        }
    }

    #[test]
    fn random_reads_make_no_stream() {
        let mut streams = Streams::default();
        let mut at: u64 = 12_345;
        let mut found = 0;
        for _ in 0..2000 {
            at = at
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            found += u64::from(read(&mut streams, (at >> 33) % BLOCKS, 1, true));
        }
        assert!(found < 200, "{found}");
    }

    #[test]
    fn streams_end_at_the_end_of_the_volume() {
        let mut streams = Streams::default();
        read(&mut streams, BLOCKS - 4, 1, true);
        assert!(read(&mut streams, BLOCKS - 3, 1, true));
        assert_eq!(fetched(&mut streams), [BLOCKS - 2, BLOCKS - 1]);
    }
}
