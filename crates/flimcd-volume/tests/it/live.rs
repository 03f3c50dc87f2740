//! A volume moves while two guests use it and check all that they read.

use std::{
    sync::{Arc, mpsc},
    thread,
};

use flimcd_core::{BlockRange, BlockSet, Epoch};
use flimcd_volume::{
    ApplyData, GuestError, GuestPort, GuestRequest, Ownership, RequestKind, Volume, device::IoBuf,
    rules::Mode,
};

use super::{MIGRATION, arriving, begin, create, incoming, owner, wait};

const BLOCKS: u64 = 64;
/// Guests write and check halves of blocks, so that writes merge with what arrives.
const HALF: usize = 2048;
const HALVES: usize = 128;

/// A guest that owns every second pair of halves and a half at each border.
struct Guest {
    port: GuestPort,
    target: Arc<Volume>,
    mine: Vec<usize>,
    /// What each half has, as acknowledged.
    model: Vec<u64>,
    numbers: u64,
    tag: u64,
    /// Told after each request.
    progress: mpsc::Sender<()>,
}

impl Guest {
    fn below(&mut self, bound: usize) -> usize {
        self.numbers = self
            .numbers
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.numbers >> 33).unwrap() % bound
    }

    /// One request on some halves, at the target once the source refuses.
    fn ask(&mut self, kind: RequestKind, first: usize, content: &[u8]) -> IoBuf {
        loop {
            self.port.submit(GuestRequest {
                id: 0,
                kind,
                offset: (first * HALF) as u64,
                length: content.len() as u64,
                fua: kind == RequestKind::Write && self.tag.is_multiple_of(16),
                buf: IoBuf::copy_of(content),
            });
            self.port.kick().unwrap();
            let reply = wait(&mut self.port);
            // Nobody listens any more after the switch.
            let _ = self.progress.send(());
            match reply.result {
                Ok(()) => return reply.buf,
                Err(GuestError::Moved) => self.port = self.target.guest_port().unwrap(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn step(&mut self) {
        let at = self.below(self.mine.len());
        let first = self.mine[at];
        // As many halves in a row as are this guest's.
        let wanted = 1 + self.below(5);
        let count = (0..wanted)
            .take_while(|n| self.mine.contains(&(first + n)))
            .count();
        match self.below(8) {
            0..3 => self.check(first, count),
            3 => {
                let kind = RequestKind::WriteZeroes { punch: true };
                self.ask(kind, first, &vec![0; count * HALF]);
                self.model[first..first + count].fill(0);
            }
            _ => {
                self.tag += 2;
                let content = self.tag.to_le_bytes().repeat(count * HALF / 8);
                self.ask(RequestKind::Write, first, &content);
                self.model[first..first + count].fill(self.tag);
            }
        }
    }

    fn check(&mut self, first: usize, count: usize) {
        let buf = self.ask(RequestKind::Read, first, &vec![0xee; count * HALF]);
        for (half, bytes) in (first..).zip(buf.chunks(HALF)) {
            let want = self.model[half].to_le_bytes().repeat(HALF / 8);
            assert!(bytes == want, "half {half} is not {}", self.model[half]);
        }
    }

    fn run(mut self) {
        while !Arc::ptr_eq(self.port.volume(), &self.target) {
            self.step();
        }
        for _ in 0..400 {
            self.step();
        }
        for half in self.mine.clone() {
            self.check(half, 1);
        }
    }
}

fn send(source: &Arc<Volume>, target: &Volume, range: BlockRange) {
    let mut buf = vec![0; usize::try_from(range.len()).unwrap() * 4096];
    source.begin_send(range).read(&mut buf).unwrap();
    let data = if buf.iter().all(|&byte| byte == 0) {
        ApplyData::Zeroes
    } else {
        ApplyData::Bytes(&buf)
    };
    target.apply(range, data).unwrap();
}

/// Pre-copy until the guests have done `requests`; what is left to send.
fn precopy(
    source: &Arc<Volume>,
    target: &Volume,
    progress: &mpsc::Receiver<()>,
    requests: usize,
) -> BlockSet {
    let mut pending = begin(source);
    for _ in 0..requests {
        progress.recv().unwrap();
        pending.union_with(&source.take_dirty());
        if let Some(run) = pending.next_run(0, BLOCKS) {
            let range = BlockRange::new(run.start, run.end.min(run.start + 3));
            pending.remove_range(range);
            send(source, target, range);
            target.sync().unwrap();
            if !pending.intersects(range) {
                source.mark_clean(&[range]).unwrap();
            }
        }
    }
    pending
}

fn switch(source: &Volume, target: &Volume, mut pending: BlockSet) {
    let peer = || "east".parse().unwrap();
    source.freeze();
    while !source.is_drained() {
        thread::yield_now();
    }
    pending.union_with(&source.take_dirty());
    let prepared = Ownership::Prepared {
        epoch: Epoch(1),
        migration: MIGRATION,
        peer: peer(),
    };
    source.set_ownership(prepared).unwrap();
    target.take_over(pending, arriving(2)).unwrap();
    let released = Ownership::Released {
        epoch: Epoch(2),
        migration: MIGRATION,
        peer: peer(),
        complete: false,
    };
    source.set_ownership(released).unwrap();
    source.release();
}

/// Post-copy: what guests wait for first, else the next missing block.
fn postcopy(source: &Arc<Volume>, target: &Volume) {
    while target.missing_count() > 0 {
        while let Some(fault) = target.poll_fault() {
            send(source, target, fault);
        }
        for range in target.first_missing(1) {
            send(source, target, range);
        }
    }
    target.set_ownership(owner(2)).unwrap();
    target.finish_postcopy().unwrap();
}

#[test]
fn guests_notice_nothing_but_the_switch() {
    for requests in [0, 20, 300] {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = create(here.path(), BLOCKS, owner(1));
        let target = create(there.path(), BLOCKS, incoming());
        let (told, progress) = mpsc::channel();
        let guests: Vec<_> = (0..2u64)
            .map(|number| {
                let guest = Guest {
                    port: source.guest_port().unwrap(),
                    target: target.clone(),
                    // Runs of five halves by turns: every run shares a block with the other guest.
                    mine: (0..HALVES)
                        .filter(|half| (half / 5) % 2 == usize::try_from(number).unwrap())
                        .collect(),
                    model: vec![0; HALVES],
                    numbers: 1 + number,
                    tag: number,
                    progress: told.clone(),
                };
                thread::spawn(move || guest.run())
            })
            .collect();
        let pending = precopy(&source, &target, &progress, requests);
        switch(&source, &target, pending);
        postcopy(&source, &target);
        for guest in guests {
            guest.join().unwrap();
        }
        assert_eq!(target.mode(), Mode::Owner);
    }
}
