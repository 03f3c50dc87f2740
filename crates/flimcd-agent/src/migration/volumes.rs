//! The volumes of one migration, as one range of blocks.
//!
//! A machine knows one range of blocks and one owner. [`VolumeSet`] is the volumes behind it, laid out by a
//! [`VolumeLayout`]: block sets and runs are shifted into the layout on the way to the machine and back on the
//! way to a volume. One volume alone lies at 0, and everything is passed through as it is.
//!
//! Blocks between the volumes belong to none. Only a peer that does not keep to the layout names them; that is an
//! error of the disk to the machine ([`io::ErrorKind::InvalidInput`]) and never a panic.
//!
//! Each volume has a durable record of its own, so what is done to all of them is done to one after the other or
//! side by side, and a crash can come between. What that means is decided in one place: see
//! [`settle`](super::settle).

use flimcd_content::{Fingerprint, is_zero};
use flimcd_core::{
    BLOCKS_PER_CHUNK, BlockIndex, BlockRange, BlockSet, Epoch, InvalidSize, MigrationId, SiteName,
    VolumeLayout,
};
use flimcd_volume::{Begun, Ownership, Sending, Volume, VolumeObserver, rules::Mode};
use flimcd_wire::{Entry, SampleChunk};
use std::{io, sync::Arc, thread};

/// Chunks that an image is recognised by. Where 5% of a volume are in an image, one in a thousand samples misses it.
const SAMPLE_CHUNKS: usize = 128;

/// See the module.
pub(crate) struct VolumeSet {
    volumes: Vec<Arc<Volume>>,
    layout: VolumeLayout,
}

/// What a target may lack of several volumes when their migration begins.
pub(crate) struct BegunTogether {
    /// Where it has zeroes: blocks that are not holes.
    pub(crate) data: BlockSet,
    /// Where it has the copy that the base names: blocks that may have changed since. `None` if there is no base.
    pub(crate) changed: Option<BlockSet>,
    /// For each volume, the migration that left a copy there of which it is known what it lacks.
    pub(crate) bases: Vec<Option<MigrationId>>,
}

/// A question of one of the volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeekId {
    volume: usize,
    number: u64,
}

/// Reads and misses of all guests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GuestReads {
    pub(crate) reads: u64,
    pub(crate) missed: u64,
}

impl VolumeSet {
    /// The volumes, in the order that both sides know.
    pub(crate) fn new(volumes: Vec<Arc<Volume>>) -> Result<Arc<Self>, InvalidSize> {
        let layout = VolumeLayout::new(volumes.iter().map(|volume| volume.size()))?;
        Ok(Arc::new(Self { volumes, layout }))
    }

    /// The volumes themselves, in their order.
    pub(crate) fn all(&self) -> &[Arc<Volume>] {
        &self.volumes
    }

    /// Where each lies.
    pub(crate) fn layout(&self) -> &VolumeLayout {
        &self.layout
    }

    /// Whether a run lies in one of the volumes as a whole.
    pub(crate) fn has(&self, range: BlockRange) -> bool {
        self.layout.locate(range).is_some()
    }

    /// The volume that a run lies in, and the run as that volume knows it.
    fn locate(&self, range: BlockRange) -> io::Result<(&Arc<Volume>, BlockRange)> {
        let found = self.layout.locate(range);
        let (index, within) = found.ok_or_else(|| outside(range))?;
        Ok((&self.volumes[index], within))
    }

    /// Each volume with its first block in the layout.
    fn placed(&self) -> impl Iterator<Item = (&Arc<Volume>, u64)> {
        let starts = self.layout.all_blocks().map(|blocks| blocks.start);
        self.volumes.iter().zip(starts)
    }

    // ---- sets --------------------------------------------------------------------------------

    /// One set of all that `of` says of each volume.
    fn gather(&self, mut of: impl FnMut(&Volume) -> io::Result<BlockSet>) -> io::Result<BlockSet> {
        if let [only] = &self.volumes[..] {
            return of(only);
        }
        let mut all = BlockSet::new(self.layout.size().blocks());
        for (volume, start) in self.placed() {
            for run in of(volume)?.runs() {
                all.insert_range(shift_out(run, start));
            }
        }
        Ok(all)
    }

    /// A set by volume; an error if it has blocks of none.
    fn scatter(&self, set: BlockSet) -> io::Result<Vec<BlockSet>> {
        if self.volumes.len() == 1 {
            return Ok(vec![set]);
        }
        let mut parts: Vec<_> = self
            .volumes
            .iter()
            .map(|volume| BlockSet::new(volume.size().blocks()))
            .collect();
        for run in set.runs() {
            let (index, within) = self.layout.locate(run).ok_or_else(|| outside(run))?;
            parts[index].insert_range(within);
        }
        Ok(parts)
    }

    /// Does something with each volume, with several side by side. All are tried; the first error counts.
    fn each(&self, work: impl Fn(usize, &Arc<Volume>) -> io::Result<()> + Sync) -> io::Result<()> {
        if let [only] = &self.volumes[..] {
            return work(0, only);
        }
        let work = &work;
        thread::scope(|scope| {
            let begun: Vec<_> = self
                .volumes
                .iter()
                .enumerate()
                .map(|(index, volume)| scope.spawn(move || work(index, volume)))
                .collect();
            let mut result = Ok(());
            for thread in begun {
                let ended = thread
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("the work on a volume panicked")));
                result = result.and(ended);
            }
            result
        })
    }

    // ---- both sides --------------------------------------------------------------------------

    /// Who is told what happens in any of them from now on.
    pub(crate) fn set_observer(&self, observer: &Arc<impl VolumeObserver + 'static>) {
        for volume in &self.volumes {
            volume.set_observer(observer.clone());
        }
    }

    /// Guest connections that are open.
    pub(crate) fn connections(&self) -> usize {
        self.volumes.iter().map(|volume| volume.connections()).sum()
    }

    /// What guests have read.
    pub(crate) fn guest_reads(&self) -> GuestReads {
        let mut sum = GuestReads::default();
        for volume in &self.volumes {
            let stats = volume.stats();
            sum.reads += stats.guest_reads;
            sum.missed += stats.guest_reads_missed;
        }
        sum
    }

    /// Makes durable what was written before the call.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.each(|_, volume| volume.sync())
    }

    /// What the records say.
    pub(crate) fn ownerships(&self) -> Vec<Ownership> {
        self.volumes
            .iter()
            .map(|volume| ownership_of(volume))
            .collect()
    }

    // ---- source ------------------------------------------------------------------------------

    /// Begins to mark writes, with a record that the target may lack anything, and finds out what it lacks on what
    /// may stand there.
    pub(crate) fn begin_migration(
        &self,
        site: &SiteName,
        migration: MigrationId,
    ) -> io::Result<BegunTogether> {
        let mut begun = Vec::new();
        for volume in &self.volumes {
            begun.push(volume.begin_migration(site, migration)?);
        }
        let bases: Vec<_> = (begun.iter())
            .map(|begun| begun.changed.as_ref().map(|(base, _)| *base))
            .collect();
        let together = |of: &dyn Fn(&Begun) -> BlockSet| {
            if let [only] = &begun[..] {
                return of(only);
            }
            let mut all = BlockSet::new(self.layout.size().blocks());
            for (begun, (_, start)) in begun.iter().zip(self.placed()) {
                for run in of(begun).runs() {
                    all.insert_range(shift_out(run, start));
                }
            }
            all
        };
        let data = together(&|begun| begun.data.clone());
        let changed = bases.iter().any(Option::is_some).then(|| {
            together(&|begun| match &begun.changed {
                Some((_, changed)) => changed.clone(),
                // No base was named, so that this is not asked for; if it were, it would be right.
                None => BlockSet::full(begun.data.capacity()),
            })
        });
        Ok(BegunTogether {
            data,
            changed,
            bases,
        })
    }

    /// What the target may lack when a migration goes on: as the volumes kept it, or everything where that is not
    /// known any more.
    pub(crate) fn resume_migration(
        &self,
        site: &SiteName,
        migration: MigrationId,
    ) -> io::Result<BlockSet> {
        self.gather(|volume| volume.resume_migration(site, migration))
    }

    /// Hands over the blocks that were written since the last call.
    pub(crate) fn take_dirty(&self) -> BlockSet {
        match self.gather(|volume| Ok(volume.take_dirty())) {
            Ok(dirty) => dirty,
            Err(_) => unreachable!("nothing in it fails"),
        }
    }

    /// Clears the dirty marks of `range`, which is to be read and sent; and says how many bytes it has.
    pub(crate) fn begin_send(&self, range: BlockRange) -> io::Result<(Sending, u64)> {
        let (volume, within) = self.locate(range)?;
        let bytes = within.bytes(volume.size()).len();
        Ok((volume.begin_send(within), bytes))
    }

    /// The bytes of `range` as they are now.
    pub(crate) fn peek(&self, range: BlockRange) -> io::Result<Vec<u8>> {
        let (volume, within) = self.locate(range)?;
        volume.peek(within)
    }

    /// The target durably has these blocks.
    pub(crate) fn mark_clean(&self, ranges: &[BlockRange]) -> io::Result<()> {
        self.within(ranges, Volume::mark_clean)
    }

    /// The target has acknowledged these blocks.
    pub(crate) fn acked(&self, ranges: &[BlockRange]) {
        let told = self.within(ranges, |volume, within| {
            volume.acked(within);
            Ok(())
        });
        debug_assert!(told.is_ok(), "nothing in it fails");
    }

    /// Does something with the blocks of each volume that has some of `ranges`.
    fn within(
        &self,
        ranges: &[BlockRange],
        work: impl Fn(&Volume, &[BlockRange]) -> io::Result<()>,
    ) -> io::Result<()> {
        if let [only] = &self.volumes[..] {
            return work(only, ranges);
        }
        for (volume, start) in self.placed() {
            let blocks = BlockRange::new(start, start + volume.size().blocks());
            let within: Vec<_> = ranges
                .iter()
                .map(|range| range.intersect(blocks))
                .filter(|range| !range.is_empty())
                .map(|range| BlockRange::new(range.start - start, range.end - start))
                .collect();
            if !within.is_empty() {
                work(volume, &within)?;
            }
        }
        Ok(())
    }

    /// Draws whole chunks with data among `blocks`, at random, and reads them: what a target may recognise an image by.
    /// What cannot be read is left out.
    pub(crate) fn sample(&self, blocks: &BlockSet) -> Vec<SampleChunk> {
        let mut sample = Vec::new();
        for range in draw_chunks(blocks) {
            let read = self
                .locate(range)
                .and_then(|(volume, within)| volume.peek(within));
            if let Ok(content) = read
                && !is_zero(&content)
            {
                sample.push(SampleChunk {
                    chunk: BlockIndex(range.start).chunk(),
                    prefix: Fingerprint::of_run(&content).prefix(),
                });
            }
        }
        sample
    }

    /// Whole chunks around these blocks, as far as the volumes go. Holes inside of a chunk cost nothing on the link,
    /// and only whole chunks can be found in an image of a library.
    pub(crate) fn whole_chunks(&self, blocks: &BlockSet) -> BlockSet {
        let mut whole = blocks.clone();
        for volume in self.layout.all_blocks() {
            for run in blocks.runs_in(volume) {
                let start = run.start / BLOCKS_PER_CHUNK * BLOCKS_PER_CHUNK;
                let end = run.end.next_multiple_of(BLOCKS_PER_CHUNK).min(volume.end);
                whole.insert_range(BlockRange::new(start, end));
            }
        }
        whole
    }

    /// Parks guest requests from now on.
    pub(crate) fn freeze(&self) {
        for volume in &self.volumes {
            volume.freeze();
        }
    }

    /// Whether no admitted guest request is in flight.
    pub(crate) fn is_drained(&self) -> bool {
        self.volumes.iter().all(|volume| volume.is_drained())
    }

    /// Takes [`freeze`](Self::freeze) back.
    pub(crate) fn thaw(&self) {
        for volume in &self.volumes {
            volume.thaw();
        }
    }

    /// The volumes have moved: guest requests are refused from now on.
    pub(crate) fn release(&self) {
        for volume in &self.volumes {
            volume.release();
        }
    }

    /// Makes all records say what `of` makes of the volume's own epoch. With an error some may say it and
    /// others not.
    pub(crate) fn record(&self, of: impl Fn(Epoch) -> Ownership + Sync) -> io::Result<()> {
        self.each(|_, volume| {
            let own = ownership_of(volume).epoch().unwrap_or(Epoch::FIRST);
            volume.set_ownership(of(own))
        })
    }

    // ---- target ------------------------------------------------------------------------------

    /// Writes content that arrived. `write` gets the volume and the entry as that volume knows it.
    pub(crate) fn apply<T>(
        &self,
        entry: Entry,
        write: impl FnOnce(&Volume, Entry) -> io::Result<T>,
    ) -> io::Result<T> {
        let (volume, range) = self.locate(entry.range)?;
        write(volume, Entry { range, ..entry })
    }

    /// Takes the volumes over together: no guest is let in anywhere before all records say so durably.
    ///
    /// With an error no guest was let in, and the records that said so were put back.
    pub(crate) fn take_over(
        &self,
        missing: BlockSet,
        epoch: Epoch,
        migration: MigrationId,
        peer: &SiteName,
    ) -> io::Result<()> {
        let missing = self.scatter(missing)?;
        let recorded = self.each(|index, volume| {
            let peer = peer.clone();
            let arriving = Ownership::Arriving {
                epoch,
                migration,
                peer,
            };
            volume.record_arrival(&missing[index], arriving)
        });
        if let Err(error) = recorded {
            self.take_arrival_back(migration, peer)?;
            return Err(error);
        }
        for (volume, missing) in self.volumes.iter().zip(missing) {
            volume.start_postcopy(missing);
        }
        Ok(())
    }

    /// Puts back records that say that a volume has arrived, where the others do not.
    pub(crate) fn take_arrival_back(
        &self,
        migration: MigrationId,
        peer: &SiteName,
    ) -> io::Result<()> {
        self.each(|_, volume| {
            if !matches!(ownership_of(volume), Ownership::Arriving { .. }) {
                return Ok(());
            }
            let peer = peer.clone();
            volume.take_arrival_back(Ownership::Incoming { migration, peer })
        })
    }

    /// Every block is here: makes that durable, and the volumes ordinary ones.
    pub(crate) fn complete(&self, epoch: Epoch) -> io::Result<()> {
        self.sync()?;
        self.each(|_, volume| volume.set_ownership(Ownership::Owner { epoch }))?;
        self.each(|_, volume| match volume.mode() {
            // It was ended before an earlier agent died.
            Mode::Owner => Ok(()),
            _ => volume.finish_postcopy(),
        })
    }

    /// An increment is whole: see `Volume::seal_arrival`.
    pub(crate) fn seal(
        &self,
        epoch: Epoch,
        migration: MigrationId,
        peer: &SiteName,
        as_of_unix_ms: u64,
    ) -> io::Result<()> {
        self.each(|_, volume| volume.seal_arrival(epoch, migration, peer, as_of_unix_ms))
    }

    /// A block that a guest waits for, each once until [`requeue_faults`](Self::requeue_faults).
    pub(crate) fn poll_fault(&self) -> Option<BlockRange> {
        self.placed().find_map(|(volume, start)| {
            let run = volume.poll_fault()?;
            Some(shift_out(run, start))
        })
    }

    /// Reports all blocks that guests wait for once more.
    pub(crate) fn requeue_faults(&self) {
        for volume in &self.volumes {
            volume.requeue_faults();
        }
    }

    /// Whether reads before the switch are put to the source.
    pub(crate) fn set_peeking(&self, is_on: bool) {
        for volume in &self.volumes {
            volume.set_peeking(is_on);
        }
    }

    /// A question of a read before the switch, each once until [`requeue_peeks`](Self::requeue_peeks).
    pub(crate) fn poll_peek(&self) -> Option<(PeekId, BlockRange)> {
        let mut placed = self.placed().enumerate();
        placed.find_map(|(volume, (of, start))| {
            let peek = of.poll_peek()?;
            let number = peek.number;
            Some((PeekId { volume, number }, shift_out(peek.range, start)))
        })
    }

    /// The source's answer to a question; `None` when it could not read the blocks.
    pub(crate) fn answer_peek(&self, id: PeekId, bytes: Option<&[u8]>) {
        self.volumes[id.volume].answer_peek(id.number, bytes);
    }

    /// Asks every question that is open once more.
    pub(crate) fn requeue_peeks(&self) {
        for volume in &self.volumes {
            volume.requeue_peeks();
        }
    }

    /// Number of blocks whose content is not here.
    pub(crate) fn missing_count(&self) -> u64 {
        self.volumes
            .iter()
            .map(|volume| volume.missing_count())
            .sum()
    }

    /// The first missing blocks, at most `blocks_max` of them.
    pub(crate) fn first_missing(&self, blocks_max: u64) -> Vec<BlockRange> {
        let mut left = blocks_max;
        let mut runs = Vec::new();
        for (volume, start) in self.placed() {
            for run in volume.first_missing(left) {
                left -= run.len();
                runs.push(shift_out(run, start));
            }
        }
        runs
    }

    /// The blocks that guest writes made present since the last call.
    pub(crate) fn take_overwritten(&self) -> BlockSet {
        match self.gather(|volume| Ok(volume.take_overwritten())) {
            Ok(overwritten) => overwritten,
            Err(_) => unreachable!("nothing in it fails"),
        }
    }
}

/// Up to so many chunks of which all blocks are in the set, each as likely as any other.
fn draw_chunks(blocks: &BlockSet) -> Vec<BlockRange> {
    let first_whole = |run: BlockRange| run.start.next_multiple_of(BLOCKS_PER_CHUNK);
    let whole = |run: BlockRange| (run.end.saturating_sub(first_whole(run))) / BLOCKS_PER_CHUNK;
    let total: u64 = blocks.runs().map(whole).sum();
    if total == 0 {
        return Vec::new();
    }
    let mut drawn: Vec<u64> = (0..SAMPLE_CHUNKS)
        .map(|_| rand::random_range(0..total))
        .collect();
    drawn.sort_unstable();
    drawn.dedup();
    let mut drawn = drawn.into_iter().peekable();
    let (mut chunks, mut before) = (Vec::new(), 0);
    for run in blocks.runs() {
        let here = whole(run);
        while let Some(number) = drawn.next_if(|&number| number < before + here) {
            let start = first_whole(run) + (number - before) * BLOCKS_PER_CHUNK;
            chunks.push(BlockRange::new(start, start + BLOCKS_PER_CHUNK));
        }
        before += here;
    }
    chunks
}

fn shift_out(run: BlockRange, start: u64) -> BlockRange {
    BlockRange::new(run.start + start, run.end + start)
}

fn outside(range: BlockRange) -> io::Error {
    let text = format!("blocks {range:?} belong to none of the volumes");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// What a volume's record says.
pub(crate) fn ownership_of(volume: &Volume) -> Ownership {
    match volume.record() {
        Some(record) => record.ownership,
        None => unreachable!("volumes without a record are made by tests only"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::{VolumeId, VolumeSize};
    use flimcd_volume::{NewVolume, VolumesDir, device::OpenOptions};
    use flimcd_wire::Content;
    use std::{fs, os::unix::fs::FileExt, path::Path};

    const MIGRATION: MigrationId = MigrationId(9);
    /// Laid out as blocks 0..3, 16..32 and 48..49.
    const SIZES: [u64; 3] = [2 * 4096 + 512, 16 * 4096, 512];

    fn peer() -> SiteName {
        "beta".parse().unwrap()
    }

    fn make(dir: &Path, ownership: &Ownership) -> Arc<VolumeSet> {
        let volumes = VolumesDir::open(dir.join("volumes")).unwrap();
        let make = |(number, &bytes): (usize, &u64)| {
            let name = format!("v{number}").parse().unwrap();
            let new = NewVolume {
                id: VolumeId(number as u128 + 1),
                image: dir.join(format!("{number}.raw")),
                name,
                tenant: "default".to_owned(),
                epoch: Epoch::FIRST,
                ownership: ownership.clone(),
            };
            let size = VolumeSize::new(bytes).unwrap();
            Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap()
        };
        VolumeSet::new(SIZES.iter().enumerate().map(make).collect()).unwrap()
    }

    fn owned(dir: &Path) -> Arc<VolumeSet> {
        make(dir, &Ownership::Owner { epoch: Epoch(1) })
    }

    fn arriving(dir: &Path) -> Arc<VolumeSet> {
        let (migration, peer) = (MIGRATION, peer());
        make(dir, &Ownership::Incoming { migration, peer })
    }

    fn set(runs: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::new(49);
        for &(start, end) in runs {
            set.insert_range(BlockRange::new(start, end));
        }
        set
    }

    /// Writes through the layout, as content that arrives does.
    fn write(volumes: &VolumeSet, start: u64, end: u64) -> io::Result<()> {
        let entry = Entry {
            range: BlockRange::new(start, end),
            content: Content::Zero,
        };
        volumes.apply(entry, |volume, within| {
            let bytes = within.range.bytes(volume.size()).len();
            let data = vec![7; usize::try_from(bytes).unwrap()];
            volume.apply(within.range, flimcd_volume::ApplyData::Bytes(&data))?;
            Ok(())
        })
    }

    #[test]
    fn blocks_are_shifted_and_short_ends_stay_short() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = owned(dir.path());
        let begin = || {
            let begun = volumes.begin_migration(&peer(), MIGRATION).unwrap();
            assert_eq!(volumes.all()[0].unacked().unwrap().unwrap().count(), 3);
            begun.data
        };
        assert_eq!(begin(), set(&[]));
        for (number, at, bytes) in [(0, 4096, 4096 + 512), (1, 4 * 4096, 8192), (2, 0, 512)] {
            let image = dir.path().join(format!("{number}.raw"));
            let image = fs::File::options().write(true).open(image).unwrap();
            image.write_all_at(&vec![7; bytes], at).unwrap();
            image.sync_all().unwrap();
        }
        let written = set(&[(1, 3), (20, 22), (48, 49)]);
        assert_eq!(begin(), written);
        let clean = [(0, 1), (16, 20), (22, 32)].map(|(start, end)| BlockRange::new(start, end));
        volumes.mark_clean(&clean).unwrap();
        let bytes = |start, end| {
            let begun = volumes.begin_send(BlockRange::new(start, end));
            let (sending, bytes) = begun.unwrap();
            let mut buf = vec![0; usize::try_from(bytes).unwrap()];
            sending.read(&mut buf).unwrap();
            buf
        };
        assert_eq!(bytes(1, 3), [7; 4096 + 512]);
        assert_eq!(bytes(48, 49), [7; 512]);
        assert_eq!(bytes(16, 17), [0; 4096]);
        volumes.mark_clean(&[BlockRange::new(2, 21)]).unwrap();
        let left = set(&[(1, 2), (21, 22), (48, 49)]);
        assert_eq!(volumes.resume_migration(&peer(), MIGRATION).unwrap(), left);
    }

    #[test]
    fn blocks_of_no_volume_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = arriving(dir.path());
        for (start, end) in [(3, 4), (2, 4), (15, 17), (32, 48), (49, 50), (5000, 5001)] {
            assert!(!volumes.has(BlockRange::new(start, end)));
            assert!(write(&volumes, start, end).is_err(), "{start}..{end}");
            let range = BlockRange::new(start, end);
            assert!(volumes.begin_send(range).is_err(), "{start}..{end}");
        }
        let missing = set(&[(2, 5)]);
        let taken = volumes.take_over(missing, Epoch(2), MIGRATION, &peer());
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        volumes.mark_clean(&[BlockRange::new(0, 5000)]).unwrap();
    }

    #[test]
    fn all_are_taken_over_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = arriving(dir.path());
        let missing = set(&[(0, 1), (16, 19)]);
        // No file can be put in the place of this.
        let in_the_way = dir.path().join("volumes/v1/missing");
        fs::create_dir(&in_the_way).unwrap();
        let take = || volumes.take_over(missing.clone(), Epoch(2), MIGRATION, &peer());
        take().unwrap_err();
        for volume in volumes.all() {
            assert_eq!(volume.mode(), Mode::Incoming, "no guest is let in");
            assert!(matches!(ownership_of(volume), Ownership::Incoming { .. }));
        }
        fs::remove_dir(&in_the_way).unwrap();
        take().unwrap();
        assert_eq!(volumes.missing_count(), 4);
        let first = [BlockRange::new(0, 1), BlockRange::new(16, 18)];
        assert_eq!(volumes.first_missing(3), first);
        write(&volumes, 0, 1).unwrap();
        volumes.complete(Epoch(2)).unwrap_err();
        write(&volumes, 16, 19).unwrap();
        volumes.complete(Epoch(2)).unwrap();
        volumes.complete(Epoch(2)).unwrap();
        for volume in volumes.all() {
            assert_eq!(ownership_of(volume), Ownership::Owner { epoch: Epoch(2) });
        }
    }
}
