//! Running QEMU virtual machines, over QMP: look at their disks, put an agent's export in the place of
//! an image file and back while the guest runs, and move the guest's memory.
//!
//! - [`qmp`]: the client; [`commands`]: the commands that are used, as types.
//! - [`inspect()`]: what disks a VM has, with all that has to be the same afterwards, and why one cannot
//!   be adopted.
//! - [`adopt()`], [`release()`], [`state_of`]: the swap, its way back, and where a disk stands.
//! - [`transfer`]: the primitives of a migration of memory.
//!
//! Nothing here knows volumes, links or agents. All state is QEMU's: it is asked for, not remembered, so
//! that an agent can be restarted at any moment.

pub mod adopt;
pub mod commands;
pub mod inspect;
pub mod qmp;
pub mod transfer;

pub use adopt::{
    AdoptError, Adopted, DiskState, Export, Method, adopt, adopted_by_export, release, state_of,
    tidy,
};
pub use commands::RunState;
pub use inspect::{
    Disk, DiskFormat, DiskOptions, InspectError, Inspected, NodeOptions, Nodes, Problem,
    ProtocolOptions, inspect,
};
pub use qmp::{Event, EventKind, Events, Qmp, QmpError, Version};
