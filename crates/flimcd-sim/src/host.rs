//! The machine of one site: a disk, the files of a volume's state, one process, and the I/O that the process has under way.
//!
//! Of the state there is, as the agent has it: the record, replaced atomically; at the source the bitmap of what the target may
//! lack, in the page cache and so void after a power loss; at the target the set of missing blocks twice: durable and cleared
//! in place by flushes, and of this boot, in the page cache and written through, so that nothing that a guest was told is
//! forgotten with a mere process.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use flimcd_core::{BlockRange, BlockSet, ByteRange, Epoch, Seq, Time, VolumeSize};
use flimcd_migrate::{ApplyId, DiskError};
use flimcd_volume::rules::{ApplyToken, Mode, Rules, Ticket};

use crate::{
    content::SECTOR_LEN,
    dice::Dice,
    disk::{Disk, Sectors},
    flow::Flow,
    guest::RequestId,
    heat::HostHeat,
    packing::HowToPack,
    plan::DiskPlan,
};

/// What the durable record of a volume says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) stage: Stage,
    /// An epoch that will never be owned here.
    pub(crate) refused: Option<Epoch>,
}

/// Where the volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// There is no volume.
    None,
    /// Owned; `migrating`: a migration to the other site goes on.
    Owner { migrating: bool },
    /// Source: the target is offered this epoch.
    Prepared(Epoch),
    /// Source: the target owns this epoch.
    Released(Epoch),
    /// Source: and needs nothing more.
    Retired,
    /// Target: content comes.
    Incoming,
    /// Target: owned, with blocks missing.
    Arriving(Epoch),
    /// Target: owned, everything is here.
    Complete(Epoch),
    /// Target: the migration ended before the switch.
    Gone,
}

impl Record {
    pub(crate) const NONE: Self = Self {
        stage: Stage::None,
        refused: None,
    };

    pub(crate) fn owns(self) -> bool {
        matches!(
            self.stage,
            Stage::Owner { .. } | Stage::Arriving(_) | Stage::Complete(_)
        )
    }
}

/// A file that is replaced atomically.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replaced<T> {
    /// What survives a power loss for sure.
    pub(crate) durable: T,
    /// What a process reads.
    pub(crate) visible: T,
}

/// The set of missing blocks on the disk, cleared in place.
#[derive(Clone, Debug)]
pub(crate) struct MissingFile {
    pub(crate) cache: BlockSet,
    durable: BlockSet,
}

impl MissingFile {
    fn new(set: &BlockSet) -> Self {
        Self {
            cache: set.clone(),
            durable: set.clone(),
        }
    }

    /// Every byte of the file, eight blocks, is as it was or as it should be. (A real sector holds more, but then so small
    /// a volume would be one sector, and nothing could tear.)
    fn lose_power(&mut self, dice: &mut Dice, kept_permille: u64) {
        let blocks = self.cache.capacity();
        for start in (0..blocks).step_by(8) {
            let unit = BlockRange::new(start, (start + 8).min(blocks));
            if dice.permille(kept_permille) {
                self.durable.remove_range(unit);
                for run in self.cache.runs_in(unit) {
                    self.durable.insert_range(run);
                }
            }
        }
        self.cache = self.durable.clone();
    }
}

/// What a piece of I/O is for.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    /// A guest's request.
    Guest { request: RequestId, ticket: Ticket },
    /// A read to be sent.
    Send {
        seq: Seq,
        range: BlockRange,
        how: HowToPack,
    },
    /// A look at the target's own disk, for an entry of a message; `at` says where in the entry the bytes belong.
    Fetch {
        id: ApplyId,
        entry: usize,
        at: usize,
    },
    /// A part of an apply.
    Apply { id: ApplyId, token: ApplyToken },
    /// A step of a flow.
    Flow(u64),
}

/// A piece of I/O.
#[derive(Clone)]
pub(crate) enum Io {
    Read(ByteRange),
    Write(u64, Bytes),
    Zero(ByteRange),
    /// Takes time and changes nothing.
    Nothing,
    Sync,
    /// Makes the missing file durable as it is.
    SyncMissing,
    /// Makes a new missing file, durably.
    NewMissing(BlockSet),
    Record(Record),
}

/// When I/O takes effect between its submission and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timing {
    Early,
    Late,
    /// Even sectors early, odd ones late.
    Torn,
}

struct Work {
    io: Io,
    purpose: Purpose,
    timing: Timing,
    fails: bool,
    buffer: Vec<u8>,
    sectors: Option<Sectors>,
}

/// How I/O ended: the bytes of a read.
pub(crate) type Done = Result<Vec<u8>, DiskError>;

/// Which sectors of a request.
#[derive(Clone, Copy)]
enum Part {
    All,
    Even,
    Odd,
}

/// See the module.
pub(crate) struct Host {
    pub(crate) size: VolumeSize,
    plan: DiskPlan,
    /// Counts processes.
    pub(crate) life: u64,
    /// Whether the process runs.
    pub(crate) up: bool,
    pub(crate) disk: Disk,
    pub(crate) record: Replaced<Record>,
    pub(crate) unacked: BlockSet,
    /// False after a power loss.
    pub(crate) unacked_is_valid: bool,
    pub(crate) missing_of_boot: Option<BlockSet>,
    pub(crate) missing_file: Option<MissingFile>,
    /// What is hot.
    pub(crate) heat: HostHeat,
    /// How many of a thousand I/Os fail.
    pub(crate) errors_permille: u64,
    /// Writes of content fail for lack of room.
    pub(crate) full: bool,

    // What dies with the process.
    pub(crate) rules: Rules,
    works: BTreeMap<u64, Work>,
    next_work: u64,
    pub(crate) parked: BTreeMap<Ticket, RequestId>,
    /// Writes that ended and were not answered.
    pub(crate) held: BTreeMap<Ticket, RequestId>,
    pub(crate) flows: BTreeMap<u64, Flow>,
    pub(crate) next_flow: u64,
}

impl Host {
    pub(crate) fn new(size: VolumeSize, plan: DiskPlan, mode: Mode) -> Self {
        Self {
            size,
            plan,
            life: 1,
            up: true,
            disk: Disk::new(size.bytes()),
            record: Replaced {
                durable: Record::NONE,
                visible: Record::NONE,
            },
            unacked: BlockSet::new(size.blocks()),
            unacked_is_valid: false,
            missing_of_boot: None,
            missing_file: None,
            heat: HostHeat::new(size),
            errors_permille: 0,
            full: false,
            rules: Rules::new(size, mode),
            works: BTreeMap::new(),
            next_work: 0,
            parked: BTreeMap::new(),
            held: BTreeMap::new(),
            flows: BTreeMap::new(),
            next_flow: 0,
        }
    }

    /// Sets the record, before the simulation begins or where its own durability is not the question.
    pub(crate) fn set_stage(&mut self, stage: Stage) {
        let record = Record {
            stage,
            ..self.record.visible
        };
        self.record = Replaced {
            durable: record,
            visible: record,
        };
    }

    /// Begins I/O; says its number and how long it takes.
    pub(crate) fn submit(&mut self, io: Io, purpose: Purpose, dice: &mut Dice) -> (u64, Duration) {
        let (low, high) = match io {
            Io::Sync | Io::SyncMissing | Io::NewMissing(_) | Io::Record(_) => self.plan.sync_us,
            _ => self.plan.latency_us,
        };
        let slow = if dice.permille(10) { 20 } else { 1 };
        let takes = dice.micros(low * slow, high * slow);
        let writes_content = matches!(io, Io::Write(..) | Io::Zero(_));
        let mut work = Work {
            timing: dice.pick(&[Timing::Early, Timing::Late, Timing::Torn]),
            fails: dice.permille(self.errors_permille) || (self.full && writes_content),
            io,
            purpose,
            buffer: Vec::new(),
            sectors: None,
        };
        match work.timing {
            Timing::Early => self.take_effect(&mut work, Part::All),
            Timing::Torn => self.take_effect(&mut work, Part::Even),
            Timing::Late => {}
        }
        if matches!(work.io, Io::Sync) && work.timing != Timing::Early {
            work.sectors = Some(self.disk.unsynced());
        }
        if self.plan.write_back_permille > 0 && writes_content {
            self.disk
                .write_back_some(dice, self.plan.write_back_permille);
        }
        self.next_work += 1;
        self.works.insert(self.next_work, work);
        (self.next_work, takes)
    }

    /// What a piece of I/O does to the cache and the medium, or to its buffer.
    fn take_effect(&mut self, work: &mut Work, part: Part) {
        match &work.io {
            Io::Read(range) => {
                let bytes = self.disk.bytes(*range);
                work.buffer.resize(bytes.len(), 0);
                for at in pieces(bytes.len(), part) {
                    let end = (at + SECTOR_LEN).min(bytes.len());
                    work.buffer[at..end].copy_from_slice(&bytes[at..end]);
                }
            }
            Io::Write(offset, data) => self.write_part(*offset, data, part),
            Io::Zero(range) => {
                let zeroes = vec![0; crate::disk::index(range.len())];
                self.write_part(range.start, &zeroes, part);
            }
            Io::Sync if matches!(part, Part::All) => {
                let sectors = work.sectors.take().unwrap_or_else(|| self.disk.unsynced());
                if !work.fails {
                    self.disk.write_back(&sectors);
                }
            }
            Io::Nothing | Io::Sync | Io::SyncMissing | Io::NewMissing(_) | Io::Record(_) => {}
        }
    }

    fn write_part(&mut self, offset: u64, data: &[u8], part: Part) {
        if matches!(part, Part::All) {
            return self.disk.write(offset, data);
        }
        for at in pieces(data.len(), part) {
            let end = (at + SECTOR_LEN).min(data.len());
            self.disk.write(offset + at as u64, &data[at..end]);
        }
    }

    /// Ends I/O.
    pub(crate) fn complete(&mut self, id: u64) -> Option<(Purpose, Done)> {
        let mut work = self.works.remove(&id)?;
        if work.fails {
            let no_space = self.full;
            let text = if no_space {
                "no space left"
            } else {
                "input/output error"
            };
            let error = DiskError {
                no_space,
                text: text.to_owned(),
            };
            return Some((work.purpose, Err(error)));
        }
        match (work.timing, &work.io) {
            (Timing::Early, _) => {}
            (Timing::Torn, Io::Read(_) | Io::Write(..) | Io::Zero(_)) => {
                self.take_effect(&mut work, Part::Odd);
            }
            _ => self.take_effect(&mut work, Part::All),
        }
        match work.io {
            Io::SyncMissing => {
                if let Some(file) = &mut self.missing_file {
                    file.durable = file.cache.clone();
                }
            }
            Io::NewMissing(set) => self.missing_file = Some(MissingFile::new(&set)),
            Io::Record(record) => {
                self.record = Replaced {
                    durable: record,
                    visible: record,
                };
            }
            _ => {}
        }
        Some((work.purpose, Ok(work.buffer)))
    }

    /// The process ends; what it had under way happens or not.
    pub(crate) fn kill(&mut self, dice: &mut Dice) {
        self.up = false;
        self.life += 1;
        for (_, mut work) in std::mem::take(&mut self.works) {
            if dice.coin() {
                continue;
            }
            match work.io {
                Io::Write(..) | Io::Zero(_) if work.timing == Timing::Torn => {
                    self.take_effect(&mut work, Part::Odd);
                }
                Io::Write(..) | Io::Zero(_) if work.timing == Timing::Late => {
                    self.take_effect(&mut work, Part::All);
                }
                Io::NewMissing(set) => self.missing_file = Some(MissingFile::new(&set)),
                Io::Record(record) => self.record.visible = record,
                _ => {}
            }
        }
        self.parked.clear();
        self.held.clear();
        self.flows.clear();
    }

    /// The power goes.
    pub(crate) fn lose_power(&mut self, dice: &mut Dice, kept_permille: u64) {
        self.kill(dice);
        self.disk.lose_power(dice, kept_permille);
        if dice.coin() {
            self.record.durable = self.record.visible;
        }
        self.record.visible = self.record.durable;
        self.unacked_is_valid = false;
        self.missing_of_boot = None;
        self.heat = HostHeat::new(self.size);
        if let Some(file) = &mut self.missing_file {
            file.lose_power(dice, kept_permille);
        }
    }

    /// The process starts: it makes durable what it reads, before it acts on it. What was present before a mere kill
    /// has its data synced and its presence recorded, since no flush will do it later.
    pub(crate) fn start(&mut self) -> Record {
        self.up = true;
        self.record.durable = self.record.visible;
        if let Some(missing) = &self.missing_of_boot {
            let unsynced = self.disk.unsynced();
            self.disk.write_back(&unsynced);
            self.missing_file = Some(MissingFile::new(missing));
        } else if let Some(file) = &mut self.missing_file {
            file.durable = file.cache.clone();
        }
        self.record.visible
    }

    /// Writes through what is missing, before anybody acts on it.
    pub(crate) fn note_missing(&mut self) {
        if self.rules.mode() == Mode::PostCopy
            && let Some(file) = &mut self.missing_of_boot
            && file.count() != self.rules.missing_count()
        {
            *file = self.rules.missing().clone();
        }
    }

    /// The blocks that hold anything but zeroes.
    pub(crate) fn data_blocks(&self) -> BlockSet {
        let mut set = BlockSet::new(self.size.blocks());
        for block in self.size.all_blocks().iter() {
            if self
                .disk
                .has_data(BlockRange::single(block).bytes(self.size))
            {
                set.insert(block);
            }
        }
        set
    }

    /// Whether the process answers guests.
    pub(crate) fn serves(&self) -> bool {
        self.up && matches!(self.rules.mode(), Mode::Owner | Mode::PostCopy)
    }

    /// The image as a process sees it.
    pub(crate) fn image(&self) -> &[u8] {
        self.disk.bytes(ByteRange::new(0, self.size.bytes()))
    }
}

/// Where in a request the sectors of `part` begin.
fn pieces(len: usize, part: Part) -> impl Iterator<Item = usize> {
    let (first, step) = match part {
        Part::All => (0, SECTOR_LEN),
        Part::Even => (0, 2 * SECTOR_LEN),
        Part::Odd => (SECTOR_LEN, 2 * SECTOR_LEN),
    };
    (first..len.max(first)).step_by(step)
}

/// The bytes of whole blocks that a trim may clear.
pub(crate) fn trimmed(range: ByteRange, size: VolumeSize) -> ByteRange {
    let covered = range.blocks_covered(size);
    if covered.is_empty() {
        return ByteRange::new(range.start, range.start);
    }
    covered.bytes(size)
}

/// Time after `now` in microseconds.
pub(crate) fn after(now: Time, dice: &mut Dice, low_us: u64, high_us: u64) -> Time {
    now + dice.micros(low_us, high_us)
}
