//! Commands that only QEMU's own migration of disks needs. Names and members are QEMU's.

use std::net::Ipv4Addr;

use flimcd_qemu::{commands::Nothing, qmp::Command};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

macro_rules! command {
    ($name:ident = $qmp:literal -> $reply:ty { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Clone, Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(super) struct $name {
            $(pub(super) $field: $type),*
        }

        impl Command for $name {
            const NAME: &'static str = $qmp;
            type Reply = $reply;
        }
    };
}

command! { NbdServerStart = "nbd-server-start" -> Nothing { addr: Value } }
command! { NbdServerStop = "nbd-server-stop" -> Nothing {} }
command! {
    BlockExportAdd = "block-export-add" -> Nothing {
        r#type: &'static str,
        id: String,
        node_name: String,
        name: String,
        writable: bool,
    }
}
command! { QueryBlockJobs = "query-block-jobs" -> Vec<BlockJob> {} }

/// `blockdev-mirror` to a node that is there already.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Mirror {
    pub(super) job_id: String,
    pub(super) device: String,
    pub(super) target: String,
    pub(super) sync: &'static str,
    pub(super) copy_mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) granularity: Option<u32>,
}

impl Command for Mirror {
    const NAME: &'static str = "blockdev-mirror";
    type Reply = Nothing;
}

/// Parameters of the migration; those that are `None` stay.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Parameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) downtime_limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) multifd_channels: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) multifd_compression: Option<&'static str>,
}

impl Command for Parameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Nothing;
}

/// A running block job.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct BlockJob {
    /// Bytes done; more than once when the guest writes them again.
    pub(super) offset: u64,
    /// Bytes known to be done at the end; grows while the guest writes.
    pub(super) len: u64,
}

/// An address to listen on or to connect to.
pub(super) fn inet(host: Ipv4Addr, port: u16) -> Value {
    json!({ "type": "inet", "host": host.to_string(), "port": port.to_string() })
}
