//! The record of a volume, and its bytes.

use std::path::{Path, PathBuf};

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
}

impl VolumeRecord {
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
