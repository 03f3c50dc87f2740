//! The record of a volume, and its bytes.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use flimcd_core::{Epoch, MigrationId, SiteName, VolumeId, VolumeName, VolumeSize};
use serde::{Deserialize, Serialize};

use super::StateError;

const MAGIC: &[u8; 8] = b"FLIMVOL\0";
const VERSION: u32 = 1;
const HEAD: usize = 20;
/// Far more than a record needs: what is longer is not read.
pub(super) const RECORD_BYTES_MAX: usize = 64 * 1024;

/// Who owns a volume, as far as this site knows. Every change of it is durable before it takes effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Ownership {
    /// This site, whole.
    Owner {
        /// The epoch owned.
        epoch: Epoch,
    },
    /// This site, but the guest is stopped and the next epoch is offered to a peer.
    Prepared {
        /// The epoch owned.
        epoch: Epoch,
        /// In which migration.
        migration: MigrationId,
        /// To whom.
        peer: SiteName,
    },
    /// A peer.
    Released {
        /// The epoch that the peer owns.
        epoch: Epoch,
        /// In which migration.
        migration: MigrationId,
        /// Who.
        peer: SiteName,
        /// Whether the peer has every block. Until then this site serves what is missing there.
        complete: bool,
    },
    /// A peer; its content arrives here.
    Incoming {
        /// In which migration.
        migration: MigrationId,
        /// From whom.
        peer: SiteName,
    },
    /// This site, with blocks still missing.
    Arriving {
        /// The epoch owned.
        epoch: Epoch,
        /// In which migration.
        migration: MigrationId,
        /// Who has the missing blocks.
        peer: SiteName,
    },
}

impl Ownership {
    /// The epoch it names; none while content arrives.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Owner { epoch }
            | Self::Prepared { epoch, .. }
            | Self::Released { epoch, .. }
            | Self::Arriving { epoch, .. } => Some(*epoch),
            Self::Incoming { .. } => None,
        }
    }

    /// The migration it belongs to.
    #[must_use]
    pub fn migration(&self) -> Option<MigrationId> {
        match self {
            Self::Owner { .. } => None,
            Self::Prepared { migration, .. }
            | Self::Released { migration, .. }
            | Self::Incoming { migration, .. }
            | Self::Arriving { migration, .. } => Some(*migration),
        }
    }

    /// The other site it names.
    #[must_use]
    pub fn peer(&self) -> Option<&SiteName> {
        match self {
            Self::Owner { .. } => None,
            Self::Prepared { peer, .. }
            | Self::Released { peer, .. }
            | Self::Incoming { peer, .. }
            | Self::Arriving { peer, .. } => Some(peer),
        }
    }

    /// Whether a guest may run here.
    #[must_use]
    pub fn owns(&self) -> bool {
        matches!(self, Self::Owner { .. } | Self::Arriving { .. })
    }
}

/// What is durably known of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its identity, kept when it moves.
    pub id: VolumeId,
    /// Its name, here.
    pub name: VolumeName,
    /// Whose it is: content is only shared inside a tenant.
    pub tenant: String,
    /// Its size.
    pub size: VolumeSize,
    /// The highest epoch known here.
    pub epoch: Epoch,
    /// Who owns it.
    pub ownership: Ownership,
    /// The image, as an absolute path.
    pub image: PathBuf,
    /// Whether the image was there before the volume.
    pub imported: bool,
    /// The migration that last brought or took it.
    pub last_migration: Option<MigrationId>,
    /// Of an owner: the copy at another site of which `unacked` says what it may lack.
    #[serde(default)]
    pub baseline: Option<Baseline>,
    /// Of a volume that has moved away: the copy that stayed here.
    #[serde(default)]
    pub replica: Option<Replica>,
    /// While content arrives: it is written over a copy that stood here.
    #[serde(default)]
    pub in_place: bool,
    /// The image as the last agent left it, if that stopped in order and is to be held to it.
    #[serde(default)]
    pub sealed: Option<ImageIdentity>,
    /// Of a copy that is kept by increments: the moment that it is of, or that its undo journal leads back to.
    #[serde(default)]
    pub consistent: Option<Consistent>,
}

/// A moment at which a guest could have lost power at the source, and found this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consistent {
    /// The increment that brought it.
    pub migration: MigrationId,
    /// When that was, by the source's clock, in milliseconds since 1970.
    pub as_of_unix_ms: u64,
    /// The image has been written over since, and what stood there is in the undo journal.
    pub undo: bool,
}

/// A copy of the volume at another site. It differs from the image here at most in the blocks of `unacked`.
///
/// That holds from the moment the migration begins: then `unacked` is full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Where it is.
    pub site: SiteName,
    /// The migration that left it there.
    pub migration: MigrationId,
}

/// A copy that stayed when the volume moved away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Since when, as milliseconds since 1970.
    pub since_unix_ms: u64,
    /// The image as it was then; `None` where that is not known, and the copy may be of any time.
    pub identity: Option<ImageIdentity>,
}

/// By what an image is known again as untouched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageIdentity {
    /// Its length in bytes.
    pub size: u64,
    /// The file system's device number.
    pub device: u64,
    /// Number of the file on it.
    pub inode: u64,
    /// When its content was last changed: seconds and nanoseconds.
    pub modified: (i64, i64),
    /// When anything of it was last changed.
    pub changed: (i64, i64),
}

impl ImageIdentity {
    /// Of the file at `path`; `None` for what is no regular file, since a disk does not say when it was written.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let found = fs::metadata(path)?;
        Ok(found.is_file().then(|| Self {
            size: found.len(),
            device: found.dev(),
            inode: found.ino(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }))
    }
}

impl VolumeRecord {
    /// Whether the volume has moved away whole, so that what is here is a copy of it.
    #[must_use]
    pub fn is_replica(&self) -> bool {
        matches!(self.ownership, Ownership::Released { complete: true, .. })
    }

    /// What follows from a new owner. The identity of a copy that stays is for the caller to fill in.
    pub fn set_ownership(&mut self, ownership: Ownership) {
        let last = ownership.migration();
        self.last_migration = last.or(self.last_migration);
        self.epoch = ownership.epoch().map_or(self.epoch, |e| e.max(self.epoch));
        match &ownership {
            Ownership::Owner { .. } => self.in_place = false,
            Ownership::Released { complete: true, .. } => {
                self.baseline = None;
                self.in_place = false;
            }
            Ownership::Prepared { .. } | Ownership::Released { .. } => {}
            Ownership::Incoming { .. } => self.baseline = None,
            Ownership::Arriving {
                migration, peer, ..
            } => {
                self.baseline = Some(Baseline {
                    site: peer.clone(),
                    migration: *migration,
                });
            }
        }
        if !matches!(ownership, Ownership::Released { .. }) {
            self.replica = None;
        }
        if !matches!(
            ownership,
            Ownership::Incoming { .. } | Ownership::Released { complete: true, .. }
        ) {
            self.consistent = None;
        }
        self.ownership = ownership;
    }

    /// The record's bytes; the byte table stands in the module above.
    pub(super) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let payload = serde_json::to_vec(self)?;
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEAD + payload.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &payload);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&payload);
        Ok(bytes)
    }

    /// Reads a record's bytes, which came from `path`.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self, StateError> {
        let damaged = |why: &str| StateError::damaged(path, why);
        let Some((head, payload)) = bytes.split_at_checked(HEAD) else {
            return Err(damaged("it is too short"));
        };
        if &head[..8] != MAGIC {
            return Err(damaged("it does not begin as a record does"));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| head[at + i]));
        let (version, length, crc) = (number(8), number(12), number(16));
        // The version first: a later format may have everything else in other places.
        if version != VERSION {
            return Err(if version > VERSION {
                StateError::TooNew {
                    path: path.to_owned(),
                    version,
                }
            } else {
                damaged("its version is 0")
            });
        }
        if payload.len() as u64 != u64::from(length) {
            return Err(damaged("its length is wrong"));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&head[..16]), payload) != crc {
            return Err(damaged("its checksum is wrong"));
        }
        serde_json::from_slice(payload).map_err(|error| damaged(&error.to_string()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample(epoch: u64) -> VolumeRecord {
        VolumeRecord {
            id: VolumeId(0x1234),
            name: "vm-1".parse().unwrap(),
            tenant: "default".into(),
            size: VolumeSize::new(12345).unwrap(),
            epoch: Epoch(epoch),
            ownership: Ownership::Prepared {
                epoch: Epoch(epoch),
                migration: MigrationId(7),
                peer: "west".parse().unwrap(),
            },
            image: "/images/vm-1.raw".into(),
            imported: false,
            last_migration: Some(MigrationId(7)),
            baseline: None,
            replica: None,
            in_place: false,
            sealed: None,
            consistent: None,
        }
    }

    fn decode(bytes: &[u8]) -> Result<VolumeRecord, StateError> {
        VolumeRecord::decode(bytes, Path::new("record"))
    }

    #[test]
    fn round_trip_and_bytes_as_in_the_table() {
        let bytes = sample(3).encode().unwrap();
        assert_eq!(decode(&bytes).unwrap(), sample(3));
        assert_eq!(&bytes[..12], b"FLIMVOL\0\x01\0\0\0");
        let json: serde_json::Value = serde_json::from_slice(&bytes[20..]).unwrap();
        assert_eq!(json["ownership"]["state"], "prepared");
    }

    #[test]
    fn a_version_from_the_future_says_what_to_do() {
        let mut bytes = sample(3).encode().unwrap();
        bytes[8] = 2;
        bytes.truncate(30);
        let error = decode(&bytes).unwrap_err();
        assert!(matches!(error, StateError::TooNew { version: 2, .. }));
        assert!(error.to_string().contains("newer one"), "{error}");
    }

    proptest! {
        #[test]
        fn damage_is_found_and_never_panics(cut in 0usize..400, flip in 0usize..400, bit in 0u8..8) {
            let good = sample(3).encode().unwrap();
            let mut bytes = good.clone();
            bytes.truncate(cut);
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= 1 << bit;
            }
            match decode(&bytes) {
                Ok(record) => prop_assert!(bytes == good && record == sample(3)),
                Err(StateError::Damaged { .. } | StateError::TooNew { .. }) => prop_assert!(bytes != good),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        #[test]
        fn random_bytes_are_no_record(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
