//! A run in virtual time.
//!
//! The machines, the rules of the volumes, the loads and the sizes of the messages are the real ones; the link (`link`), the
//! disks and the content (`content`, ids instead of bytes) are models. A TiB that is mostly empty takes seconds.
//!
//! ```text
//!   guest ── requests ──► rules, image ◄── machine ◄══ link ══► machine ──► rules, image ◄── requests ── guest
//! ```
//! Before the migration the load runs for [`WARM_UP`], so that heat is known, as it is in a volume that has been in care. Nothing goes
//! wrong here: faults are the business of the other simulator. Every read is checked all the same.
//!
//! # What is modelled, and how well
//! * The link: rate, round trip, jitter; loss costs goodput as it was measured with BBR and nothing else; what a message waits
//!   for is a millisecond of the wire and the bottleneck's queue. No slow start.
//! * Disks: 0.1 ms for a request and 1 GB/s for the migration's reads and writes, one after the other; the guest's requests do not
//!   wait for those. Packing and hashing take no time.
//! * `requests_per_sec_alone` is what was due in the same time and not a run of its own: it is too high for a load that asks for more
//!   than the disk could do without a migration. Latencies count from when a request is made, not from when it was due.
//! * A replica is one whose changes are known ([`flimcd_wire::Base::Known`]).

mod content;
mod figures;
mod guest;
mod link;
mod source;
mod target;
#[cfg(test)]
mod tests;
mod world;

use std::time::Duration;

use flimcd_core::{Time, VolumeSize};
use flimcd_lab::load::catalog;

use crate::{
    Bound, Cell, CellResult, Kinds,
    oracle::{self, Access, Setting},
};
use content::{Id, Image, Profile};
use world::World;

/// How long the load runs before the migration.
pub const WARM_UP: Duration = Duration::from_secs(60);
/// A migration that takes so many times what the data takes on the link does not end.
const PATIENCE: f64 = 40.0;

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// The volume's size.
    #[error("a volume of {0} bytes cannot be simulated: use 16 MiB to 64 TiB")]
    Size(u64),
    /// The load.
    #[error("{0}")]
    Load(String),
    /// The run did not come to its end, or something was wrong.
    #[error("{strategy} on {load}: {why}")]
    Run {
        /// The strategy.
        strategy: String,
        /// The load.
        load: String,
        /// What happened.
        why: String,
    },
}

/// Runs a cell.
///
/// # Errors
/// [`SimError`] when the cell cannot be run, or the run went wrong.
pub fn run(cell: &Cell) -> Result<CellResult, SimError> {
    if VolumeSize::new(cell.size_bytes).is_err() || cell.size_bytes < catalog::MIN_BYTES {
        return Err(SimError::Size(cell.size_bytes));
    }
    let load = catalog::by_name(&cell.load, cell.size_bytes, cell.seed, cell.speed)
        .map_err(|error| SimError::Load(error.to_string()))?;
    let without_replica = cell.without.iter().any(|part| part == "replica");
    let profile = Profile {
        seed: cell.seed,
        data_share: load.image.data_share,
        compressible_share: load.image.compressible_share,
        replica_differs: cell.replica_differs.filter(|_| !without_replica),
    };
    let mut world = World::new(cell, load, profile, WARM_UP);
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let whole_s = cell.size_bytes as f64 * 8.0 / cell.link.rate_bits_per_sec as f64;
    let patience = Duration::from_secs_f64(whole_s * PATIENCE + 600.0);
    world.run(world.begin + patience);
    if world.error.is_none() {
        world.check_end();
    }
    let failed = |why| SimError::Run {
        strategy: cell.strategy.clone(),
        load: cell.load.clone(),
        why,
    };
    if let Some(why) = world.error.take() {
        return Err(failed(why));
    }
    let mut result =
        result(cell, &mut world).ok_or_else(|| failed("it ended without a switch".to_owned()))?;
    let ended = world.ended_at.unwrap_or(world.now);
    let load = catalog::by_name(&cell.load, cell.size_bytes, cell.seed, cell.speed)
        .map_err(|error| SimError::Load(error.to_string()))?;
    result.bound = bound(&result, &world, load, ended);
    Ok(result)
}

/// What was possible, for the same load until the same time.
fn bound(result: &CellResult, world: &World, load: catalog::Workload, ended: Time) -> Bound {
    let profile = world.profile;
    let blocks = world.size.blocks();
    let begin_s = WARM_UP.as_secs_f64();
    let accesses: Vec<Access<Id>> = guest::until(load.requests, load.options, ended)
        .map(|request| Access {
            at_s: request.due.since(Time::ZERO).as_secs_f64() - begin_s,
            blocks: request.blocks(),
            content: request.content,
        })
        .collect();
    let lacking = if profile.replica_differs.is_some() {
        profile.differing(blocks)
    } else {
        profile.data(blocks)
    };
    let source = Image::source(profile, blocks);
    let target = Image::target(profile, blocks);
    let setting = Setting {
        switch_s: result.switch_s,
        end_s: result.migration_s,
        bytes_per_sec: world.goodput(),
        rtt_s: result.cell.link.rtt_ms / 1000.0,
    };
    oracle::bound(
        setting,
        &lacking,
        &accesses,
        |block| source.get(block),
        |id| {
            if id == Id::ZERO {
                0
            } else {
                profile.packed_len(id)
            }
        },
        |id| target.find(id).is_some(),
    )
}

fn result(cell: &Cell, world: &mut World) -> Option<CellResult> {
    let (frozen, resumed, ended) = (world.frozen_at?, world.resumed_at?, world.ended_at?);
    let begin = world.begin;
    let content = world.source.as_ref()?.progress().content;
    let migration_s = ended.since(begin).as_secs_f64();
    let answered = world.figures.answered;
    let asked = answered + world.overdue();
    let per_sec = |count: u64| {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let count = count as f64;
        count / migration_s.max(1e-9)
    };
    Some(CellResult {
        cell: cell.clone(),
        migration_s,
        switch_s: resumed.since(begin).as_secs_f64(),
        downtime_ms: resumed.since(frozen).as_secs_f64() * 1000.0,
        link_bytes: world.bytes(),
        kinds: Kinds {
            zero_blocks: content.zero_blocks,
            same_blocks: content.same_blocks,
            elsewhere_blocks: content.elsewhere_blocks,
            repeated_blocks: content.repeated_blocks,
            zstd_blocks: content.zstd_blocks,
            zstd_bytes: content.zstd_bytes,
            raw_blocks: content.raw_blocks,
        },
        reads_after: world.figures.reads_after,
        misses: world.misses(),
        read_latency_after: world.figures.latency_after(),
        requests_per_sec_alone: per_sec(asked),
        requests_per_sec: per_sec(answered),
        stall_max_ms: world.figures.stall_ms(),
        predicted: world.predicted,
        bound: Bound::default(),
        samples: std::mem::take(&mut world.figures.samples),
        regions: std::mem::take(&mut world.figures.regions),
    })
}
