//! A strategy with some of its choices made by somebody else.

use flimcd_core::{BlockRange, Time};

use super::{Policy, PolicyOptions, Prediction, View, Writes, cursor::Cursor};

/// What [`PolicyOptions`] ask for, over any strategy. With a fixed moment of the switch comparisons of what happens afterwards
/// are fair, because all switch alike.
pub(super) struct Chosen {
    policy: Box<dyn Policy>,
    options: PolicyOptions,
    /// Blocks that were pending when it was first asked.
    total: Option<u64>,
    cursor: Cursor,
}

impl Chosen {
    pub(super) fn new(policy: Box<dyn Policy>, options: PolicyOptions) -> Self {
        Self {
            policy,
            options,
            total: None,
            cursor: Cursor::default(),
        }
    }

    /// Whether it is time to switch, if that is not the strategy's choice.
    fn is_due(&mut self, view: &View<'_>) -> Option<bool> {
        let share = self.options.switch_at?.clamp(0.0, 1.0);
        let left = view.pending.count() + view.in_flight_blocks;
        let total = *self.total.get_or_insert(left);
        #[expect(clippy::cast_precision_loss, reason = "counts of blocks")]
        let (left, left_max) = (left as f64, total as f64 * (1.0 - share));
        Some(left <= left_max)
    }
}

impl Policy for Chosen {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn compress(&self) -> bool {
        self.options
            .compress
            .unwrap_or_else(|| self.policy.compress())
    }

    fn uses_library(&self) -> bool {
        self.options
            .library
            .unwrap_or_else(|| self.policy.uses_library())
    }

    fn allows_postcopy(&self) -> bool {
        self.options.switch_at.is_some() || self.policy.allows_postcopy()
    }

    fn writes(&self) -> Writes {
        self.policy.writes()
    }

    fn write_limit(&mut self, view: &View<'_>) -> Option<u64> {
        self.policy.write_limit(view)
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        match self.is_due(view) {
            None => self.policy.next_precopy(view),
            Some(true) => None,
            Some(false) => {
                let next = self.policy.next_precopy(view);
                next.or_else(|| self.cursor.next(view.pending, |_| true))
            }
        }
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.is_due(view)
            .unwrap_or_else(|| self.policy.is_ready(view))
    }

    fn predict(&mut self, view: &View<'_>) -> Option<Prediction> {
        self.policy.predict(view)
    }

    fn on_dirtied(&mut self, run: BlockRange) {
        self.policy.on_dirtied(run);
    }

    fn on_outdated(&mut self, run: BlockRange) {
        self.policy.on_outdated(run);
    }

    fn on_read(&mut self, now: Time, range: BlockRange) {
        self.policy.on_read(now, range);
    }

    fn begin_push(&mut self, view: &View<'_>) {
        self.policy.begin_push(view);
    }

    fn next_prefetch(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.policy.next_prefetch(view)
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.policy.next_push(view)
    }

    fn on_demand(&mut self, now: Time, range: BlockRange) {
        self.policy.on_demand(now, range);
    }
}
