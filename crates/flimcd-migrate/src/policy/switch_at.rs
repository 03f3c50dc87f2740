//! Any strategy with a fixed moment of the switch: comparisons of what happens afterwards are fair only when all switch alike.

use flimcd_core::BlockRange;

use super::{Policy, View, cursor::Cursor};

pub(super) struct SwitchAt {
    policy: Box<dyn Policy>,
    share: f64,
    /// Blocks that were pending when it was first asked.
    total: Option<u64>,
    cursor: Cursor,
}

impl SwitchAt {
    /// Switches when `share` of what there is at the beginning has been sent.
    pub(super) fn new(policy: Box<dyn Policy>, share: f64) -> Self {
        Self {
            policy,
            share: share.clamp(0.0, 1.0),
            total: None,
            cursor: Cursor::default(),
        }
    }

    fn is_due(&mut self, view: &View<'_>) -> bool {
        let left = view.pending.count() + view.in_flight_blocks;
        let total = *self.total.get_or_insert(left);
        #[expect(clippy::cast_precision_loss, reason = "counts of blocks")]
        let left_max = total as f64 * (1.0 - self.share);
        #[expect(clippy::cast_precision_loss, reason = "counts of blocks")]
        let left = left as f64;
        left <= left_max
    }
}

impl Policy for SwitchAt {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn compress(&self) -> bool {
        self.policy.compress()
    }

    fn uses_library(&self) -> bool {
        self.policy.uses_library()
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        if self.is_due(view) {
            return None;
        }
        self.policy
            .next_precopy(view)
            .or_else(|| self.cursor.next(view.pending, |_| true))
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.is_due(view)
    }

    fn begin_push(&mut self, view: &View<'_>) {
        self.policy.begin_push(view);
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.policy.next_push(view)
    }

    fn on_demand(&mut self, range: BlockRange) {
        self.policy.on_demand(range);
    }
}
