//! What is hot in the agent's volumes: written down once a minute, and told to whoever asks.

use flimcd_core::{BLOCK_SIZE, CHUNK_SIZE, Heat, VolumeName, VolumeSize};
use flimcd_volume::{HEAT_HALF_LIFE, HeatSnapshot, HeatTotals, Volume};
use std::{cmp::Reverse, collections::BinaryHeap, iter::Peekable, sync::Arc, time::Duration};

use crate::{
    agent::Agent,
    api::{ApiCode, ErrorBody, HeatCell, HeatOf, HeatQuery, HeatReport, HeatShare, HotChunk},
};

/// Cells of a picture, if nothing is said, and at most.
const CELLS: (u32, u32) = (64, 1 << 16);
/// Hottest chunks, likewise.
const TOP: (u32, u32) = (10, 10_000);
/// Shares of what is touched, in percent.
const SHARES: [f64; 3] = [50.0, 90.0, 99.0];
/// Counts have steps of this, and end at `COUNT_STEPS` of them.
const COUNT_STEP: f64 = 1.0 / 16.0;
const COUNT_STEPS: usize = u16::MAX as usize;

/// Writes down what is hot, for every volume once in a half-life, until the agent stops.
pub(crate) async fn keep(agent: Arc<Agent>) {
    let mut stop = agent.stop_signal();
    let mut minute = tokio::time::interval(HEAT_HALF_LIFE);
    minute.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    minute.tick().await;
    loop {
        tokio::select! {
            // An error means that the agent is gone, which is a stop as well.
            _ = stop.wait_for(|&stop| stop) => return,
            _ = minute.tick() => {}
        }
        let hosted = agent.hosting.all();
        let store = move || hosted.iter().for_each(|hosted| store(hosted.volume()));
        if let Err(error) = tokio::task::spawn_blocking(store).await {
            tracing::error!("writing down what is hot failed: {error}");
        }
    }
}

/// Writes down what is hot in a volume. Where that fails nothing is lost but a warm start.
pub(crate) fn store(volume: &Volume) {
    if let Err(error) = volume.store_heat() {
        tracing::warn!(volume = %volume.name(), "cannot write down what is hot: {error}");
    }
}

impl Agent {
    /// What is hot in a volume.
    pub(crate) async fn heat(
        &self,
        name: &VolumeName,
        query: HeatQuery,
    ) -> Result<HeatReport, ErrorBody> {
        let hosted = self.hosting.get(name)?;
        let make = move || {
            let volume = hosted.volume();
            report(volume.name(), volume.size(), &volume.heat(), query)
        };
        let made = tokio::task::spawn_blocking(make).await;
        made.map_err(|error| ErrorBody {
            code: ApiCode::Io,
            message: format!("looking at what is hot failed: {error}"),
            hint: None,
        })
    }
}

fn report(
    volume: &VolumeName,
    size: VolumeSize,
    heat: &HeatSnapshot,
    query: HeatQuery,
) -> HeatReport {
    let window_s = heat.window.as_secs_f64();
    let rate = |count: f64| per_second(count * bytes(BLOCK_SIZE), heat.window);
    let wanted = query.cells.unwrap_or(CELLS.0).clamp(1, CELLS.1);
    let cell_chunks = size.chunks().div_ceil(u64::from(wanted)).max(1);
    let mut cells: Vec<_> = (0..size.chunks().div_ceil(cell_chunks))
        .map(|_| HeatCell::default())
        .collect();
    let top = query.top.unwrap_or(TOP.0).min(TOP.1);
    let mut hottest = Hottest::new(index(u64::from(top)));
    for (chunk, read, written) in both(&heat.read, &heat.write) {
        let cell = &mut cells[index(chunk / cell_chunks)];
        cell.read_bytes_per_s += rate(read);
        cell.written_bytes_per_s += rate(written);
        hottest.add(chunk, read, written);
    }
    let hot = |(chunk, read, written): (u64, f64, f64)| HotChunk {
        offset: chunk * CHUNK_SIZE,
        read_bytes_per_s: rate(read),
        written_bytes_per_s: rate(written),
    };
    HeatReport {
        volume: volume.clone(),
        size_bytes: size.bytes(),
        chunk_bytes: CHUNK_SIZE,
        half_life_s: HEAT_HALF_LIFE.as_secs_f64(),
        window_s,
        reads: one_kind(&heat.read, heat.reads, size, heat),
        writes: one_kind(&heat.write, heat.writes, size, heat),
        cells,
        cell_bytes: cell_chunks * CHUNK_SIZE,
        hottest: hottest.take().into_iter().map(hot).collect(),
    }
}

/// Reads or writes.
fn one_kind(heat: &Heat, totals: HeatTotals, size: VolumeSize, of: &HeatSnapshot) -> HeatOf {
    // How many chunks have each count: a TiB has too many of them to sort.
    let mut having = vec![0u64; COUNT_STEPS + 1];
    let (mut sum, mut touched) = (0.0, 0);
    for (_, count) in heat.chunks() {
        having[step(count)] += 1;
        sum += count;
        touched += 1;
    }
    // Without what was counted elsewhere the totals are exact, and a chunk's count may have reached its end.
    let bytes_per_s = if of.window > of.counted {
        per_second(sum * bytes(BLOCK_SIZE), of.window)
    } else {
        per_second(bytes(totals.blocks) * bytes(BLOCK_SIZE), of.counted)
    };
    HeatOf {
        requests_per_s: per_second(bytes(totals.requests), of.counted),
        bytes_per_s,
        touched_bytes: (touched * CHUNK_SIZE).min(size.bytes()),
        shares: SHARES
            .map(|percent| share(&having, sum, percent, size))
            .to_vec(),
        saturated_chunks: having[COUNT_STEPS],
    }
}

/// The fewest chunks that have `percent` of `sum`.
fn share(having: &[u64], sum: f64, percent: f64, size: VolumeSize) -> HeatShare {
    let mut left = sum * percent / 100.0;
    let mut chunks = 0;
    for (step, &number) in having.iter().enumerate().rev() {
        if left <= 0.0 || number == 0 {
            continue;
        }
        let count = bytes(step as u64) * COUNT_STEP;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at most as many as there are, rounded up"
        )]
        let needed = ((left / count).ceil() as u64).min(number);
        chunks += needed;
        left -= bytes(needed) * count;
    }
    let bytes_of = (chunks * CHUNK_SIZE).min(size.bytes());
    HeatShare {
        percent,
        bytes: bytes_of,
        percent_of_volume: bytes(bytes_of) / bytes(size.bytes()) * 100.0,
    }
}

/// The chunks that are touched most.
struct Hottest {
    kept: BinaryHeap<(Reverse<usize>, u64)>,
    counts: std::collections::HashMap<u64, (f64, f64)>,
    most: usize,
}

impl Hottest {
    fn new(most: usize) -> Self {
        Self {
            kept: BinaryHeap::new(),
            counts: std::collections::HashMap::new(),
            most,
        }
    }

    fn add(&mut self, chunk: u64, read: f64, written: f64) {
        // Of equally hot ones the first.
        self.kept.push((Reverse(step(read) + step(written)), chunk));
        self.counts.insert(chunk, (read, written));
        if self.kept.len() > self.most
            && let Some((_, coldest)) = self.kept.pop()
        {
            self.counts.remove(&coldest);
        }
    }

    /// The hottest first.
    fn take(self) -> Vec<(u64, f64, f64)> {
        let sorted = self.kept.into_sorted_vec().into_iter();
        sorted
            .filter_map(|(_, chunk)| self.counts.get(&chunk).map(|&(r, w)| (chunk, r, w)))
            .collect()
    }
}

/// Every chunk that is not cold, with its counts of blocks read and written.
fn both<'a>(read: &'a Heat, write: &'a Heat) -> impl Iterator<Item = (u64, f64, f64)> + 'a {
    let mut read = read.chunks().map(|(chunk, n)| (chunk.0, n)).peekable();
    let mut write = write.chunks().map(|(chunk, n)| (chunk.0, n)).peekable();
    std::iter::from_fn(move || {
        let next = match (read.peek(), write.peek()) {
            (Some(&(r, _)), Some(&(w, _))) => r.min(w),
            (Some(&(chunk, _)), None) | (None, Some(&(chunk, _))) => chunk,
            (None, None) => return None,
        };
        Some((next, count_of(&mut read, next), count_of(&mut write, next)))
    })
}

fn count_of(counts: &mut Peekable<impl Iterator<Item = (u64, f64)>>, chunk: u64) -> f64 {
    let found = counts.next_if(|&(at, _)| at == chunk);
    found.map_or(0.0, |(_, count)| count)
}

fn per_second(count: f64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { count / seconds } else { 0.0 }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and is bounded"
)]
fn step(count: f64) -> usize {
    ((count / COUNT_STEP).round() as usize).min(COUNT_STEPS)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
const fn bytes(n: u64) -> f64 {
    n as f64
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::{ChunkIndex, Time};

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    fn snapshot(size: VolumeSize, reads: &[(u64, u64)], writes: &[(u64, u64)]) -> HeatSnapshot {
        let heat = |counts: &[(u64, u64)]| {
            let mut heat = Heat::new(size, HEAT_HALF_LIFE, Time::ZERO);
            for &(chunk, count) in counts {
                heat.add(ChunkIndex(chunk), count, Time::ZERO);
            }
            heat
        };
        let totals = |counts: &[(u64, u64)]| HeatTotals {
            requests: counts.iter().map(|(_, count)| count / 2).sum(),
            blocks: counts.iter().map(|(_, count)| count).sum(),
        };
        HeatSnapshot {
            read: heat(reads),
            write: heat(writes),
            window: Duration::from_secs(10),
            reads: totals(reads),
            writes: totals(writes),
            counted: Duration::from_secs(10),
        }
    }

    fn made(size: u64, heat: &HeatSnapshot, cells: u32, top: u32) -> HeatReport {
        let query = HeatQuery {
            cells: Some(cells),
            top: Some(top),
        };
        let size = VolumeSize::new(size).unwrap();
        report(&"vm".parse().unwrap(), size, heat, query)
    }

    #[test]
    fn shares_cells_and_hottest_are_right() {
        let size = 100 * CHUNK_SIZE;
        let reads: Vec<_> = (0..10)
            .map(|chunk| (chunk, 10))
            .chain([(50, 100)])
            .collect();
        let heat = snapshot(VolumeSize::new(size).unwrap(), &reads, &[(50, 4), (99, 8)]);
        let report = made(size, &heat, 10, 2);
        let shares: Vec<_> = report
            .reads
            .shares
            .iter()
            .map(|s| s.bytes / CHUNK_SIZE)
            .collect();
        assert_eq!(shares, [1, 9, 11]);
        assert!(near(report.reads.shares[1].percent_of_volume, 9.0));
        assert!(near(report.reads.bytes_per_s, 200.0 * 4096.0 / 10.0));
        assert!(near(report.writes.requests_per_s, 0.6));
        assert_eq!(report.writes.touched_bytes, 2 * CHUNK_SIZE);
        assert_eq!(
            (report.cells.len(), report.cell_bytes),
            (10, 10 * CHUNK_SIZE)
        );
        let read: Vec<_> = report
            .cells
            .iter()
            .map(|cell| cell.read_bytes_per_s)
            .collect();
        assert!(near(read[0], 100.0 * 409.6) && near(read[5], 100.0 * 409.6));
        assert!(near(read.iter().sum::<f64>(), report.reads.bytes_per_s));
        let hottest: Vec<_> = report
            .hottest
            .iter()
            .map(|hot| hot.offset / CHUNK_SIZE)
            .collect();
        assert_eq!(hottest, [50, 0]);
        assert!(near(report.hottest[0].written_bytes_per_s, 4.0 * 409.6));
    }

    #[test]
    fn a_cold_volume_and_one_of_a_block_have_a_report() {
        for size in [512, CHUNK_SIZE + 512] {
            let heat = snapshot(VolumeSize::new(size).unwrap(), &[], &[]);
            let report = made(size, &heat, 1000, 5);
            assert_eq!(report.cells.len() as u64, size.div_ceil(CHUNK_SIZE));
            assert!(report.hottest.is_empty());
            assert!(report.reads.shares.iter().all(|share| share.bytes == 0));
        }
        let size = VolumeSize::new(CHUNK_SIZE + 512).unwrap();
        let heat = snapshot(size, &[(1, 9000)], &[]);
        let report = made(size.bytes(), &heat, 0, 0);
        assert_eq!(report.cells.len(), 1);
        assert_eq!(report.reads.saturated_chunks, 1);
        assert!(
            near(report.reads.bytes_per_s, 9000.0 * 409.6),
            "exact all the same"
        );
    }

    #[test]
    fn what_a_migration_brought_is_in_the_rates() {
        let size = VolumeSize::new(CHUNK_SIZE).unwrap();
        let mut heat = snapshot(size, &[(0, 100)], &[]);
        heat.reads = HeatTotals::default();
        heat.window = Duration::from_secs(100);
        let report = made(size.bytes(), &heat, 1, 1);
        assert!(near(report.reads.bytes_per_s, 4096.0));
        assert!(near(report.reads.requests_per_s, 0.0));
    }
}
