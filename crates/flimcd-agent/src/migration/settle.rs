//! What the records of several volumes say together, and putting them right after a crash.
//!
//! Every volume has a durable record of its own, so a crash can leave those of one migration mixed. Before any
//! volume is opened, and so before any guest is let in, they are put right by this table; `e` is the migration's
//! epoch, and only records of this very migration count.
//!
//! | source: the records | what it means | put right |
//! | --- | --- | --- |
//! | all Owner | Owner | |
//! | some Prepared, some Owner | Owner: nothing was offered yet, or it was refused already | all Owner |
//! | all Prepared | Prepared(e+1) | |
//! | some Released, some Prepared | Released(e+1): the target has said that it owns them | all Released |
//! | all Released | Released(e+1); completed once all are complete | |
//! | Released and Owner | never written by us | nothing: the migration waits for a person |
//!
//! | target: the records | what it means | put right |
//! | --- | --- | --- |
//! | all Incoming | Incoming | |
//! | some Arriving, some Incoming | Incoming: `SwitchDone` was not sent, and no guest was let in | all Incoming |
//! | all Arriving, or some Owner | Owner(e+1) | |
//! | all Owner | Complete(e+1) | |
//! | Owner and Incoming | never written by us | nothing: the migration waits for a person |
//! | Arriving, but e+1 was refused durably or the migration ended early | Incoming | all Incoming |
//!
//! A volume that is not there decides nothing: with its directory lost, putting others back could take what their
//! guest has written.

use flimcd_core::{Epoch, MigrationId};
use flimcd_volume::{Ownership, StateError, VolumesDir, state::StateDir};
use flimcd_wire::{SourceStage, TargetStage};
use std::path::Path;

use super::store::MigrationRecord;
use crate::{
    api::{Phase, Role},
    error::StartError,
};

/// Puts the records of all volumes in `dir` right that `migrations` are about. None of them may be open. Blocks.
pub(crate) fn settle_all(dir: &Path, migrations: &[MigrationRecord]) -> Result<(), StartError> {
    let failed = |error: StateError| StartError::Volume {
        path: dir.to_owned(),
        problem: error.to_string(),
    };
    let volumes = VolumesDir::open(dir).map_err(failed)?;
    for migration in migrations {
        settle_one(&volumes, migration).map_err(failed)?;
    }
    Ok(())
}

fn settle_one(volumes: &VolumesDir, migration: &MigrationRecord) -> Result<(), StateError> {
    // Of those that ended well, and at the source of all that ended, every record was written before.
    if migration.status.phase == Phase::Completed
        || (migration.has_ended() && migration.role == Role::Source)
    {
        return Ok(());
    }
    let Some(mut found) = open_all(volumes, migration)? else {
        return Ok(());
    };
    let ownerships: Vec<_> = found
        .iter()
        .map(|state| state.record().ownership.clone())
        .collect();
    for (state, wanted) in found.iter_mut().zip(settled(migration, &ownerships)) {
        if state.record().ownership != wanted {
            put_right(state, migration, wanted)?;
        }
    }
    Ok(())
}

/// The directories of a migration's volumes; `None` if one is not there.
fn open_all(
    volumes: &VolumesDir,
    migration: &MigrationRecord,
) -> Result<Option<Vec<StateDir>>, StateError> {
    let mut found = Vec::new();
    for volume in &migration.volumes {
        match volumes.open_volume(&volume.name) {
            Ok(state) if state.record().id == volume.id => found.push(state),
            Ok(_) | Err(StateError::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(found))
}

fn put_right(
    state: &mut StateDir,
    migration: &MigrationRecord,
    wanted: Ownership,
) -> Result<(), StateError> {
    let mut record = state.record().clone();
    tracing::info!(
        migration = %migration.id, volume = %record.name, was = ?record.ownership, now = ?wanted,
        "the agent ended while the volumes of a migration changed hands; the record is put right"
    );
    let is_back = matches!(wanted, Ownership::Incoming { .. });
    record.set_ownership(wanted);
    state.store(record)?;
    if is_back {
        state.remove_missing()?;
    }
    Ok(())
}

/// How many records say what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    all: usize,
    owner: usize,
    prepared: usize,
    released: usize,
    /// Those among `released` whose target has everything.
    complete: usize,
    incoming: usize,
    arriving: usize,
    /// Of another migration.
    foreign: usize,
}

fn count(id: MigrationId, ownerships: &[Ownership]) -> Count {
    let mut count = Count {
        all: ownerships.len(),
        ..Count::default()
    };
    for ownership in ownerships {
        let kind = match ownership {
            Ownership::Owner { .. } => &mut count.owner,
            other if other.migration() != Some(id) => &mut count.foreign,
            Ownership::Prepared { .. } => &mut count.prepared,
            Ownership::Released { complete, .. } => {
                count.complete += usize::from(*complete);
                &mut count.released
            }
            Ownership::Incoming { .. } => &mut count.incoming,
            Ownership::Arriving { .. } => &mut count.arriving,
        };
        *kind += 1;
    }
    count
}

/// What the records should say. As they are where nothing is mixed, or where nobody can say.
fn settled(migration: &MigrationRecord, ownerships: &[Ownership]) -> Vec<Ownership> {
    let found = count(migration.id, ownerships);
    let offered = migration.epoch.next();
    let peer = || migration.peer.clone();
    let wanted = |ownership: &Ownership| match (migration.role, ownership) {
        (Role::Source, Ownership::Prepared { epoch, .. })
            if found.owner > 0 && found.owner + found.prepared == found.all =>
        {
            Ownership::Owner { epoch: *epoch }
        }
        (Role::Source, Ownership::Prepared { .. })
            if found.released > 0 && found.released + found.prepared == found.all =>
        {
            Ownership::Released {
                epoch: offered,
                migration: migration.id,
                peer: peer(),
                complete: false,
            }
        }
        (
            Role::Target,
            Ownership::Arriving {
                epoch,
                migration: id,
                ..
            },
        ) if *id == migration.id
            && (found.incoming > 0 && found.incoming + found.arriving == found.all
                || migration.refused >= Some(*epoch)
                || migration.has_ended()) =>
        {
            Ownership::Incoming {
                migration: migration.id,
                peer: peer(),
            }
        }
        (_, ownership) => ownership.clone(),
    };
    ownerships.iter().map(wanted).collect()
}

/// Where a source stands; `None` if the records contradict each other.
pub(crate) fn source_stage(
    id: MigrationId,
    offered: Epoch,
    ownerships: &[Ownership],
) -> Option<SourceStage> {
    let found = count(id, ownerships);
    match found.all {
        all if found.owner == all => Some(SourceStage::Owner),
        all if found.prepared == all => Some(SourceStage::Prepared(offered)),
        all if found.released == all => Some(SourceStage::Released(offered)),
        _ => None,
    }
}

/// Where a target stands; `None` if the records contradict each other.
pub(crate) fn target_stage(
    id: MigrationId,
    offered: Epoch,
    ownerships: &[Ownership],
) -> Option<TargetStage> {
    let found = count(id, ownerships);
    match found.all {
        all if found.incoming == all => Some(TargetStage::Incoming),
        all if found.owner == all => Some(TargetStage::Complete(offered)),
        all if found.owner + found.arriving == all => Some(TargetStage::Owner(offered)),
        _ => None,
    }
}

/// Whether a migration that its own record takes for running has completed, by the volumes' records.
pub(crate) fn is_complete(role: Role, id: MigrationId, ownerships: &[Ownership]) -> bool {
    let found = count(id, ownerships);
    match role {
        Role::Source => found.complete == found.all,
        Role::Target => found.owner == found.all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::{progress::fresh_status, store::MovedVolume};
    use flimcd_core::{SiteName, VolumeId};

    const ID: MigrationId = MigrationId(77);
    const E: Epoch = Epoch(4);

    fn peer() -> SiteName {
        "beta".parse().unwrap()
    }

    /// One letter each: **O**wner, **P**repared, **R**eleased, **C** released and complete, **I**ncoming,
    /// **A**rriving, **X** of another migration.
    fn ownership(letter: char) -> Ownership {
        let (migration, peer) = (ID, peer());
        let released = |complete| Ownership::Released {
            epoch: E.next(),
            migration,
            peer: "beta".parse().unwrap(),
            complete,
        };
        match letter {
            'O' => Ownership::Owner { epoch: E },
            'P' => Ownership::Prepared {
                epoch: E,
                migration,
                peer,
            },
            'R' => released(false),
            'C' => released(true),
            'I' => Ownership::Incoming { migration, peer },
            'A' => Ownership::Arriving {
                epoch: E.next(),
                migration,
                peer,
            },
            _ => Ownership::Incoming {
                migration: MigrationId(1),
                peer,
            },
        }
    }

    fn all(letters: &str) -> Vec<Ownership> {
        letters.chars().map(ownership).collect()
    }

    fn migration(role: Role) -> MigrationRecord {
        let names = vec!["vm".parse().unwrap()];
        let moved = vec![MovedVolume {
            id: VolumeId(1),
            name: "vm".parse().unwrap(),
        }];
        let status = fresh_status(ID, names, role, peer(), 1);
        MigrationRecord::new(role, moved, E, None, status)
    }

    #[test]
    fn the_table_of_the_source() {
        let check = |found: &str, put_right: &str, stage: Option<SourceStage>, ended: bool| {
            let settled = settled(&migration(Role::Source), &all(found));
            assert_eq!(settled, all(put_right), "{found}");
            assert_eq!(source_stage(ID, E.next(), &settled), stage, "{found}");
            assert_eq!(
                is_complete(Role::Source, ID, &settled),
                ended,
                "{found} completed"
            );
        };
        let prepared = Some(SourceStage::Prepared(E.next()));
        let released = Some(SourceStage::Released(E.next()));
        check("O", "O", Some(SourceStage::Owner), false);
        check("OOO", "OOO", Some(SourceStage::Owner), false);
        check("POO", "OOO", Some(SourceStage::Owner), false);
        check("OPP", "OOO", Some(SourceStage::Owner), false);
        check("P", "P", prepared, false);
        check("PPP", "PPP", prepared, false);
        check("PRP", "RRR", released, false);
        check("PCP", "RCR", released, false);
        check("RC", "RC", released, false);
        check("CC", "CC", released, true);
        check("RO", "RO", None, false);
        check("POR", "POR", None, false);
        check("PX", "PX", None, false);
    }

    #[test]
    fn the_table_of_the_target() {
        let check = |found: &str, put_right: &str, stage: Option<TargetStage>, ended: bool| {
            let settled = settled(&migration(Role::Target), &all(found));
            assert_eq!(settled, all(put_right), "{found}");
            assert_eq!(target_stage(ID, E.next(), &settled), stage, "{found}");
            assert_eq!(
                is_complete(Role::Target, ID, &settled),
                ended,
                "{found} completed"
            );
        };
        let owner = Some(TargetStage::Owner(E.next()));
        check("I", "I", Some(TargetStage::Incoming), false);
        check("AI", "II", Some(TargetStage::Incoming), false);
        check("IAA", "III", Some(TargetStage::Incoming), false);
        check("A", "A", owner, false);
        check("AAA", "AAA", owner, false);
        check("AOA", "AOA", owner, false);
        check("OO", "OO", Some(TargetStage::Complete(E.next())), true);
        check("OI", "OI", None, false);
        check("OAI", "OAI", None, false);
        check("AX", "AX", None, false);
    }

    #[test]
    fn what_was_refused_has_not_arrived() {
        let mut record = migration(Role::Target);
        record.refused = Some(E);
        assert_eq!(settled(&record, &all("AA")), all("AA"), "an older epoch");
        record.refused = Some(E.next());
        assert_eq!(settled(&record, &all("AA")), all("II"));
        record.refused = None;
        record.status.phase = Phase::Failed;
        assert_eq!(settled(&record, &all("AI")), all("II"));
    }
}
