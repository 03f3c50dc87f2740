//! Running machines under care: their records, how their disks come into care and out of it, and how they move.

mod care;
mod errors;
mod plan;
pub(crate) mod ram;
mod record;
pub(crate) mod session;
mod view;

pub(crate) use errors::{care_error, qmp_error};
pub(crate) use record::{CareState, VmDisk, VmRecord, Vms, Work, Working};
