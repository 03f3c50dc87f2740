//! Copies that stay: what a volume that moved away leaves, and content that arrives over such a copy.
//!
//! A volume that has moved away whole is a *replica*: nobody writes to its image any more, and the record has what the image
//! can be known again by. Together with the `baseline` and the `unacked` set of the new owner that makes a way back which
//! sends what changed. Whoever is not sure forgets the identity, never the copy: it is then a copy of some time, which
//! costs reading and comparing and can do no harm.
//!
//! The identity is forgotten, durably, before the first write; it is taken again only by the process that did all of the
//! writing, since between two processes anybody may have touched the file.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use flimcd_core::MigrationId;

use super::Volume;
use crate::{
    rules::Mode,
    state::{ImageIdentity, Ownership, Replica, StateDir, StateError},
};

/// What stands where a volume is to arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The copy that this migration left, untouched since.
    Untouched(MigrationId),
    /// A copy of some time.
    Unsure,
    /// The image is not where the record says, or is another file or of another size: nothing may be written to it.
    Lost,
}

/// What is known of a copy that stays from now on. `is_sure`: this process wrote all that is in it.
pub(super) fn of(image: &Path, is_sure: bool) -> Replica {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.map_or(0, |since| since.as_millis());
    let identity = is_sure.then(|| ImageIdentity::of(image));
    Replica {
        since_unix_ms: u64::try_from(since).unwrap_or(0),
        identity: identity.and_then(|identity| identity.ok().flatten()),
    }
}

/// Takes a seal off a volume that is opened. An image that was touched since it was sealed is not what its owner's copy
/// elsewhere was compared with.
pub(super) fn unseal(state: &mut StateDir) -> Result<(), StateError> {
    let Some(sealed) = state.record().sealed else {
        return Ok(());
    };
    let mut record = state.record().clone();
    record.sealed = None;
    let found = ImageIdentity::of(&record.image).ok().flatten();
    if found != Some(sealed)
        && matches!(record.ownership, Ownership::Owner { .. })
        && let Some(baseline) = record.baseline.take()
    {
        tracing::warn!(
            volume = %record.name, image = %record.image.display(),
            "the image was changed while no agent had it: what the copy at site {} lacks is not known any more, so the \
             next migration there compares everything", baseline.site
        );
    }
    // The record first: without a baseline the bits mean nothing.
    state.store(record)?;
    if state.record().baseline.is_none()
        && matches!(state.record().ownership, Ownership::Owner { .. })
    {
        state.remove_unacked()?;
    }
    Ok(())
}

impl Volume {
    /// What stands here, for content that may arrive; `None` unless the volume has moved away whole.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        let record = self.record().filter(|record| record.is_replica())?;
        let is_there = match (&self.image, fs::metadata(&record.image)) {
            (Some(image), Ok(at_path)) => {
                image
                    .file_number()
                    .is_ok_and(|number| number == (at_path.dev(), at_path.ino()))
                    && (!at_path.is_file() || at_path.len() == record.size.bytes())
            }
            (None, Ok(_)) => true,
            (_, Err(_)) => false,
        };
        if !is_there {
            return Some(Standing::Lost);
        }
        let known = record.replica.and_then(|replica| replica.identity);
        let found = ImageIdentity::of(&record.image).ok().flatten();
        Some(match (record.last_migration, known) {
            (Some(migration), Some(_)) if known == found => Standing::Untouched(migration),
            _ => Standing::Unsure,
        })
    }

    /// A volume that moved away comes back: makes the record say so, and parks guest requests until the switch. From then
    /// on what stands here may be written over; [`leave_incoming`](Self::leave_incoming) gives that up.
    ///
    /// # Errors
    /// When the disk fails.
    ///
    /// # Panics
    /// As [`Rules::enter_incoming`](crate::rules::Rules::enter_incoming).
    pub fn enter_incoming(&self, ownership: Ownership) -> io::Result<()> {
        if let Some(durable) = &self.durable {
            let mut state = durable.state();
            let mut record = state.record().clone();
            record.set_ownership(ownership);
            record.in_place = true;
            self.begin_undo(&mut record, state.path());
            state.store(record)?;
        }
        self.came_in_place.store(true, Ordering::Release);
        self.drop_unacked()?;
        // What was hot when it moved away is of the past, and comes with it anyway.
        self.heat.clear(self.size());
        self.core.change(|core| core.rules.enter_incoming());
        Ok(())
    }

    /// The way back was given up before the switch: the record says that the volume has moved away whole, as before, and
    /// guest requests are refused. Nothing may be written any more by whoever wrote what arrived.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a volume that did not come back over a copy, or when the disk fails.
    pub fn leave_incoming(&self) -> io::Result<()> {
        let refused = || {
            let problem = "content does not arrive over a copy here";
            io::Error::new(io::ErrorKind::InvalidInput, problem)
        };
        if self.mode() != Mode::Incoming {
            return Err(refused());
        }
        let synced = self.sync();
        if let Some(durable) = &self.durable {
            let mut state = durable.state();
            let mut record = state.record().clone();
            let Ownership::Incoming { migration, peer } = record.ownership.clone() else {
                return Err(refused());
            };
            if !record.in_place {
                return Err(refused());
            }
            let epoch = record.epoch;
            record.set_ownership(Ownership::Released {
                epoch,
                migration,
                peer,
                complete: true,
            });
            let is_sure = synced.is_ok() && self.came_in_place.swap(false, Ordering::AcqRel);
            record.replica = Some(of(&record.image, is_sure));
            state.store(record)?;
        }
        self.core.change(|core| core.rules.leave_incoming());
        Ok(())
    }

    /// The agent stops in order, nobody writes any more: takes note of the image, so that the next one finds out whether
    /// somebody has changed it while no agent had it.
    ///
    /// # Errors
    /// When the disk fails. Nothing is noted then.
    pub fn seal(&self) -> io::Result<()> {
        let Some(durable) = &self.durable else {
            return Ok(());
        };
        let mut state = durable.state();
        let mut record = state.record().clone();
        if !matches!(record.ownership, Ownership::Owner { .. }) || record.baseline.is_none() {
            return Ok(());
        }
        record.sealed = ImageIdentity::of(&record.image)?;
        Ok(state.store(record)?)
    }
}
