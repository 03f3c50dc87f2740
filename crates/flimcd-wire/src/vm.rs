//! What two agents say to each other about a running machine: a *session* beside the migration of its disks.
//!
//! A session has a number of its own, in the place of a migration's in its frames, so that the disks'
//! machines and the running state do not wait for each other. Both sides send their `Open` or `Accept` first
//! after every link-up. What belongs to one transfer of the running state carries the number of the
//! *attempt*, so that what is left of a broken one is not taken for the next.

use bytes::Bytes;
use flimcd_core::{VolumeName, limits};
use serde::{Deserialize, Serialize};

use crate::{DecodeError, WireError};

/// One message of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmMessage {
    /// Never sent; a decoder refuses it.
    Invalid,

    // Source to target.
    /// First message after every link-up.
    Open(VmOpen),
    /// Start the machine, so that it waits for its running state. The one of an earlier attempt is ended.
    Prepare {
        /// Counts from 1.
        attempt: u32,
    },
    /// The session ends before the switch; the target ends its machine and forgets it.
    Cancel,
    /// Answer to `Running`: the source's machine is gone for good.
    Finished,

    // Target to source.
    /// Answer to `Open`.
    Accept {
        /// The last attempt that was begun here, 0 for none.
        attempt: u32,
        /// Where it stands.
        stage: VmStage,
    },
    /// The machine waits for its running state.
    Listening {
        /// Which attempt.
        attempt: u32,
        /// Whether pages may follow the switch there.
        postcopy: bool,
    },
    /// The machine has all of its running state (or all but pages that follow), and stands still.
    Loaded {
        /// Which attempt.
        attempt: u32,
    },
    /// The guest runs here.
    Running,
    /// An attempt ended here. Before the switch that ends the session unless the source begins another.
    Broken {
        /// Which attempt.
        attempt: u32,
        /// Why.
        error: WireError,
    },
    /// The session cannot go on here; before the switch only.
    Failed(WireError),

    // Both ways: the bytes that the two hypervisors say to each other.
    /// A part of a stream of bytes, packed. Parts of a stream are unpacked in the order of their numbers.
    Part {
        /// Which attempt.
        attempt: u32,
        /// Which of the connections between the hypervisors.
        stream: u8,
        /// Number of the part, from 0 in each direction of a stream.
        seq: u64,
        /// Packed bytes.
        #[serde(skip)]
        payload: Bytes,
    },
    /// All parts below `next` were given to the hypervisor; the end counts as the part after the last. Sent by both
    /// sides after each link-up, too; one for a stream that is not known yet opens it.
    PartAck {
        /// Which attempt.
        attempt: u32,
        /// Which connection.
        stream: u8,
        /// First number that is not there.
        next: u64,
    },
    /// The hypervisor has closed this direction of a stream; `seq` is the number after its last part.
    End {
        /// Which attempt.
        attempt: u32,
        /// Which connection.
        stream: u8,
        /// Parts in all.
        seq: u64,
    },
}

/// See [`VmMessage::Open`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmOpen {
    /// Name of the machine, the same on both sides.
    pub name: VolumeName,
    /// What the target has to know to start it: JSON that the hypervisor's layer reads, at most
    /// [`limits::MAX_VM_DESCRIPTION_BYTES`].
    pub description: String,
}

/// Where a target stands with a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmStage {
    /// Never sent.
    Invalid,
    /// There is no machine, or one that cannot go on.
    Idle,
    /// It waits for its running state, or is receiving it.
    Listening,
    /// It has its running state and stands still.
    Loaded,
    /// It runs.
    Running,
}

impl VmMessage {
    pub(crate) fn payload(&self) -> Bytes {
        match self {
            Self::Part { payload, .. } => payload.clone(),
            _ => Bytes::new(),
        }
    }

    pub(crate) fn set_payload(&mut self, rest: Bytes) -> bool {
        match self {
            Self::Part { payload, .. } => {
                *payload = rest;
                true
            }
            _ => rest.is_empty(),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), DecodeError> {
        let sound = match self {
            Self::Invalid => false,
            Self::Open(open) => open.description.len() <= limits::MAX_VM_DESCRIPTION_BYTES,
            Self::Accept { stage, .. } => *stage != VmStage::Invalid,
            Self::Broken { error, .. } | Self::Failed(error) => {
                error.text.len() <= limits::MAX_TEXT_BYTES
            }
            Self::Part { payload, .. } => {
                !payload.is_empty() && payload.len() <= limits::MAX_VM_PART_BYTES
            }
            _ => true,
        };
        if sound {
            Ok(())
        } else {
            Err(DecodeError::Malformed("a field has no valid value"))
        }
    }
}
