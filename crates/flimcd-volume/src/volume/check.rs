//! What a guest has written since its volume arrived, for a comparison with the copy that stayed at the source.

use std::io;

use flimcd_core::{BlockRange, BlockSet, MigrationId, SiteName};

use super::Volume;
use crate::state::Ownership;

impl Volume {
    /// The blocks of `range` that the guest may have written since `migration` from `site` brought the volume here, in ascending runs; `None`
    /// when that is not known: another migration has begun since, or the record of it was lost with the machine's boot.
    ///
    /// A block that is not among them had, until this call, the content that it arrived with: marks come before writes. So what was read
    /// *before* the call is that content.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn written_since(
        &self,
        site: &SiteName,
        migration: MigrationId,
        range: BlockRange,
    ) -> io::Result<Option<Vec<BlockRange>>> {
        let Some(durable) = &self.durable else {
            return Ok(None);
        };
        // A migration that begins takes the marks away and changes the record under the same lock.
        let file = durable.unacked.lock();
        let is_it = {
            let state = durable.state();
            let record = state.record();
            let of = record.baseline.as_ref();
            matches!(record.ownership, Ownership::Owner { .. })
                && of.is_some_and(|of| of.site == *site && of.migration == migration)
        };
        let Some(bitmap) = file.as_ref().filter(|_| is_it) else {
            return Ok(None);
        };
        let mut written = BlockSet::new(self.size().blocks());
        for run in bitmap.runs_in(range)? {
            written.insert_range(run);
        }
        // A second write to a block may begin before the first one's mark stands in the record.
        for run in self.core.lock().rules.dirty_in(range) {
            written.insert_range(run);
        }
        Ok(Some(written.runs_in(range).collect()))
    }
}
