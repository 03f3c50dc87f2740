//! What came out.

use serde::Serialize;

use super::{
    super::{ClientReport, LoadSummary},
    BaselineOptions,
};

/// The part that did not come to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The disks' mirror.
    Mirror,
    /// Memory.
    Ram,
}

/// Whether it came to an end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The guest runs at the target.
    Completed,
    /// Given up after the time allowed; the guest runs at the source.
    NotConverged {
        /// What did not come to an end.
        phase: Phase,
        /// Bytes that were left: of the disks, or of memory.
        left_bytes: u64,
    },
}

/// What came out. Times in seconds and milliseconds as the names say; what never happened is `None`.
#[derive(Clone, Debug, Serialize)]
pub struct BaselineReport {
    /// Whether it came to an end.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The settings.
    pub options: BaselineOptions,
    /// QEMU's version.
    pub qemu: String,
    /// From the first command until the guest runs at the target and nothing is left to send.
    pub total_s: f64,
    /// Until every mirror was ready.
    pub mirror_s: Option<f64>,
    /// From there until memory had converged and the guest stopped.
    pub ram_s: Option<f64>,
    /// How long the mirror's rest took while the guest stood still.
    pub drain_ms: Option<f64>,
    /// From the source's STOP to the target's RESUME, by the clock of the host.
    pub stop_to_resume_ms: Option<f64>,
    /// What QEMU itself calls downtime.
    pub qemu_downtime_ms: Option<u64>,
    /// Post-copy: from the guest's running at the target until all memory was there.
    pub postcopy_tail_s: Option<f64>,
    /// What the client saw, from the first command until the guest had settled.
    pub client: ClientReport,
    /// Bytes from source to target on the WAN, headers included; the client's traffic too.
    pub wire_bytes: u64,
    /// The part until the mirrors were ready.
    pub wire_bytes_mirror: u64,
    /// Bytes the other way.
    pub wire_bytes_back: u64,
    /// Bytes of memory as QEMU counts them.
    pub ram_bytes: Option<u64>,
    /// Passes over memory.
    pub ram_passes: Option<u64>,
    /// The guest's load meanwhile, at the source and after.
    pub load: LoadSummary,
    /// The same before, in the last seconds of the warm-up.
    pub load_before: LoadSummary,
    /// Packets that the emulator handed over too late: many mean that the machine was too busy.
    pub late_packets: u64,
    /// First difference between the disks at the switch; `Some(None)` when there was none.
    pub difference: Option<Option<String>>,
    /// What the guest said when it verified itself at the target.
    pub verified: Option<String>,
    /// What either guest printed that is wrong.
    pub complaints: Vec<String>,
}

impl BaselineReport {
    /// The client's downtime: the longest gap between two answers to its ping.
    #[must_use]
    pub const fn client_gap_ms(&self) -> f64 {
        self.client.ping.gap_ms_max
    }
}
