//! The volume at the source: what changed, what the target may lack, and the way to the switch.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flimcd_core::{BlockRange, BlockSet, ByteRange, MigrationId, SiteName, Time};

use super::Volume;
use crate::state::{Baseline, BitmapFile, Ownership};

/// The durable record of what the target may lack, if one is kept.
///
/// Its mutex is taken before the core's. A bit is cleared only under both, after a look at the rules: a write that begins
/// later waits here before it is submitted, and sets the bit again.
#[derive(Debug)]
pub(super) struct Unacked {
    file: Mutex<Option<BitmapFile>>,
}

impl Unacked {
    pub(super) fn new(file: Option<BitmapFile>) -> Self {
        Self {
            file: Mutex::new(file),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<BitmapFile>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a target may lack when a migration begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// If it has zeroes: blocks that are not holes.
    pub data: BlockSet,
    /// If it has the copy that this migration left there: blocks that may have changed since.
    pub changed: Option<(MigrationId, BlockSet)>,
}

/// Blocks whose dirty marks were cleared because they are about to be read.
#[must_use]
pub struct Sending {
    volume: Arc<Volume>,
    range: BlockRange,
}

impl Sending {
    /// Reads the blocks. `buf` takes their bytes; what lies beyond the end of the volume is left alone.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When `buf` is smaller than the blocks.
    pub fn read(self, buf: &mut [u8]) -> io::Result<()> {
        self.volume.read_blocks(self.range, buf)
    }
}

impl Volume {
    /// Starts a migration's bookkeeping: marks what the guest writes from now on, and keeps a record of what the target may
    /// lack that survives the agent's death. At first that is everything; once the target has said what stands there,
    /// [`mark_clean`](Self::mark_clean) takes the rest out.
    ///
    /// # Errors
    /// When the image or the state directory cannot be read or written. What the guest writes may be marked then.
    pub fn begin_migration(&self, site: &SiteName, migration: MigrationId) -> io::Result<Begun> {
        self.core.change(|core| core.rules.start_tracking());
        let full = BlockSet::full(self.size().blocks());
        let mut changed = None;
        if let Some(durable) = &self.durable {
            let mut file = durable.unacked.lock();
            let known = file.as_ref().map(BitmapFile::load).transpose()?;
            // A write that is marked after this look waits for the lock before it is submitted.
            let marked = self.core.lock().rules.take_dirty();
            let mut state = durable.state();
            // The file first: that everything may be lacking is true of the copy that the record names until then, too.
            *file = Some(state.create_unacked(&full)?);
            let mut record = state.record().clone();
            let before = record.baseline.replace(Baseline {
                site: site.clone(),
                migration,
            });
            state.store(record)?;
            if let (Some(before), Some(mut known)) = (before, known)
                && before.site == *site
            {
                known.union_with(&marked);
                changed = Some((before.migration, known));
            }
        }
        let data = self.data_blocks()?;
        Ok(Begun { data, changed })
    }

    /// As [`begin_migration`](Self::begin_migration), for one that a restart goes on with: what the target may lack. Everything, where the
    /// record of that is gone or was of another migration.
    ///
    /// # Errors
    /// When the state directory cannot be read or written.
    pub fn resume_migration(
        &self,
        site: &SiteName,
        migration: MigrationId,
    ) -> io::Result<BlockSet> {
        let full = BlockSet::full(self.size().blocks());
        let Some(record) = self.record() else {
            return Ok(full);
        };
        if record.is_replica() {
            return Ok(BlockSet::new(self.size().blocks()));
        }
        let is_of_it = record.baseline.is_some_and(|b| b.migration == migration);
        if is_of_it && let Some(unacked) = self.unacked()? {
            return Ok(unacked);
        }
        if let Ownership::Owner { .. } = record.ownership {
            drop(self.begin_migration(site, migration)?);
        }
        Ok(full)
    }

    /// Marks what the guest writes from now on, with a record of what somebody may lack: `unacked`, or anything if that is
    /// `None`.
    ///
    /// # Errors
    /// When the state directory cannot be written. Nothing is marked then.
    pub fn start_tracking(&self, unacked: Option<&BlockSet>) -> io::Result<()> {
        self.core.change(|core| core.rules.start_tracking());
        let all;
        let unacked = match unacked {
            Some(set) => set,
            None => {
                all = BlockSet::full(self.size().blocks());
                &all
            }
        };
        let result = self.keep_unacked(unacked);
        if result.is_err() {
            self.stop_tracking()?;
        }
        result
    }

    /// Writes the record of what the target may lack: `unacked` and what is marked.
    fn keep_unacked(&self, unacked: &BlockSet) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let mut file = durable.unacked.lock();
        // A write that is marked after this look waits for the lock before it is submitted.
        let mut set = unacked.clone();
        set.union_with(&self.core.lock().rules.dirty());
        *file = Some(durable.state().create_unacked(&set)?);
        Ok(())
    }

    /// Stops marking, and forgets what the target may lack.
    ///
    /// # Errors
    /// When the record of that cannot be removed.
    pub fn stop_tracking(&self) -> io::Result<()> {
        self.drop_unacked()?;
        self.core.change(|core| core.rules.stop_tracking());
        Ok(())
    }

    pub(super) fn drop_unacked(&self) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let mut file = durable.unacked.lock();
        durable.state().remove_unacked()?;
        *file = None;
        Ok(())
    }

    /// The blocks that are not holes.
    ///
    /// # Errors
    /// What the device reports.
    pub fn data_blocks(&self) -> io::Result<BlockSet> {
        const EXTENTS: usize = 4096;
        let size = self.size();
        let mut data = BlockSet::new(size.blocks());
        let mut at = 0;
        while at < size.bytes() {
            let rest = ByteRange::new(at, size.bytes());
            let extents = self.device.data_extents(rest, EXTENTS)?;
            for extent in &extents {
                if !extent.is_hole {
                    data.insert_range(extent.range.blocks_touched());
                }
                at = extent.range.end;
            }
            if extents.is_empty() {
                break;
            }
        }
        Ok(data)
    }

    /// Records durably that the target may lack what a write to `range`, newly marked dirty, is about to change.
    ///
    /// If that cannot be written the record is removed as a whole, which a restart takes for "anything", so that a
    /// full state directory never fails a guest. Only when even that is refused the write must not happen.
    pub(crate) fn note_dirty(&self, range: ByteRange) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let mut file = durable.unacked.lock();
        let Some(bitmap) = &*file else { return Ok(()) };
        if let Err(error) = bitmap.set(range.blocks_touched()) {
            tracing::warn!(
                volume = %self.name, %error,
                "cannot record what the target may lack: after a restart everything counts as such"
            );
            durable.state().remove_unacked()?;
            *file = None;
        }
        Ok(())
    }

    /// The target durably has these blocks: they are taken out of the record, except what is marked again or has a
    /// write in flight.
    ///
    /// # Errors
    /// When the record cannot be written. It then says more than is true, which costs time after a restart and nothing else.
    pub fn mark_clean(&self, ranges: &[BlockRange]) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let file = durable.unacked.lock();
        let Some(bitmap) = &*file else { return Ok(()) };
        let clean = {
            let core = self.core.lock();
            let mut clean = Vec::new();
            for range in ranges {
                core.rules.clean_runs(*range, &mut clean);
            }
            clean
        };
        for run in clean {
            bitmap.clear(run)?;
        }
        Ok(())
    }

    /// What the target may lack, as the record of an earlier process of this boot has it; `None` when there is none, and the
    /// target may lack anything.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn unacked(&self) -> io::Result<Option<BlockSet>> {
        let Some(durable) = &self.durable else {
            return Ok(None);
        };
        let file = durable.unacked.lock();
        let set = file.as_ref().map(BitmapFile::load).transpose()?;
        Ok(set)
    }

    /// Lets writes to what the target has wait for it, as [`Rules::set_mirroring`](crate::rules::Rules::set_mirroring): the record of what the
    /// target may lack says which those are.
    ///
    /// # Errors
    /// When the record cannot be read. Nothing waits then.
    pub fn set_mirroring(&self, is_on: bool) -> io::Result<()> {
        let lacking = if is_on {
            let known = self.unacked()?;
            Some(known.unwrap_or_else(|| BlockSet::full(self.size().blocks())))
        } else {
            None
        };
        self.core.change(|core| core.rules.set_mirroring(lacking));
        Ok(())
    }

    /// The target has acknowledged these blocks: [`Rules::acked`](crate::rules::Rules::acked).
    pub fn acked(&self, ranges: &[BlockRange]) {
        self.core.change(|core| core.rules.acked(ranges));
    }

    /// Limits what guests write per second: [`Rules::set_write_limit`](crate::rules::Rules::set_write_limit).
    pub fn set_write_limit(&self, bytes_per_sec: Option<u64>, now: Time) {
        self.core
            .change(|core| core.rules.set_write_limit(bytes_per_sec, now));
    }

    /// Credit for guests' writes: [`Rules::refill_writes`](crate::rules::Rules::refill_writes).
    pub fn refill_writes(&self, now: Time) {
        self.core.change(|core| core.rules.refill_writes(now));
    }

    /// The number of the write that is held longest: [`Rules::oldest_held`](crate::rules::Rules::oldest_held).
    #[must_use]
    pub fn oldest_held(&self) -> Option<u64> {
        self.core.lock().rules.oldest_held()
    }

    /// Hands over the blocks that the guest wrote since the last call, as [`Rules::take_dirty`](crate::rules::Rules::take_dirty).
    #[must_use]
    pub fn take_dirty(&self) -> BlockSet {
        self.core.lock().rules.take_dirty()
    }

    /// Whether guest reads are kept, as [`Rules::set_read_log`](crate::rules::Rules::set_read_log) has it.
    pub fn set_read_log(&self, is_on: bool) {
        self.core.lock().rules.set_read_log(is_on);
    }

    /// Appends the guest's reads since the last call, as [`Rules::take_reads`](crate::rules::Rules::take_reads).
    pub fn take_reads(&self, out: &mut Vec<BlockRange>) {
        self.core.lock().rules.take_reads(out);
    }

    /// Clears the dirty marks of `range`, which is to be read and sent. The read may come later: what the guest writes from
    /// now on is marked.
    pub fn begin_send(self: &Arc<Self>, range: BlockRange) -> Sending {
        self.core.lock().rules.begin_send(range);
        Sending {
            volume: self.clone(),
            range,
        }
    }

    /// Reads `range` to be sent. A block that the guest writes meanwhile is dirty afterwards. `buf` takes the blocks' bytes;
    /// what lies beyond the end of the volume is left alone.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When `buf` is smaller than the range.
    pub fn read_for_send(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.core.lock().rules.begin_send(range);
        self.read_blocks(range, buf)
    }

    /// The bytes of `range` as they are now, clipped at the end of the volume. A block that the guest is writing may be in part old
    /// and in part new. Nothing is marked or cleared.
    ///
    /// # Errors
    /// What the device reports; [`io::ErrorKind::InvalidInput`] when the range lies outside of the volume.
    pub fn peek(&self, range: BlockRange) -> io::Result<Vec<u8>> {
        if range.end > self.size().blocks() {
            let problem = format!("blocks {range:?} lie beyond the end of the volume");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let bytes = range.bytes(self.size());
        let length = usize::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut content = vec![0; length];
        self.device.read_at(bytes.start, &mut content)?;
        Ok(content)
    }

    fn read_blocks(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let bytes = range.bytes(self.size());
        let length = usize::try_from(bytes.len()).map_err(io::Error::other)?;
        let result = self.device.read_at(bytes.start, &mut buf[..length]);
        self.core.lock().rules.end_send(range);
        result
    }

    /// Parks guest requests from now on; whether nothing is in flight any more. If something is,
    /// [`on_drained`](super::VolumeObserver::on_drained) tells when that has ended.
    ///
    /// # Panics
    /// As [`Rules::freeze`](crate::rules::Rules::freeze).
    pub fn freeze(&self) -> bool {
        self.core.change(|core| {
            core.rules.freeze();
            let drained = core.rules.is_drained();
            core.draining = !drained;
            drained
        })
    }

    /// Whether no admitted guest request is in flight.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.core.lock().rules.is_drained()
    }

    /// Takes [`freeze`](Self::freeze) back: parked requests run.
    ///
    /// # Panics
    /// As [`Rules::thaw`](crate::rules::Rules::thaw).
    pub fn thaw(&self) {
        self.core.change(|core| {
            core.draining = false;
            core.rules.thaw();
        });
    }

    /// The volume has moved: guest requests are refused from now on.
    ///
    /// # Panics
    /// As [`Rules::release`](crate::rules::Rules::release).
    pub fn release(&self) {
        self.core.change(|core| core.rules.release());
    }
}
