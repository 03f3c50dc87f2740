//! What a volume remembers across crashes: a directory per volume with small plain files.
//!
//! ```text
//! STATE_DIR/volumes/
//!   NAME/           one volume
//!     lock          locked (flock) while an agent has the volume open
//!     record        who owns the volume, where its image is: replaced atomically
//!     missing       target in post-copy: which blocks are durably not here; changed in place
//!     missing-now   target in post-copy: which blocks are not here at the moment; changed in place
//!     unacked       owner: which blocks the copy at another site may lack; changed in place
//!     undo          replica: what stood where an increment wrote over it; appended, see `volume/undo.rs`
//!     heat          how often each chunk is read and written: replaced about once a minute; advice only
//!   .new-NAME/      a volume being made: removed at the next start
//!   .delete-NAME/   a volume being removed with its image: finished at the next start
//!   .forget-NAME/   a volume being removed without its image: finished at the next start
//! ```
//! # Why not a database
//! Three things are stored, with three different needs. The record is a few hundred bytes that change a few times per
//! migration and must never be lost: an atomic rename is all it takes. `missing` is up to 32 MiB per TiB, where each flush of the guest
//! clears a few bits and waits for them: in place that is one sector, a log or a tree would write more and need
//! compaction. `unacked` changes with the guest's writes and must not cost a sync each: the page cache
//! is enough, since it only has to survive the death of the agent, not of the machine.
//!
//! # What a crash can do
//! Assumed of the medium: a sector reads back as it was written last or, when power fails during a write, as before or
//! after; a file's content is durable after `fsync` of the file, its name after `fsync` of the directory; `rename` is atomic.
//! - `record`: written beside, synced, renamed over, directory synced. At every moment the name leads to the old
//!   or the new record as a whole. A damaged one is found by its checksum and never guessed at.
//! - `missing`: bits only go from missing (1) to present (0), and only after the block's data is durable. So any mix of old and new
//!   sectors is a true state: a block may be called missing that is present, and is then fetched again, which is harmless
//!   because it was not flushed; never the other way round. The file is complete and durable before the record says that it counts.
//! - `missing-now`: bits are cleared as soon as a block is present, before the guest hears of its write or sees what was
//!   fetched. When only the agent dies, the kernel still has both the data and these bits, and a write that was acknowledged
//!   is not fetched over. When the machine dies the file is thrown away like `unacked`, and `missing` counts. An agent that
//!   starts with it makes the data durable and brings `missing` up to date before it serves anybody.
//! - `unacked`: bits are set before the guest's write is submitted. When the agent dies, the kernel still
//!   has every byte that was handed to it. When the machine dies, the file may be older than the image: the header has
//!   the boot's id, and a file of another boot is thrown away. Everything counts as unacknowledged then.
//!   It means something only together with the record's `baseline`, which names the copy that it is about: during a migration
//!   the one that is arriving, afterwards the one that stayed. When the two change, the file goes first, and to a superset.
//!
//! # Byte table of `record` (integers are little-endian)
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `FLIMVOL\0` |
//! | 8 | 4 | version of the format, 1 |
//! | 12 | 4 | length of the payload |
//! | 16 | 4 | CRC-32C of bytes 0 to 16 and the payload |
//! | 20 | length | payload: JSON of [`VolumeRecord`] |
//!
//! # Byte table of `missing`, `missing-now` and `unacked`
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `FLIMBITS` |
//! | 8 | 4 | version of the format, 1 |
//! | 12 | 4 | 1 missing, 2 unacked, 3 missing-now |
//! | 16 | 16 | id of the volume |
//! | 32 | 8 | size of the volume in bytes |
//! | 40 | 8 | `missing`, `missing-now`: the epoch it belongs to; `unacked`: 0 |
//! | 48 | 36 | `unacked`, `missing-now`: the boot's id as text; `missing`: zero |
//! | 84 | 4 | CRC-32C of bytes 0 to 84 |
//! | 88 | 4008 | zero |
//! | 4096 | ⌈blocks/8⌉ | block b is bit b mod 8, from the lowest, of byte b div 8 |
//!
//! # Byte table of `heat`
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `FLIMHEAT` |
//! | 8 | 4 | version of the format, 1 |
//! | 12 | 4 | length of what follows offset 20 |
//! | 16 | 4 | CRC-32C of bytes 0 to 16 and of what follows offset 20 |
//! | 20 | 16 | id of the volume |
//! | 36 | 8 | size of the volume in bytes |
//! | 44 | 8 | milliseconds that counting took, decayed as the counts are |
//! | 52 | 8 | the same of counts made elsewhere, beyond that |
//! | 60 | 32 | decayed counts: reads, blocks read, writes, blocks written |
//! | 92 | 8 | length of the counts of reads |
//! | 100 | that | counters of blocks read, in runs: 8 bytes how many cold ones lie before it, 8 bytes its length, a byte each |
//! | | rest | the same of blocks written |
//!
//! It is advice. One that is damaged, of another version or of another volume is left aside with a line in the log.
//!
//! # Who owns what
//! One agent per directory, by its lock; the agent locks the whole `STATE_DIR` besides. Everything here blocks for the disk.

mod bitmap;
mod counts;
mod dir;
mod error;
mod heat;
mod record;
mod replace;

pub use bitmap::{BitmapFile, BitmapKind};
pub use dir::{StateDir, VolumesDir};
pub use error::StateError;
pub(crate) use heat::{HeatFile, HeatRecord};
pub use heat::{HeatKind, HeatTotals};
pub use record::{Baseline, Consistent, ImageIdentity, Ownership, Replica, VolumeRecord};
