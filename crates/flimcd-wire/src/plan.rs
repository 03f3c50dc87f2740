//! What a migration would cost, asked of the real target.
//!
//! ```text
//!  source                                          target
//!    PlanOpen (volumes)    ──────────────────────►   could they come? what stands there?
//!                          ◄──────────────────────   Planned (bases), or Failed
//!    SeedAsk …             ◄─────────────────────►   SeedOffer, SeedPart …: as in a migration
//!    Probe …               ◄─────────────────────►   Probed …: as in a migration
//!    Cancel                ──────────────────────►   the target forgets it
//! ```
//! A plan has a migration's number of its own. It makes no volume and no record at the target, and ends there with the link,
//! with `Cancel`, or when nothing is asked for a while.

use flimcd_core::limits;
use serde::{Deserialize, Serialize};

use crate::{Base, VolumeOffer};

/// First message of a plan; see the module of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanOpen {
    /// The volumes that would move together, as in [`Open`](crate::Open).
    pub volumes: Vec<VolumeOffer>,
}

/// Answer to [`PlanOpen`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// What stands at the target for each volume, in their order.
    pub bases: Vec<Base>,
}

impl PlanOpen {
    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        (1..=limits::MAX_VOLUMES_PER_MIGRATION).contains(&self.volumes.len())
    }
}

impl Planned {
    /// Whether it could be one.
    pub(crate) fn is_sound(&self) -> bool {
        (1..=limits::MAX_VOLUMES_PER_MIGRATION).contains(&self.bases.len())
            && !self.bases.contains(&Base::Invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Body, Class, Frame, FrameDecoder, Message, encode};
    use flimcd_core::{MigrationId, VolumeId, VolumeSize};

    /// Sends a message through the frame codec.
    fn sent(message: Message) -> Option<Message> {
        let frame = Frame {
            migration: MigrationId(1),
            class: Class::Control,
            message,
        };
        let encoded = encode(&Body::Frame(frame));
        let mut decoder = FrameDecoder::new();
        decoder.buffer().extend_from_slice(&encoded.head);
        decoder.buffer().extend_from_slice(&encoded.payload);
        match decoder.poll() {
            Ok(Some(Body::Frame(frame))) => Some(frame.message),
            _ => None,
        }
    }

    #[test]
    fn plans_survive_the_link_and_empty_ones_are_refused() {
        let offer = VolumeOffer {
            id: VolumeId(7),
            name: "vm".parse().unwrap(),
            size: VolumeSize::new(5000).unwrap(),
            base: Some(MigrationId(3)),
        };
        let most = limits::MAX_VOLUMES_PER_MIGRATION;
        for count in [0, 1, most, most + 1] {
            let open = Message::PlanOpen(PlanOpen {
                volumes: vec![offer.clone(); count],
            });
            let planned = Message::Planned(Planned {
                bases: vec![Base::Unknown; count],
            });
            for message in [open, planned] {
                let back = sent(message.clone());
                let expected = (1..=most).contains(&count).then_some(message);
                assert_eq!(back, expected, "{count}");
            }
        }
        let bases = vec![Base::Zeroes, Base::Invalid];
        assert_eq!(sent(Message::Planned(Planned { bases })), None);
    }
}
