//! A simulator of whole migrations.
//!
//! One seed is one run: a volume, a guest with requests in flight, an operator, two sites with disks and page caches, a link
//! between them, and faults. The machines ([`flimcd_migrate`]), the rules of a volume ([`flimcd_volume::rules`]), the
//! wire format and the encodings are the real ones; time, disks, the network and the power are simulated here. The same
//! seed is the same run, to the last bit, on every machine.
//!
//! ```text
//!   guest ── requests ──► host (rules, disk, records)   ◄─ actions ─ agent (machine) ── frames ──► net ──► the other site
//!     └── what it saw ──► model
//! ```
//! * `host`, `disk`, `flow`, `volume`, `arrive`, `packing`: one site's machine. What a process kill and a power loss leave of it is
//!   decided there.
//! * `source`, `target`, `link`: the agents, which do with a machine what its contract asks for.
//! * `base`: what stands at the target before, and what both sides know of it. `seed`: an image in the target's library, or that
//!   copy, with a table that may lie. `elsewhere`: content at other places, with hints that may be stale.
//! * `guest` decides what is asked for, `faults` what goes wrong; `plan` draws both from the seed.
//! * `model`, `resend`, `check` know only what must hold: every read returns what it may; at most one owner; after a power
//!   loss everything flushed is there; no block that arrived is sent again because of a link break; when faults
//!   stop the migration ends, both sites agree how, and the image is what the guest made it.

mod arrive;
mod base;
mod broken;
mod check;
mod content;
mod dice;
mod disk;
mod elsewhere;
mod faults;
mod flow;
mod guest;
mod heat;
mod host;
mod link;
mod model;
mod net;
mod packing;
mod plan;
mod range;
mod resend;
mod seed;
mod source;
mod target;
mod volume;
mod world;

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

#[cfg(feature = "mutations")]
pub use broken::Mutation;
#[cfg(feature = "mutations")]
pub use flimcd_volume::rules::Mutation as Rule;
pub use range::{RangeReport, run_range};

use world::World;

/// How to run.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Keep a line for everything that happens. Costs memory and time.
    pub trace: bool,
    /// Whether anything goes wrong.
    pub faults: bool,
    /// A rule of the volume that is broken on purpose.
    #[cfg(feature = "mutations")]
    pub mutation: Option<Mutation>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            trace: false,
            faults: true,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The guest runs at the target, and the source is not needed any more.
    Completed,
    /// The guest runs at the source, as asked, or because a restart forgot the migration.
    Cancelled,
    /// The guest runs at the source, because of an error.
    Failed,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

/// A run in which every check held.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its seed.
    pub seed: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The strategy that the seed chose.
    pub strategy: &'static str,
    /// Time in the simulation.
    pub virtual_time: Duration,
    /// Requests of the guest that were answered or given up.
    pub guest_requests: u64,
    /// What was met, and how often: phases, faults, turns of events.
    pub coverage: BTreeMap<&'static str, u64>,
    /// What happened, if it was asked for.
    pub trace: Vec<String>,
}

/// A run in which a check failed. Shown to a person it says how to see it again.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// What was wrong.
    pub what: String,
    /// When, in the simulation.
    pub at: Duration,
    /// What happened before, if it was asked for.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, what, at, .. } = self;
        write!(
            f,
            "seed {seed}, after {:.6} s: {what}\nrun it again with: flimcd sim --seeds {seed}..{} --trace",
            at.as_secs_f64(),
            seed + 1
        )
    }
}

/// Runs one seed.
///
/// # Errors
/// [`Failure`] with the first check that failed. A panic of the code under test is one too.
pub fn run(seed: u64, options: &SimOptions) -> Result<Summary, Failure> {
    let mut world = World::new(seed, options);
    let strategy = world.plan.strategy;
    let ended = catch_unwind(AssertUnwindSafe(|| drive(&mut world)));
    let outcome = match ended {
        Ok(outcome) => outcome,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            world.fail(format!("panic: {}", text.unwrap_or("without a text")));
            None
        }
    };
    let (at, trace) = (world.elapsed(), world.take_trace());
    match (outcome, world.failure.take()) {
        (Some(outcome), None) => Ok(Summary {
            seed,
            outcome,
            strategy,
            virtual_time: at,
            guest_requests: world.guest.answered,
            coverage: world.coverage,
            trace,
        }),
        (_, what) => Err(Failure {
            seed,
            what: what.unwrap_or_else(|| "it ended without an outcome".to_owned()),
            at,
            trace,
        }),
    }
}

fn drive(world: &mut World) -> Option<Outcome> {
    loop {
        if !world.step() {
            world.fail(format!("nothing is left to happen; {}", world.stuck()));
            return None;
        }
        world.check_owner();
        if world.failure.is_some() {
            return None;
        }
        if let Some(outcome) = world.is_over() {
            world.check_end(outcome);
            return Some(outcome);
        }
        if world.now > world.deadline() {
            world.fail(world.stuck());
            return None;
        }
    }
}
