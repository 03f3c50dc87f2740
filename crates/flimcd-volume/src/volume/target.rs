//! The volume at the target: content that arrives, what is missing, and making both durable.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use flimcd_core::{BlockRange, BlockSet, Epoch};

use super::{Volume, VolumeError};
use crate::{
    rules::{ApplyPlan, FlushPlan, FlushStep, Mode, Outcome, Peek},
    state::{BitmapFile, Ownership, StateDir, StateError},
};

/// The missing set in both its forms; see the state module.
pub(super) struct MissingFiles {
    durable: BitmapFile,
    now: BitmapFile,
}

impl MissingFiles {
    fn create(state: &StateDir, epoch: Epoch, missing: &BlockSet) -> Result<Self, StateError> {
        Ok(Self {
            now: state.create_missing_now(epoch, missing)?,
            durable: state.create_missing(epoch, missing)?,
        })
    }

    /// Opens what an earlier agent left, and returns what is missing. Where an agent of this boot left more than is
    /// durable, that is made durable first: `sync_data` and then the set.
    pub(super) fn open(
        state: &StateDir,
        epoch: Epoch,
        sync_data: impl FnOnce() -> io::Result<()>,
    ) -> Result<(Self, BlockSet), VolumeError> {
        let durable = state.open_missing(epoch)?;
        let missing = durable.load()?;
        let Some(now) = state.open_missing_now(epoch)? else {
            let now = state.create_missing_now(epoch, &missing)?;
            return Ok((Self { durable, now }, missing));
        };
        let mut present = missing.clone();
        let missing = now.load()?;
        present.subtract(&missing);
        if !present.is_empty() {
            sync_data().map_err(|source| VolumeError::Sync {
                path: state.record().image.clone(),
                source,
            })?;
            for run in present.runs() {
                durable.clear(run)?;
            }
            durable.sync()?;
        }
        Ok((Self { durable, now }, missing))
    }
}

/// Content that arrived.
#[derive(Clone, Copy, Debug)]
pub enum ApplyData<'a> {
    /// The bytes of the blocks, clipped at the end of the volume.
    Bytes(&'a [u8]),
    /// All zero.
    Zeroes,
    /// What stands in the image already is right.
    Kept,
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
            ApplyData::Zeroes | ApplyData::Kept => true,
        };
        if range.is_empty() || range.end > self.size().blocks() || !is_long {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("content for {range:?} does not fit the blocks"),
            ));
        }
        let (mut plan, mode) = self
            .core
            .change(|core| (core.rules.begin_apply(range), core.rules.mode()));
        if plan.wait {
            plan = self.core.wait_for_apply(plan.token);
        }
        let mut result = self.keep_old(mode, &plan, data);
        if result.is_ok() {
            result = self.write_plan(&plan, data);
        }
        if result.is_ok() && mode == Mode::PostCopy {
            result = plan
                .write
                .iter()
                .try_for_each(|run| self.note_present(*run));
        }
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
                ApplyData::Kept => {}
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

    /// Whether a guest read before the switch becomes questions to the source, as
    /// [`Rules::set_peeking`](crate::rules::Rules::set_peeking) has it.
    pub fn set_peeking(&self, is_on: bool) {
        self.core.change(|core| core.rules.set_peeking(is_on));
    }

    /// The next question for the source. Each is given once, until [`requeue_peeks`](Self::requeue_peeks), and some are only
    /// given when others have been answered: [`on_peek`](super::VolumeObserver::on_peek) tells.
    #[must_use]
    pub fn poll_peek(&self) -> Option<Peek> {
        self.core.lock().rules.poll_peek()
    }

    /// The source's answer to a question: the bytes of its blocks, clipped at the end of the volume, or `None` when it could not read
    /// them. Bytes of another length count as that. An answer that is not wanted any more changes nothing.
    pub fn answer_peek(&self, number: u64, bytes: Option<&[u8]>) {
        self.core.change(|core| core.answer_peek(number, bytes));
    }

    /// Asks every open question again, because it or its answer may be lost with a link.
    pub fn requeue_peeks(&self) {
        self.core.change(|core| core.rules.requeue_peeks());
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

    fn write_presence(&self, present: &BlockSet) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        // The lock keeps two flushes from changing the bits of one byte at the same time.
        let missing = durable.missing();
        if let Some(files) = &*missing {
            for run in present.runs() {
                files.durable.clear(run)?;
            }
        }
        Ok(())
    }

    /// Notes, for the case that this process dies, that the data of these blocks has been written. To be called before the
    /// rules hear of it and so before anybody can see the blocks.
    pub(crate) fn note_present(&self, blocks: BlockRange) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        if !self.core.lock().rules.missing().intersects(blocks) {
            return Ok(());
        }
        if let Some(files) = &*durable.missing() {
            files.now.clear(blocks)?;
        }
        Ok(())
    }

    fn sync_presence(&self) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        // On a descriptor of its own, so that nobody waits for this sync to write presence.
        let bitmap = durable
            .missing()
            .as_ref()
            .map(|files| files.durable.try_clone());
        if let Some(bitmap) = bitmap {
            bitmap?.sync()?;
        }
        Ok(())
    }

    /// Takes the volume over: [`record_arrival`](Self::record_arrival), then the guest runs here.
    ///
    /// # Errors
    /// When the disk fails. The record does not say that this site owns the volume then.
    ///
    /// # Panics
    /// As [`Rules::start_postcopy`](crate::rules::Rules::start_postcopy).
    pub fn take_over(&self, missing: BlockSet, ownership: Ownership) -> io::Result<()> {
        self.record_arrival(&missing, ownership)?;
        self.start_postcopy(missing);
        Ok(())
    }

    /// The durable half of taking the volume over: what arrived, then `missing`, then the record with `ownership`, which
    /// must be [`Ownership::Arriving`]. No guest is let in before [`start_postcopy`](Self::start_postcopy), so that volumes that
    /// move together are let in together; until then [`take_arrival_back`](Self::take_arrival_back) undoes it.
    ///
    /// # Errors
    /// When the disk fails. The record does not say that this site owns the volume then.
    pub fn record_arrival(&self, missing: &BlockSet, ownership: Ownership) -> io::Result<()> {
        let Ownership::Arriving { epoch, .. } = ownership else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "taking over is arriving",
            ));
        };
        self.sync()?;
        if let Some(durable) = &self.durable {
            // What the guest writes here from now on is what the copy at the source lacks. Before the record names that.
            let nothing = BlockSet::new(self.size().blocks());
            let mut unacked = durable.unacked.lock();
            *unacked = Some(durable.state().create_unacked(&nothing)?);
            drop(unacked);
            let files = MissingFiles::create(&durable.state(), epoch, missing)?;
            *durable.missing() = Some(files);
        }
        self.store_ownership(ownership)?;
        self.drop_undo();
        Ok(())
    }

    /// Undoes [`record_arrival`](Self::record_arrival): the record says `ownership`, which must be [`Ownership::Incoming`], and the
    /// missing set is gone. Nothing to do is fine.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] once guests were let in, or when the disk fails.
    pub fn take_arrival_back(&self, ownership: Ownership) -> io::Result<()> {
        if !matches!(ownership, Ownership::Incoming { .. }) || self.mode() != Mode::Incoming {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only an arrival that no guest has seen can be taken back",
            ));
        }
        self.store_ownership(ownership)?;
        self.drop_unacked()?;
        if let Some(durable) = &self.durable {
            *durable.missing() = None;
            durable.state().remove_missing()?;
        }
        Ok(())
    }

    /// The guest runs here from now on, without the content of `missing`. What makes that durable comes before it:
    /// [`record_arrival`](Self::record_arrival); volumes without durable state need no more than this.
    ///
    /// # Panics
    /// As [`Rules::start_postcopy`](crate::rules::Rules::start_postcopy).
    pub fn start_postcopy(&self, missing: BlockSet) {
        let is_durable = self.durable.is_some();
        self.core.change(|core| {
            if is_durable {
                core.rules.start_tracking();
            }
            core.rules.start_postcopy(missing);
        });
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

    /// The first missing blocks, at most `blocks_max` of them, whether a guest waits or not.
    #[must_use]
    pub fn first_missing(&self, blocks_max: u64) -> Vec<BlockRange> {
        let core = self.core.lock();
        let mut left = blocks_max;
        let mut runs = Vec::new();
        for mut run in core.rules.missing().runs() {
            if left == 0 {
                break;
            }
            run.end = run.end.min(run.start.saturating_add(left));
            left -= run.len();
            runs.push(run);
        }
        runs
    }

    /// The blocks that guest writes made present since the last call.
    #[must_use]
    pub fn take_overwritten(&self) -> BlockSet {
        self.core.lock().rules.take_overwritten()
    }

    /// Nothing is missing any more, and the record says [`Ownership::Owner`]: the volume is an ordinary one.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when the record says something else: a crash would bring the missing set back and with it old
    /// content over what the guest wrote. Or when the missing set cannot be removed, which does no harm.
    ///
    /// # Panics
    /// As [`Rules::finish_postcopy`](crate::rules::Rules::finish_postcopy).
    pub fn finish_postcopy(&self) -> io::Result<()> {
        if let Some(durable) = &self.durable {
            let ownership = durable.state().record().ownership.clone();
            if !matches!(ownership, Ownership::Owner { .. }) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the record does not say that this site owns the whole volume",
                ));
            }
        }
        self.core.change(|core| core.rules.finish_postcopy());
        self.flusher.stop();
        if let Some(durable) = &self.durable {
            *durable.missing() = None;
            durable.state().remove_missing()?;
        }
        Ok(())
    }
}
