//! The parameters of the server loads: published statistics of a week of the FIU traces, and what is assumed
//! beside them.
//!
//! Statistics: Koller and Rangaswami, "I/O Deduplication", FAST 2010, Table 1, from memory of the table and so
//! parameters here and no quotations. Everything else (the mix of streams, request sizes, rate) is assumed,
//! and said so in `docs/loads.md`.

use flimcd_core::BLOCK_SIZE;

use super::{super::Duplicates, ImageProfile, layout::share_of};

/// A server's disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Name of the load.
    pub name: &'static str,
    /// Share of reads in the bytes of all requests (published).
    pub read_bytes_share: f64,
    /// Share of the disk that is read in the week (published: unique sectors of the file system's).
    pub read_share: f64,
    /// Share of the disk that is written in the week (published).
    pub written_share: f64,
    /// Share of the disk that is touched at all (published). Less than the two together: some is both.
    pub touched_share: f64,
    /// Bytes written in the week, in multiples of the bytes of what is written at all (published).
    pub rewrite_factor: f64,
    /// Share of the written blocks whose content was written before (published).
    pub duplicate_share: f64,
    /// Reads and writes per second (assumed: a busy hour).
    pub rate_per_sec: f64,
    /// Bytes per second that are written in the week, on average (published).
    pub week_write_bytes_per_sec: f64,
    /// What the written bytes are for (assumed).
    pub writes: WriteMix,
    /// What the read bytes are for (assumed).
    pub reads: ReadMix,
    /// What the disk holds before (assumed).
    pub image: ImageProfile,
}

/// Shares of the written bytes; together 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WriteMix {
    /// A journal: one after the other, round and round a small area.
    pub journal: f64,
    /// Logs that are appended to; their last block is written again until it is full.
    pub logs: f64,
    /// Blocks that are written again and again: metadata.
    pub hot: f64,
    /// Files written from start to end.
    pub files: f64,
    /// Every 8th block of some area, one after the other: inode tables, indexes.
    pub strided: f64,
    /// Blocks per request of the journal.
    pub journal_blocks: u64,
    /// Blocks per request to files.
    pub file_blocks: u64,
}

/// Shares of the read bytes; together 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadMix {
    /// Files read from start to end, neighbours after each other.
    pub files: f64,
    /// Every 2nd, 4th or 8th block of some area, one after the other.
    pub strided: f64,
    /// What was written lately.
    pub recent: f64,
    /// Small areas that are read again and again: metadata, indexes.
    pub hot: f64,
    /// Blocks per request to files.
    pub file_blocks: u64,
    /// Share of the groups of files that have not been read for longest; the others were read lately.
    pub fresh: f64,
}

impl WriteMix {
    /// Mean bytes of a write, in blocks.
    pub(super) fn mean_blocks(&self) -> f64 {
        let (journal, file) = (blocks(self.journal_blocks), blocks(self.file_blocks));
        let single = self.logs + self.hot + self.strided;
        1.0 / (self.journal / journal + self.files / file + single)
    }
}

impl ReadMix {
    /// Mean bytes of a read, in blocks.
    pub(super) fn mean_blocks(&self) -> f64 {
        let single = self.strided + self.recent + self.hot;
        1.0 / (self.files / blocks(self.file_blocks) + single)
    }
}

impl Server {
    /// Share of reads among the requests.
    #[must_use]
    pub fn read_requests_share(&self) -> f64 {
        let reads = self.read_bytes_share / self.reads.mean_blocks();
        let writes = (1.0 - self.read_bytes_share) / self.writes.mean_blocks();
        reads / (reads + writes)
    }

    /// Bytes written per second at speed 1.
    #[must_use]
    pub fn write_bytes_per_sec(&self) -> f64 {
        let writes = self.rate_per_sec * (1.0 - self.read_requests_share());
        writes * self.writes.mean_blocks() * 4096.0
    }

    /// What is written again and again on a disk of this size: each content about [`WRITES_PER_CONTENT`] times in
    /// a week, so that hardly any of them is new.
    #[must_use]
    pub fn duplicates(&self, size_bytes: u64) -> Duplicates {
        let week = self.written_share * self.rewrite_factor * self.duplicate_share;
        let blocks = share_of(size_bytes / BLOCK_SIZE, week);
        Duplicates {
            share: self.duplicate_share,
            contents: (blocks / WRITES_PER_CONTENT).max(8),
        }
    }

    /// All parameters in words, at `speed`.
    pub(super) fn describe(&self, speed: f64, contents: u64) -> String {
        let Self { writes, reads, .. } = self;
        let percent = |share: f64| {
            format!("{:.3}", share * 100.0)
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
                + "%"
        };
        format!(
            "{:.0} requests per second in bursts of {:.0} ({:.2} MB/s written; the week's mean is {:.3}); reads are {} of the \
             bytes and {} of the requests; of the disk {} is read, {} written, {} touched; {:.1} bytes are written in a \
             week for each that is written at all; {} of the written blocks have one of {contents} contents. Written: \
             journal {}, logs {}, hot blocks {}, files {}, strided {}; read: files {} (in requests of {} KiB), strided {}, written lately \
             {}, hot {}",
            self.rate_per_sec * speed,
            super::super::arrivals::BURST_MEAN,
            self.write_bytes_per_sec() * speed / 1e6,
            self.week_write_bytes_per_sec / 1e6,
            percent(self.read_bytes_share),
            percent(self.read_requests_share()),
            percent(self.read_share),
            percent(self.written_share),
            percent(self.touched_share),
            self.rewrite_factor,
            percent(self.duplicate_share),
            percent(writes.journal),
            percent(writes.logs),
            percent(writes.hot),
            percent(writes.files),
            percent(writes.strided),
            percent(reads.files),
            reads.file_blocks * 4,
            percent(reads.strided),
            percent(reads.recent),
            percent(reads.hot),
        )
    }
}

/// A few blocks as a factor.
pub(super) fn blocks(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Times that a repeated content is written in a week, on average (assumed).
const WRITES_PER_CONTENT: u64 = 64;
/// Seconds of a week.
const WEEK_S: f64 = 7.0 * 86_400.0;

/// A department's mail server: 62.0 GB read of which 29.2 are unique, 482.1 GB written of which 4.2 are; 500 GB.
pub const MAIL: Server = Server {
    name: "mail",
    read_bytes_share: 62.0 / (62.0 + 482.1),
    read_share: 29.2 / 500.0,
    written_share: 4.2 / 500.0,
    touched_share: 0.063,
    rewrite_factor: 482.1 / 4.2,
    duplicate_share: 0.88,
    rate_per_sec: 600.0,
    week_write_bytes_per_sec: 482.1e9 / WEEK_S,
    writes: WriteMix {
        journal: 0.25,
        logs: 0.10,
        hot: 0.30,
        files: 0.30,
        strided: 0.05,
        journal_blocks: 2,
        file_blocks: 2,
    },
    reads: ReadMix {
        files: 0.60,
        strided: 0.10,
        recent: 0.15,
        hot: 0.15,
        file_blocks: 4,
        fresh: 0.85,
    },
    image: ImageProfile {
        data_share: 0.6,
        compressible_share: 0.5,
    },
};

/// Home directories over NFS: 5.8 GB read of which 2.4 are unique, 148.9 written of which 4.3 are; 470 GB.
pub const HOMES: Server = Server {
    name: "homes",
    read_bytes_share: 5.8 / (5.8 + 148.9),
    read_share: 2.4 / 470.0,
    written_share: 4.3 / 470.0,
    touched_share: 0.014,
    rewrite_factor: 148.9 / 4.3,
    duplicate_share: 0.34,
    rate_per_sec: 200.0,
    week_write_bytes_per_sec: 148.9e9 / WEEK_S,
    writes: WriteMix {
        journal: 0.20,
        logs: 0.05,
        hot: 0.25,
        files: 0.45,
        strided: 0.05,
        journal_blocks: 1,
        file_blocks: 4,
    },
    reads: ReadMix {
        files: 0.65,
        strided: 0.10,
        recent: 0.05,
        hot: 0.20,
        file_blocks: 4,
        fresh: 0.75,
    },
    image: ImageProfile {
        data_share: 0.6,
        compressible_share: 0.5,
    },
};

/// A machine with two web servers: 3.4 GB read of which 1.3 are unique, 11.5 written of which 0.9 are; 70 GB.
pub const WEB_VM: Server = Server {
    name: "web-vm",
    read_bytes_share: 3.4 / (3.4 + 11.5),
    read_share: 1.3 / 70.0,
    written_share: 0.9 / 70.0,
    touched_share: 0.028,
    rewrite_factor: 11.5 / 0.9,
    duplicate_share: 0.20,
    rate_per_sec: 100.0,
    week_write_bytes_per_sec: 11.5e9 / WEEK_S,
    writes: WriteMix {
        journal: 0.15,
        logs: 0.20,
        hot: 0.25,
        files: 0.35,
        strided: 0.05,
        journal_blocks: 1,
        file_blocks: 2,
    },
    reads: ReadMix {
        files: 0.60,
        strided: 0.10,
        recent: 0.10,
        hot: 0.20,
        file_blocks: 4,
        fresh: 0.75,
    },
    image: ImageProfile {
        data_share: 0.4,
        compressible_share: 0.5,
    },
};
