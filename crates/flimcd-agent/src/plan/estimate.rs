//! What a migration would take, from what a plan has found out: one small model for each strategy.
//!
//! ```text
//! D  bytes on the link for all content once       R  bytes per second that the link carries
//! c  what a byte of new content comes to, packed  W  bytes per second that the guest writes
//! ```
//! | strategy | sends | the guest moves after | misses |
//! | --- | --- | --- | --- |
//! | `precopy` | rounds: all of it, then what was written during the last one, at most 30 | the rounds | none |
//! | `precopy-zstd` | the same, packed | the rounds | none |
//! | `postcopy` | D once | three round trips | reads during D/R that meet what has not come |
//! | `flimcd` | D once, then what was written meanwhile | D/R | reads that meet what was written meanwhile |
//!
//! Every write counts as one to another block until the whole volume is written, so what is sent again is an upper bound: a guest that
//! writes the same blocks again and again costs less. A miss is a read of a block that is not there; what is missing shrinks evenly, so that
//! half of it is there on average, and a chunk of 64 KiB is missed once at most. The link carries nothing else.

use flimcd_core::CHUNK_SIZE;

use crate::api::StrategyEstimate;

/// Beyond a round trip: the guest's requests drain, and both sides make their records durable.
const SWITCH_S: f64 = 0.02;
/// Round trips before the guest of `postcopy` moves: opening, asking the library, the switch.
const POSTCOPY_ROUND_TRIPS: f64 = 3.0;
/// As in the policy `precopy`: rounds at most, and what may be left when the guest is stopped.
const ROUNDS_MAX: u32 = 30;
/// See [`ROUNDS_MAX`].
const STOP_AND_COPY_S: f64 = 0.3;

/// What a plan has found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Facts {
    /// Size of the volumes.
    pub(crate) volume_bytes: f64,
    /// Bytes of content that are neither holes nor zeroes nor known to be at the target.
    pub(crate) content_bytes: f64,
    /// What a byte of it comes to when it is compressed, 0 to 1.
    pub(crate) packed: f64,
    /// Bytes on the link when everything is used that the target has.
    pub(crate) link_bytes: f64,
    /// Of the link, if known.
    pub(crate) bytes_per_sec: Option<f64>,
    /// Round trip of the link.
    pub(crate) rtt_s: f64,
    /// Of the guest.
    pub(crate) written_per_sec: f64,
    /// Reads, not bytes.
    pub(crate) reads_per_sec: f64,
}

/// One estimate for each strategy, in the order of the module's table.
pub(crate) fn estimate(facts: &Facts) -> Vec<StrategyEstimate> {
    vec![
        precopy(facts, "precopy", 1.0),
        precopy(facts, "precopy-zstd", facts.packed),
        postcopy(facts),
        flimcd(facts),
    ]
}

fn precopy(facts: &Facts, name: &str, packed: f64) -> StrategyEstimate {
    let Some(rate) = facts.bytes_per_sec else {
        return unknown(name, facts.content_bytes * packed);
    };
    let mut left = facts.content_bytes;
    let (mut bytes, mut seconds) = (0.0, 0.0);
    let mut rounds = 0;
    while left / rate > STOP_AND_COPY_S && rounds < ROUNDS_MAX {
        let took = left * packed / rate;
        bytes += left * packed;
        seconds += took;
        left = (facts.written_per_sec * took).min(facts.volume_bytes);
        rounds += 1;
    }
    let last = left * packed / rate;
    let down = last + facts.rtt_s + SWITCH_S;
    StrategyEstimate {
        strategy: name.to_owned(),
        bytes_on_link: whole(bytes + left * packed),
        moves_s: Some(seconds + down),
        total_s: Some(seconds + down),
        downtime_ms: Some(down * 1000.0),
        misses: Some(0),
        converges: left / rate <= STOP_AND_COPY_S,
    }
}

fn postcopy(facts: &Facts) -> StrategyEstimate {
    let Some(rate) = facts.bytes_per_sec else {
        return unknown("postcopy", facts.link_bytes);
    };
    let moves = POSTCOPY_ROUND_TRIPS * facts.rtt_s + SWITCH_S;
    let push = facts.link_bytes / rate;
    StrategyEstimate {
        strategy: "postcopy".to_owned(),
        bytes_on_link: whole(facts.link_bytes),
        moves_s: Some(moves),
        total_s: Some(moves + push),
        downtime_ms: Some((facts.rtt_s + SWITCH_S) * 1000.0),
        misses: Some(misses(facts, facts.content_bytes, push)),
        converges: true,
    }
}

fn flimcd(facts: &Facts) -> StrategyEstimate {
    let Some(rate) = facts.bytes_per_sec else {
        return unknown("flimcd", facts.link_bytes);
    };
    let before = facts.link_bytes / rate;
    let written = (facts.written_per_sec * before).min(facts.volume_bytes);
    let after = written * facts.packed / rate;
    let down = facts.rtt_s + SWITCH_S;
    StrategyEstimate {
        strategy: "flimcd".to_owned(),
        bytes_on_link: whole(facts.link_bytes + written * facts.packed),
        moves_s: Some(before + down),
        total_s: Some(before + down + after),
        downtime_ms: Some(down * 1000.0),
        misses: Some(misses(facts, written, after)),
        converges: true,
    }
}

/// Reads that meet one of `missing` bytes, which come within `seconds`.
fn misses(facts: &Facts, missing: f64, seconds: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "65536")]
    let chunks = missing / CHUNK_SIZE as f64;
    let share = (missing / facts.volume_bytes).min(1.0);
    whole((facts.reads_per_sec * seconds * share / 2.0).min(chunks))
}

/// While nobody knows what the link carries.
fn unknown(name: &str, bytes: f64) -> StrategyEstimate {
    StrategyEstimate {
        strategy: name.to_owned(),
        bytes_on_link: whole(bytes),
        moves_s: None,
        total_s: None,
        downtime_ms: None,
        misses: None,
        converges: true,
    }
}

fn whole(figure: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate; what does not fit is cut"
    )]
    let whole = figure.round() as u64;
    whole
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "figures of estimates")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: f64 = 1_048_576.0;

    fn quiet() -> Facts {
        Facts {
            volume_bytes: 1024.0 * MIB,
            content_bytes: 512.0 * MIB,
            packed: 0.5,
            link_bytes: 64.0 * MIB,
            bytes_per_sec: Some(8.0 * MIB),
            rtt_s: 0.04,
            written_per_sec: 0.0,
            reads_per_sec: 0.0,
        }
    }

    fn by_name(all: &[StrategyEstimate], name: &str) -> StrategyEstimate {
        all.iter().find(|e| e.strategy == name).unwrap().clone()
    }

    #[test]
    fn a_quiet_guest_costs_its_bytes() {
        let all = estimate(&quiet());
        let seconds = |name| by_name(&all, name).total_s.unwrap();
        assert!((seconds("precopy") - 64.06).abs() < 0.01, "{all:?}");
        assert!((seconds("precopy-zstd") - 32.06).abs() < 0.01, "{all:?}");
        assert!((seconds("flimcd") - 8.06).abs() < 0.01, "{all:?}");
        assert!((seconds("postcopy") - 8.14).abs() < 0.01, "{all:?}");
        assert!(by_name(&all, "postcopy").moves_s.unwrap() < 0.2, "{all:?}");
        assert!(all.iter().all(|e| e.converges && e.misses == Some(0)));
        assert_eq!(by_name(&all, "flimcd").bytes_on_link, 64 << 20);
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_never_converges() {
        let facts = Facts {
            written_per_sec: 20.0 * MIB,
            reads_per_sec: 100.0,
            ..quiet()
        };
        let all = estimate(&facts);
        let precopy = by_name(&all, "precopy");
        assert!(!precopy.converges, "{precopy:?}");
        assert!(precopy.downtime_ms.unwrap() > 10_000.0, "{precopy:?}");
        let flimcd = by_name(&all, "flimcd");
        assert!(flimcd.converges && flimcd.downtime_ms.unwrap() < 100.0);
        assert!(flimcd.misses.unwrap() > 0, "{flimcd:?}");
    }

    #[test]
    fn without_a_rate_there_are_bytes_and_no_times() {
        let facts = Facts {
            bytes_per_sec: None,
            ..quiet()
        };
        for e in estimate(&facts) {
            assert!(e.total_s.is_none() && e.downtime_ms.is_none() && e.misses.is_none());
            assert!(e.bytes_on_link > 0);
        }
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let figures = (
            1u64..1 << 44,
            0u64..=1000,
            0u64..=1000,
            0u64..=1000,
            1u64..1 << 34,
        );
        (figures, 0u64..1000, 0u64..1 << 32, 0u64..1 << 20).prop_map(
            |((volume, content, packed, link, rate), rtt_ms, written, reads)| {
                let volume_bytes = volume as f64;
                let content_bytes = volume_bytes * content as f64 / 1000.0;
                let packed = packed as f64 / 1000.0;
                Facts {
                    volume_bytes,
                    content_bytes,
                    packed,
                    link_bytes: content_bytes * packed * link as f64 / 1000.0,
                    bytes_per_sec: Some(rate as f64),
                    rtt_s: rtt_ms as f64 / 1000.0,
                    written_per_sec: written as f64,
                    reads_per_sec: reads as f64,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn estimates_are_sane(facts in facts()) {
            let all = estimate(&facts);
            prop_assert_eq!(all.len(), 4);
            for e in &all {
                let (moves, total, down) = (e.moves_s.unwrap(), e.total_s.unwrap(), e.downtime_ms.unwrap());
                prop_assert!(moves.is_finite() && moves <= total + 1e-9, "{:?}", e);
                prop_assert!(down >= facts.rtt_s * 1000.0 && down / 1000.0 <= moves + 1e-9, "{:?}", e);
                prop_assert!(e.misses.unwrap() as f64 <= (facts.volume_bytes / 65536.0).ceil(), "{:?}", e);
                // Nothing is sent faster than the link carries.
                let carried = total * facts.bytes_per_sec.unwrap();
                prop_assert!(e.bytes_on_link as f64 <= carried * 1.001 + 1.0, "{:?}", e);
            }
            // Packing never makes a pre-copy dearer; what the target has never makes a migration dearer.
            prop_assert!(all[1].bytes_on_link <= all[0].bytes_on_link + 1);
            prop_assert!(all[2].bytes_on_link <= all[1].bytes_on_link + 1);
        }

        #[test]
        fn a_busier_guest_or_a_slower_link_is_never_cheaper(facts in facts(), factor in 2u32..10) {
            let busier = Facts { written_per_sec: facts.written_per_sec * f64::from(factor), ..facts };
            let slower = Facts { bytes_per_sec: facts.bytes_per_sec.map(|r| r / f64::from(factor)), ..facts };
            // `flimcd` and `postcopy` have no rounds, whose number may jump.
            for at in [2, 3] {
                let before = estimate(&facts)[at].total_s.unwrap();
                for other in [busier, slower] {
                    let after = estimate(&other)[at].total_s.unwrap();
                    prop_assert!(after >= before - before * 1e-9, "{:?} {:?}", facts, other);
                }
            }
        }
    }
}
