//! Volumes that come from a peer: whether they may, whether they fit, and making them.

use flimcd_core::{Epoch, MigrationId, SiteName, VolumeName};
use flimcd_volume::{Consistent, NewVolume, Ownership, Standing, Volume};
use flimcd_wire::{Base, ErrorCode, Open, VolumeOffer, WireError};
use std::{collections::BTreeSet, fs, sync::Arc};

use super::{
    DEFAULT_TENANT, Hosted, Hosting, cannot_make,
    hosted::{allocated, state_of},
};
use crate::{
    Config,
    api::{ApiCode, ErrorBody},
    error::refuse,
    ops::not_owner,
};

impl Hosting {
    /// Whether the volumes that a peer wants to send may come, and fit together: what stands here for each. Blocks.
    pub(crate) fn check_arrival(
        &self,
        open: &Open,
        config: &Config,
    ) -> Result<Vec<Base>, WireError> {
        let names: BTreeSet<_> = open.volumes.iter().map(|offer| &offer.name).collect();
        let ids: BTreeSet<_> = open.volumes.iter().map(|offer| offer.id).collect();
        if names.len() < open.volumes.len() || ids.len() < open.volumes.len() {
            let text = "the source names a volume twice in one migration";
            return Err(WireError::new(ErrorCode::PROTOCOL, text));
        }
        let mut bases = Vec::new();
        let mut bytes = 0;
        for offer in &open.volumes {
            bases.push(self.check_one(offer, config)?);
            let there = self.by_id(offer.id);
            let there = there.map_or(0, |hosted| allocated(&hosted.record().image));
            bytes += offer.size.bytes().saturating_sub(there);
        }
        self.check_room(bytes, config)?;
        Ok(bases)
    }

    fn check_one(&self, offer: &VolumeOffer, config: &Config) -> Result<Base, WireError> {
        let site = &config.site;
        let exists = |text: String| Err(WireError::new(ErrorCode::VOLUME_EXISTS, text));
        if let Some(same) = self.by_id(offer.id) {
            let record = same.record();
            let name = same.name();
            if record.size != offer.size {
                let text = format!(
                    "site {site} has this volume as {name} with {} bytes, but {} are to come; remove it there",
                    record.size.bytes(),
                    offer.size.bytes()
                );
                return Err(WireError::new(ErrorCode::SIZE, text));
            }
            let Some(standing) = same.volume().standing() else {
                let state = state_of(&record.ownership).0;
                return exists(format!(
                    "site {site} has this volume already, as {name} ({state})"
                ));
            };
            if *name != offer.name {
                return exists(format!(
                    "site {site} keeps a copy of this volume as {name}, not {}; remove it there with `flimcd replica drop \
                     {name}`, then migrate again",
                    offer.name
                ));
            }
            if standing == Standing::Lost {
                return exists(format!(
                    "the image {} of the copy of {name} at site {site} was moved, replaced or cut; remove the copy there with \
                     `flimcd replica drop {name} --keep-image`, then migrate again",
                    record.image.display()
                ));
            }
            return Ok(match (standing, offer.base) {
                (Standing::Untouched(left), Some(base)) if left == base => Base::Known,
                _ => {
                    tracing::info!(
                        volume = %name, ?standing, base = ?offer.base,
                        "the copy that stands here is of some time: all of it is compared"
                    );
                    Base::Unknown
                }
            });
        }
        if self.slots().contains_key(&offer.name) {
            return exists(format!(
                "site {site} has another volume called {}; rename or remove one of the two",
                offer.name
            ));
        }
        let image = self.image_path(&offer.name);
        if fs::symlink_metadata(&image).is_ok() {
            return exists(format!(
                "at site {site} there is a file {} where the image would be; move it away",
                image.display()
            ));
        }
        Ok(Base::Zeroes)
    }

    fn check_room(&self, bytes: u64, config: &Config) -> Result<(), WireError> {
        let room = rustix::fs::statvfs(&self.images_dir).map_err(|error| {
            let text = format!(
                "the room at site {} cannot be found out: {error}",
                config.site
            );
            WireError::new(ErrorCode::DISK, text)
        })?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        // What is still to come of volumes that are arriving already.
        let promised: u64 = self
            .all()
            .iter()
            .map(|hosted| hosted.record())
            .filter(|record| {
                matches!(
                    record.ownership,
                    Ownership::Incoming { .. } | Ownership::Arriving { .. }
                )
            })
            .map(|record| record.size.bytes().saturating_sub(allocated(&record.image)))
            .sum();
        let reserve = config.limits.reserve_bytes();
        let usable = free.saturating_sub(promised).saturating_sub(reserve);
        let needed = if config.limits.overcommit { 1 } else { bytes };
        if needed <= usable {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let text = format!(
            "site {} has too little room for {} MiB: {} MiB are free in {}, {} MiB of that are promised to \
             other volumes and {} MiB kept in reserve; make room{}",
            config.site,
            mib(bytes),
            mib(free),
            self.images_dir.display(),
            mib(promised),
            mib(reserve),
            if config.limits.overcommit {
                ""
            } else {
                ", or set limits.overcommit there if the volume is sparse enough"
            }
        );
        Err(WireError::new(ErrorCode::NO_SPACE, text))
    }

    /// Makes the volumes for an arrival that was checked: all or none. Blocks.
    pub(crate) fn take_in(
        &self,
        open: &Open,
        migration: MigrationId,
        peer: &SiteName,
    ) -> Result<Vec<Arc<Hosted>>, WireError> {
        let mut made: Vec<Arc<Hosted>> = Vec::new();
        for offer in &open.volumes {
            match self.make_arriving(offer, open.epoch, migration, peer) {
                Ok(hosted) => made.push(hosted),
                Err(error) => {
                    for hosted in made {
                        if let Err(error) = self.discard(hosted.name()) {
                            tracing::error!(volume = %hosted.name(), "cleaning up failed: {error}");
                        }
                    }
                    return Err(WireError::new(
                        ErrorCode::OTHER,
                        format!("at the target: {error}"),
                    ));
                }
            }
        }
        Ok(made)
    }

    fn make_arriving(
        &self,
        offer: &VolumeOffer,
        epoch: Epoch,
        migration: MigrationId,
        peer: &SiteName,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        if let Some(hosted) = self.by_id(offer.id) {
            return self.come_back(&hosted, migration, peer);
        }
        let reservation = self.reserve(&offer.name)?;
        let new = NewVolume {
            id: offer.id,
            name: offer.name.clone(),
            tenant: DEFAULT_TENANT.to_owned(),
            image: self.image_path(&offer.name),
            epoch,
            ownership: Ownership::Incoming {
                migration,
                peer: peer.clone(),
            },
        };
        let volume = Volume::create(&self.volumes, new, offer.size, &self.options)
            .map_err(|error| cannot_make(&error))?;
        self.put(reservation, &volume, true)
    }

    /// Puts a copy back to its last consistent moment. Nothing arrives at it meanwhile. Blocks.
    pub(crate) fn restore_replica(
        &self,
        name: &VolumeName,
    ) -> Result<(Consistent, u64), ErrorBody> {
        let hosted = self.get(name)?;
        let reservation = self.withdraw(name)?;
        let restored = hosted.volume.take_image_locks().map_err(|error| {
            let message = format!("the copy of {name} is in use: {error}");
            refuse(ApiCode::Image, message, "")
        });
        let restored = restored.and_then(|()| {
            let restored = hosted.volume.restore_replica();
            hosted.volume.give_up_image_locks();
            restored.map_err(|error| {
                let message = format!("restoring the replica {name} failed: {error}");
                refuse(ApiCode::Io, message, "put that right and try again")
            })
        });
        reservation.fill(hosted);
        restored
    }

    /// Lets content arrive over the copy that stands here. Nobody else changes the volume meanwhile.
    fn come_back(
        &self,
        hosted: &Arc<Hosted>,
        migration: MigrationId,
        peer: &SiteName,
    ) -> Result<Arc<Hosted>, ErrorBody> {
        let name = hosted.name();
        let reservation = self.withdraw(name)?;
        let entered = if hosted.record().is_replica() {
            hosted.volume.take_image_locks().map_err(|error| {
                let message = format!("the copy of {name} cannot be written over: {error}");
                refuse(ApiCode::Image, message, "")
            })
        } else {
            Err(not_owner(name, hosted.state(), None))
        };
        let entered = entered.and_then(|()| {
            let incoming = Ownership::Incoming {
                migration,
                peer: peer.clone(),
            };
            hosted.volume.enter_incoming(incoming).map_err(|error| {
                let message = format!("recording that {name} comes back failed: {error}");
                refuse(ApiCode::Io, message, "")
            })
        });
        reservation.fill(hosted.clone());
        entered?;
        Ok(hosted.clone())
    }
}
