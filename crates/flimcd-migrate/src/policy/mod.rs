//! What differs between strategies: which block goes next, and when to switch.
//!
//! The machine owns all sets and does all bookkeeping; a policy only chooses. It sees the state through
//! [`View`] and answers with a run of pending blocks, so that a wrong policy can be slow but never wrong.
//! A new strategy is one small file here and one line in [`by_name`].

mod bitmap;
mod chosen;
mod cursor;
mod flimcd;
mod forward;
mod heat_maps;
mod hybrid_threshold;
mod postcopy;
mod precopy;
mod snapshot;
mod workload_aware;

use std::{str::FromStr, time::Duration};

pub use heat_maps::HeatMaps;

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, Time, VolumeSize};

use crate::LinkEstimate;

/// What is left may take this long with the guest stopped, where nothing may be missing at the target; QEMU's default for its
/// downtime limit.
const STOP_AND_COPY_MAX: Duration = Duration::from_millis(300);

/// A part of `flimcd` that can be left out, to see what it is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Not sending what the target has or has been sent already.
    Dedup,
    /// Sending what a guest will probably ask for next.
    Prefetch,
    /// The order by heat, and leaving hot chunks for post-copy.
    Order,
    /// Holding bulk a little below the link's rate while guests can fault; left out by the driver.
    Pacing,
    /// What stands at the target before; left out by whoever sets the target up.
    Replica,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 5] = [
        Self::Dedup,
        Self::Prefetch,
        Self::Order,
        Self::Pacing,
        Self::Replica,
    ];

    /// Name that selects it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dedup => "dedup",
            Self::Prefetch => "prefetch",
            Self::Order => "order",
            Self::Pacing => "pacing",
            Self::Replica => "replica",
        }
    }
}

impl FromStr for Part {
    type Err = UnknownPart;

    fn from_str(name: &str) -> Result<Self, UnknownPart> {
        let part = Self::ALL.into_iter().find(|part| part.name() == name);
        part.ok_or_else(|| UnknownPart(name.to_owned()))
    }
}

/// The name of a part that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no part {:?}; choose of {}", .0, Part::ALL.map(Part::name).join(", "))]
pub struct UnknownPart(pub String);

/// How a strategy is made different from what its name says, for comparisons.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyOptions {
    /// Whether content is compressed, whatever the strategy does by itself.
    pub compress: Option<bool>,
    /// Whether the target is asked what it has, whatever the strategy does by itself.
    pub library: Option<bool>,
    /// What `flimcd` has to do without.
    pub without: Vec<Part>,
    /// Switch when this share of the blocks that there were at the beginning has been sent, and let the rest follow,
    /// whatever the strategy says.
    pub switch_at: Option<f64>,
}

/// Names of all strategies that [`by_name`] knows.
pub const STRATEGIES: &[&str] = &[
    "flimcd",
    "precopy",
    "precopy-zstd",
    "postcopy",
    "forward-writes",
    "mirror",
    "snapshot",
    "bitmap",
    "workload-aware",
    "hybrid-threshold",
];

/// What a policy may look at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Now.
    pub now: Time,
    /// Size of the volume.
    pub size: VolumeSize,
    /// Blocks whose current content the target lacks and that are not on their way.
    pub pending: &'a BlockSet,
    /// Blocks on their way.
    pub in_flight_blocks: u64,
    /// What is hot.
    pub heat: &'a HeatMaps,
    /// What the link does.
    pub link: LinkEstimate,
    /// Bytes that a block has cost on the link so far, on average.
    pub bytes_per_block: f64,
}

impl View<'_> {
    /// Time to send everything that is pending, if nothing more got dirty.
    #[must_use]
    pub fn time_to_send_pending(&self) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let bytes = (self.pending.count() + self.in_flight_blocks) as f64 * self.bytes_per_block;
        Duration::try_from_secs_f64(bytes / self.link.rate_or_default()).unwrap_or(Duration::MAX)
    }
}

/// A strategy. All methods must answer without looking at more of the volume than they have to: they
/// are called for every message.
pub trait Policy: Send {
    /// Name that selects it.
    fn name(&self) -> &'static str;

    /// Whether content is compressed.
    fn compress(&self) -> bool {
        true
    }

    /// Whether what the target's library has at the same place need not be sent.
    fn uses_library(&self) -> bool {
        true
    }

    /// Whether blocks may be missing at the target after the switch. Without, the source sends everything
    /// while the guest is stopped.
    fn allows_postcopy(&self) -> bool {
        true
    }

    /// The next run to send before the switch; `None` when nothing should be sent now. All of its
    /// blocks must be pending, and it must lie in one chunk.
    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange>;

    /// Whether switching now is better than going on.
    fn is_ready(&mut self, view: &View<'_>) -> bool;

    /// What becomes of the guest's writes before the switch.
    fn writes(&self) -> Writes {
        Writes::Free
    }

    /// Bytes a second that the guest may write now, asked now and then where writes are [`Writes::Limited`].
    fn write_limit(&mut self, _view: &View<'_>) -> Option<u64> {
        None
    }

    /// The guest at the source has written this.
    fn on_dirtied(&mut self, _run: BlockRange) {}

    /// This has to go once more: the guest has written it after it was sent, or while it was on its way, or it was lost on it.
    fn on_outdated(&mut self, _run: BlockRange) {}

    /// The guest has read this: at the source, or after the switch at the target, there or missing.
    fn on_read(&mut self, _now: Time, _range: BlockRange) {}

    /// The switch has been made; `view.pending` is what the target misses.
    fn begin_push(&mut self, _view: &View<'_>) {}

    /// What the guest will probably read next, under the same conditions as what is pushed; it goes before that.
    fn next_prefetch(&mut self, _view: &View<'_>) -> Option<BlockRange> {
        None
    }

    /// What was expected of the switch, when it is made.
    fn predict(&mut self, _view: &View<'_>) -> Option<Prediction> {
        None
    }

    /// The next run to send after the switch, under the same conditions as before it.
    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange>;

    /// A guest at the target waits for these blocks; they are sent without asking the policy.
    fn on_demand(&mut self, _now: Time, _range: BlockRange) {}
}

/// What becomes of the guest's writes at the source while content goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// They run as fast as they can.
    Free,
    /// One to what the target has already is answered when the target has it, too.
    Mirrored,
    /// They run as fast as [`Policy::write_limit`] says.
    Limited,
}

/// What is to come after the switch, as seen when it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Bytes that go over.
    pub bytes: u64,
    /// Guest reads that will touch a block that is not there.
    pub misses: f64,
    /// Until everything is there.
    pub duration: Duration,
}

/// A strategy's name that is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no strategy {:?}; choose one of {}", .0, STRATEGIES.join(", "))]
pub struct UnknownStrategy(pub String);

/// The strategy of this name.
///
/// # Errors
/// [`UnknownStrategy`] with the list of those there are.
pub fn by_name(name: &str, options: &PolicyOptions) -> Result<Box<dyn Policy>, UnknownStrategy> {
    let policy: Box<dyn Policy> = match name {
        "flimcd" => Box::new(flimcd::Flimcd::new(&options.without)),
        "precopy" => Box::new(precopy::PreCopy::new(false)),
        "precopy-zstd" => Box::new(precopy::PreCopy::new(true)),
        "postcopy" => Box::new(postcopy::PostCopy::default()),
        "forward-writes" => Box::new(forward::Forward::limiting()),
        "mirror" => Box::new(forward::Forward::mirroring()),
        "snapshot" => Box::new(snapshot::Snapshot::default()),
        "bitmap" => Box::new(bitmap::Bitmap::default()),
        "workload-aware" => Box::new(workload_aware::WorkloadAware::default()),
        "hybrid-threshold" => Box::new(hybrid_threshold::HybridThreshold::default()),
        _ => return Err(UnknownStrategy(name.to_owned())),
    };
    Ok(Box::new(chosen::Chosen::new(policy, options.clone())))
}

/// Bytes that go over if everything that is pending goes as it is. What a guest has just written is seldom zero.
fn bytes_left(view: &View<'_>) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let bytes = ((view.pending.count() + view.in_flight_blocks) * BLOCK_SIZE) as f64;
    bytes
}

/// Whether the rest can go while the guest stands.
fn fits_downtime(view: &View<'_>) -> bool {
    bytes_left(view) / view.link.rate_or_default() <= STOP_AND_COPY_MAX.as_secs_f64()
}
