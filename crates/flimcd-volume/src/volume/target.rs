//! The volume at the target: content that arrives, what is missing, and making both durable.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use flimcd_core::{BlockRange, BlockSet};

use super::Volume;
use crate::rules::{ApplyPlan, FlushPlan, FlushStep, Outcome};

/// Content that arrived.
#[derive(Clone, Copy, Debug)]
pub enum ApplyData<'a> {
    /// The bytes of the blocks, clipped at the end of the volume.
    Bytes(&'a [u8]),
    /// All zero.
    Zeroes,
}

/// What became of content that arrived, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Written to the image.
    pub written: u64,
    /// Not written: the block was there already, or the guest's own content is newer.
    pub dropped: u64,
}

/// Whether data that was written can still be made durable.
///
/// After a failed sync the kernel may have dropped what it could not write and report success the next time, so
/// that a later success proves nothing. As in QEMU, every sync fails from then on until the volume is opened again.
#[derive(Debug, Default)]
pub(super) struct SyncHealth {
    failed: AtomicBool,
}

impl Volume {
    /// Writes content that arrived to the blocks of `range` that want it. Waits for another apply of the same blocks.
    ///
    /// # Errors
    /// What the device reports; the blocks are then missing as before. [`io::ErrorKind::InvalidInput`] when the content is not
    /// as long as the range, or the range lies outside of the volume.
    pub fn apply(&self, range: BlockRange, data: ApplyData<'_>) -> io::Result<Applied> {
        let bytes = range.bytes(self.size());
        let is_long = match data {
            ApplyData::Bytes(data) => data.len() as u64 == bytes.len(),
            ApplyData::Zeroes => true,
        };
        if range.is_empty() || range.end > self.size().blocks() || !is_long {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("content for {range:?} does not fit the blocks"),
            ));
        }
        let mut plan = self.core.change(|core| core.rules.begin_apply(range));
        if plan.wait {
            plan = self.core.wait_for_apply(plan.token);
        }
        let result = self.write_plan(&plan, data);
        let outcome = if result.is_ok() {
            Outcome::Done
        } else {
            Outcome::Failed
        };
        self.core
            .change(|core| core.rules.end_apply(plan.token, outcome));
        result?;
        let written = plan.blocks_to_write();
        Ok(Applied {
            written,
            dropped: range.len() - written,
        })
    }

    fn write_plan(&self, plan: &ApplyPlan, data: ApplyData<'_>) -> io::Result<()> {
        let base = plan.range.bytes(self.size()).start;
        for run in &plan.write {
            let bytes = run.bytes(self.size());
            match data {
                ApplyData::Zeroes => self.device.write_zeroes(bytes, true)?,
                ApplyData::Bytes(data) => {
                    let part = |at: u64| usize::try_from(at - base).map_err(io::Error::other);
                    let part = &data[part(bytes.start)?..part(bytes.end)?];
                    self.device.write_at(bytes.start, part)?;
                }
            }
        }
        Ok(())
    }

    /// Makes durable what was written before the call: data, then, in post-copy, presence.
    ///
    /// # Errors
    /// What the device or the state directory report. After a failure of the device every later sync fails as well.
    pub fn sync(&self) -> io::Result<()> {
        let mut plan = self.core.change(|core| core.rules.begin_flush());
        let result = self.run_flush(&mut plan);
        self.core
            .change(|core| core.rules.end_flush(plan, result.is_ok()));
        result
    }

    /// Runs the steps of `plan` that are left.
    pub(crate) fn run_flush(&self, plan: &mut FlushPlan) -> io::Result<()> {
        loop {
            match plan.next() {
                FlushStep::SyncData => self.check_sync(self.device.sync_data())?,
                FlushStep::WritePresence(set) => self.write_presence(set)?,
                FlushStep::SyncPresence => self.sync_presence()?,
                FlushStep::Done => return Ok(()),
            }
        }
    }

    /// Takes note of how a data sync went.
    pub(crate) fn check_sync(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.syncs.failed.store(true, Ordering::Release);
        } else if self.syncs.failed.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "an earlier sync of the image failed, so that data may be lost: restart the agent after the disk is in order",
            ));
        }
        result
    }

    fn write_presence(&self, _set: &BlockSet) -> io::Result<()> {
        Ok(())
    }

    fn sync_presence(&self) -> io::Result<()> {
        Ok(())
    }

    /// The switch: the guest runs here from now on, without the content of `missing`.
    ///
    /// # Panics
    /// As [`Rules::start_postcopy`](crate::rules::Rules::start_postcopy).
    pub fn start_postcopy(&self, missing: BlockSet) {
        self.core.change(|core| core.rules.start_postcopy(missing));
    }

    /// Blocks that a guest waits for, each once until [`requeue_faults`](Self::requeue_faults).
    #[must_use]
    pub fn poll_fault(&self) -> Option<BlockRange> {
        self.core.lock().rules.poll_fault()
    }

    /// Reports all blocks that guests wait for once more.
    pub fn requeue_faults(&self) {
        self.core.change(|core| core.rules.requeue_faults());
    }

    /// Number of blocks whose content is not here.
    #[must_use]
    pub fn missing_count(&self) -> u64 {
        self.core.lock().rules.missing_count()
    }

    /// The blocks that guest writes made present since the last call.
    #[must_use]
    pub fn take_overwritten(&self) -> BlockSet {
        self.core.lock().rules.take_overwritten()
    }

    /// Nothing is missing any more.
    ///
    /// # Panics
    /// As [`Rules::finish_postcopy`](crate::rules::Rules::finish_postcopy).
    pub fn finish_postcopy(&self) {
        self.core.change(|core| core.rules.finish_postcopy());
    }
}
